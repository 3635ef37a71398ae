"""One model, two sets of deltas, two kinds of images: what each set is worth on each.

    python -m examples.easy_vqa_deltas MODEL DELTAS [--limit 500] [--output numbers.json]

MODEL is a repo that `delta-llava delta merge --rank 3` made of the shipped checkpoint, DELTAS what the recipe
`easy-vqa-deltas.yaml` trained on images with red and blue swapped. The model is loaded once; the sets are swapped.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from examples.easy_vqa_data import swap_red_and_blue
from examples.easy_vqa_questions import Question, answer_questions, draw_test_questions, score_answers
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


def main() -> None:
    """Ask, swap, ask again, print."""
    parser = argparse.ArgumentParser(description="Measure two sets of deltas on two kinds of images.")
    parser.add_argument("model")
    parser.add_argument("deltas")
    parser.add_argument("--limit", type=int, help="ask only so many test questions, always the same")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    model = DeltaLlavaForConditionalGeneration.from_pretrained(arguments.model)
    processor = DeltaLlavaProcessor.from_pretrained(arguments.model)
    model.load_deltas(arguments.deltas, name="swapped")
    trained = sum(tensor.numel() for tensor in model.delta_state_dict().values())
    share = trained / sum(p.numel() for p in model.model.multi_modal_projector.parameters())

    questions = draw_test_questions(arguments.limit)
    table = Table("deltas", "as they are", "red and blue swapped", "swap")
    table.title = f"{len(questions)} test questions, percent right; the deltas are {trained:,} numbers, {share:.2%} of the projector"
    report = []
    with tempfile.TemporaryDirectory() as folder:
        images = {"as they are": questions, "red and blue swapped": swap_images(questions, Path(folder))}
        for name in ("default", "swapped"):
            start = time.perf_counter()
            model.set_deltas(name)
            seconds = time.perf_counter() - start
            cells = []
            for kind, asked in images.items():
                score = score_answers([q.answer for q in asked], answer_questions(model, processor, asked))["overall"]
                cells.append(f"{score.accuracy:.2f} ({score.interval[0]:.2f} to {score.interval[1]:.2f})")
                report.append({"deltas": name, "images": kind, "overall": score.to_dict()})
            table.add_row(name, *cells, f"{seconds * 1e3:.1f} ms")
    Console().print(table)
    if arguments.output is not None:
        numbers = {"questions": len(questions), "numbers": trained, "share": share, "results": report}
        arguments.output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def swap_images(questions: list[Question], folder: Path) -> list[Question]:
    """The same questions on images with red and blue swapped, which are written to `folder`."""
    for question in {question.image_id: question for question in questions}.values():
        with Image.open(question.image) as file:
            swap_red_and_blue(file.convert("RGB")).save(folder / f"{question.image_id}.png")
    return [question._replace(image=str(folder / f"{question.image_id}.png")) for question in questions]


if __name__ == "__main__":
    main()
