"""One training step of either stage at every budget, compared with transformers' own LLaVA at all patches.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --device cuda --dtype bfloat16 --shape 7b --batch-size 16 --text-tokens 128

Stage 1 trains the projector, stage 2 the language model as well; the tower is frozen. `Table 4` is the paper's time of an epoch as
a share of LLaVA's; its text speaks of 3.5 and 7.5 hours for LLaVA, its table of 1:24:01 and 4:34:20: the table is taken.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.harness import arguments_of, peak_bytes, prepare, print_table, side_by_side, write_results
from benchmarks.harness.models import LLAVA, build_pair, make_inputs


# Table 4 in seconds, stage 1 and stage 2.
TABLE_4 = {
    LLAVA: (5041, 16460),
    144: (2012, 12097),
    64: (1404, 11843),
    16: (1116, 11669),
    4: (992, 11554),
    1: (960, 10310),
}


def main() -> None:
    """Measure LLaVA and every budget in turns, stage by stage, print, write."""
    parser = arguments_of("Time training steps and LLaVA's.", seconds=120.0)
    parser.add_argument("--shape", default="0.5b", help="0.5b, 7b, 13b, or tiny to try the script")
    parser.add_argument("--budgets", type=int, nargs="+", help="all that the grid gives by default")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=68)
    parser.add_argument("--optimizer", choices=["AdamW", "SGD"], default="SGD", help="AdamW holds two more copies")
    arguments = parser.parse_args()
    prepare(arguments)
    ours, llava = build_pair(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    budgets = arguments.budgets or [b for b in ours.config.visual_token_budgets if b != 9]
    models = {LLAVA: (llava, ours.config.num_visual_tokens_for(1)), **{budget: (ours, budget) for budget in budgets}}
    rows = []
    for stage in (1, 2):
        steps = {}
        for name, (model, budget) in models.items():
            inputs = make_inputs(model, budget, arguments.text_tokens, arguments.batch_size)
            inputs["labels"] = inputs["input_ids"].masked_fill(
                inputs["input_ids"] == model.config.image_token_id, -100
            )
            if model is ours:
                inputs["num_visual_tokens"] = budget
            steps[name] = partial(step, model, inputs, stage, make_optimizer(model, arguments.optimizer))
        seconds = side_by_side({str(name): function for name, function in steps.items()}, arguments)
        for name, function in steps.items():
            published = TABLE_4.get(name)
            rows.append(
                {
                    "stage": stage,
                    "visual tokens": name,
                    "ms": 1000 * seconds[str(name)],
                    "of LLaVA's": seconds[str(name)] / seconds[LLAVA],
                    "Table 4": published[stage - 1] / TABLE_4[LLAVA][stage - 1] if published else None,
                    "MB": peak_bytes(function, arguments.device) / 1e6,
                }
            )
    print_table(f"{arguments.shape}, batch {arguments.batch_size}: time of a training step", rows)
    write_results(f"training_step_{arguments.shape}_{arguments.device}", arguments, rows=rows)


def make_optimizer(model: Any, name: str) -> torch.optim.Optimizer:
    """Over what may be trained; parameters without a gradient are skipped."""
    parts = model.model.multi_modal_projector, model.model.language_model, model.lm_head
    trained = dict.fromkeys(parameter for part in parts for parameter in part.parameters())  # a tied head once
    return getattr(torch.optim, name)(list(trained), lr=1e-6)


def step(model: Any, inputs: dict[str, Any], stage: int, optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward and update of the weights that the stage trains; of a language model with LoRA only the adapters."""
    model.train().requires_grad_(stage == 2)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    names = [name for name, _ in model.model.language_model.named_parameters()]
    if any("lora_" in name for name in names):
        model.lm_head.requires_grad_(False)
        for name in names:
            model.model.language_model.get_parameter(name).requires_grad_("lora_" in name)
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
