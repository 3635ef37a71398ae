"""Projectors side by side on easy-VQA: same tower, language model, data, steps and seeds; only the projector differs.

    python examples/easy_vqa_data.py
    python benchmarks/projectors_on_easy_vqa.py --run [--seeds 0 1 2] [--steps 600 400] [--hours 5] [--device cuda]
    python benchmarks/projectors_on_easy_vqa.py

With `--run` it trains and measures what is missing, one model after the other, first seed first, each as
`examples/recipes/easy-vqa-pretrain.yaml` and `easy-vqa.yaml` say, one after the other, but for projector, budget, seed and number
of steps. Every finished run is a line in
`benchmarks/results/projectors_on_easy_vqa.jsonl`; a sweep that was stopped goes on from there. Without `--run` it prints
the table of what is there, and writes it to `.md`, and a plot to `.svg`, beside that file.

The row `sampled` is one checkpoint, trained with a budget drawn at every step, and measured at each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from harness.plots import line_plot
from projectors import VARIANTS
from projectors.sweep import read_runs, show_table, spread
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProjector
from transformers_delta_llava.evaluation import answer_questions, draw_test_questions, score_answers
from transformers_delta_llava.training import load_recipe
from transformers_delta_llava.training.recipe import Recipe
from transformers_delta_llava.training.run import make_trainer
from transformers_delta_llava.training.trainer import DeltaLlavaTrainer


ROOT = Path(__file__).resolve().parents[1]
RECIPES = [ROOT / "examples" / "recipes" / name for name in ("easy-vqa-pretrain.yaml", "easy-vqa.yaml")]
RESULTS = ROOT / "benchmarks" / "results" / "projectors_on_easy_vqa.jsonl"
BUDGETS = (16, 4, 1)
TIMED_STEPS = 10
# What each variant is trained at: most at one budget after the other, one also with the budget drawn at every step.
TRAINED_AT: dict[str, Sequence[int | tuple[int, ...]]] = dict.fromkeys(VARIANTS, BUDGETS) | {
    "MLP, no reduction": (64,),
    "Delta, released": (*BUDGETS, BUDGETS),
}


def main() -> None:
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description="Compare projectors on easy-VQA.")
    parser.add_argument("--run", action="store_true", help="train what is missing (hours on a CPU)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs=2, default=[2500, 2300], help="of the two stages")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmark", help="folder to work in")
    arguments = parser.parse_args()
    if arguments.run:
        run_missing(arguments)
    runs = read_runs(RESULTS)
    if not runs:
        print("There is no result yet: python benchmarks/projectors_on_easy_vqa.py --run")
        return
    for steps in sorted({tuple(run["steps"]) for run in runs}):
        show([run for run in runs if tuple(run["steps"]) == steps], steps)


def run_missing(arguments: argparse.Namespace) -> None:
    """Train and measure, seed by seed, what has no line yet."""
    start = time.perf_counter()
    done = {(run["variant"], str(run["trained_at"]), run["seed"], tuple(run["steps"])) for run in read_runs(RESULTS)}
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in arguments.seeds:
        for variant in arguments.variants:
            for budget in TRAINED_AT[variant]:
                trained_at = [budget] if isinstance(budget, int) else list(budget)
                if (variant, str(trained_at), seed, tuple(arguments.steps)) in done:
                    continue
                if time.perf_counter() - start > 3600 * arguments.hours:
                    return
                run = measure(variant, trained_at, seed, arguments)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
                print(json.dumps(run), flush=True)


def measure(variant: str, trained_at: list[int], seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one model and measure it."""
    make_projector, config = VARIANTS[variant]
    changes = {
        "num_visual_tokens": trained_at,
        "arguments.output_dir": arguments.output / f"{variant.replace(' ', '-')}-{trained_at}-{seed}".replace(",", ""),
        "arguments.seed": seed,
        "arguments.use_cpu": arguments.device == "cpu",
        "arguments.save_strategy": "'no'",  # YAML takes a bare no for false
        "arguments.disable_tqdm": True,
    }
    first, second = (load_recipe(path, [f"{key}={value}" for key, value in changes.items()]) for path in RECIPES)
    first.model.config.update(config)
    # Built anew, because no folder can hold a projector that is not ours; see `continued`.
    second = second.model_copy(update={"model": first.model})
    weights: dict[str, torch.Tensor] = {}
    seconds = 0.0
    for recipe, steps in zip((first, second), arguments.steps):
        recipe.arguments["max_steps"] = steps
        trainer, model = continued(recipe, make_projector, weights)
        step = seconds_per_step(trainer, model)
        seconds += trainer.train().metrics["train_runtime"]
        weights = model.state_dict()
    questions = draw_test_questions()
    truths = [question.answer for question in questions]
    scores = {}
    for budget in trained_at:
        answers = answer_questions(model, trainer.processing_class, questions, budget, batch_size=256)
        scores[str(budget)] = {kind: score.to_dict() for kind, score in score_answers(truths, answers).items()}
    return {
        "variant": variant,
        "trained_at": trained_at,
        "seed": seed,
        "steps": arguments.steps,
        "parameters": sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters()),
        "seconds_per_step": round(step, 4),
        "train_seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scores": scores,
    }


def continued(
    recipe: Recipe, make_projector: Callable[[DeltaLlavaConfig], nn.Module], weights: dict[str, torch.Tensor]
) -> tuple[DeltaLlavaTrainer, DeltaLlavaForConditionalGeneration]:
    """A trainer of a model with that projector, untrained or with the weights of the stage before."""
    trainer = make_trainer(recipe)
    model = trainer.model
    assert isinstance(model, DeltaLlavaForConditionalGeneration)
    if make_projector is not DeltaLlavaProjector:
        set_seed(trainer.args.seed)
        model.model.multi_modal_projector = make_projector(model.config).apply(model._init_weights).to(model.device)
    if weights:
        model.load_state_dict(weights)
    return trainer, model


def seconds_per_step(trainer: Any, model: DeltaLlavaForConditionalGeneration) -> float:
    """Median time of forward and backward of stage 2 on one batch; processor time on a CPU, which others may share."""
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    for name in ("num_tokens", "num_images", "num_skipped"):
        inputs.pop(name)
    model.train()
    cuda = model.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    times = []
    for _ in range(TIMED_STEPS):
        start = clock()
        model(**inputs).loss.backward()
        if cuda:
            torch.cuda.synchronize()
        times.append(clock() - start)
        model.zero_grad()
    return statistics.median(times)


def show(runs: list[dict[str, Any]], steps: tuple[int, ...]) -> None:
    """Print the table, and write it and the plot beside the results."""
    header = ["projector", "trained at", "tokens", "n", "overall", "yes/no", "open", "s per step", "parameters"]
    rows = []
    points: dict[str, list[tuple[int, float]]] = {}
    groups = sorted(
        {(list(VARIANTS).index(run["variant"]), tuple(run["trained_at"])) for run in runs},
        key=lambda group: (group[0], len(group[1]), [-budget for budget in group[1]]),
    )
    for index, trained_at in groups:
        variant = list(VARIANTS)[index]
        same = [run for run in runs if run["variant"] == variant and tuple(run["trained_at"]) == trained_at]
        for budget in trained_at:
            sampled = len(trained_at) > 1
            cells = [spread([run["scores"][str(budget)][kind]["accuracy"] for run in same], 2) for kind in header[4:7]]
            time_cell = f"{statistics.median(run['seconds_per_step'] for run in same):.3f}"
            name = "sampled" if sampled else "this budget"
            rows.append([variant, name, str(budget), str(len(same)), *cells, time_cell, f"{same[0]['parameters']:,}"])
            mean = statistics.fmean(run["scores"][str(budget)]["overall"]["accuracy"] for run in same)
            points.setdefault(variant + (", sampled" if sampled else ""), []).append((budget, mean))
    trained = " + ".join(map(str, steps))
    title = f"easy-VQA, all test questions, percent right after {trained} steps: mean (least to most) of n seeds"
    stem = RESULTS.with_name(f"{RESULTS.stem}-{'-'.join(map(str, steps))}")
    show_table(title, header, rows, stem.with_suffix(".md"))
    title = f"easy-VQA after {trained} steps, percent right"
    line_plot(points, title, "visual tokens per image", stem.with_suffix(".svg"), log_x=True)


if __name__ == "__main__":
    main()
