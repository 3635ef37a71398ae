"""Names and shapes of the weights in the authors' layout and in ours, and the tensors that a repo consists of.

A pattern is literal text with three wildcards: `*` any text, `#` a whole number, `{a,b}` one of the given words.
The text that the wildcards of a source pattern match replaces, in order, the wildcards of the target pattern.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..modeling.vision_tower_delta_llava import SAVED_ATTENTION
from ..utils.errors import DeltaLlavaError, explain_errors, format_names
from .weights import Checkpoint, LazyTensor


@dataclass(frozen=True)
class Rule:
    """Tensors named `source` become `target`; a 1x1 convolution becomes a matrix, without its last two axes."""

    source: str
    target: str
    conv_1x1: bool = False

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return _compile(self.source)

    def rename(self, name: str) -> str | None:
        """The target name of `name`, or None where the rule does not apply."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        words = iter(match.groups())
        return _WILDCARD.sub(lambda _: next(words), self.target)

    def target_shape(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The shape of the target of a tensor `name` of `shape`; DeltaLlavaError where it must be a 1x1 convolution."""
        if not self.conv_1x1 or len(shape) == 2:
            return shape
        if len(shape) != 4 or shape[2:] != (1, 1):
            raise DeltaLlavaError(f"{name} should be a 1x1 convolution of shape (out, in, 1, 1), but is {shape}.")
        return shape[:2]


_WILDCARD = re.compile(r"\*|#|\{[^}]*\}")
_WILDCARD_REGEX = {"*": r"(.+)", "#": r"(\d+)"}


def _compile(pattern: str) -> re.Pattern[str]:
    parts, end = [], 0
    for wildcard in _WILDCARD.finditer(pattern):
        parts.append(re.escape(pattern[end : wildcard.start()]))
        words = "|".join(re.escape(word) for word in wildcard[0][1:-1].split(","))
        parts.append(_WILDCARD_REGEX.get(wildcard[0], f"({words})"))
        end = wildcard.end()
    return re.compile("".join(parts) + re.escape(pattern[end:]))


# The projector in the authors' checkpoints, and in a model of ours.
SOURCE_PROJECTOR = "model.mm_projector."
PROJECTOR = "model.multi_modal_projector."
_BLOCK, _OUR_BLOCK = SOURCE_PROJECTOR + "combined_block.ntb.", PROJECTOR + "block."
SOURCE_TOWER = "model.vision_tower."
_TOWER_SOURCE = SOURCE_TOWER + "vision_tower."
# Some transformers versions have the `vision_model.` level of CLIP and SigLIP in memory and others not; this form loads in
# all of them.
_TOWER_TARGET = f"{SOURCE_TOWER}vision_model."
# DINOv2 never had that level.
_DINOV2 = re.compile(
    r"encoder\.layer\.|layernorm\.|embeddings\.(cls_token|mask_token|register_tokens|position_embeddings)$|"
    r"embeddings\.patch_embeddings\."
)
SOURCE_EMBEDDINGS, EMBEDDINGS = "model.embed_tokens.weight", "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"  # in both

ROLES = ("query", "key", "value")
RULES = (
    # DeltaProjections: a shared base, a low-rank update kept apart, a norm.
    *(
        Rule(f"{SOURCE_PROJECTOR}{role[0]}_proj_1.{theirs}", f"{PROJECTOR}{role}.{ours}")
        for role in ROLES
        for theirs, ours in (
            ("shared_weight.weight", "weight"),
            ("U", "delta_u"),
            ("V", "delta_v"),
            ("norm.{weight,bias}", "norm.{weight,bias}"),
        )
    ),
    # Window attention.
    Rule(SOURCE_PROJECTOR + "clip_attn.in_proj_{weight,bias}", PROJECTOR + "window_attention.in_proj_{weight,bias}"),
    Rule(SOURCE_PROJECTOR + "clip_attn.out_proj.{weight,bias}", PROJECTOR + "window_attention.out_proj.{weight,bias}"),
    # The transformer block that refines the queries.
    Rule(_BLOCK + "patch_embed.conv.weight", _OUR_BLOCK + "stem.weight", conv_1x1=True),
    Rule(_BLOCK + "norm_mhsa.{weight,bias}", _OUR_BLOCK + "attention_norm.{weight,bias}"),
    Rule(_BLOCK + "e_mhsa.norm.{weight,bias}", _OUR_BLOCK + "attention.norm.{weight,bias}"),
    *(
        Rule(f"{_BLOCK}e_mhsa.{role[0]}.{{weight,bias}}", f"{_OUR_BLOCK}attention.{role}.{{weight,bias}}")
        for role in ROLES
    ),
    Rule(_BLOCK + "e_mhsa.proj.{weight,bias}", _OUR_BLOCK + "attention.out_proj.{weight,bias}"),
    Rule(_BLOCK + "projection.conv.weight", _OUR_BLOCK + "local_proj.weight", conv_1x1=True),
    Rule(_BLOCK + "mhca.group_conv3x3.weight", _OUR_BLOCK + "conv_attention.group_conv.weight"),
    Rule(_BLOCK + "mhca.norm.{weight,bias}", _OUR_BLOCK + "conv_attention.norm.{weight,bias}"),
    Rule(_BLOCK + "mhca.projection.weight", _OUR_BLOCK + "conv_attention.out_proj.weight", conv_1x1=True),
    Rule(_BLOCK + "mlp.conv{1,2}.weight", _OUR_BLOCK + "mlp.fc{1,2}.weight", conv_1x1=True),
    Rule(_BLOCK + "mlp.conv{1,2}.bias", _OUR_BLOCK + "mlp.fc{1,2}.bias"),
    # Feed-forward into the language model's width.
    Rule(SOURCE_PROJECTOR + "mlp.0.{weight,bias}", PROJECTOR + "feed_forward.fc1.{weight,bias}"),
    Rule(SOURCE_PROJECTOR + "mlp.2.{weight,bias}", PROJECTOR + "feed_forward.fc2.{weight,bias}"),
    # Vision tower, with and without the inner level that newer transformers dropped.
    Rule(_TOWER_SOURCE + "encoder.layer.*", SOURCE_TOWER + "encoder.layer.*"),
    Rule(_TOWER_SOURCE + "layernorm.{weight,bias}", SOURCE_TOWER + "layernorm.{weight,bias}"),
    Rule(
        _TOWER_SOURCE + "embeddings.{cls_token,mask_token,register_tokens,position_embeddings}",
        SOURCE_TOWER + "embeddings.{cls_token,mask_token,register_tokens,position_embeddings}",
    ),
    Rule(_TOWER_SOURCE + "embeddings.patch_embeddings.*", SOURCE_TOWER + "embeddings.patch_embeddings.*"),
    Rule(_TOWER_SOURCE + "vision_model.*", _TOWER_TARGET + "*"),
    Rule(_TOWER_SOURCE + "*", _TOWER_TARGET + "*"),
    # Language model: every supported one keeps to these names.
    Rule(SOURCE_EMBEDDINGS, EMBEDDINGS),
    Rule("model.layers.#.*", "model.language_model.layers.#.*"),
    Rule("model.norm.{weight,bias}", "model.language_model.norm.{weight,bias}"),
    Rule("lm_head.{weight,bias}", "lm_head.{weight,bias}"),
)

_COMPUTED = "a table that is computed, not trained"
# Looked up before RULES: buffers that some versions of the training stack saved.
IGNORED = {
    SOURCE_PROJECTOR + "pos_embed": _COMPUTED,
    "model.layers.#.self_attn.rotary_emb.inv_freq": _COMPUTED,
    "model.rotary_emb.inv_freq": _COMPUTED,
    _TOWER_SOURCE + "vision_model.embeddings.position_ids": _COMPUTED,
    _TOWER_SOURCE + "embeddings.position_ids": _COMPUTED,
}
_IGNORED_REGEX = tuple((_compile(pattern), reason) for pattern, reason in IGNORED.items())
AnyTensor = TypeVar("AnyTensor", torch.Tensor, LazyTensor)


@dataclass(frozen=True)
class NameMap:
    """Where each source name goes: `rules` maps it to (target name, rule), `ignored` to the reason it is left out."""

    rules: dict[str, tuple[str, Rule]]
    ignored: dict[str, str]

    def rename(self, tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
        """`tensors` under their target names and in their target shapes.

        Raises:
            DeltaLlavaError: a tensor that must be a 1x1 convolution has another shape.
        """
        return {
            target: tensors[name].reshape(rule.target_shape(tuple(tensors[name].shape), name))
            for name, (target, rule) in self.rules.items()
        }


def map_names(names: Iterable[str]) -> NameMap:
    """Look every name up in `IGNORED` and `RULES`.

    Raises:
        DeltaLlavaError: listing unknown names, or names with one target.
    """
    rules: dict[str, tuple[str, Rule]] = {}
    ignored: dict[str, str] = {}
    sources: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in names:
        reason = next((reason for regex, reason in _IGNORED_REGEX if regex.fullmatch(name)), None)
        match = next(((target, rule) for rule in RULES if (target := rule.rename(name)) is not None), None)
        if reason is not None:
            ignored[name] = reason
        elif match is not None:
            rules[name] = match
            sources.setdefault(match[0], []).append(name)
        else:
            unknown.append(name)
    if unknown:
        raise DeltaLlavaError(f"Not tensors of a released Delta-LLaVA checkpoint: {format_names(unknown)}.")
    clashes = [f"{' and '.join(sorted(group))} (both {target})" for target, group in sources.items() if group[1:]]
    if clashes:
        raise DeltaLlavaError(f"Several tensors have the same target: {format_names(clashes)}.")
    return NameMap(rules, ignored)


def find_delta_rank(tensors: Mapping[str, torch.Tensor | LazyTensor]) -> int | None:
    """Rank of the projector's updates, by the authors' names or ours; None where it has none."""
    factor = tensors.get(f"{SOURCE_PROJECTOR}q_proj_1.U", tensors.get(f"{PROJECTOR}query.delta_u"))
    return int(factor.shape[-1]) if factor is not None and len(factor.shape) == 2 else None


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of an authors' checkpoint to the names of a `DeltaLlavaForConditionalGeneration` repo.

    Works on any subset (only the projector, only the language model, ...). Values, dtypes and devices stay; 1x1
    convolutions lose their two trailing axes, as views where possible. Tensors that hold nothing trained (`IGNORED`)
    are left out. The vision tower gets the names under which it is published, which `from_pretrained` reads on every
    supported transformers version.

    Args:
        state_dict: full checkpoint names (`model.mm_projector...`, `model.layers...`) to tensors.

    Raises:
        DeltaLlavaError: listing unknown names, names with one target, or a 1x1 convolution of another shape.
    """
    return map_names(state_dict).rename(state_dict)


@dataclass(frozen=True)
class TensorPlan:
    """`tensors` in the order of the model, by published name; `ignored` maps source names to reasons."""

    tensors: dict[str, LazyTensor]
    ignored: dict[str, str]


def plan_tensors(
    checkpoint: Checkpoint,
    names: NameMap,
    tower: Checkpoint | None,
    config: DeltaLlavaConfig,
    dtype: torch.dtype | None,
) -> TensorPlan:
    """Decide what every tensor of the repo is read from. Reads no values, except to compare a tied head.

    Args:
        checkpoint: the source, and `names`, where its tensors go.
        tower: the vision tower's tensors by their names inside the tower, where the source has none.
        config: of the result, with its final vocabulary.
        dtype: to cast to; None keeps each tensor's own.

    Raises:
        DeltaLlavaError: listing tensors that are missing, unexpected, or of another shape than the model's.
    """
    tensors = names.rename(checkpoint.tensors)
    if tower is not None:
        tensors |= {published_name(SOURCE_TOWER + name): tensor for name, tensor in tower.tensors.items()}
    _check_dtypes(tensors)
    _check_projector_width(tensors, config.vision_config)
    ignored = dict(names.ignored)
    if config.tie_word_embeddings and HEAD in tensors:
        _check_tied_head(tensors[EMBEDDINGS], tensors.pop(HEAD))
        ignored[HEAD] = "equal to the embeddings, to which the config ties it"
    _add_rows(tensors, config)
    expected = expected_shapes(config)
    if problems := compare_shapes(tensors, expected):
        raise DeltaLlavaError(" ".join(problems))
    ordered = {name: tensors[name] for name in expected}
    if dtype is not None:
        ordered = {n: tensor.map(lambda value: value.to(dtype), dtype=dtype) for n, tensor in ordered.items()}
    return TensorPlan(ordered, ignored)


def _add_rows(tensors: dict[str, LazyTensor], config: DeltaLlavaConfig) -> None:
    """Add rows for new tokens to the embeddings and the head, in place.

    No new token may ever win an argmax. A row that repeats row 0 gives the logit of token 0, and a tie goes to the
    first. The image token's embedding is the mean row instead, because it must differ from every other row: models that
    are given embeddings find their placeholders by it. As a row of a tied head it gives the mean of all logits.
    """
    embeddings, size = tensors.get(EMBEDDINGS), config.text_config.vocab_size
    if embeddings is None or len(embeddings.shape) != 2 or embeddings.shape[0] >= size:
        return
    for name, mean_row in ((EMBEDDINGS, config.image_token_id), (HEAD, None)):
        table = tensors.get(name)
        if table is not None and table.shape == embeddings.shape:
            tensors[name] = table.map(
                lambda value, mean_row=mean_row: torch.cat([value, new_rows(value, size, mean_row)]),  # type: ignore[misc]
                shape=(size, *table.shape[1:]),
            )


def new_rows(table: torch.Tensor, size: int, mean_row: int | None) -> torch.Tensor:
    """The (size - rows, width) rows that conversion adds to a (rows, width) table; `mean_row` is an index into both."""
    rows = table[:1].repeat(size - len(table), 1)
    if mean_row is not None and mean_row >= len(table):
        rows[mean_row - len(table)] = table.mean(0, dtype=torch.float32).to(table.dtype)
    return rows


def _check_dtypes(tensors: Mapping[str, LazyTensor]) -> None:
    integers = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]
    if integers:
        raise DeltaLlavaError(
            f"Weights should be floating-point numbers; is the checkpoint quantised? {format_names(integers)}."
        )


def _check_projector_width(tensors: Mapping[str, LazyTensor], vision_config: PreTrainedConfig) -> None:
    base = tensors.get(f"{PROJECTOR}query.weight")
    if base is not None and len(base.shape) == 2 and base.shape[1] != vision_config.hidden_size:
        raise DeltaLlavaError(
            f"The projector was trained on a vision tower {base.shape[1]} wide, but this tower is "
            f"{vision_config.hidden_size} wide; pass the right one as `vision_tower=...`."
        )


def _check_tied_head(embeddings: LazyTensor, head: LazyTensor) -> None:
    if embeddings.shape != head.shape or not torch.equal(embeddings.load(), head.load()):
        raise DeltaLlavaError(
            "config.json ties lm_head.weight to the embeddings (tie_word_embeddings), but the checkpoint's lm_head.weight "
            "differs from them; set tie_word_embeddings to what the model was trained with."
        )


def expected_shapes(config: DeltaLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of everything the model stores.

    Raises:
        DeltaLlavaError: a layer refuses a setting.
    """
    with explain_errors("The settings in config.json do not give a model"), torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    shapes = {published_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def published_name(name: str) -> str:
    """The name in files of a tensor of a model in memory: towers have others there, in some versions of transformers."""
    inner = tower_part(name)
    if inner is None:
        return name
    if not _DINOV2.match(inner):
        return _TOWER_TARGET + inner
    for published, here in SAVED_ATTENTION.items():
        inner = inner.replace(here, published)
    return SOURCE_TOWER + inner


def tower_part(name: str) -> str | None:
    """The name inside the tower of one of its tensors, or None for a tensor of something else."""
    return name.removeprefix(SOURCE_TOWER).removeprefix("vision_model.") if name.startswith(SOURCE_TOWER) else None


def compare_shapes(tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A sentence each on the tensors that are missing, unexpected, or of another shape than `expected`."""
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"Missing tensors: {format_names(missing)}.")
    if unexpected := tensors.keys() - expected.keys():
        problems.append(f"Tensors that the model of config.json does not have: {format_names(unexpected)}.")
    wrong = [
        f"{name} is {tensor.shape} instead of {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if wrong:
        problems.append(f"Tensors of other shapes than config.json and the vision tower give: {format_names(wrong)}.")
    return problems


# A tensor that every delta projector has, whatever its ablations and its rank.
_DELTA = "q_proj_1.shared_weight.weight"
_LAYER = re.compile(r"(?:(\d+)\.)?(weight|bias)")
_TRAIN = "a Delta-LLaVA can be trained on its vision tower and language model (`delta-llava train`, docs/training.md)"


def describe_other_projector(tensors: Mapping[str, LazyTensor], name: str) -> str | None:
    """A sentence on the projector of a checkpoint and what to do with it; None where it is a delta projector.

    Args:
        tensors: of the checkpoint, by the names in its files.
        name: of the checkpoint, for the sentence.
    """
    shapes = {n.removeprefix(SOURCE_PROJECTOR): t.shape for n, t in tensors.items() if n.startswith(SOURCE_PROJECTOR)}
    if any(n == _DELTA or n.startswith("combined_block.") or n.endswith(("_proj_1.U", "_proj_1.V")) for n in shapes):
        return None
    if not shapes:
        return _describe_missing_projector(tensors, name)
    if layers := _linear_layers(shapes):
        kind = "a single linear layer (linear)" if len(layers) == 1 else f"LLaVA's own MLP (mlp{len(layers)}x_gelu)"
        widths = " -> ".join(str(width) for width in [layers[0][1], *(out for out, _ in layers)])
        return (
            f"The projector of {name} is {kind}, {widths} wide, and not a delta projector, whatever its config says: it "
            f"runs in LLaVA's code, or in transformers after its convert_llava_weights_to_hf.py; {_TRAIN}."
        )
    if "q_proj_1.weight" in shapes or {"ln_q_1.weight", "ln_k_1.weight"} & shapes.keys():
        return (
            f"The projector of {name} is TokenPacker's, with plain query, key and value projections, and not a delta "
            f"projector: it runs in TokenPacker's code; {_TRAIN}."
        )
    return (
        f"The projector of {name} is not a delta projector and of an unknown kind; its tensors are "
        f"{format_names(shapes, limit=6)}; {_TRAIN}."
    )


def _linear_layers(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """(out, in) of the projector's linear layers; empty where it has anything else."""
    layers: dict[int, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = _LAYER.fullmatch(name)
        if match is None or (match[2] == "weight" and len(shape) != 2):
            return []
        if match[2] == "weight":
            layers[int(match[1] or 0)] = shape
    return [layers[number] for number in sorted(layers)]


def _describe_missing_projector(tensors: Mapping[str, LazyTensor], name: str) -> str:
    if any("multi_modal_projector.query." in tensor for tensor in tensors):
        return f"{name} is already a Delta-LLaVA repo, which needs no conversion; `delta-llava inspect` looks into it."
    if any("multi_modal_projector." in tensor for tensor in tensors):
        return (
            f"{name} is a model in the layout of transformers, which needs no conversion: AutoModelForImageTextToText loads "
            f"it; {_TRAIN}."
        )
    return (
        f"{name} has no projector (no tensor is called {SOURCE_PROJECTOR}...); convert the folder that has the trained "
        "projector, with its mm_projector.bin, and pass this one as `base_model=...`."
    )
