"""lmms-eval finds the model and the task that this package brings, and measures what our own evaluation measures."""

import json
import re

import pytest

from examples.easy_vqa_questions import answer_questions, load_questions
from tests.integration.engines import ROOT, Engine, needs
from tests.pages import commands_of, read_blocks
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


pytestmark = needs("lmms-eval")


QUESTIONS = 200  # the limit in the documentation
PAGE = ROOT / "docs" / "evaluation.md"


@pytest.mark.parametrize("budget", [None, 1])
def test_accuracy_is_that_of_our_own_evaluation(repo, tmp_path, budget):
    engine = Engine("lmms-eval", tmp_path)
    model = f"pretrained={repo},dtype=float32,device=cpu" + (f",num_visual_tokens={budget}" if budget else "")
    _, command = read_blocks("evaluation.md", "lmms-eval")
    ((_, *words),) = commands_of(command.text)
    words = [model if word == "pretrained=REPO" else word for word in words]
    assert model in words and str(QUESTIONS) in words
    engine.run_python(*words, "--output_path", tmp_path / "out", "--log_samples")

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
    page = PAGE.read_text()
    rows = re.findall(r"^\| \w+ \| [\d, ]+ \| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    named = {task: re.findall(r"`(\w+)`", metrics) for task, metrics in rows}
    assert len(named) == 10

    report = Engine("lmms-eval", tmp_path).run("lmms_tasks.py", *named)

    assert report["model"] == "transformers_delta_llava.lmms"
    for task, metrics in named.items():
        assert set(metrics) <= set(report["metrics"][task]), task


def test_the_commands_of_the_documentation(tmp_path):
    """Those that fetch data are not run: their options, budgets and tasks are held against what there is."""
    blocks = read_blocks("evaluation.md", "lmms-eval") + read_blocks("evaluation.md", "The paper's tables")
    commands = [command for block in blocks for command in commands_of(block.text)]
    assert commands.pop(0) == ["pip", "install", ".[eval]"]
    engine = Engine("lmms-eval", tmp_path)
    known = set(re.findall(r"--[\w-]+", engine.run_python("-m", "lmms_eval", "eval", "--help")))
    takes = engine.run("lmms_tasks.py", "easy_vqa")["arguments"]
    tasks = set(re.findall(r"^\| \w+ \| [\d, ]+ \| `(\w+)`", PAGE.read_text(), re.MULTILINE)) | {"easy_vqa"}
    assert len(commands) == 2 + 1 + 4 + 7
    for command in commands:
        assert command[:3] == ["python", "-m", "lmms_eval"]
        assert {word for word in command if word.startswith("--")} <= known
        options = dict(zip(command[3::2], command[4::2]))
        assert options["--model"] == "delta_llava" and set(options["--tasks"].split(",")) <= tasks
        given = dict(pair.split("=") for pair in options["--model_args"].split(","))
        assert given.pop("pretrained") == "REPO" and set(given) <= set(takes)
        assert int(given.get("num_visual_tokens", 144)) in DeltaLlavaConfig().visual_token_budgets
