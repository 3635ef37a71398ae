"""Which tensor goes where: every tensor of the source is used or left out for a reason, every target is filled once."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..utils.errors import one_line
from .checkpoint_reader import Checkpoint, LazyTensor
from .errors import ConversionError, listed
from .key_map import PROJECTOR, TOWER_TARGET, NameMap


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
        ConversionError: listing tensors that are missing, have no place, or have another shape than the model's.
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
        raise ConversionError(f"Weights should be floating-point numbers; a quantised checkpoint? {listed(strange)}.")


def _check_projector_width(found: dict[str, LazyTensor], vision_config: PreTrainedConfig) -> None:
    base = found.get(_QUERY_BASE)
    if base is not None and len(base.shape) == 2 and base.shape[1] != vision_config.hidden_size:
        raise ConversionError(
            f"The projector was trained on a vision tower {base.shape[1]} wide, but this tower is "
            f"{vision_config.hidden_size} wide; give the right one (--vision-tower)."
        )


def _check_tied_head(embeddings: LazyTensor, head: LazyTensor) -> None:
    if embeddings.shape != head.shape or not torch.equal(embeddings.load(), head.load()):
        raise ConversionError(
            "config.json ties lm_head.weight to the embeddings (tie_word_embeddings), but the checkpoint's lm_head.weight "
            "differs from them; set tie_word_embeddings to what the model was trained with."
        )


def expected_shapes(config: DeltaLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of everything the model stores."""
    try:
        with torch.device("meta"):
            model = DeltaLlavaForConditionalGeneration(config)
    except Exception as error:  # any layer of any language model may refuse a setting
        raise ConversionError(f"No model can be built from the settings in config.json: {one_line(error)}.") from error
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
        faults.append(f"the checkpoint lacks tensors that the model needs: {listed(missing)}")
    if homeless := found.keys() - expected.keys():
        faults.append(f"the model that config.json describes has no place for {listed(homeless)}")
    if faults:
        text = "; ".join(faults)
        raise ConversionError(f"{text[0].upper()}{text[1:]}.")
    wrong = [
        f"{name} is {found[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if found[name].shape != shape
    ]
    if wrong:
        raise ConversionError(
            f"Tensors have other shapes than config.json and the vision tower ask for: {listed(wrong)}."
        )
    return {name: found[name] for name in expected}
