"""Projectors side by side on real parts: DINOv2, SmolLM2 and the data of `examples/smol`; only the projector differs.

    python -m examples.smol.build_parts && python -m examples.smol.build_data
    python -m benchmarks.projectors_on_smol --run [--seeds 0 1 2] [--budgets 64 16 4 1] [--steps 2000 2000] [--device cuda]
    python -m benchmarks.projectors_on_smol

Each model is trained as `examples/smol/align.yaml` says and then, with a LoRA of the language model, as
`examples/smol/finetune.yaml` says, but for projector, number of visual tokens, seed and number of steps. Without steps of
the second stage (`--steps 300 0`, what two CPU cores can do) only the words nearest to the visual tokens are scored.
Every finished model is a line in `benchmarks/results/projectors_on_smol.jsonl`; a sweep that was stopped goes on from
there. Without `--run` it writes the table of each number of steps next to that file, and prints it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft.utils import ModulesToSaveWrapper

from benchmarks.projectors import VARIANTS
from benchmarks.projectors.sweep import read_runs, show_table, spread
from examples.easy_vqa_questions import answer_questions
from examples.smol.align import Captions, start, train
from examples.smol.frozen_features import FrozenFeatures
from examples.smol.nearest_words import nearest_words
from examples.smol.test_set import MAX_NEW_TOKENS, load_test_set, score_tasks
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.modeling import modeling_delta_llava
from transformers_delta_llava.training import Recipe, load_recipe, make_trainer


ROOT = Path(__file__).resolve().parents[1]
RECIPES = [ROOT / "examples" / "smol" / name for name in ("align.yaml", "finetune.yaml")]
RESULTS = ROOT / "benchmarks" / "results" / "projectors_on_smol.jsonl"
ALL_PATCHES = 256


def main() -> None:
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description="Compare projectors between DINOv2 and SmolLM2.")
    parser.add_argument("--run", action="store_true", help="train what is missing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 16, 4, 1])
    parser.add_argument("--steps", type=int, nargs=2, default=[2000, 2000], help="of the two stages")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--data", type=Path, default=Path("smol-data"))
    arguments = parser.parse_args()
    if arguments.run:
        run_missing(arguments)
    runs = read_runs(RESULTS)
    if not runs:
        print("There is no result yet: python -m benchmarks.projectors_on_smol --run")
    for steps in sorted({tuple(run["steps"]) for run in runs}):
        show([run for run in runs if tuple(run["steps"]) == steps], steps)


def run_missing(arguments: argparse.Namespace) -> None:
    """Train and score, seed by seed, what has no line yet."""
    done = {(run["variant"], run["num_visual_tokens"], run["seed"], tuple(run["steps"])) for run in read_runs(RESULTS)}
    captions: Captions | None = None
    for seed in arguments.seeds:
        for variant in arguments.variants:
            for budget in [ALL_PATCHES] if variant == "MLP, no reduction" else arguments.budgets:
                if (variant, budget, seed, tuple(arguments.steps)) in done:
                    continue
                captions, run = measure(variant, budget, seed, arguments, captions)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
                print(json.dumps(run), flush=True)


def measure(
    variant: str, budget: int, seed: int, arguments: argparse.Namespace, captions: Captions | None
) -> tuple[Captions, dict[str, Any]]:
    """Train one model and score it; the captions, which do not depend on the projector, are read once."""
    first, second = (recipe_of(file, budget, seed, arguments) for file in RECIPES)
    scale_factor = round((ALL_PATCHES / budget) ** 0.5)
    first.model.config.update({"scale_factor": scale_factor, **VARIANTS[variant][1]})
    # Built anew, because no folder can hold a projector that is not ours.
    template = {"chat_template": first.data.chat_template}
    second = second.model_copy(update={"model": first.model, "data": second.data.model_copy(update=template)})
    settings = first.training_arguments()
    with patch.object(modeling_delta_llava, "DeltaLlavaProjector", VARIANTS[variant][0]):
        model, processor = start(first, settings)
    if captions is None:
        captions = Captions.read(model, processor, first)
    else:  # reading the captions did it for the first model: features of the test's images come from the disk
        FrozenFeatures(model, "smol-features")
    begin = time.process_time() if arguments.device == "cpu" else time.perf_counter()
    log = train(model, captions, processor.tokenizer, (budget,), settings)
    seconds = (time.process_time() if arguments.device == "cpu" else time.perf_counter()) - begin
    run = {
        "variant": variant,
        "num_visual_tokens": budget,
        "seed": seed,
        "steps": arguments.steps,
        "parameters": sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters()),
        "seconds_per_step": round(seconds / arguments.steps[0], 4),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu, seconds of processor time",
        "torch": torch.__version__,
        "entropy": round(log[-1]["entropy"], 4),
        "nearest_words": nearest_words(model, processor, arguments.data, budget),
        "scores": None,
    }
    if arguments.steps[1]:
        with patch.object(modeling_delta_llava, "DeltaLlavaProjector", VARIANTS[variant][0]):
            model = finetune(second, model.model.multi_modal_projector.state_dict())
        questions = load_test_set(arguments.data)
        answers = answer_questions(model, processor, questions, budget, max_new_tokens=MAX_NEW_TOKENS)
        run["scores"] = {task: score.to_dict() for task, score in score_tasks(questions, answers).items()}
    return captions, run


def recipe_of(file: Path, budget: int, seed: int, arguments: argparse.Namespace) -> Recipe:
    """One of the two recipes, on these data, for so many steps."""
    stage = RECIPES.index(file)
    changes = {
        "data.path": arguments.data / ("pretrain.json", "finetune.json")[stage],
        "data.images": arguments.data / "images",
        "num_visual_tokens": budget,
        "arguments.max_steps": arguments.steps[stage],
        "arguments.seed": seed,
        "arguments.use_cpu": arguments.device == "cpu",
        "arguments.save_strategy": "'no'",  # YAML takes a bare no for false
        "arguments.output_dir": "runs/projectors-on-smol",
        "arguments.disable_tqdm": True,
    }
    return load_recipe(file, [f"{key}={value}" for key, value in changes.items()])


def finetune(recipe: Recipe, weights: dict[str, torch.Tensor]) -> DeltaLlavaForConditionalGeneration:
    """Stage 2 from a projector's weights; the model with its LoRA merged."""
    trainer = make_trainer(recipe)
    wrapper = trainer.model.get_base_model().model.multi_modal_projector
    assert isinstance(wrapper, ModulesToSaveWrapper)
    wrapper.modules_to_save["default"].load_state_dict(weights)
    trainer.train()
    return trainer.model.merge_and_unload().eval()


def show(runs: list[dict[str, Any]], steps: tuple[int, ...]) -> None:
    """Print the table of one number of steps, and write it next to the results."""
    tasks = list(runs[0]["scores"] or ())
    header = [
        "projector",
        "tokens",
        "n",
        "entropy",
        *(f"naming at {k}" for k in (1, 5, 20)),
        *tasks,
        "s per step",
        "parameters",
    ]
    title = (
        f"After {steps[0]} + {steps[1]} steps: cross-entropy of the captions' words over the last steps; test images whose "
        f"name is among the 1, 5 and 20 words nearest to their visual tokens{', and answers, ' if tasks else ' '}in percent; mean (least to most) of n seeds"
    )
    rows = []
    for variant, budget in sorted(
        {(run["variant"], run["num_visual_tokens"]) for run in runs},
        key=lambda group: (-group[1], list(VARIANTS).index(group[0])),
    ):
        same = [run for run in runs if (run["variant"], run["num_visual_tokens"]) == (variant, budget)]
        nearest = [[run["nearest_words"]["naming"][f"right at {k}"]["accuracy"] for run in same] for k in (1, 5, 20)]
        answered = [[run["scores"][task]["accuracy"] for run in same] for task in tasks]
        step = statistics.median(run["seconds_per_step"] for run in same)
        cells = [spread([run["entropy"] for run in same], 2), *(spread(values, 1) for values in nearest + answered)]
        rows.append([variant, str(budget), str(len(same)), *cells, f"{step:.2f}", f"{same[0]['parameters']:,}"])
    show_table(title, header, rows, RESULTS.with_name(f"{RESULTS.stem}-{'-'.join(map(str, steps))}.md"))


if __name__ == "__main__":
    main()
