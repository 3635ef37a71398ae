"""Operations of an image, a prompt and an answer at every number of visual tokens, counted by PyTorch and by the paper's formula.

    python -m benchmarks.profile 7b
    python -m benchmarks.profile REPO --text-tokens 68 --new-tokens 30 --output profile.json

Nothing is computed: models are on the meta device. A product and its sum are two operations; products of matrices,
convolutions and attention count.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from benchmarks.shapes import SHAPES, model_config
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from transformers_delta_llava.loading import load_config
from transformers_delta_llava.modeling import CACHE_NAME


PARTS = ("tower", "projector", "prefill", "decode")
# The formula leaves out Llama's gate matrix and the head, and counts the tower's last layer, which nothing reads. Its projector
# figures (0.024 TFLOPs at 576 tokens, 0.0015 at 144) are those of LLaVA's two-layer MLP on V / s^2 tokens.


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description="Count operations at every number of visual tokens.")
    parser.add_argument("model", help=f"{', '.join(SHAPES)}, a folder or a Hub id")
    parser.add_argument("--text-tokens", type=int, default=68, help="of the prompt; the paper's figures fit 68")
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--views", type=int, default=1, help="of an image in tiles, or frames of a video")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    config = model_config(arguments.model) if arguments.model in SHAPES else load_config(arguments.model)
    rows = profile(config, arguments.text_tokens, arguments.new_tokens, views=arguments.views)
    table = Table("visual tokens", *PARTS, "sum", "paper's formula", title=f"TFLOPs of {arguments.model}")
    for row in rows:
        counts = [*row["flops"].values(), sum(row["flops"].values()), sum(row["paper"].values())]
        table.add_row(str(row["num_visual_tokens"]), *(f"{count / 1e12:.4f}" for count in counts))
    Console().print(table)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def profile(
    config: DeltaLlavaConfig,
    text_tokens: int = 68,
    new_tokens: int = 30,
    budgets: Sequence[int] | None = None,
    views: int = 1,
) -> list[dict[str, Any]]:
    """Rows of `num_visual_tokens` per view, and of `flops` and, of one view, `paper`, both by part, at inference."""
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config).to("meta").eval()
    tower = views * tower_flops(model)
    rows = []
    for budget in config.visual_token_budgets if budgets is None else budgets:
        projector = views * projector_flops(model.model.multi_modal_projector, config.scale_factor_for(budget))
        prefill, decode = language_flops(model, text_tokens + views * budget, new_tokens)
        flops = dict(zip(PARTS, (tower, projector, prefill, decode)))
        paper = paper_flops(config, budget, text_tokens, new_tokens)
        rows.append({"num_visual_tokens": budget, "flops": flops, "paper": paper})
    return rows


def count_flops(function: Callable[[], Any]) -> int:
    """Operations of a call."""
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **kwargs: 2 * left[0] * left[1] * right[1]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        function()
    return counter.get_total_flops()


def tower_flops(model: DeltaLlavaForConditionalGeneration) -> int:
    """Of the vision tower for one image, up to the deepest layer that the projector reads."""
    side = model.config.vision_config.image_size
    pixels = torch.empty(1, 3, side, side, device="meta", dtype=model.dtype)
    return count_flops(lambda: model.model.get_patch_features(pixels))


def projector_flops(projector: Any, scale_factor: int) -> int:
    """Of the projector for one image."""
    config = projector.config
    features = torch.empty(
        1, config.grid_size**2, config.vision_config.hidden_size, device="meta", dtype=projector.dtype
    )
    levels = [features] * len(config.vision_feature_levels)
    return count_flops(lambda: projector(features, levels, scale_factor))


def language_flops(model: DeltaLlavaForConditionalGeneration, prompt: int, new_tokens: int) -> tuple[int, int]:
    """
    Of reading a prompt, which gives the first token of the answer, and of the other tokens.

    Every further token reads one more position than the one before, so two steps tell the operations of all.
    """
    embeddings = torch.empty(1, prompt, model.config.text_config.hidden_size, dtype=model.dtype, device="meta")
    cache = DynamicCache()

    def run(tokens: torch.Tensor) -> Any:
        outputs = model.model.language_model(inputs_embeds=tokens, use_cache=True, **{CACHE_NAME: cache})
        return model.lm_head(outputs.last_hidden_state[:, -1:])

    prefill, first, second = (count_flops(lambda x=x: run(x)) for x in (embeddings, *[embeddings[:, :1]] * 2))
    steps = new_tokens - 1
    return prefill, steps * first + steps * (steps - 1) // 2 * (second - first)


def paper_flops(config: DeltaLlavaConfig, budget: int, text_tokens: int, new_tokens: int) -> dict[str, int]:
    """
    The counts that reproduce Fig. 3 and section 6.5, by part.

    A layer of width d with an MLP of width m costs `2 S (4 d^2 + 2 d m) + 4 S^2 d` for S tokens (equation 14), and each new
    token the same with S0 in place of the second S (equation 15). For the projector equation (12) gives no constants.
    """
    vision, text = config.vision_config, config.text_config
    patches, prompt = config.grid_size**2, text_tokens + budget
    seen = patches + config.num_prefix_tokens
    hidden, width = text.hidden_size, vision.hidden_size
    embedding = 2 * patches * 3 * vision.patch_size**2 * width
    return {
        "tower": embedding + vision.num_hidden_layers * _paper_layer(vision, seen, seen),
        "projector": round(2 * budget / config.scale_factor_for(budget) ** 2 * (width * hidden + hidden * hidden)),
        "prefill": text.num_hidden_layers * _paper_layer(text, prompt, prompt),
        "decode": text.num_hidden_layers * _paper_layer(text, new_tokens, prompt),
    }


def _paper_layer(config: Any, tokens: int, context: int) -> int:
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or width * config.mlp_ratio  # DINOv2's
    return 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens * context * width


if __name__ == "__main__":
    main()
