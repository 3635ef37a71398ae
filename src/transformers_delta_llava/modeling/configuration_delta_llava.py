"""Configuration of Delta-LLaVA: a vision tower, the delta projector and a language model."""

from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import AutoConfig, PreTrainedConfig


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


class DeltaLlavaConfig(PreTrainedConfig):
    r"""
    Configuration of [`DeltaLlavaModel`] and [`DeltaLlavaForConditionalGeneration`].

    Every bad combination raises a `ValueError` that names the field, its value and what would do.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower. Defaults to CLIP-L/14 at 336 px.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the language model. Defaults to Llama (7B) with 32,064 tokens.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the placeholder token; it must be smaller than the vocabulary.
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
        projector_sr_ratio (`int`, *optional*, defaults to 1):
            Spatial reduction of EMHSA's keys and values.
        projector_window_size (`int`, *optional*, defaults to 1):
            Side `w` of a query window (equation 9). The released code has 1.
        projector_drop_path (`float`, *optional*, defaults to 0.1):
            Rate of stochastic depth in the transformer block, in training.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the DeltaProjections (`"released"`) and of the feed-forward.
        use_emhsa, use_transformer_block, use_delta_projection (`bool`, *optional*, default to `True`):
            The ablations of the paper's Table 3.
        delta_sharing (`str`, *optional*, defaults to `"levels"`):
            Which bases the `"paper"` layout shares: `"levels"` (one per role q, k, v) or `"all"` (one for all roles).
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
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]
    attribute_map = {"image_seq_length": "num_visual_tokens"}  # transformers' name for it

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict | None = None,
        text_config: PreTrainedConfig | dict | None = None,
        image_token_id: int = 32000,
        scale_factor: int | None = None,
        vision_feature_layer: int = -2,
        vision_feature_levels: Sequence[int] = (12, 16, 22, 23),
        vision_feature_select_strategy: str = "default",
        delta_rank: int = 16,
        projector_layout: str = "released",
        projector_num_attention_heads: int | None = None,
        projector_head_dim: int = 32,
        projector_mix_ratio: float = 0.75,
        projector_mlp_ratio: float = 2,
        projector_sr_ratio: int = 1,
        projector_window_size: int = 1,
        projector_drop_path: float = 0.1,
        projector_hidden_act: str = "gelu",
        use_emhsa: bool = True,
        use_transformer_block: bool = True,
        use_delta_projection: bool = True,
        delta_sharing: str = "levels",
        tie_word_embeddings: bool | None = None,
        num_visual_tokens: int | None = None,
        image_seq_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config, DEFAULT_VISION_CONFIG)
        self.text_config = _sub_config(text_config, DEFAULT_TEXT_CONFIG)
        self.image_token_id = image_token_id
        self.scale_factor = 2 if scale_factor is None else scale_factor
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_levels = list(vision_feature_levels)
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.delta_rank = delta_rank
        self.projector_layout = projector_layout
        self.projector_num_attention_heads = projector_num_attention_heads
        self.projector_head_dim = projector_head_dim
        self.projector_mix_ratio = projector_mix_ratio
        self.projector_mlp_ratio = projector_mlp_ratio
        self.projector_sr_ratio = projector_sr_ratio
        self.projector_window_size = projector_window_size
        self.projector_drop_path = projector_drop_path
        self.projector_hidden_act = projector_hidden_act
        self.use_emhsa = use_emhsa
        self.use_transformer_block = use_transformer_block
        self.use_delta_projection = use_delta_projection
        self.delta_sharing = delta_sharing
        if tie_word_embeddings is None:
            tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        kwargs.pop("code_version", None)  # of the code that wrote the config
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        _check_choices(self)
        _check_tower(self)
        _check_projector(self)
        _check_text(self)
        for name, number in (("num_visual_tokens", num_visual_tokens), ("image_seq_length", image_seq_length)):
            if number is None:
                continue
            if scale_factor is not None and number != self.num_visual_tokens:
                raise ValueError(
                    f"{name}={number} disagrees with scale_factor={self.scale_factor}, which gives "
                    f"{self.num_visual_tokens} tokens; leave one of the two out."
                )
            scale_factor = self.scale_factor = self.scale_factor_for(number)
        self.num_visual_tokens_for(self.scale_factor)

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
        """Visual tokens per image at `scale_factor`, equation (5). This is the one place that counts them.

        Raises:
            ValueError: if the grid cannot be reduced by `scale_factor`.
        """
        window = self.projector_window_size
        if not _is_int(scale_factor, minimum=1) or self.grid_size % (scale_factor * window):
            windows = f" into windows of {window} x {window} queries" if window > 1 else ""
            raise ValueError(
                f"scale_factor={scale_factor!r}: it does not divide the {self.grid_size} x {self.grid_size} patch grid"
                f"{windows}; use one of {', '.join(map(str, self._scale_factors()))}."
            )
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
    def visual_token_budgets(self) -> tuple[int, ...]:
        """Every number of visual tokens that the grid can give, from most to fewest."""
        return tuple(self.num_visual_tokens_for(scale_factor) for scale_factor in self._scale_factors())

    def scale_factor_for(self, num_visual_tokens: int) -> int:
        """The scale factor that gives `num_visual_tokens` per image.

        Raises:
            ValueError: if there is none; the message lists the budgets that there are.
        """
        for scale_factor, budget in zip(self._scale_factors(), self.visual_token_budgets):
            if budget == num_visual_tokens and not isinstance(num_visual_tokens, (bool, float)):
                return scale_factor
        budgets = ", ".join(map(str, self.visual_token_budgets))
        raise ValueError(f"num_visual_tokens={num_visual_tokens}: this model cannot give it; use one of {budgets}.")

    def _scale_factors(self) -> list[int]:
        return [s for s in range(1, self.grid_size + 1) if self.grid_size % (s * self.projector_window_size) == 0]

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


def _check_choices(config: DeltaLlavaConfig) -> None:
    for field, choices in {
        "vision_feature_select_strategy": ("default", "full"),
        "projector_layout": ("released", "paper"),
        "delta_sharing": ("levels", "all"),
        "use_emhsa": (True, False),
        "use_transformer_block": (True, False),
        "use_delta_projection": (True, False),
    }.items():
        _require(config, field, getattr(config, field) in choices, f"use one of {', '.join(map(repr, choices))}")
    try:
        from transformers.activations import ACT2FN
    except ImportError:  # without torch, which a config does not need
        ACT2FN = {config.projector_hidden_act: None}
    is_known = config.projector_hidden_act in ACT2FN
    _require(config, "projector_hidden_act", is_known, "use a key of transformers' ACT2FN, such as 'gelu'")
    if config.projector_layout == "released":
        remedy = "the 'released' layout has windows of 1; use projector_layout='paper'"
        _require(config, "projector_window_size", config.projector_window_size == 1, remedy)
        remedy = "the 'released' layout shares no base; use projector_layout='paper'"
        _require(config, "delta_sharing", config.delta_sharing == "levels", remedy)


def _check_tower(config: DeltaLlavaConfig) -> None:
    vision = config.vision_config
    for field in ("image_size", "patch_size"):
        is_valid = _is_int(getattr(vision, field, None), minimum=1)
        _require(config, f"vision_config.{field}", is_valid, "use one integer: the patch grid must be square")
    remedy = f"it must hold at least one patch of {vision.patch_size} pixels"
    _require(config, "vision_config.image_size", config.grid_size >= 1, remedy)

    states = vision.num_hidden_layers + 1
    _require(
        config,
        "vision_feature_levels",
        bool(config.vision_feature_levels),
        "name at least one hidden state of the tower",
    )
    for field, levels in (
        ("vision_feature_layer", [config.vision_feature_layer]),
        ("vision_feature_levels", config.vision_feature_levels),
    ):
        is_valid = all(_is_int(level, minimum=-states) and level < states for level in levels)
        remedy = f"the tower has {states} hidden states (the embedding and {states - 1} layers); use {-states} to {states - 1}"
        _require(config, field, is_valid, remedy)

    strategy = SELECT_STRATEGIES.get(vision.model_type, config.vision_feature_select_strategy)
    reason = "starts with a class token" if strategy == "default" else "has no class token"
    is_valid = config.vision_feature_select_strategy == strategy
    _require(config, "vision_feature_select_strategy", is_valid, f"a {vision.model_type} {reason}; use {strategy!r}")


def _check_projector(config: DeltaLlavaConfig) -> None:
    width, grid = config.vision_config.hidden_size, config.grid_size
    for field in ("delta_rank", "projector_head_dim", "projector_sr_ratio", "projector_window_size"):
        _require(config, field, _is_int(getattr(config, field), minimum=1), "use an integer of at least 1")
    if grid % config.projector_window_size:
        remedy = f"windows must tile the {grid} x {grid} grid; use one of {_divisors(grid)}"
        _refuse(config, "projector_window_size", remedy)
    remedy = f"a low-rank update has at most the tower's width, {width}"
    _require(config, "delta_rank", config.delta_rank <= width, remedy)
    _require(config, "vision_config.hidden_size", width % 4 == 0, "2-D sinusoidal positions need a multiple of 4")

    # The released block splits its channels between attention and convolution, and each needs a head.
    needed = 2 if config.projector_layout == "released" and config.use_transformer_block else 1
    if width % config.projector_head_dim or width < needed * config.projector_head_dim:
        remedy = f"it must divide the tower's width, {width}, into at least {needed} head(s); use one of "
        _refuse(config, "projector_head_dim", remedy + _divisors(width, at_most=width // needed))
    heads = config.num_window_attention_heads
    if not _is_int(heads, minimum=1) or width % heads:
        remedy = f"{heads} heads do not divide the tower's width, {width}; use one of {_divisors(width)}"
        _refuse(config, "projector_num_attention_heads", remedy)
    for field, is_valid, remedy in (
        ("projector_mix_ratio", 0 < config.projector_mix_ratio < 1, "use a share between 0 and 1, both excluded"),
        ("projector_mlp_ratio", config.projector_mlp_ratio > 0, "use a positive number"),
        ("projector_drop_path", 0 <= config.projector_drop_path < 1, "use a rate from 0 (off) to below 1"),
    ):
        _require(config, field, is_valid, remedy)


def _check_text(config: DeltaLlavaConfig) -> None:
    text, image_token_id = config.text_config, config.image_token_id
    is_valid = _is_int(image_token_id, minimum=0) and image_token_id < text.vocab_size
    _require(config, "image_token_id", is_valid, f"use an id in the vocabulary, 0 to {text.vocab_size - 1}")
    for field in ("logit_scale", "logits_scaling"):
        remedy = "language models that scale their logits are not supported; use one that does not"
        _require(config, f"text_config.{field}", getattr(text, field, None) in (None, 1), remedy)


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _divisors(number: int, at_most: int | None = None) -> str:
    return ", ".join(str(d) for d in range(1, (at_most or number) + 1) if number % d == 0)


def _require(config: DeltaLlavaConfig, field: str, is_valid: bool, remedy: str) -> None:
    if not is_valid:
        _refuse(config, field, remedy)


def _refuse(config: DeltaLlavaConfig, field: str, remedy: str) -> NoReturn:
    part, _, name = field.rpartition(".")
    value = getattr(getattr(config, part) if part else config, name, None)
    raise ValueError(f"{field}={value!r}: {remedy}.")


try:  # `transformers serve` finds the kind of a model by its type in this table
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(DeltaLlavaConfig.model_type, "DeltaLlavaForConditionalGeneration")
except ImportError:  # a config needs no torch
    pass


__all__ = ["DeltaLlavaConfig"]
