"""Names and shapes of the authors' checkpoints, and what they are called here: one table, read top to bottom.

A pattern is literal text with three wildcards: `*` any text, `#` a whole number, `{a,b}` one of the given words.
What the wildcards of a source pattern match is put, in order, into those of the target pattern.

The released projector keeps its 1x1 convolutions as linear maps over tokens here: `Shape.CONV_1X1` drops their two
trailing axes of length one.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch

from .checkpoint_reader import LazyTensor
from .errors import ConversionError, listed


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
        """The shape of the target for a source of `shape`; ConversionError where a 1x1 convolution is none."""
        if self.shape is Shape.KEEP or len(shape) == 2:
            return shape
        if len(shape) != 4 or shape[2:] != (1, 1):
            raise ConversionError(f"{name} should be a 1x1 convolution of shape (out, in, 1, 1), but is {shape}.")
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
        ConversionError: listing the names that the table does not know, or those that claim one target.
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
        raise ConversionError(f"Not tensors of a released Delta-LLaVA checkpoint: {listed(unknown)}.")
    _refuse_duplicates(rules)
    return NameMap(rules, ignored)


def _refuse_duplicates(rules: Mapping[str, tuple[str, Rule]]) -> None:
    by_target: dict[str, list[str]] = {}
    for name, (target, _) in rules.items():
        by_target.setdefault(target, []).append(name)
    clashes = [f"{' and '.join(sorted(names))} (both {target})" for target, names in by_target.items() if names[1:]]
    if clashes:
        raise ConversionError(f"Several tensors claim one place: {listed(clashes)}.")


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
        ConversionError: listing names that are unknown, names that claim one target, or a 1x1 convolution that is none.
    """
    return {
        target: state_dict[name].reshape(rule.reshape(tuple(state_dict[name].shape), name))
        for name, (target, rule) in map_names(state_dict).rules.items()
    }
