"""Write `examples/easy-vqa/`: the trained easy-VQA model as a checkpoint of the authors' trainer, with its log and its card.

    delta-llava train examples/recipes/easy-vqa-pretrain.yaml
    delta-llava train examples/recipes/easy-vqa.yaml
    python -m examples.easy_vqa_questions runs/easy-vqa --num-visual-tokens 16 ... --output runs/easy-vqa/easy-vqa.json
    python -m examples.easy_vqa_ship runs/easy-vqa-pretrain runs/easy-vqa examples/easy-vqa

The released code has no token for images, so the embeddings of its checkpoints have no row for one. Export leaves out the last
row, which training here adds for `<image>`; conversion adds it again.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
import transformers

from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import export_checkpoint


LOGGED = ("step", "epoch", "loss", "learning_rate", "grad_norm", "images_per_second", "tokens_per_second")


def main() -> None:
    """Write the folder from a finished run."""
    parser = argparse.ArgumentParser(description="Write a trained easy-VQA model in the authors' checkpoint layout.")
    parser.add_argument("pretrain", type=Path, help="folder that delta-llava train wrote in stage 1")
    parser.add_argument("run", type=Path, help="folder that it wrote in stage 2, with easy-vqa.json in it")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    write_checkpoint(arguments.run, arguments.output)
    write_log({"pretrain": arguments.pretrain, "finetune": arguments.run}, arguments.output)
    scores = json.loads((arguments.run / "easy-vqa.json").read_text(encoding="utf-8"))
    (arguments.output / "results.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    model = DeltaLlavaForConditionalGeneration.from_pretrained(arguments.run)
    (arguments.output / "README.md").write_text(card(model, arguments.output), encoding="utf-8")


def write_checkpoint(run: Path, output: Path) -> None:
    """Export a run without the row of its image token, which is its last."""
    rows = DeltaLlavaConfig.from_pretrained(run).image_token_id
    export_checkpoint(run, output, vocab_size=rows, overwrite=True)


def write_log(runs: dict[str, Path], output: Path) -> None:
    """Write the recipe of each stage, and its losses and speed."""
    log: dict = {"torch": torch.__version__, "transformers": transformers.__version__, "cpus": os.cpu_count()}
    for stage, run in runs.items():
        shutil.copyfile(run / "recipe.yaml", output / f"recipe-{stage}.yaml")
        state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
        history = [{name: entry[name] for name in LOGGED if name in entry} for entry in state["log_history"]]
        results = json.loads((run / "train_results.json").read_text(encoding="utf-8"))
        log[stage] = {"results": results, "history": [entry for entry in history if "loss" in entry]}
    (output / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def card(model: DeltaLlavaForConditionalGeneration, folder: Path) -> str:
    """The folder's README, every number read from the files beside it."""
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    rows = [_row(f"{entry['num_visual_tokens']}", entry["scores"]) for entry in report["results"]]
    parts = {
        "vision tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language model": model.model.language_model,
        "all": model,
    }
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    budgets = "--num-visual-tokens " + " ".join(str(entry["num_visual_tokens"]) for entry in report["results"])
    return CARD.format(
        questions=f"{report['questions']:,}",
        dtype=report["dtype"],
        rows="\n".join([*rows, _row("none: majority of the question alone", report["question_alone"])]),
        parameters=sizes,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        minutes=[log[stage]["results"]["train_runtime"] / 60 for stage in ("pretrain", "finetune")],
        steps=[log[stage]["history"][-1]["step"] for stage in ("pretrain", "finetune")],
        losses=[log[stage]["history"][-1]["loss"] for stage in ("pretrain", "finetune")],
        log=log,
        budgets=budgets,
    )


def _row(name: str, scores: dict) -> str:
    cells = [f"{s['accuracy']:.2f} ({s['interval_95'][0]:.2f} to {s['interval_95'][1]:.2f})" for s in scores.values()]
    return " | ".join(["| " + name, *cells]) + " |"


CARD = """\
# A small Delta-LLaVA that was really trained

easy-VQA: one coloured shape, thirteen possible answers. The weights are stored as the authors' trainer stores them
(names, layout, `config.json`); `vision-tower/` holds the tower's settings only, its weights are in the checkpoint.
`make demo` converts it and asks it questions. It knows nothing but coloured shapes.

| visual tokens | overall | yes/no | open |
|---|---|---|---|
{rows}

Percent right of all {questions} test questions, exact match, in {dtype}, with 95 % Wilson intervals (which take questions for
independent; there are about ten per image). Printed by

    delta-llava convert examples/easy-vqa easy-vqa-repo
    python -m examples.easy_vqa_questions easy-vqa-repo {budgets}

The author of the data set reports 93.78 on the test split for his own network.

Parameters: {parameters}. Weights: {megabytes:.1f} MB.

Training: `recipe-pretrain.yaml` (captions), then `recipe-finetune.yaml` (questions), from random weights, seeds in them:
{minutes[0]:.0f} + {minutes[1]:.0f} minutes on {log[cpus]} CPU cores ({steps[0]} + {steps[1]} steps, last losses {losses[0]:.4f} and {losses[1]:.4f},
torch {log[torch]}, transformers {log[transformers]}). `training_log.json` has the course of it. Steps drew their number of visual
tokens from the recipes' list, so one set of weights serves all of them.

To make it again:

    pip install '.[train]'
    python -m examples.easy_vqa_data
    delta-llava train examples/recipes/easy-vqa-pretrain.yaml
    delta-llava train examples/recipes/easy-vqa.yaml
    python -m examples.easy_vqa_questions runs/easy-vqa {budgets} --output runs/easy-vqa/easy-vqa.json
    python -m examples.easy_vqa_ship runs/easy-vqa-pretrain runs/easy-vqa examples/easy-vqa

Data: [easy-VQA](https://github.com/vzhou842/easy-VQA) by Victor Zhou, MIT. Weights: Apache-2.0, as this repository.
"""


if __name__ == "__main__":
    main()
