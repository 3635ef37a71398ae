"""lmms-eval finds the model and the task that this package brings, and measures what our own evaluation measures."""

import json
import re

import pytest

from tests.integration.engines import ROOT, Engine, needs
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.evaluation import answer_questions, load_questions
from transformers_delta_llava.evaluation.lmms import TASKS


pytestmark = needs("lmms-eval")


QUESTIONS = 200


@pytest.mark.parametrize("budget", [None, 1])
def test_accuracy_is_that_of_our_own_evaluation(repo, tmp_path, budget):
    engine = Engine("lmms-eval", tmp_path)
    model = f"pretrained={repo},dtype=float32,device=cpu" + (f",num_visual_tokens={budget}" if budget else "")
    command = ["--model", "delta_llava", "--model_args", model, "--tasks", "easy_vqa", "--include_path", TASKS]
    command += ["--batch_size", 32, "--limit", QUESTIONS, "--output_path", tmp_path / "out", "--log_samples"]
    engine.run_python("-m", "lmms_eval", *command)

    (results,) = (tmp_path / "out").rglob("*_results.json")
    (samples,) = (tmp_path / "out").rglob("*_samples_easy_vqa.jsonl")
    said = [json.loads(line) for line in samples.read_text().splitlines()]
    questions = load_questions("test")[:QUESTIONS]
    loaded = DeltaLlavaForConditionalGeneration.from_pretrained(repo)
    own = answer_questions(loaded, DeltaLlavaProcessor.from_pretrained(repo), questions, budget)
    assert [sample["filtered_resps"] for sample in sorted(said, key=lambda sample: sample["doc_id"])] == own
    right = sum(answer == question.answer for answer, question in zip(own, questions))
    scores = json.loads(results.read_text())["results"]["easy_vqa"]
    assert scores["exact_match,none"] == pytest.approx(right / QUESTIONS)


def test_the_tasks_and_metrics_that_the_documentation_names_exist(tmp_path):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| \w+ \| [\d, ]+ \| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    named = {task: re.findall(r"`(\w+)`", metrics) for task, metrics in rows}
    assert len(named) == 10

    report = Engine("lmms-eval", tmp_path).run("lmms_tasks.py", *named)

    assert report["model"] == "transformers_delta_llava.evaluation.lmms.model"
    for task, metrics in named.items():
        assert set(metrics) <= set(report["metrics"][task]), task
    commands = re.findall(r"--tasks ([\w,]+)", page)
    assert {task for command in commands for task in command.split(",")} <= {*named, "easy_vqa"}
