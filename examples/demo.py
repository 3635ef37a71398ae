"""The main job, end to end: a trained checkpoint in the authors' format becomes a repo that answers about images.

    make demo

The checkpoint is `examples/easy-vqa/`: small, but really trained. The images are test images of easy-VQA, which it has
never seen, and the answers come from a process in which this package cannot be imported.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.easy_vqa_questions import Score, draw_test_questions, score_answers


ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "easy-vqa"
OUTPUT = ROOT / "demo-output"
QUESTIONS, SHOWN = 500, 10
BUDGETS = (16, 1)


def main() -> None:
    """Run all steps in `demo-output/` and print what came out."""
    console = Console()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    repo = OUTPUT / "delta-llava-easy-vqa"
    steps = Table("step", "seconds", "result", title="A trained checkpoint becomes a Hub repo")

    start = time.perf_counter()
    run_command([sys.executable, "-m", "transformers_delta_llava", "convert", str(CHECKPOINT), str(repo)])
    steps.add_row("delta-llava convert examples/easy-vqa", f"{time.perf_counter() - start:.1f}", _contents(repo))

    questions = draw_test_questions(QUESTIONS)
    truths = [question.answer for question in questions]
    answers: dict[int, list[str]] = {}
    for budget in BUDGETS:
        report = answer_without_package(repo, questions, budget)
        answers[budget] = report["answers"]
        if budget == BUDGETS[0]:
            seconds = f"{report['seconds_to_load']:.1f}"
            steps.add_row("load the repo where the package is absent", seconds, "the model's code came with the repo")
        result = _percent(score_answers(truths, answers[budget])["overall"])
        step = f"{QUESTIONS} test questions, {budget} visual token{'s' if budget > 1 else ''} per image"
        steps.add_row(step, f"{report['seconds_to_answer']:.1f}", result)

    shown = Table("image", "question", "truth", *(f"answer, {budget} tokens" for budget in BUDGETS))
    for index in range(0, QUESTIONS, QUESTIONS // SHOWN):
        question = questions[index]
        row = (f"test/{question.image_id}.png", question.text, question.answer)
        shown.add_row(*row, *(_judged(answers[budget][index], question.answer) for budget in BUDGETS))
    console.print(shown)
    console.print(steps)
    console.print(f"The repo is in {repo}, its weights' history in {CHECKPOINT}.", soft_wrap=True)


def answer_without_package(
    repo: Path, questions: Sequence[Any], budget: int, output: Path = OUTPUT, *options: str
) -> dict:
    """Run `answer.py` on `repo` in a process that has the dependencies and not this package, and return its report.

    `make` installs the package in editable mode: a .pth file in site-packages, which only the `site` module reads.
    With `-S` Python leaves that module out, and PYTHONPATH brings the dependencies back. The process says itself
    whether it could import the package.
    """
    asked = output / "questions.json"
    asked.write_text(json.dumps([{"image": q.image, "question": q.text} for q in questions]), encoding="utf-8")
    command = [sys.executable, "-S", str(ROOT / "examples" / "answer.py"), str(repo), str(asked)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))),
        "HF_HUB_OFFLINE": "1",  # nothing may come from the network
        "HF_MODULES_CACHE": str(output / "modules"),  # nor from an earlier run
    }
    printed = run_command([*command, "--num-visual-tokens", str(budget), *options], environment)
    report = json.loads(printed.splitlines()[-1])
    if report["package_importable"]:
        sys.exit("The second process can import transformers_delta_llava: install it with pip install --editable.")
    if not report["model_code"].startswith("transformers_modules."):
        sys.exit(f"The model's code came from {report['model_code']}, not from the repo.")
    return report


def run_command(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run a command, and return what it printed; stop with its output where it fails."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\nfailed:\n{result.stdout}{result.stderr}")
    return result.stdout


def _judged(answer: str, truth: str) -> str:
    return escape(answer) if answer == truth else f"[red]{escape(answer)} (wrong)[/red]"


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{score.accuracy:.1f} % right (95 % interval: {low:.1f} to {high:.1f})"


def _contents(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
