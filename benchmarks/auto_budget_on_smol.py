"""What `num_visual_tokens="auto"` spends and gets right on the test set of `examples/smol`, compared with fixed numbers at equal cost.

    python -m benchmarks.auto_budget_on_smol REPO smol-data examples/smol/checkpoint/results.json

No model runs: `delta-llava evaluate smol` has kept the answers at each fixed number (RESULTS), and auto takes, image by image,
the answer at the number that it picks among them. "Equal cost" draws, for each image alike, one of the two
fixed numbers around auto's mean, with the probability that gives the same mean; its score is that draw's expected one.
"""

import argparse
import json
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.projectors.sweep import show_table
from examples.easy_vqa_questions import Score
from examples.smol.test_set import load_test_set
from transformers_delta_llava import DeltaLlavaProcessor
from transformers_delta_llava.processing.auto_budget_delta_llava import pick_budget


TRAINED_AT = (64, 16, 4, 1)
DETAILS = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.05)
RESULTS = Path(__file__).resolve().parent / "results" / "auto_budget_on_smol.json"


def at_equal_cost(mean: float, scores: dict[int, float]) -> float:
    """The expected score of a draw between the two numbers around `mean` that spends as much.

    Args:
        mean: visual tokens per image.
        scores: number of visual tokens to score.
    """
    numbers = sorted(scores)
    upper = min(bisect_right(numbers, mean), len(numbers) - 1)
    low, high = numbers[upper - 1], numbers[upper]
    share = (mean - low) / (high - low)
    return (1 - share) * scores[low] + share * scores[high]


def measure(processor: DeltaLlavaProcessor, data: Path, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per limit: mean tokens, and per task and overall auto's score and that at equal cost, in percent."""
    questions, answers = load_test_set(data), {result["asked"]: result.get("answers") for result in results}
    right = {
        number: [q.is_right(said) for q, said in zip(questions, answers[f"{number} visual tokens"], strict=True)]
        for number in TRAINED_AT
    }
    processor.visual_token_budgets = TRAINED_AT
    details = []
    for question in questions:
        with Image.open(str(question.image)) as image:
            details.append(processor.image_detail(image.convert("RGB"))[0])
    tasks = {"all": [*range(len(questions))]} | {
        task: [index for index, q in enumerate(questions) if q.task == task]
        for task in dict.fromkeys(q.task for q in questions)
    }
    fixed = {
        task: {number: 100 * statistics.fmean(hits[index] for index in members) for number, hits in right.items()}
        for task, members in tasks.items()
    }
    rows = []
    for limit in DETAILS:
        picks = [pick_budget(detail, limit) for detail in details]
        row: dict[str, Any] = {"auto_min_detail": limit, "tasks": {}}
        for task, members in tasks.items():
            mean = statistics.fmean(picks[index] for index in members)
            score = Score(sum(right[picks[index]][index] for index in members), len(members)).to_dict()
            equal = round(at_equal_cost(mean, fixed[task]), 2)
            row["tasks"][task] = {"mean_visual_tokens": round(mean, 2), "auto": score, "equal cost": equal}
        rows.append(row)
    return rows


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description="Auto against fixed numbers of visual tokens at equal cost.")
    parser.add_argument("repo", type=Path, help="the converted model, of which only the processor is loaded")
    parser.add_argument("data", type=Path)
    parser.add_argument("results", type=Path, help="what delta-llava evaluate smol wrote")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))["results"]
    rows = measure(DeltaLlavaProcessor.from_pretrained(arguments.repo), arguments.data, results)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    tasks = list(rows[0]["tasks"])
    cells = [
        [
            f"{row['auto_min_detail']:g}",
            f"{row['tasks']['all']['mean_visual_tokens']:.1f}",
            *(f"{cell['auto']['accuracy']:.1f} / {cell['equal cost']:.1f}" for cell in row["tasks"].values()),
        ]
        for row in rows
    ]
    title = "Percent right: auto / a draw of fixed numbers that spends as much on the same task"
    show_table(title, ["detail from", "mean tokens", *tasks], cells, RESULTS.with_suffix(".md"))


if __name__ == "__main__":
    main()
