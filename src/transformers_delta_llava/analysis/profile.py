"""What a model costs: operations, memory of activations and cache, and the least time a GPU needs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from ..modeling import CACHE_NAME, DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProjector
from ..modeling.configuration_delta_llava import DEFAULT_VISION_CONFIG
from ..modeling.delta_repo_delta_llava import dtype_name


class FusedAttention(TorchFunctionMode):
    """Scaled dot-product attention makes its result and nothing else, as on devices; without data PyTorch spells it out."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or make the result of attention."""
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, _, value = args[:3]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as anything holds them; `peak` is the most.

    What a kernel needs for itself, and what an allocator rounds up, is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look what is new and what is gone."""
        kwargs = kwargs or {}
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = operation(*args, **kwargs)
        held = {reference.cdata for reference in self._held()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in held and storage._cdata not in given:
                    self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result

    def peak_of(self, function: Callable[[], Any]) -> int:
        """Most bytes that a call holds at a time, beyond what is held when it starts; what it returns is let go."""
        before = self.peak = sum(self._held().values())
        with torch.no_grad(), FusedAttention(), self:
            function()
        return self.peak - before

    def _held(self) -> dict[StorageWeakRef, int]:
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        return self.live


def tower_peak_bytes(model: DeltaLlavaForConditionalGeneration) -> int:
    """Of the vision tower for one image, the levels that it keeps among them; the model is on the meta device."""
    side = model.config.vision_config.image_size
    pixels = torch.empty(1, 3, side, side, dtype=model.dtype, device="meta")
    return LiveMemory().peak_of(lambda: model.model._run_vision_tower(pixels))


def projector_peak_bytes(projector: DeltaLlavaProjector, scale_factor: int) -> int:
    """Of the projector for one image, without the features that go in; it is on the meta device."""
    config = projector.config
    shape = (1, config.grid_size**2, config.vision_config.hidden_size)
    features = torch.empty(shape, dtype=projector.dtype, device="meta")
    levels = [features] * len(config.vision_feature_levels)
    return LiveMemory().peak_of(lambda: projector(features, levels, scale_factor))


def language_peak_bytes(model: DeltaLlavaForConditionalGeneration, prompt: int) -> tuple[int, int]:
    """Of the prefill of `prompt` tokens and of one step of decoding, without the cache; the model is on the meta device."""
    width, language_model = model.config.text_config.hidden_size, model.model.language_model
    embeddings = torch.empty(1, prompt, width, dtype=model.dtype, device="meta")
    cache, memory = DynamicCache(), LiveMemory()

    def run(tokens: torch.Tensor) -> Any:
        outputs = language_model(inputs_embeds=tokens, use_cache=True, **{CACHE_NAME: cache})
        return model.lm_head(outputs.last_hidden_state[:, -1:])

    prefill = memory.peak_of(lambda: run(embeddings))
    cached = sum(memory._held().values())  # the last layer runs when nearly all of it is there
    return prefill - cached, memory.peak_of(lambda: run(embeddings[:, :1]))


PARTS = ("tower", "projector", "prefill", "decode")
# Language models by the size in a model's name: Qwen2-0.5B, Vicuna-7B and Vicuna-13B. The tower is CLIP-L/14 at 336 px.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {"model_type": "llama", "vocab_size": 32064},
    "13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32064,
    },
}
PAPER_NOTE = (
    "The paper's formula leaves out Llama's gate matrix and the head, and counts the tower's last layer, which nothing "
    "reads. Its projector figures (0.024 TFLOPs at 576 tokens, 0.0015 at 144) are those of LLaVA's two-layer MLP on "
    "V / s^2 tokens; the released projector computes 0.050 and 0.0216."
)


@dataclass(frozen=True)
class BudgetProfile:
    """Costs of one image, a prompt and an answer at one budget; each mapping has the keys of `PARTS`.

    `weight_bytes` is what a part reads of the model's weights, decoding in each of its steps.
    """

    num_visual_tokens: int
    exact_flops: dict[str, int]
    paper_flops: dict[str, int]
    weight_bytes: dict[str, int]
    activation_bytes: dict[str, int]
    kv_cache_bytes: int


@dataclass(frozen=True)
class ModelProfile:
    """Costs of a model at every budget; parameters are those of `tower`, `projector` and `language_model`."""

    text_tokens: int
    new_tokens: int
    dtype: str
    parameters: dict[str, int]
    budgets: list[BudgetProfile]


def shape_config(shape: str, vision: dict | None = None, text: dict | None = None, **fields: Any) -> DeltaLlavaConfig:
    """The config of `0.5b`, `7b` or `13b`; `vision` and `text` change fields of the sub-configs.

    Raises:
        ValueError: if there is no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: use one of {', '.join(SHAPES)}.")
    return DeltaLlavaConfig({**DEFAULT_VISION_CONFIG, **(vision or {})}, {**SHAPES[shape], **(text or {})}, **fields)


# Of a prompt or an answer: more than any model reads.
MAX_TOKENS = 10**8


def profile_model(
    config: DeltaLlavaConfig,
    text_tokens: int = 68,
    new_tokens: int = 30,
    dtype: torch.dtype = torch.bfloat16,
    budgets: Sequence[int] | None = None,
) -> ModelProfile:
    """What one image costs with a prompt of `text_tokens` and an answer of `new_tokens`, batch 1, at inference.

    Args:
        config: of the model; its tower is a CLIP or a SigLIP.
        text_tokens: of the prompt, visual tokens aside. 68 is what the paper's figures fit.
        new_tokens: of the answer, of which the prefill gives the first.
        dtype: of weights and activations, for memory.
        budgets: numbers of visual tokens; all that the grid can give by default.

    Raises:
        ValueError: on a budget that the grid cannot give, lengths that no model has, or a tower of another type.
    """
    for name, number, least in (("text_tokens", text_tokens, 0), ("new_tokens", new_tokens, 1)):
        if not least <= number <= MAX_TOKENS:
            raise ValueError(f"{name}={number}: use a number from {least} to {MAX_TOKENS:,}.")
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config).to("meta", dtype).eval()  # the position table is not there
    parts = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    parameters = {name: _parameters(module) for name, module in parts.items()}
    parameters["language_model"] = _parameters(model) - sum(parameters.values())
    profiles, tower = [], tower_peak_bytes(model)
    read_of_tower, read_of_language_model = _parameters_read(model)
    for budget in config.visual_token_budgets if budgets is None else budgets:
        scale_factor, prompt = config.scale_factor_for(budget), text_tokens + budget
        projector = projector_peak_bytes(parts["projector"], scale_factor)
        prefill, decode = language_peak_bytes(model, prompt)
        profiles.append(
            BudgetProfile(
                num_visual_tokens=budget,
                exact_flops={
                    "tower": tower_flops(model),
                    "projector": projector_flops(parts["projector"], scale_factor),
                    "prefill": prefill_flops(model, prompt),
                    "decode": decode_flops(model, prompt, new_tokens),
                },
                paper_flops=paper_flops(config, budget, text_tokens, new_tokens),
                weight_bytes={
                    "tower": read_of_tower * dtype.itemsize,
                    "projector": _projector_parameters_read(parts["projector"], scale_factor) * dtype.itemsize,
                    "prefill": read_of_language_model * dtype.itemsize,
                    "decode": read_of_language_model * dtype.itemsize,
                },
                activation_bytes=dict(zip(PARTS, (tower, projector, prefill, decode))),
                kv_cache_bytes=kv_cache_bytes(config, prompt + new_tokens - 1, dtype),
            )
        )
    return ModelProfile(text_tokens, new_tokens, dtype_name(dtype), parameters, profiles)


# ---------------------------------------------------------------------------- exact


def tower_flops(model: DeltaLlavaForConditionalGeneration) -> int:
    """Of one image, up to the deepest layer that the model reads.

    Raises:
        ValueError: if the tower is neither a CLIP nor a SigLIP.
    """
    config, tower = model.config, model.model.vision_tower
    patches = config.grid_size**2
    tokens = patches + (config.vision_feature_select_strategy == "default")
    layers = _layers_read(model)
    attention = 4 * tokens**2 * tower.config.hidden_size * len(layers)
    return patches * _products(tower.embeddings) + tokens * _products(layers) + attention


def _layers_read(model: DeltaLlavaForConditionalGeneration) -> nn.ModuleList:
    """The tower's layers up to the deepest one whose output is read."""
    config, tower = model.config, model.model.vision_tower
    if not hasattr(tower, "encoder"):
        raise ValueError(
            f"vision_config.model_type={tower.config.model_type!r}: operations are counted for CLIP and SigLIP towers."
        )
    states = tower.config.num_hidden_layers + 1
    deepest = max(level % states for level in (config.vision_feature_layer, *config.vision_feature_levels))
    return tower.encoder.layers[:deepest]


def projector_flops(projector: DeltaLlavaProjector, scale_factor: int) -> int:
    """Of one image at inference."""
    config = projector.config
    patches, tokens = config.grid_size**2, config.num_visual_tokens_for(scale_factor)
    width, levels = config.vision_config.hidden_size, len(config.vision_feature_levels)
    rank = config.delta_rank if config.use_delta_projection else 0
    output = tokens * _products(projector.feed_forward)
    if config.projector_layout == "released":
        memory = 2 * patches * (levels * width * width + rank * (levels * width + width))
        if scale_factor == 1:  # one key per window: values alone matter
            return memory + 2 * 2 * patches * width**2 + output
        query = _block_flops(projector.block, config, tokens) + 2 * tokens * (width**2 + 2 * rank * width)
        # In, out, and the key and value maps on the queries' side; then each head over keys as wide as the tower.
        window = 4 * 2 * tokens * width**2 + 4 * patches * config.num_window_attention_heads * width
        return 2 * memory + query + window + output
    memory = 2 * 2 * patches * levels * (width**2 + 2 * rank * width)
    query = 2 * tokens * (width**2 + 2 * rank * levels * width) + _block_flops(projector.block, config, tokens)
    query += _block_flops(projector.refine, config, tokens)
    window = 4 * patches * config.projector_window_size**2 * levels * width
    return memory + query + window + output + tokens * _products(projector.out_proj)


def prefill_flops(model: DeltaLlavaForConditionalGeneration, prompt: int) -> int:
    """Of `prompt` tokens, text and visual, and the head on the last one."""
    layers = model.model.language_model.layers
    return prompt * _products(layers) + _products(model.lm_head) + prompt * _attention(model, prompt)


def decode_flops(model: DeltaLlavaForConditionalGeneration, prompt: int, new_tokens: int) -> int:
    """Of all tokens of the answer but the first, which the prefill gives; each reads the cache and itself."""
    per_token = _products(model.model.language_model.layers) + _products(model.lm_head)
    return sum(per_token + _attention(model, prompt + index) for index in range(1, new_tokens))


def _attention(model: DeltaLlavaForConditionalGeneration, context: int) -> int:
    """Scores and weighted sum of one token over `context` tokens, in all layers."""
    heads, head_dim, _ = _heads(model.config.text_config)
    return 4 * context * heads * head_dim * model.config.text_config.num_hidden_layers


def _block_flops(block: nn.Module | None, config: DeltaLlavaConfig, tokens: int) -> int:
    """Of a refinement block of the projector over `tokens`, row and column alike."""
    if block is None:
        return 0
    count = tokens * _products(block)
    attention: Any = block.attention
    if attention is not None:
        side = math.ceil(math.isqrt(tokens) / config.projector_sr_ratio)
        keys, width = side * side, attention.q_proj.weight.shape[0]
        count += 4 * tokens * keys * width
        count -= (tokens - keys) * (_products(attention.k_proj) + _products(attention.v_proj))
    return count


def _products(module: nn.Module) -> int:
    """Operations per token of all linear maps and convolutions in a module."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d)))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parameters_read(model: DeltaLlavaForConditionalGeneration) -> tuple[int, int]:
    """Of the tower, and of the language model with its head for any number of tokens: few rows of the embedding count."""
    tower, language_model = model.model.vision_tower, model.model.language_model
    of_language_model = _parameters(language_model) - language_model.get_input_embeddings().weight.numel()
    return _parameters(tower.embeddings) + _parameters(_layers_read(model)), of_language_model + _parameters(
        model.lm_head
    )


def _projector_parameters_read(projector: DeltaLlavaProjector, scale_factor: int) -> int:
    """Of the projector at inference: with one key per window only what becomes of the values."""
    if projector.config.projector_layout == "released" and scale_factor == 1:
        attention = projector.window_attention
        packed = attention.in_proj_weight.numel() + attention.in_proj_bias.numel()
        modules = (projector.v_proj, attention.out_proj, projector.feed_forward)
        return sum(_parameters(module) for module in modules) + packed // 3
    return _parameters(projector)


def _heads(text_config: Any) -> tuple[int, int, int]:
    """Attention heads, channels per head, and heads of keys and values."""
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return heads, head_dim, getattr(text_config, "num_key_value_heads", None) or heads


def kv_cache_bytes(config: DeltaLlavaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Of the keys and values of `tokens` tokens in all layers."""
    _, head_dim, heads = _heads(config.text_config)
    return 2 * config.text_config.num_hidden_layers * tokens * heads * head_dim * dtype.itemsize


# ---------------------------------------------------------------------------- the paper's


def paper_flops(config: DeltaLlavaConfig, budget: int, text_tokens: int, new_tokens: int) -> dict[str, int]:
    """The counts that reproduce Fig. 3 and section 6.5, by part.

    A layer of width d with an MLP of width m costs `2 S (4 d^2 + 2 d m) + 4 S^2 d` for S tokens, in the tower and in the
    language model (equation 14), and each new token the same with S0 in place of the second S (equation 15). For the
    projector equation (12) gives no constants; see `PAPER_NOTE`.
    """
    vision, text = config.vision_config, config.text_config
    patches, prompt = config.grid_size**2, text_tokens + budget
    seen = patches + (config.vision_feature_select_strategy == "default")
    hidden, width = text.hidden_size, vision.hidden_size
    embedding = 2 * patches * 3 * vision.patch_size**2 * width
    scale_factor = config.scale_factor_for(budget)
    return {
        "tower": embedding + vision.num_hidden_layers * _paper_layer(vision, seen, seen),
        "projector": round(2 * budget / scale_factor**2 * (width * hidden + hidden * hidden)),
        "prefill": text.num_hidden_layers * _paper_layer(text, prompt, prompt),
        "decode": text.num_hidden_layers * _paper_layer(text, new_tokens, prompt),
    }


def _paper_layer(config: Any, tokens: int, context: int) -> int:
    width = config.hidden_size
    return 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 4 * tokens * context * width


@dataclass(frozen=True)
class Floor:
    """Least seconds at one number of visual tokens.

    num_visual_tokens: per image.
    seconds: by part, with the keys of `PARTS`; `decode` is all of an answer but its first token.
    limited_by: by part, `"compute"` or `"memory"`, whichever takes longer.
    first_token: tower, projector and prefill, one after the other.
    per_token: mean of the steps of decoding; `None` for an answer of one token.
    """

    num_visual_tokens: int
    seconds: dict[str, float]
    limited_by: dict[str, str]
    first_token: float
    per_token: float | None


def roofline(
    profile: ModelProfile, flops_per_second: float, bytes_per_second: float, batch_size: int = 1
) -> list[Floor]:
    """
    Floors of a batch of images, one prompt each, at every number of visual tokens of a profile.

    A part takes at least its operations over the rate of operations, and at least the bytes that it reads over the bandwidth: its
    weights once per step, whatever the batch, and in decoding the keys and values of each row. Activations are not counted.

    Args:
        profile: of `profile_model`, whose dtype says how large weights and cache are.
        flops_per_second: what the device computes in that dtype, best measured with a large matrix product.
        bytes_per_second: bandwidth of the device's memory.
        batch_size: rows, with one image each.

    Raises:
        ValueError: on a rate or a batch that is not positive.
    """
    rates = {"flops_per_second": flops_per_second, "bytes_per_second": bytes_per_second, "batch_size": batch_size}
    for name, value in rates.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: it must be above 0.")
    floors = []
    steps = profile.new_tokens - 1
    for budget in profile.budgets:
        prompt = profile.text_tokens + budget.num_visual_tokens
        cached = sum(prompt + step for step in range(1, steps + 1))  # tokens read in all steps of decoding
        cache_bytes = batch_size * budget.kv_cache_bytes * cached / (prompt + steps)
        reads = {**budget.weight_bytes, "decode": steps * budget.weight_bytes["decode"] + cache_bytes}
        times = {
            part: {
                "compute": batch_size * budget.exact_flops[part] / flops_per_second,
                "memory": reads[part] / bytes_per_second,
            }
            for part in PARTS
        }
        seconds = {part: max(both.values()) for part, both in times.items()}
        floors.append(
            Floor(
                num_visual_tokens=budget.num_visual_tokens,
                seconds=seconds,
                limited_by={part: max(both, key=both.__getitem__) for part, both in times.items()},
                first_token=sum(seconds.values()) - seconds["decode"],
                per_token=seconds["decode"] / steps if steps else None,
            )
        )
    return floors
