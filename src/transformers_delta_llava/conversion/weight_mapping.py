"""Names and shapes of the weights in the authors' layout, and in ours.

A pattern is literal text with three wildcards: `*` any text, `#` a whole number, `{a,b}` one of the given words.
What the wildcards of a source pattern match is put, in order, into those of the target pattern.

The released projector keeps its 1x1 convolutions as linear maps over tokens here: `Shape.CONV_1X1` drops their two
trailing axes of length one.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..utils.errors import DeltaLlavaError, format_names, one_line
from .checkpoint import Checkpoint, LazyTensor


class Shape(Enum):
    """What happens to the shape of a tensor on its way."""

    KEEP = "keep"
    CONV_1X1 = "(out, in, 1, 1) -> (out, in)"


@dataclass(frozen=True)
class Rule:
    """One row of the table: tensors named `source` become `target`."""

    source: str
    target: str
    shape: Shape = Shape.KEEP

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return _compile(self.source)

    def rename(self, name: str) -> str | None:
        """The target name of `name`, or None where the rule does not apply."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        found = iter(match.groups())
        return _WILDCARD.sub(lambda _: next(found), self.target)

    def reshape(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The shape of the target for a source of `shape`; DeltaLlavaError where a 1x1 convolution is none."""
        if self.shape is Shape.KEEP or len(shape) == 2:
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


# The projector's level in the authors' checkpoints.
SOURCE_PROJECTOR = _SOURCE = "model.mm_projector."
_BLOCK_SOURCE = _SOURCE + "combined_block.ntb."
# And in a model of ours.
PROJECTOR = _TARGET = "model.multi_modal_projector."
_BLOCK_TARGET = _TARGET + "block."
_TOWER_SOURCE = "model.vision_tower.vision_tower."
# Published with the `vision_model.` level, which some transformers versions have in memory and others not:
# this form loads in all of them.
TOWER_TARGET = "model.vision_tower.vision_model."

RULES = (
    # DeltaProjections: a shared base, a low-rank update kept apart, a norm.
    Rule(_SOURCE + "{q,k,v}_proj_1.shared_weight.weight", _TARGET + "{q,k,v}_proj.weight"),
    Rule(_SOURCE + "{q,k,v}_proj_1.U", _TARGET + "{q,k,v}_proj.delta_u"),
    Rule(_SOURCE + "{q,k,v}_proj_1.V", _TARGET + "{q,k,v}_proj.delta_v"),
    Rule(_SOURCE + "{q,k,v}_proj_1.norm.{weight,bias}", _TARGET + "{q,k,v}_proj.norm.{weight,bias}"),
    # Window attention.
    Rule(_SOURCE + "clip_attn.in_proj_{weight,bias}", _TARGET + "window_attention.in_proj_{weight,bias}"),
    Rule(_SOURCE + "clip_attn.out_proj.{weight,bias}", _TARGET + "window_attention.out_proj.{weight,bias}"),
    # The transformer block that refines the queries.
    Rule(_BLOCK_SOURCE + "patch_embed.conv.weight", _BLOCK_TARGET + "stem.weight", Shape.CONV_1X1),
    Rule(_BLOCK_SOURCE + "norm_mhsa.{weight,bias}", _BLOCK_TARGET + "attention_norm.{weight,bias}"),
    Rule(_BLOCK_SOURCE + "e_mhsa.norm.{weight,bias}", _BLOCK_TARGET + "attention.norm.{weight,bias}"),
    Rule(_BLOCK_SOURCE + "e_mhsa.{q,k,v}.{weight,bias}", _BLOCK_TARGET + "attention.{q,k,v}_proj.{weight,bias}"),
    Rule(_BLOCK_SOURCE + "e_mhsa.proj.{weight,bias}", _BLOCK_TARGET + "attention.out_proj.{weight,bias}"),
    Rule(_BLOCK_SOURCE + "projection.conv.weight", _BLOCK_TARGET + "local_proj.weight", Shape.CONV_1X1),
    Rule(_BLOCK_SOURCE + "mhca.group_conv3x3.weight", _BLOCK_TARGET + "conv_attention.group_conv.weight"),
    Rule(_BLOCK_SOURCE + "mhca.norm.{weight,bias}", _BLOCK_TARGET + "conv_attention.norm.{weight,bias}"),
    Rule(_BLOCK_SOURCE + "mhca.projection.weight", _BLOCK_TARGET + "conv_attention.out_proj.weight", Shape.CONV_1X1),
    Rule(_BLOCK_SOURCE + "mlp.conv{1,2}.weight", _BLOCK_TARGET + "mlp.fc{1,2}.weight", Shape.CONV_1X1),
    Rule(_BLOCK_SOURCE + "mlp.conv{1,2}.bias", _BLOCK_TARGET + "mlp.fc{1,2}.bias"),
    # Feed-forward into the language model's width.
    Rule(_SOURCE + "mlp.0.{weight,bias}", _TARGET + "feed_forward.fc1.{weight,bias}"),
    Rule(_SOURCE + "mlp.2.{weight,bias}", _TARGET + "feed_forward.fc2.{weight,bias}"),
    # Vision tower, with and without the inner level that newer transformers dropped.
    Rule(_TOWER_SOURCE + "vision_model.*", TOWER_TARGET + "*"),
    Rule(_TOWER_SOURCE + "*", TOWER_TARGET + "*"),
    # Language model: every supported one keeps to these names.
    Rule("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    Rule("model.layers.#.*", "model.language_model.layers.#.*"),
    Rule("model.norm.{weight,bias}", "model.language_model.norm.{weight,bias}"),
    Rule("lm_head.{weight,bias}", "lm_head.{weight,bias}"),
)

_COMPUTED = "a table that is computed, not trained"
# Looked up before RULES: buffers that some versions of the training stack saved.
IGNORED = {
    _SOURCE + "pos_embed": _COMPUTED,
    "model.layers.#.self_attn.rotary_emb.inv_freq": _COMPUTED,
    "model.rotary_emb.inv_freq": _COMPUTED,
    _TOWER_SOURCE + "vision_model.embeddings.position_ids": _COMPUTED,
    _TOWER_SOURCE + "embeddings.position_ids": _COMPUTED,
}
_IGNORED_REGEX = tuple((_compile(pattern), reason) for pattern, reason in IGNORED.items())


@dataclass(frozen=True)
class NameMap:
    """Where each source name goes: `rules` maps it to (target name, rule), `ignored` to the reason it is left out."""

    rules: dict[str, tuple[str, Rule]]
    ignored: dict[str, str]


def map_names(names: Iterable[str]) -> NameMap:
    """Look every name up in the table.

    Raises:
        DeltaLlavaError: listing the names that the table does not know, or those that claim one target.
    """
    rules: dict[str, tuple[str, Rule]] = {}
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        reason = next((reason for regex, reason in _IGNORED_REGEX if regex.fullmatch(name)), None)
        row = next(((target, rule) for rule in RULES if (target := rule.rename(name)) is not None), None)
        if reason is not None:
            ignored[name] = reason
        elif row is not None:
            rules[name] = row
        else:
            unknown.append(name)
    if unknown:
        raise DeltaLlavaError(f"Not tensors of a released Delta-LLaVA checkpoint: {format_names(unknown)}.")
    _refuse_duplicates(rules)
    return NameMap(rules, ignored)


def _refuse_duplicates(rules: Mapping[str, tuple[str, Rule]]) -> None:
    by_target: dict[str, list[str]] = {}
    for name, (target, _) in rules.items():
        by_target.setdefault(target, []).append(name)
    clashes = [f"{' and '.join(sorted(names))} (both {target})" for target, names in by_target.items() if names[1:]]
    if clashes:
        raise DeltaLlavaError(f"Several tensors claim one place: {format_names(clashes)}.")


def delta_rank(tensors: Mapping[str, torch.Tensor | LazyTensor]) -> int | None:
    """Rank of the projector's updates in an authors' checkpoint; None where it has none."""
    factor = tensors.get(f"{SOURCE_PROJECTOR}q_proj_1.U")
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
        DeltaLlavaError: listing names that are unknown, names that claim one target, or a 1x1 convolution that is none.
    """
    return {
        target: state_dict[name].reshape(rule.reshape(tuple(state_dict[name].shape), name))
        for name, (target, rule) in map_names(state_dict).rules.items()
    }


SOURCE_EMBEDDINGS = "model.embed_tokens.weight"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
_QUERY_BASE = f"{PROJECTOR}q_proj.weight"


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
    """Decide what every tensor of the repo is made of. Reads no values, except to compare a tied head.

    Args:
        checkpoint: the source, and `names`, where its tensors go.
        tower: the vision tower's tensors by their names inside the tower, where the source has none.
        config: of the result, with its final vocabulary.
        dtype: to cast to; None keeps each tensor's own.

    Raises:
        DeltaLlavaError: listing tensors that are missing, have no place, or have another shape than the model's.
    """
    found = {
        target: _then(checkpoint.tensors[name], _reshape(rule.reshape(checkpoint.tensors[name].shape, name)))
        for name, (target, rule) in names.rules.items()
    }
    if tower is not None:
        found |= {TOWER_TARGET + name: tensor for name, tensor in tower.tensors.items()}
    _check_dtypes(found)
    _check_projector_width(found, config.vision_config)
    ignored = dict(names.ignored)
    if config.tie_word_embeddings and HEAD in found:
        _check_tied_head(found[EMBEDDINGS], found.pop(HEAD))
        ignored[HEAD] = "equal to the embeddings, to which the config ties it"
    _grow(found, config)
    ordered = _match(found, expected_shapes(config))
    if dtype is not None:
        ordered = {name: _then(tensor, _cast(dtype)) for name, tensor in ordered.items()}
    return TensorPlan(ordered, ignored)


@dataclass(frozen=True)
class _Step:
    """A step between reading and writing: the shape and dtype that come out (None: as they were), and the work."""

    work: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


def _then(tensor: LazyTensor, step: _Step) -> LazyTensor:
    return replace(
        tensor,
        shape=tensor.shape if step.shape is None else step.shape,
        dtype=step.dtype or tensor.dtype,
        load=lambda: step.work(tensor.load()),
    )


def _reshape(shape: tuple[int, ...]) -> _Step:
    return _Step(lambda tensor: tensor.reshape(shape), shape=shape)


def _cast(dtype: torch.dtype) -> _Step:
    return _Step(lambda tensor: tensor.to(dtype), dtype=dtype)


def _grow(found: dict[str, LazyTensor], config: DeltaLlavaConfig) -> None:
    """Add rows for new tokens to the embeddings and the head, in place.

    No new token may ever win an argmax. A row that repeats row 0 gives the logit of token 0, and a tie goes to the
    first. The image token's embedding is the mean row instead, because it must differ from every other row: models that
    are given embeddings find their placeholders by it. As a row of a tied head it gives the mean of all logits.
    """
    embeddings, size = found.get(EMBEDDINGS), config.text_config.vocab_size
    if embeddings is None or len(embeddings.shape) != 2 or embeddings.shape[0] >= size:
        return
    for name, mean_row in ((EMBEDDINGS, config.image_token_id), (HEAD, None)):
        tensor = found.get(name)
        if tensor is not None and tensor.shape == embeddings.shape:
            found[name] = _then(tensor, _add_rows(tensor.shape, size, mean_row))


def _add_rows(shape: tuple[int, ...], size: int, mean_row: int | None) -> _Step:
    return _Step(lambda matrix: torch.cat([matrix, new_rows(matrix, size, mean_row)]), shape=(size, *shape[1:]))


def new_rows(matrix: torch.Tensor, size: int, mean_row: int | None) -> torch.Tensor:
    """The (size - rows, width) rows that conversion puts below a (rows, width) table; `mean_row` is a row's index in all."""
    rows = matrix[:1].repeat(size - len(matrix), 1)
    if mean_row is not None and mean_row >= len(matrix):
        rows[mean_row - len(matrix)] = matrix.mean(0, dtype=torch.float32).to(matrix.dtype)
    return rows


def _check_dtypes(found: dict[str, LazyTensor]) -> None:
    strange = [f"{name} ({tensor.dtype})" for name, tensor in found.items() if not tensor.dtype.is_floating_point]
    if strange:
        raise DeltaLlavaError(
            f"Weights should be floating-point numbers; a quantised checkpoint? {format_names(strange)}."
        )


def _check_projector_width(found: dict[str, LazyTensor], vision_config: PreTrainedConfig) -> None:
    base = found.get(_QUERY_BASE)
    if base is not None and len(base.shape) == 2 and base.shape[1] != vision_config.hidden_size:
        raise DeltaLlavaError(
            f"The projector was trained on a vision tower {base.shape[1]} wide, but this tower is "
            f"{vision_config.hidden_size} wide; give the right one (--vision-tower)."
        )


def _check_tied_head(embeddings: LazyTensor, head: LazyTensor) -> None:
    if embeddings.shape != head.shape or not torch.equal(embeddings.load(), head.load()):
        raise DeltaLlavaError(
            "config.json ties lm_head.weight to the embeddings (tie_word_embeddings), but the checkpoint's lm_head.weight "
            "differs from them; set tie_word_embeddings to what the model was trained with."
        )


def expected_shapes(config: DeltaLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of everything the model stores."""
    try:
        with torch.device("meta"):
            model = DeltaLlavaForConditionalGeneration(config)
    except Exception as error:  # any layer of any language model may refuse a setting
        raise DeltaLlavaError(f"No model can be built from the settings in config.json: {one_line(error)}.") from error
    shapes = {published_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def published_name(name: str) -> str:
    """`name` with the tower's `vision_model.` level, which models in memory may lack."""
    in_memory = "model.vision_tower."
    if name.startswith(in_memory) and not name.startswith(TOWER_TARGET):
        return TOWER_TARGET + name.removeprefix(in_memory)
    return name


def _match(found: dict[str, LazyTensor], expected: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """`found` in the model's order; refuses any difference in names or shapes."""
    faults = []
    if missing := expected.keys() - found.keys():
        faults.append(f"the checkpoint lacks tensors that the model needs: {format_names(missing)}")
    if homeless := found.keys() - expected.keys():
        faults.append(f"the model that config.json describes has no place for {format_names(homeless)}")
    if faults:
        text = "; ".join(faults)
        raise DeltaLlavaError(f"{text[0].upper()}{text[1:]}.")
    wrong = [
        f"{name} is {found[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if found[name].shape != shape
    ]
    if wrong:
        raise DeltaLlavaError(
            f"Tensors have other shapes than config.json and the vision tower ask for: {format_names(wrong)}."
        )
    return {name: found[name] for name in expected}


# Every delta projector has it, whatever its ablations and its rank.
_DELTA = "q_proj_1.shared_weight.weight"
_LAYER = re.compile(r"(?:(\d+)\.)?weight")
_TRAIN = "a Delta-LLaVA can be trained on its vision tower and language model (`delta-llava train`, docs/training.md)"


def describe_other_projector(tensors: Mapping[str, LazyTensor], name: str) -> str | None:
    """A sentence on what the projector of a checkpoint is and what can be done with it; None for a delta projector.

    Args:
        tensors: of the checkpoint, by the names in its files.
        name: of the checkpoint, for the sentence.
    """
    shapes = {n.removeprefix(SOURCE_PROJECTOR): t.shape for n, t in tensors.items() if n.startswith(SOURCE_PROJECTOR)}
    if any(_is_delta(inner) for inner in shapes):
        return None
    if not shapes:
        return _without_projector(tensors, name)
    layers = _linear_layers(shapes)
    if layers:
        what = "a single linear layer (linear)" if len(layers) == 1 else f"LLaVA's own MLP (mlp{len(layers)}x_gelu)"
        widths = " -> ".join(str(width) for width in [layers[0][1], *(out for out, _ in layers)])
        return (
            f"The projector of {name} is {what}, {widths} wide, and not a delta projector, whatever its config says: it "
            f"runs in LLaVA's code, or in transformers after its convert_llava_weights_to_hf.py; {_TRAIN}."
        )
    if "q_proj_1.weight" in shapes or {"ln_q_1.weight", "ln_k_1.weight"} & shapes.keys():
        return (
            f"The projector of {name} is TokenPacker's, with plain query, key and value projections, and not a delta "
            f"projector: it runs in TokenPacker's code; {_TRAIN}."
        )
    return (
        f"The projector of {name} is not a delta projector, and not one that is known here; its tensors are "
        f"{format_names(shapes, limit=6)}; {_TRAIN}."
    )


def _is_delta(inner: str) -> bool:
    """Whether a tensor of the projector has a name that only delta projectors have."""
    return inner == _DELTA or inner.startswith("combined_block.") or inner.endswith(("_proj_1.U", "_proj_1.V"))


def _linear_layers(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """(out, in) of the linear layers, where the projector is made of nothing else."""
    layers: dict[int, tuple[int, ...]] = {}
    for inner, shape in shapes.items():
        match = _LAYER.fullmatch(inner)
        if match and len(shape) == 2:
            layers[int(match[1] or 0)] = shape
        elif not re.fullmatch(r"(\d+\.)?bias", inner):
            return []
    return [layers[number] for number in sorted(layers)]


def _without_projector(tensors: Mapping[str, LazyTensor], name: str) -> str:
    if any("multi_modal_projector.q_proj." in tensor for tensor in tensors):
        return f"{name} is a Delta-LLaVA repo already, which needs no conversion; `delta-llava inspect` looks into it."
    if any("multi_modal_projector." in tensor for tensor in tensors):
        return (
            f"{name} is a model in the layout of transformers, which needs no conversion: AutoModelForImageTextToText loads "
            f"it; {_TRAIN}."
        )
    return (
        f"{name} has no projector (no tensor is called {SOURCE_PROJECTOR}...); give the folder that has the trained projector, "
        "with its mm_projector.bin, and this one as its base model (--base-model)."
    )
