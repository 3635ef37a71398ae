"""Projectors of any size for the tests: tiny configs, drawn weights and inputs, the released pair."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

from tests.reference import fixture_recipe, goldens, names, oracle
from transformers_delta_llava.modeling.configuration_delta_llava import DeltaLlavaConfig
from transformers_delta_llava.modeling.projector_delta_llava import PROJECTORS, DeltaLlavaProjector


SEED = 7
# In float64 the only disagreement left is that of the float32 position table.
FLOAT64_TOLERANCE = 1e-6


def projector_config(
    width: int = 32, grid: int = 24, levels: int = 3, hidden: int = 24, attention: str = "sdpa", **fields: Any
) -> DeltaLlavaConfig:
    """A config of these sizes: a CLIP tower of `levels + 1` layers, whose states 1 to `levels` are used."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=levels + 1,
        num_attention_heads=1,
        image_size=2 * grid,
        patch_size=2,
    )
    text = LlamaConfig(
        vocab_size=40, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1, num_attention_heads=1
    )
    fields = {"projector_head_dim": 8, "delta_rank": 2, "scale_factor": 1, "image_token_id": 39} | fields
    levels_used = list(range(1, levels + 1))
    config = DeltaLlavaConfig(vision_config=vision, text_config=text, vision_feature_levels=levels_used, **fields)
    config.vision_config._attn_implementation = attention
    return config


def make_projector(config: DeltaLlavaConfig) -> DeltaLlavaProjector:
    """The projector of the config's layout."""
    return PROJECTORS[config.projector_layout](config)


def clip_large_config(hidden: int = 4096, attention: str = "sdpa", **fields: Any) -> DeltaLlavaConfig:
    """The published sizes: CLIP ViT-L/14 at 336 px, four levels, rank 16."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(hidden_size=hidden, num_attention_heads=1, num_hidden_layers=1, vocab_size=40)
    config = DeltaLlavaConfig(vision_config=vision, text_config=text, image_token_id=39, **fields)
    config.vision_config._attn_implementation = attention
    return config


def drawn_inputs(config: DeltaLlavaConfig, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The single-level stream and then every level, each (batch, N, C), drawn independently of each other."""
    shape = (batch, config.grid_size**2, config.vision_config.hidden_size)
    labels = ["single", *(f"level {i}" for i in range(len(config.vision_feature_levels)))]
    return [torch.from_numpy(fixture_recipe.draw(label, shape, SEED)).to(dtype) for label in labels]


def draw_parameters(module: nn.Module) -> None:
    """Fills every parameter by the fixture recipe: gains near one, small biases, matrices that keep the variance."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            alias = name.replace("delta_u", "delta.U").replace("delta_v", "delta.V")
            value = fixture_recipe.draw(name, parameter.shape, SEED)
            if alias != name:  # stacked updates: the fan-in is the second last axis
                value *= (0.3 if alias.endswith(".V") else 1.0) / parameter.shape[-2] ** 0.5
            else:
                value = fixture_recipe.weight(name, parameter.shape, SEED)
            parameter.copy_(torch.from_numpy(value))


def projector(config: DeltaLlavaConfig, dtype: torch.dtype = torch.float64) -> DeltaLlavaProjector:
    """A projector in evaluation mode with drawn parameters."""
    module = make_projector(config)
    draw_parameters(module)
    return module.to(dtype).eval()


def released_pair(
    config: DeltaLlavaConfig, dtype: torch.dtype = torch.float64
) -> tuple[DeltaLlavaProjector, dict[str, Tensor]]:
    """A projector in evaluation mode, and its weights under the authors' names for the oracle."""
    module = make_projector(config)
    shapes = names.parameter_shapes(
        width=config.vision_config.hidden_size,
        levels=len(config.vision_feature_levels),
        rank=config.delta_rank,
        attention_width=module.block.stem.weight.shape[0],
        head_dim=config.projector_head_dim,
        mlp_ratio=config.projector_mlp_ratio,
        hidden=config.text_config.hidden_size,
    )
    weights = {
        name: torch.from_numpy(fixture_recipe.weight(oracle.PREFIX + name, shape, SEED)).to(dtype)
        for name, shape in shapes.items()
    }
    module.to(dtype).load_state_dict(names.package_state_dict(weights))
    return module.eval(), weights


def oracle_output(
    config: DeltaLlavaConfig, weights: dict[str, Tensor], inputs: list[Tensor], scale_factor: int
) -> Tensor:
    single, *levels = inputs
    heads = config.projector_num_attention_heads
    return oracle.released_projector(weights, single, torch.cat(levels, dim=-1), scale_factor, heads)["output"]


def assert_meets_oracle(config: DeltaLlavaConfig, scale_factor: int, batch: int = 2) -> None:
    module, weights = released_pair(config)
    inputs = drawn_inputs(config, batch)
    with torch.no_grad():
        output = module(inputs[0], inputs[1:], scale_factor)
    assert output.shape == (batch, config.num_visual_tokens_for(scale_factor), config.text_config.hidden_size)
    assert goldens.difference(output, oracle_output(config, weights, inputs, scale_factor)) <= FLOAT64_TOLERANCE


def golden_projector() -> DeltaLlavaProjector:
    """The projector of the golden numbers, in float32 and evaluation mode."""
    module = make_projector(clip_large_config(hidden=goldens.MANIFEST["geometry"]["hidden_size"]))
    module.load_state_dict(names.package_state_dict(goldens.weights()))
    return module.eval()
