# Copyright 2026 The transformers-delta-llava authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License.
# You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS"
# BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Configuration of Delta-LLaVA: a vision tower, the delta projector and a language model."""

from operator import attrgetter
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto


# Of the Hub files in a repo; `delta-llava update` replaces them by those of this version.
CODE_VERSION = "0.1.0"
MODELING_FILE = "modeling_delta_llava"
AUTO_MAP = {
    "AutoConfig": "configuration_delta_llava.DeltaLlavaConfig",
    "AutoModel": f"{MODELING_FILE}.DeltaLlavaModel",
    "AutoModelForImageTextToText": f"{MODELING_FILE}.DeltaLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{MODELING_FILE}.DeltaLlavaForConditionalGeneration",
}

# CLIP-L/14 at 336 px, the tower of the published models.
DEFAULT_VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# Vicuna's 32,000 tokens, the image token, the padding token, rounded up to a multiple of 64.
DEFAULT_TEXT_CONFIG = {"model_type": "llama", "vocab_size": 32064}

# The towers that are known, and the `vision_feature_select_strategy` that each needs: the tokens of CLIP and DINOv2 start with
# a class token, those of SigLIP do not.
SELECT_STRATEGIES = {
    "clip_vision_model": "default",
    "siglip_vision_model": "full",
    "dinov2": "default",
    "dinov2_with_registers": "default",
}


@strict
class DeltaLlavaConfig(PreTrainedConfig):
    r"""
    Configuration of [`DeltaLlavaModel`] and [`DeltaLlavaForConditionalGeneration`].

    A value that does not fit the vision tower or the language model raises a `ValueError` that names the field.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower. Defaults to CLIP-L/14 at 336 px.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the language model. Defaults to Llama (7B) with 32,064 tokens.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the placeholder token; it must be smaller than the vocabulary.
        video_token_id (`int`, *optional*):
            Id of the placeholder of videos; a model without it takes none.
        scale_factor (`int`, *optional*, defaults to 2):
            Default spatial reduction `s` of the paper: `(grid / s) ** 2` visual tokens per image. No weight depends on
            it.
        num_visual_tokens, image_seq_length (`int`, *optional*):
            Two names of the number of visual tokens per image; it sets `scale_factor` and is not stored. Also as an
            argument of `from_pretrained` and as attributes, to read and to set.
        vision_feature_layer (`int`, *optional*, defaults to -2):
            Hidden state of the tower that makes the queries. 0 is the embedding, `i` the output of layer `i`;
            negative numbers count from the end.
        vision_feature_levels (`list[int]`, *optional*, defaults to `[12, 16, 22, 23]`):
            Hidden states of the tower that make keys and values, in this order.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` drops the class token of the tower's output and the registers behind it, if there are any; `"full"`
            keeps all tokens.
        delta_rank (`int`, *optional*, defaults to 16):
            Rank of the low-rank updates `delta_u @ delta_v`.
        projector_layout (`str`, *optional*, defaults to `"released"`):
            `"released"` computes what the authors' code computes, `"paper"` takes equations (3) to (11) literally.
        projector_num_attention_heads (`int`, *optional*):
            Heads of the window attention. Defaults to one per 128 channels, at least 1.
        projector_head_dim (`int`, *optional*, defaults to 32):
            Channels per head of the transformer block, and per group of its convolution.
        projector_mix_ratio (`float`, *optional*, defaults to 0.75):
            Share of the block's channels that goes through EMHSA (`"released"` only; `"paper"` has no split).
        projector_mlp_ratio (`float`, *optional*, defaults to 2):
            Hidden width of the block's MLP, in units of the tower's width.
        projector_drop_path (`float`, *optional*, defaults to 0.1):
            Rate of stochastic depth in the transformer block, in training.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the DeltaProjections (`"released"`) and of the feed-forward.
        use_emhsa, use_transformer_block, use_delta_projection (`bool`, *optional*, default to `True`):
            The ablations of the paper's Table 3.
        tie_word_embeddings (`bool`, *optional*):
            Whether input and output embeddings are tied. Defaults to what `text_config` says.

    Example:

    ```python
    >>> from transformers_delta_llava import DeltaLlavaConfig

    >>> config = DeltaLlavaConfig(num_visual_tokens=36)
    >>> config.scale_factor
    4
    >>> config.visual_token_budgets
    (576, 144, 64, 36, 16, 9, 4, 1)

    ```
    """

    model_type = "delta_llava"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # Outputs that do not have one row per example, so that `Trainer.evaluate` and `predict` cannot gather them.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs", "video_outputs"]
    attribute_map = {"image_seq_length": "num_visual_tokens"}  # transformers' name for it

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 32000
    video_token_id: int | None = None
    scale_factor: Any = None
    vision_feature_layer: int = -2
    vision_feature_levels: list[int] | tuple[int, ...] = (12, 16, 22, 23)
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    delta_rank: int = 16
    projector_layout: Literal["released", "paper"] = "released"
    projector_num_attention_heads: int | None = None
    projector_head_dim: int = 32
    projector_mix_ratio: float | int = 0.75
    projector_mlp_ratio: float | int = 2
    projector_drop_path: float | int = 0.1
    projector_hidden_act: str = "gelu"
    use_emhsa: bool = True
    use_transformer_block: bool = True
    use_delta_projection: bool = True
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _sub_config(self.vision_config, DEFAULT_VISION_CONFIG)
        self.text_config = _sub_config(self.text_config, DEFAULT_TEXT_CONFIG)
        self.vision_feature_levels = list(self.vision_feature_levels)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        numbers = {name: kwargs.pop(name, None) for name in ("num_visual_tokens", "image_seq_length")}
        kwargs.pop("code_version", None)  # of the code that wrote the config
        super().__post_init__(**kwargs)
        given, self.scale_factor = self.scale_factor, 2 if self.scale_factor is None else self.scale_factor
        for name, number in numbers.items():
            if number is not None:
                if given is not None and number != self.num_visual_tokens:
                    raise ValueError(f"{name}={number} disagrees with scale_factor={self.scale_factor}")
                given = self.scale_factor = self.scale_factor_for(number)
        _check(self)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the tower's square grid."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens per image at the default `scale_factor`; setting it sets `scale_factor`."""
        return self.num_visual_tokens_for(self.scale_factor)

    @num_visual_tokens.setter
    def num_visual_tokens(self, number: int) -> None:
        self.scale_factor = self.scale_factor_for(number)

    def num_visual_tokens_for(self, scale_factor: int) -> int:
        """Visual tokens per image at `scale_factor`, equation (5)."""
        return (self.grid_size // scale_factor) ** 2

    @property
    def vision_feature_indices(self) -> tuple[int, ...]:
        """The tower's hidden states that the projector reads, ascending: 0 is the embedding, `i` the output of layer `i`."""
        states = self.vision_config.num_hidden_layers + 1
        return tuple(sorted({index % states for index in (self.vision_feature_layer, *self.vision_feature_levels)}))

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in the tower's output: the class token and, in towers that have them, registers."""
        if self.vision_feature_select_strategy == "full":
            return 0
        return 1 + getattr(self.vision_config, "num_register_tokens", 0)

    @property
    def num_window_attention_heads(self) -> int:
        """Heads of the window attention: `projector_num_attention_heads`, or one per 128 channels."""
        if self.projector_num_attention_heads is None:
            return max(1, self.vision_config.hidden_size // 128)
        return self.projector_num_attention_heads

    @property
    def scale_factors(self) -> list[int]:
        """The scale factors that divide the grid, ascending."""
        return [factor for factor in range(1, self.grid_size + 1) if self.grid_size % factor == 0]

    @property
    def visual_token_budgets(self) -> tuple[int, ...]:
        """Every number of visual tokens that the grid can give, from most to fewest."""
        return tuple(map(self.num_visual_tokens_for, self.scale_factors))

    def scale_factor_for(self, num_visual_tokens: int) -> int:
        """The scale factor that gives `num_visual_tokens` per image.

        Raises:
            ValueError: there is none; the message lists the budgets that there are.
        """
        if num_visual_tokens not in self.visual_token_budgets:
            budgets = ", ".join(map(str, self.visual_token_budgets))
            raise ValueError(f"num_visual_tokens={num_visual_tokens!r} is not supported; choose from {budgets}")
        return self.scale_factors[self.visual_token_budgets.index(num_visual_tokens)]

    def to_dict(self) -> dict[str, Any]:
        """As in the base class, plus the code's version and the complete `auto_map`; transformers writes the saved class only."""
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP), "code_version": CODE_VERSION}


def _sub_config(config: PreTrainedConfig | dict | None, default: dict) -> PreTrainedConfig:
    if config is None:
        config = default
    if not isinstance(config, dict):
        return config
    if "model_type" not in config:
        config = {"model_type": default["model_type"], **config}
    return AutoConfig.for_model(**config)


def _check(config: DeltaLlavaConfig) -> None:
    """Refuse values that would only fail, or go unnoticed, in the model."""
    vision, text = config.vision_config, config.text_config
    width, states, grid = vision.hidden_size, vision.num_hidden_layers + 1, config.grid_size
    head_dim, levels = config.projector_head_dim, config.vision_feature_levels
    strategy = SELECT_STRATEGIES.get(vision.model_type, config.vision_feature_select_strategy)
    # The released block splits its channels between attention and convolution; each part needs a head.
    needed = 2 if config.projector_layout == "released" and config.use_transformer_block else 1

    def require(fits: bool, field: str, remedy: str) -> None:
        if not fits:
            raise ValueError(f"{field}={attrgetter(field)(config)!r}: {remedy}")

    fits = config.vision_feature_select_strategy == strategy
    require(fits, "vision_feature_select_strategy", f"a {vision.model_type} needs {strategy!r}")
    fits = config.scale_factor in config.scale_factors
    require(fits, "scale_factor", f"choose a divisor of the {grid} x {grid} patch grid: {config.scale_factors}")
    known = f"the tower has hidden states 0 to {states - 1}; negative numbers count from the end"
    require(-states <= config.vision_feature_layer < states, "vision_feature_layer", known)
    require(all(-states <= level < states for level in levels) and bool(levels), "vision_feature_levels", known)
    require(width % 4 == 0, "vision_config.hidden_size", "2-D sinusoidal positions need a multiple of 4")
    fits = width % head_dim == 0 and width >= needed * head_dim
    require(fits, "projector_head_dim", f"it must divide the tower's width, {width}, into at least {needed} heads")
    fits = width % config.num_window_attention_heads == 0
    require(fits, "projector_num_attention_heads", f"the heads must divide the tower's width, {width}")
    require(1 <= config.delta_rank <= width, "delta_rank", f"choose a rank from 1 to the tower's width, {width}")
    for field in ("image_token_id", "video_token_id"):
        fits = 0 <= (getattr(config, field) or 0) < text.vocab_size
        require(fits, field, f"choose an id in the vocabulary, 0 to {text.vocab_size - 1}")
    for field in ("logit_scale", "logits_scaling"):  # of Cohere and Granite; the model's head does not scale
        require(getattr(text, field, 1) in (None, 1), f"text_config.{field}", "only 1 is supported")


# transformers' server looks up a model's class by this table; auto_map does not reach it.
getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}).setdefault(
    DeltaLlavaConfig.model_type, "DeltaLlavaForConditionalGeneration"
)


__all__ = ["DeltaLlavaConfig"]
