"""Names and shapes of the weights in the released layout and in ours, and the tensors that a repo consists of."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..errors import DeltaLlavaError, format_names
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..modeling.vision_tower_delta_llava import SAVED_ATTENTION
from .weights import Checkpoint, LazyTensor


# The projector in released checkpoints, and in a model of ours.
SOURCE_PROJECTOR, PROJECTOR = "model.mm_projector.", "model.multi_modal_projector."
SOURCE_EMBEDDINGS, EMBEDDINGS = "model.embed_tokens.weight", "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"  # in both
# A tensor that every delta projector has, whatever its ablations.
SOURCE_QUERY = f"{SOURCE_PROJECTOR}q_proj_1.shared_weight.weight"
TOWER = "model.vision_tower."
_SOURCE_TOWER = f"{TOWER}vision_tower."
# DINOv2's files never had the `vision_model.` level of CLIP and SigLIP. Releases of transformers differ in whether they have
# that level in memory; they all read files that have it.
_DINOV2 = (
    "encoder.layer.",
    "layernorm.",
    "embeddings.cls_token",
    "embeddings.mask_token",
    "embeddings.register_tokens",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.",
)
_ROLES = (("q", "query"), ("k", "key"), ("v", "value"))
_PROJECTOR_NAMES = {
    # DeltaProjections: a shared base, a low-rank update, a norm.
    **{f"{q}_proj_1.shared_weight.weight": f"{query}.weight" for q, query in _ROLES},
    **{f"{q}_proj_1.U": f"{query}.delta_u" for q, query in _ROLES},
    **{f"{q}_proj_1.V": f"{query}.delta_v" for q, query in _ROLES},
    **{f"{q}_proj_1.norm.": f"{query}.norm." for q, query in _ROLES},
    "clip_attn.": "window_attention.",
    # The transformer block that refines the queries.
    "combined_block.ntb.patch_embed.conv.": "block.stem.",
    "combined_block.ntb.norm_mhsa.": "block.attention_norm.",
    "combined_block.ntb.e_mhsa.norm.": "block.attention.norm.",
    **{f"combined_block.ntb.e_mhsa.{q}.": f"block.attention.{query}." for q, query in _ROLES},
    "combined_block.ntb.e_mhsa.proj.": "block.attention.out_proj.",
    "combined_block.ntb.projection.conv.": "block.local_proj.",
    "combined_block.ntb.mhca.group_conv3x3.": "block.conv_attention.group_conv.",
    "combined_block.ntb.mhca.norm.": "block.conv_attention.norm.",
    "combined_block.ntb.mhca.projection.": "block.conv_attention.out_proj.",
    "combined_block.ntb.mlp.conv1.": "block.mlp.fc1.",
    "combined_block.ntb.mlp.conv2.": "block.mlp.fc2.",
    # Feed-forward into the language model's width.
    "mlp.0.": "feed_forward.fc1.",
    "mlp.2.": "feed_forward.fc2.",
}
# (released, ours): how names begin; the first match counts, in both directions.
NAMES = (
    *((SOURCE_PROJECTOR + theirs, PROJECTOR + ours) for theirs, ours in _PROJECTOR_NAMES.items()),
    (f"{_SOURCE_TOWER}vision_model.", f"{TOWER}vision_model."),
    *((_SOURCE_TOWER + name, TOWER + name) for name in _DINOV2),
    (_SOURCE_TOWER, f"{TOWER}vision_model."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
)
# 1x1 convolutions in released checkpoints, (out, in, 1, 1); matrices here.
CONV_1X1 = {
    f"{PROJECTOR}block.{layer}.weight"
    for layer in ("stem", "local_proj", "conv_attention.out_proj", "mlp.fc1", "mlp.fc2")
}
# Buffers that some versions of the training stack saved.
_COMPUTED = re.compile(r"model\.mm_projector\.pos_embed|.*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids")


def map_names(names: Iterable[str]) -> dict[str, str]:
    """Our name of every tensor of a released checkpoint, without those that are computed and not trained.

    Raises:
        DeltaLlavaError: listing unknown names, or names with one target.
    """
    found = {name: _translate(name, NAMES) for name in names if not _COMPUTED.fullmatch(name)}
    if unknown := [name for name, target in found.items() if target is None]:
        raise DeltaLlavaError(f"these are no tensors of a released Delta-LLaVA checkpoint: {format_names(unknown)}")
    targets = {name: target for name, target in found.items() if target is not None}
    if len(set(targets.values())) < len(targets):
        seen = list(targets.values())
        twice = [name for name, target in targets.items() if seen.count(target) > 1]
        raise DeltaLlavaError(f"several tensors have the same target: {format_names(twice)}")
    return targets


def released_name(name: str) -> str:
    """The released layout's name of one of our tensors; DeltaLlavaError where it has none."""
    found = _translate(name, [(ours, theirs) for theirs, ours in NAMES])
    if found is None:
        raise DeltaLlavaError(f"the released layout has no name for {name}")
    return found


def _translate(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    return next((new + name.removeprefix(old) for old, new in table if name.startswith(old)), None)


def rename(tensors: Mapping[str, LazyTensor], names: Mapping[str, str]) -> dict[str, LazyTensor]:
    """`tensors` of a released checkpoint under our names (of `map_names`) and in our shapes."""
    return {
        target: tensors[name].reshape(tensors[name].shape[:2])
        if target in CONV_1X1 and tensors[name].shape[2:] == (1, 1)
        else tensors[name]
        for name, target in names.items()
    }


def check_projector(tensors: Mapping[str, LazyTensor], name: str) -> None:
    """Refuse the tensors of a checkpoint called `name` that has no delta projector."""
    if SOURCE_QUERY not in tensors:
        raise DeltaLlavaError(
            f"{name} has no delta projector (no tensor {SOURCE_QUERY}); `delta-llava train` trains one on its vision tower and "
            "language model"
        )


def find_delta_rank(tensors: Mapping[str, LazyTensor]) -> int | None:
    """Rank of the projector's updates, by the released names or ours; None where it has none."""
    factor = tensors.get(f"{SOURCE_PROJECTOR}q_proj_1.U", tensors.get(f"{PROJECTOR}query.delta_u"))
    return None if factor is None else int(factor.shape[-1])


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a released checkpoint to the names of a `DeltaLlavaForConditionalGeneration` repo.

    Works on any subset (only the projector, only the language model, ...). Values, dtypes and devices stay; 1x1
    convolutions lose their two trailing axes. Buffers that hold nothing trained are left out. The vision tower gets the
    names under which it is published, which `from_pretrained` reads on every supported transformers version.

    Args:
        state_dict: full checkpoint names (`model.mm_projector...`, `model.layers...`) to tensors.

    Raises:
        DeltaLlavaError: listing unknown names, or names with one target.
    """
    lazy = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state_dict.items()}  # type: ignore[misc]
    return {name: tensor.load() for name, tensor in rename(lazy, map_names(lazy)).items()}


@dataclass(frozen=True)
class TensorPlan:
    """`tensors` in the order of the model, by published name; `ignored` maps source names to reasons."""

    tensors: dict[str, LazyTensor]
    ignored: dict[str, str]


def plan_tensors(
    checkpoint: Checkpoint, tower: Checkpoint | None, config: DeltaLlavaConfig, dtype: torch.dtype | None
) -> TensorPlan:
    """Decide what every tensor of the repo is read from. Reads no values, except to compare a tied head.

    Args:
        checkpoint: the source.
        tower: the vision tower's tensors by their names inside the tower, where the source has none.
        config: of the result, with its final vocabulary.
        dtype: to cast to; None keeps each tensor's own.

    Raises:
        DeltaLlavaError: listing tensors that are missing, unexpected, of another shape than the model's, or quantised.
    """
    names = map_names(checkpoint.tensors)
    tensors = rename(checkpoint.tensors, names)
    if tower is not None:
        tensors |= {published_name(TOWER + name): tensor for name, tensor in tower.tensors.items()}
    if integers := [name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]:
        raise DeltaLlavaError(
            f"weights should be floating-point numbers; is the checkpoint quantised? {format_names(integers)}"
        )
    ignored = dict.fromkeys(checkpoint.tensors.keys() - names.keys(), "a table that is computed, not trained")
    if config.tie_word_embeddings and HEAD in tensors:
        head, embeddings = tensors.pop(HEAD), tensors[EMBEDDINGS]
        if head.shape != embeddings.shape or not torch.equal(head.load(), embeddings.load()):
            raise DeltaLlavaError(
                f"config.json says tie_word_embeddings=true, but {HEAD} differs from the embeddings; set it to what the "
                "model was trained with"
            )
        ignored[HEAD] = "equal to the embeddings, to which the config ties it"
    _add_rows(tensors, config)
    expected = expected_shapes(config)
    _check_tower(tensors, expected, config.vision_config)
    if problems := compare_shapes(tensors, expected):
        raise DeltaLlavaError("; ".join(problems))
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
    rows, size = tensors[EMBEDDINGS].shape[0], config.text_config.vocab_size
    for name, mean_row in ((EMBEDDINGS, config.image_token_id), (HEAD, None)):
        table = tensors.get(name)
        if table is not None and table.shape[0] == rows < size:
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


def expected_shapes(config: DeltaLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of everything the model stores."""
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    shapes = {published_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def published_name(name: str) -> str:
    """The name in files of a tensor of a model in memory: towers have others there in some releases of transformers."""
    inner = tower_part(name)
    if inner is None:
        return name
    if not inner.startswith(_DINOV2):
        return f"{TOWER}vision_model.{inner}"
    for published, here in SAVED_ATTENTION.items():
        inner = inner.replace(here, published)
    return TOWER + inner


def tower_part(name: str) -> str | None:
    """The name inside the tower of one of its tensors, or None for a tensor of something else."""
    return name.removeprefix(TOWER).removeprefix("vision_model.") if name.startswith(TOWER) else None


def _check_tower(
    tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]], tower: PreTrainedConfig
) -> None:
    """Name another tower than the checkpoint's by its sizes, instead of by a hundred tensors that do not fit."""
    of_tower = {name for name in tensors.keys() | expected.keys() if name.startswith(TOWER)} | {
        f"{PROJECTOR}query.weight"
    }
    shapes = {name: tensors[name].shape for name in of_tower & tensors.keys()}
    wrong = min((name for name in of_tower if shapes.get(name) != expected.get(name)), default=None)
    if wrong is not None:
        raise DeltaLlavaError(
            f"the checkpoint was trained with another vision tower than this {tower.model_type} of hidden_size="
            f"{tower.hidden_size}, num_hidden_layers={tower.num_hidden_layers}, image_size={tower.image_size}, patch_size="
            f"{tower.patch_size}: {wrong} is {shapes.get(wrong, 'missing')} instead of {expected.get(wrong, 'absent')}; "
            "pass the right one as vision_tower"
        )


def compare_shapes(tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line each on the tensors that are missing, unexpected, or of another shape than `expected`."""
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"missing tensors: {format_names(missing)}")
    if unexpected := tensors.keys() - expected.keys():
        problems.append(f"tensors that the model of config.json does not have: {format_names(unexpected)}")
    wrong = [
        f"{name} is {tensor.shape} instead of {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if wrong:
        problems.append(f"tensors of other shapes than config.json gives: {format_names(wrong)}")
    return problems
