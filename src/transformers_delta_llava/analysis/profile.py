"""What a model costs: operations, memory of activations and cache, and the least time a GPU needs."""

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
from torch.utils.flop_counter import flop_registry
from transformers import DynamicCache

from ..modeling import CACHE_NAME, DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProjector
from ..modeling.configuration_delta_llava import DEFAULT_VISION_CONFIG
from ..modeling.delta_repo_delta_llava import dtype_name


class FusedAttention(TorchFunctionMode):
    """Scaled dot-product attention allocates its result and nothing else, as fused kernels do; on the meta device PyTorch
    would decompose it. Its operations are added up in `flops`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or allocate the result of attention."""
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args[:3]
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        self.flops += 2 * key.shape[-2] * (query.numel() + result.numel())  # scores, then the weighted sum
        return result


class Counter(TorchDispatchMode):
    """Adds up the `flops` of operations, and the bytes of the tensors that they allocate, for as long as anything holds
    them; `peak` is the most.

    Workspaces of kernels, and what an allocator rounds up, are not included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live: dict[StorageWeakRef, int] = {}  # some may be freed since
        self.total = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count it and the storages that are new."""
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if formula := flop_registry.get(operation.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        elif operation is torch.ops.aten.addmm_.default:  # not in PyTorch's table
            self.flops += 2 * args[1].numel() * args[2].shape[1]
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if storage._cdata not in given and reference not in self.live:  # no view, not in place
                self.live[reference] = storage.nbytes()
                self.total += storage.nbytes()
        if self.total > self.peak:  # only then it matters what was freed
            self.peak = max(self.peak, self.held_bytes())
        return result

    def held_bytes(self) -> int:
        """Bytes of the counted tensors that something still holds."""
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.total = sum(self.live.values())
        return self.total

    def measure(self, function: Callable[[], Any]) -> tuple[int, int]:
        """Operations of a call, and the most bytes that it holds at a time beyond those held when it starts.

        A product and its sum are two operations; only products of matrices, convolutions and attention count. What the
        call returns is released; what it left behind, such as a cache, is not counted again in another call.
        """
        self.flops, before = 0, self.held_bytes()
        self.peak = before
        with torch.no_grad(), FusedAttention() as attention, self:
            function()
        return self.flops + attention.flops, self.peak - before


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def tower_costs(model: DeltaLlavaForConditionalGeneration) -> tuple[int, int]:
    """Operations and peak bytes of the vision tower for one image, up to the deepest layer that the model reads; the
    hidden states that it keeps are among the bytes. The model is on the meta device.
    """
    side = model.config.vision_config.image_size
    pixels = torch.empty(1, 3, side, side, dtype=model.dtype, device="meta")
    return Counter().measure(lambda: model.model.get_patch_features(pixels))


def projector_costs(projector: DeltaLlavaProjector, scale_factor: int) -> tuple[int, int]:
    """Operations and peak bytes of the projector for one image, without the features that go in. It may be on any
    device: its features are made there.
    """
    config = projector.config
    shape = (1, config.grid_size**2, config.vision_config.hidden_size)
    parameter = next(projector.parameters())
    features = torch.empty(shape, dtype=projector.dtype, device=parameter.device)
    levels = [features] * len(config.vision_feature_levels)
    return Counter().measure(lambda: projector(features, levels, scale_factor))


@dataclass(frozen=True)
class LanguageCosts:
    """Operations and peak bytes, without the cache, of the prefill and of decoding; `cache_bytes` after the prefill."""

    prefill_flops: int
    prefill_bytes: int
    decode_flops: int
    decode_bytes: int
    cache_bytes: int


def language_costs(model: DeltaLlavaForConditionalGeneration, prompt: int, new_tokens: int) -> LanguageCosts:
    """Of a prompt of `prompt` tokens and an answer, whose first token the prefill gives; on the meta device.

    Every further token of the answer reads one more position than the one before, so two steps of decoding tell the
    operations of all of them.
    """
    embeddings = torch.empty(1, prompt, model.config.text_config.hidden_size, dtype=model.dtype, device="meta")
    cache, counter = DynamicCache(), Counter()

    def run(tokens: torch.Tensor) -> Any:
        outputs = model.model.language_model(inputs_embeds=tokens, use_cache=True, **{CACHE_NAME: cache})
        return model.lm_head(outputs.last_hidden_state[:, -1:])

    prefill_flops, prefill_bytes = counter.measure(lambda: run(embeddings))
    cache_bytes = counter.held_bytes()  # the last layer runs when nearly all of it is there
    first, decode_bytes = counter.measure(lambda: run(embeddings[:, :1]))
    second, _ = counter.measure(lambda: run(embeddings[:, :1]))
    steps = new_tokens - 1
    decode_flops = steps * first + steps * (steps - 1) // 2 * (second - first)
    return LanguageCosts(prefill_flops, prefill_bytes - cache_bytes, decode_flops, decode_bytes, cache_bytes)


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
        config: of the model; its tower is a CLIP, a SigLIP or a DINOv2.
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
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    parameters = {"tower": _count(tower), "projector": _count(projector)}
    parameters["language_model"] = _count(model) - sum(parameters.values())
    tower_read = _count(tower.embeddings) + _count(_layers_read(model))
    # Of the embedding only the rows of the prompt are read.
    embedding = model.model.language_model.get_input_embeddings().weight
    language_model_read = _count(model.model.language_model) - embedding.numel() + _count(model.lm_head)
    tower_flops, tower_bytes = tower_costs(model)
    profiles = []
    for budget in config.visual_token_budgets if budgets is None else budgets:
        scale_factor, prompt = config.scale_factor_for(budget), text_tokens + budget
        projector_flops, projector_bytes = projector_costs(projector, scale_factor)
        language = language_costs(model, prompt, new_tokens)
        flops = (tower_flops, projector_flops, language.prefill_flops, language.decode_flops)
        read = (tower_read, _projector_read(projector, scale_factor), language_model_read, language_model_read)
        activations = (tower_bytes, projector_bytes, language.prefill_bytes, language.decode_bytes)
        profiles.append(
            BudgetProfile(
                num_visual_tokens=budget,
                exact_flops=dict(zip(PARTS, flops)),
                paper_flops=paper_flops(config, budget, text_tokens, new_tokens),
                weight_bytes={part: count * dtype.itemsize for part, count in zip(PARTS, read)},
                activation_bytes=dict(zip(PARTS, activations)),
                kv_cache_bytes=language.cache_bytes // prompt * (prompt + new_tokens - 1),
            )
        )
    return ModelProfile(text_tokens, new_tokens, dtype_name(dtype), parameters, profiles)


def _layers_read(model: DeltaLlavaForConditionalGeneration) -> nn.ModuleList:
    """The tower's layers up to the deepest one whose output is read."""
    config, tower = model.config, model.model.vision_tower
    if not hasattr(tower, "encoder"):
        raise ValueError(
            f"vision_config.model_type={tower.config.model_type!r}: only CLIP, SigLIP and DINOv2 can be profiled."
        )
    layers = getattr(tower.encoder, "layers", None) or tower.encoder.layer  # as DINOv2 calls them
    return layers[: config.vision_feature_indices[-1]]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _projector_read(projector: DeltaLlavaProjector, scale_factor: int) -> int:
    """Parameters of the projector that inference reads: at one key per window only those behind the values."""
    if projector.config.projector_layout == "released" and scale_factor == 1:
        attention = projector.window_attention
        packed = attention.in_proj_weight.numel() + attention.in_proj_bias.numel()
        return sum(map(_count, (projector.value, attention.out_proj, projector.feed_forward))) + packed // 3
    return _count(projector)


def paper_flops(config: DeltaLlavaConfig, budget: int, text_tokens: int, new_tokens: int) -> dict[str, int]:
    """The counts that reproduce Fig. 3 and section 6.5, by part.

    A layer of width d with an MLP of width m costs `2 S (4 d^2 + 2 d m) + 4 S^2 d` for S tokens, in the tower and in the
    language model (equation 14), and each new token the same with S0 in place of the second S (equation 15). For the
    projector equation (12) gives no constants; see `PAPER_NOTE`.
    """
    vision, text = config.vision_config, config.text_config
    patches, prompt = config.grid_size**2, text_tokens + budget
    seen = patches + config.num_prefix_tokens
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
    inner = getattr(config, "intermediate_size", None) or width * config.mlp_ratio  # as DINOv2's config says it
    return 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens * context * width


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
