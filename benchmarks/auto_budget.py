"""What `num_visual_tokens="auto"` spends and what it answers, beside fixed numbers of visual tokens, on easy-VQA.

    python benchmarks/auto_budget.py [--limit 500] [--images photo.jpg ...]

Every question is answered once at every fixed budget. A row of auto takes, image by image, the answer at the budget that is
picked; the last one is also run for real, in batches of mixed budgets, and the script fails if that answers otherwise in more
than 1 of 1,000 questions. Two sets of budgets are looked at: those that the shipped checkpoint was trained at, and all that its grid
has. Below it: what auto picks for images on the 24 x 24 grid of CLIP-L/336, where no model is asked, and what the rule costs.

Nothing here is drawn by chance: questions, picks and answers are the same in every run; the milliseconds are not.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.evaluation import Question, Score, answer_questions, draw_test_questions
from transformers_delta_llava.processing.auto_budget_delta_llava import budget_losses, pick_budget


ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "easy-vqa"
TRAINED_AT = (16, 4, 1)
LOSSES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
CLIP_BUDGETS = (576, 144, 64, 36, 16, 9, 4, 1)
DEFAULT_LOSS = 0.3


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Auto budgets against fixed ones.")
    parser.add_argument("--limit", type=int, help="ask only so many test questions, always the same")
    parser.add_argument("--images", type=Path, nargs="*", default=[ROOT / "examples" / "images" / "chelsea.jpg"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "auto_budget.json")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        repo = Path(folder) / "easy-vqa"
        convert_checkpoint(CHECKPOINT, repo)
        model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
        processor = DeltaLlavaProcessor.from_pretrained(repo)
    questions = draw_test_questions(arguments.limit)
    report = {
        "command": " ".join(["python", "benchmarks/auto_budget.py", *sys.argv[1:]]),
        "model": "examples/easy-vqa",
        "trained_at": TRAINED_AT,
        "questions": len(questions),
        "images": len({question.image for question in questions}),
        "seed": None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": Image.__version__,
        },
        **measure(model, processor, questions),
        "other_images": [row for path in arguments.images for row in variants(path)] + synthetic(),
        "milliseconds_of_the_rule_at_336": time_rule(),
    }
    show(report)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(model: Any, processor: Any, questions: list[Question]) -> dict[str, Any]:
    """Right answers and mean tokens of fixed budgets, and of auto over both sets of budgets."""
    budgets = processor.visual_token_budgets
    right: dict[int, list[bool]] = {}
    for budget in budgets:
        answers = answer_questions(model, processor, questions, budget)
        right[budget] = [question.answer == answer for question, answer in zip(questions, answers)]
    fixed = [{"visual_tokens": budget, **Score(sum(right[budget]), len(questions)).to_dict()} for budget in budgets]

    auto = []
    for among in (TRAINED_AT, budgets):
        processor.visual_token_budgets = among
        losses = {image: processor.image_losses(image)[0] for image in {question.image for question in questions}}
        for max_loss in LOSSES:
            spent = [pick_budget(losses[question.image], max_loss) for question in questions]
            score = Score(sum(right[budget][index] for index, budget in enumerate(spent)), len(questions))
            picked = {str(budget): spent.count(budget) for budget in among}
            mean = statistics.fmean(spent)
            auto.append({"among": among, "auto_max_loss": max_loss, "mean_visual_tokens": mean, "picked": picked})
            auto[-1] |= score.to_dict()
        really: list[int] = []
        answers = answer_questions(
            model, processor, questions, "auto", auto_max_loss=DEFAULT_LOSS, on_budgets=really.extend
        )
        expected = [pick_budget(losses[question.image], DEFAULT_LOSS) for question in questions]
        others = sum(
            (question.answer == answer) != right[budget][index]
            for index, (question, answer, budget) in enumerate(zip(questions, answers, expected))
        )
        if really != expected or others > len(questions) / 1000:
            raise SystemExit(f"A real run of auto differs: {others} answers, {really == expected=}.")
    return {"fixed": fixed, "auto": auto}


def variants(path: Path) -> list[dict[str, Any]]:
    """What auto picks for an image, and for it with less and less detail."""
    image = Image.open(path).convert("RGB")
    soft = {"": image} | {
        f", blurred by {blur} %": image.filter(ImageFilter.GaussianBlur(max(image.size) * blur / 100))
        for blur in (2, 8)
    }
    return [picks(path.name + name, image) for name, image in soft.items()]


def synthetic() -> list[dict[str, Any]]:
    """Plain, sloping, chequered and noisy squares."""
    rows, columns = np.mgrid[:336, :336]
    noise = np.random.default_rng(0).integers(0, 256, (336, 336))
    squares = {"plain": rows * 0 + 90, "slope": columns * 255 // 335, "noise (seed 0)": noise}
    squares |= {f"chessboard {n} x {n}": (rows * n // 336 + columns * n // 336) % 2 * 200 for n in (2, 4, 8, 24)}
    return [picks(name, Image.fromarray(square.astype(np.uint8)).convert("RGB")) for name, square in squares.items()]


def picks(name: str, image: Image.Image) -> dict[str, Any]:
    """Losses and picks of an image on the grid of CLIP-L/336, padded to a square as the processor does."""
    width, height = (round(336 * side / max(image.size)) for side in image.size)
    levels = np.zeros((3, 336, 336), np.int64)
    top, left = (336 - height) // 2, (336 - width) // 2
    box = top, top + height, left, left + width
    levels[:, box[0] : box[1], box[2] : box[3]] = np.asarray(
        image.resize((width, height), Image.Resampling.BICUBIC)
    ).transpose(2, 0, 1)
    losses = budget_losses(levels, CLIP_BUDGETS, box)
    return {
        "image": name,
        "losses": {str(budget): round(loss, 3) for budget, loss in losses.items()},
        "picked": {f"{max_loss:g}": pick_budget(losses, max_loss) for max_loss in (0.1, 0.3, 0.5)},
    }


def time_rule(repeats: int = 50) -> float:
    """Milliseconds of CPU time that the rule takes for one image of 336 x 336 and eight budgets, at the median."""
    levels = np.random.default_rng(0).integers(0, 256, (3, 336, 336))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        budget_losses(levels, CLIP_BUDGETS)
        times.append(1000 * (time.process_time() - start))
    return round(statistics.median(times), 2)


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    title = (
        f"easy-VQA, {report['questions']} test questions on {report['images']} images, percent right (95 % interval)"
    )
    table = Table("", "mean visual tokens", "overall", title=title)
    for row in report["fixed"]:
        untrained = "" if row["visual_tokens"] in TRAINED_AT else ", not trained at"
        table.add_row(f"fixed{untrained}", f"{row['visual_tokens']}", cell(row))
    for row in report["auto"]:
        among = ", ".join(map(str, row["among"]))
        table.add_row(
            f"auto among {among}; loss up to {row['auto_max_loss']:g}", f"{row['mean_visual_tokens']:.2f}", cell(row)
        )
    console.print(table)
    images = Table("image", *map(str, CLIP_BUDGETS), "0.1", "0.3", "0.5", title="Losses, and picks at three limits")
    for row in report["other_images"]:
        losses = (f"{loss:.2f}" for loss in row["losses"].values())
        images.add_row(row["image"], *losses, *(str(pick) for pick in row["picked"].values()))
    console.print(images)
    console.print(
        f"The rule takes {report['milliseconds_of_the_rule_at_336']} ms of CPU time for an image of 336 x 336 pixels."
    )


def cell(row: dict[str, Any]) -> str:
    """Accuracy with its interval."""
    low, high = row["interval_95"]
    return f"{row['accuracy']:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
