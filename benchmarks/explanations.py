"""Whether saliency is where the answer is to be seen: easy-VQA's test images, on whose plain ground there is one shape.

    python -m benchmarks.explanations [--images 200]

For every place and budget the script looks at the first token of one answer per image, once with the saliency that
`delta-llava explain` draws (gradient times activation at each position), once with Grad-CAM's (gradients averaged over the
positions first). It prints, and writes to `benchmarks/results/explanations.md`:

- none: images for which no saliency is left, as nothing speaks for the token; the other columns leave them out;
- on the shape: mean share of the saliency in the cells that the shape reaches into;
- cells: mean share of the cells that it reaches into, which is what saliency spread evenly would have there;
- highest: images whose highest cell is one of them;
- denser: images with more saliency per area on the shape than outside it.

Nothing is drawn by chance.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from examples.easy_vqa_questions import Question, load_questions
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.explain import saliency_map, token_gradients
from transformers_delta_llava.loading import answer_ids, encode_question, load_repo


ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "easy-vqa"
LOOKS = [("visual_tokens", 64), ("visual_tokens", 16), ("visual_tokens", 4)]
LOOKS += [("patches", budget) for budget in (64, 16, 4, 1)]
HEAD = "| saliency at | visual tokens | method | none | on the shape | cells | highest | denser |\n|---|---|---|---|---|---|---|---|"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Where saliency is in images of which we know it.")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "explanations.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repo = Path(folder) / "easy-vqa"
        convert_checkpoint(CHECKPOINT, repo)
        model, processor = load_repo(str(repo))
    questions = one_per_image(load_questions("test"), arguments.images)
    rows = [HEAD]
    for on, budget in LOOKS:
        found: dict[str, list[Any]] = {"as drawn": [], "Grad-CAM": []}
        for question in track(questions, f"{on}, {budget}", transient=True):
            with Image.open(question.image) as file:
                image = file.convert("RGB")
            inputs = encode_question(processor, image, question.text, budget)
            said = answer_ids(model, inputs, 1)
            activations, gradients = token_gradients(model, inputs, said, on)
            shape = shape_mask(image)
            found["as drawn"].append(judge(saliency_map(activations, gradients).numpy(), shape))
            averaged = gradients.mean(0, keepdim=True).expand_as(gradients)
            found["Grad-CAM"].append(judge(saliency_map(activations, averaged).numpy(), shape))
        rows += [f"| {on} | {budget} | {method} | {summary(judged)} |" for method, judged in found.items()]
    table = "\n".join(rows)
    print(table)
    command = f"python -m benchmarks.explanations --images {arguments.images}"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(f"`{command}`: {len(questions)} images, percent.\n\n{table}\n", encoding="utf-8")


def one_per_image(questions: Sequence[Question], count: int) -> list[Question]:
    """A question on each of `count` images, as far apart in their order as there are images; kinds of questions take turns."""
    asked: dict[int, list[Question]] = {}
    for question in questions:
        asked.setdefault(question.image_id, []).append(question)
    images = sorted(asked)[:: max(1, len(asked) // count)][:count]
    return [asked[image][index % len(asked[image])] for index, image in enumerate(images)]


def shape_mask(image: Image.Image) -> np.ndarray:
    """(height, width) of booleans: what is not the ground; a shape covers one corner at most."""
    pixels = np.asarray(image, int)
    corners = [tuple(pixels[y, x]) for y in (0, -1) for x in (0, -1)]
    return np.abs(pixels - np.array(max(corners, key=corners.count))).sum(-1) > 30


def judge(saliency: np.ndarray, shape: np.ndarray) -> tuple[float, float, bool, bool] | None:
    """Saliency on the shape, cells of the shape, whether it is highest there, whether it is denser there; None without saliency."""
    if not saliency.any():
        return None
    grid = len(saliency)
    share = shape.reshape(grid, shape.shape[0] // grid, grid, -1).mean((1, 3))
    reached = share > 0
    on, off = (saliency * share).sum() / share.sum(), (saliency * (1 - share)).sum() / (1 - share).sum()
    return (
        saliency[reached].sum() / saliency.sum(),
        reached.mean(),
        bool(reached.flat[saliency.argmax()]),
        bool(on > off),
    )


def summary(judged: Sequence[Any]) -> str:
    """Cells of a row."""
    some = [row for row in judged if row is not None]
    none = 100 * (1 - len(some) / len(judged))
    return " | ".join(f"{number:.0f}" for number in (none, *(100 * np.mean(some, axis=0) if some else [np.nan] * 4)))


if __name__ == "__main__":
    main()
