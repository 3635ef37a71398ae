"""What is in a repo or a checkpoint, and what is wrong with it; reads headers, and of the values only the projector's."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..errors import one_line
from ..hub.repo_files import TEMPLATE_FILE, read_code
from ..modeling import DeltaLlavaConfig
from ..modeling.delta_repo_delta_llava import dtype_name
from ..utils.errors import DeltaLlavaError, format_names
from ..utils.files import REPORT_FILE, local_folder, read_json, read_optional_json
from .config import SourceConfig, Vocabulary, convert_config, read_config
from .export import read_repo_config
from .names import (
    EMBEDDINGS,
    PROJECTOR,
    check_projector,
    compare_shapes,
    expected_shapes,
    find_delta_rank,
    map_names,
    rename,
    tower_part,
)
from .prompts import QUESTION, choose_chat_template, recognise_template, render
from .sources import check_embeddings, open_trained
from .tokenizer import has_tokenizer, load_tokenizer, read_own_template
from .vision_tower import adapt_to_weights, find_vision_tower, load_vision_tower
from .weights import Checkpoint, LazyTensor, has_weights


# Parts of the model, and words in the names of their tensors, in repos and in checkpoints; the rest is the language model.
_COMPONENTS = {"vision tower": "vision_tower.", "projector": "projector.", "language model": "", "head": "lm_head."}
_REPO_FILES = ("generation_config.json", "processor_config.json", "chat_template.jinja", "README.md")
_FILES = ("*.json", "*.py", "*.jinja", "README.md", "model*.safetensors*", "tokenizer.model", "merges.txt")


@dataclass(frozen=True)
class Component:
    """A part of the model: how many numbers, in how many tensors and bytes, and of which dtypes (tensors by dtype)."""

    parameters: int
    tensors: int
    num_bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Delta:
    """A low-rank update: Frobenius norms of it (all levels together) and of its base, and the rank it was given."""

    name: str
    rank: int
    norm: float
    base_norm: float


@dataclass
class Inspection:
    """Result of `inspect_model`.

    Attributes:
        name: of the folder.
        kind: `repo`, `checkpoint` or `projector`.
        components: by the part of the model.
        visual_token_budgets: possible numbers of visual tokens per image; `num_visual_tokens`, the default.
        code_version: of a repo's code, and `code_is_current`, whether it is today's.
        deltas: of the projector.
        chat_template: name of the one that a repo has or a conversion would choose, and `chat_template_reason`, why.
        first_prompt: a question about an image, up to where the model answers.
        problems: a sentence on each; empty where nothing is wrong.
    """

    name: str
    kind: str
    components: dict[str, Component]
    visual_token_budgets: tuple[int, ...] = ()
    num_visual_tokens: int | None = None
    code_version: str | None = None
    code_is_current: bool = True
    deltas: list[Delta] = field(default_factory=list)
    chat_template: str | None = None
    chat_template_reason: str | None = None
    first_prompt: str | None = None
    problems: list[str] = field(default_factory=list)


def inspect_model(model_id: str | Path) -> Inspection:
    """Look into a repo of ours, or a checkpoint in the authors' layout: a full one, or its projector alone.

    Args:
        model_id: folder or Hub id.

    Raises:
        DeltaLlavaError: there is no config, or there are no weights that can be read.
    """
    folder = local_folder(str(model_id), "model", _FILES)
    if not (folder / "config.json").is_file():
        raise DeltaLlavaError(f"{folder.name} has no config.json.")
    settings = read_json(folder / "config.json")
    checkpoint = open_trained(folder)
    if checkpoint is None:
        raise DeltaLlavaError(f"{folder.name} holds neither a model's weights nor a projector's.")
    if settings.get("model_type") == "delta_llava":
        return _inspect_repo(folder, checkpoint)
    return _inspect_checkpoint(folder, settings, checkpoint)


def _inspect_repo(folder: Path, checkpoint: Checkpoint) -> Inspection:
    result = Inspection(folder.name, "repo", _components(checkpoint.tensors))
    try:
        config = read_repo_config(folder)
        result.visual_token_budgets, result.num_visual_tokens = config.visual_token_budgets, config.num_visual_tokens
        _describe_deltas(result, checkpoint.tensors)
        _describe_prompt(result, folder, config.text_config)
        result.problems += _tensor_problems(config, checkpoint.tensors)
    except DeltaLlavaError as error:
        result.problems.append(str(error))
    missing = [name for name in _REPO_FILES if not (folder / name).is_file()]
    result.problems += [f"There is no {name}." for name in missing]
    if not has_tokenizer(folder):
        result.problems.append("There is no tokenizer.")
    code = read_code(folder)
    result.code_version, result.code_is_current = code.version, code.is_current
    result.problems += [
        f"There is no {name}, so the repo does not load without this package." for name in code.missing
    ]
    result.problems += [f"{name} is older code; update the repo." for name in code.outdated]
    result.problems += [f"{name} was changed by hand." for name in code.edited]
    return result


def _inspect_checkpoint(folder: Path, settings: dict, checkpoint: Checkpoint) -> Inspection:
    is_projector = not has_weights(folder)
    result = Inspection(folder.name, "projector" if is_projector else "checkpoint", _components(checkpoint.tensors))
    try:
        check_projector(checkpoint.tensors, folder.name)
    except DeltaLlavaError as error:
        result.problems.append(str(error))
        return result
    tensors = rename(checkpoint.tensors, map_names(checkpoint.tensors))
    result.components = _components(tensors)
    _describe_deltas(result, tensors)
    try:
        if not is_projector:
            check_embeddings(checkpoint)
        source = read_config(settings)
        config = _config_of_checkpoint(folder, source, tensors)
    except ValueError as error:
        result.problems.append(str(error))
    else:
        result.visual_token_budgets, result.num_visual_tokens = config.visual_token_budgets, config.num_visual_tokens
        _describe_prompt(result, folder, source.text_config, source)
        if source.unknown:
            result.problems.append(f"config.json has unknown keys: {format_names(source.unknown)}.")
        expected = expected_shapes(config)
        if is_projector:
            expected = {name: shape for name, shape in expected.items() if name.startswith(PROJECTOR)}
        elif all(tower_part(name) is None for name in tensors):
            expected = {name: shape for name, shape in expected.items() if tower_part(name) is None}
        result.problems += compare_shapes(tensors, expected)
    if not is_projector and not has_tokenizer(folder):
        result.problems.append("There is no tokenizer.")
    return result


def _config_of_checkpoint(folder: Path, source: SourceConfig, tensors: dict[str, LazyTensor]) -> DeltaLlavaConfig:
    """The config that a conversion would give, but for new rows of the embeddings."""
    tower = find_vision_tower(source.keys.mm_vision_tower, folder)
    vision_config = load_vision_tower(tower, with_weights=False).config
    _adapt_tower(vision_config, tensors)
    rows = tensors[EMBEDDINGS].shape[0] if EMBEDDINGS in tensors else None
    vocabulary = Vocabulary(rows, image_token_id=rows - 1) if rows is not None else None
    return convert_config(source, vision_config, vocabulary, delta_rank=find_delta_rank(tensors))


def _adapt_tower(config: PreTrainedConfig, tensors: Mapping[str, LazyTensor]) -> None:
    inner = [part for name in tensors if (part := tower_part(name)) is not None]
    if inner:
        adapt_to_weights(config, inner)


def _describe_prompt(
    result: Inspection, folder: Path, text_config: PreTrainedConfig, source: SourceConfig | None = None
) -> None:
    """Name the chat template and render a prompt: of a repo, or of a checkpoint (`source`) as conversion would choose it."""
    if not has_tokenizer(folder) or (source is None and not (folder / TEMPLATE_FILE).is_file()):
        return
    sentencepiece_class = source.language_model.sentencepiece_class if source else None
    try:
        tokenizer = load_tokenizer(str(folder), text_config, sentencepiece_class)
        own = read_own_template(str(folder))
        if source is None:
            template = recognise_template(own or "", read_optional_json(folder / REPORT_FILE))
        else:
            template = choose_chat_template(None, source.settings, None, tokenizer, own, folder)
        result.first_prompt = render(template.text, tokenizer, QUESTION)
    except Exception as error:  # a template raises what it likes
        result.problems.append(f"the chat template does not render a question: {one_line(error)}")
    else:
        result.chat_template, result.chat_template_reason = template.name, template.reason


def _describe_deltas(result: Inspection, tensors: dict[str, LazyTensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        if name.startswith(PROJECTOR) and not torch.isfinite(tensor.load()).all():
            result.problems.append(f"{name} holds NaN or Inf.")
        if name.endswith(".delta_u"):
            module = name.removesuffix(".delta_u")
            parts = [tensors.get(f"{module}.{part}") for part in ("weight", "delta_u", "delta_v")]
            if None in parts:
                result.problems.append(f"{module} has delta_u, but not weight and delta_v with it.")
                continue
            weight, u, v = (part.load().double() for part in parts if part is not None)
            if u.dim() != v.dim() or u.dim() < 2 or u.shape[:-2] != v.shape[:-2] or u.shape[-1] != v.shape[-2]:
                result.problems.append(f"{name} {tuple(u.shape)} and delta_v {tuple(v.shape)} do not fit each other.")
                continue
            # The norm of u @ v from products of rank x rank: u @ v of an unknown file may not fit the memory.
            norms = float(((u.mT @ u) * (v @ v.mT)).sum().sqrt()), float(weight.norm())
            result.deltas.append(Delta(module.removeprefix(PROJECTOR), u.shape[-1], *norms))
            if not u.any():  # a delta_v of zeros is where fresh deltas start after a merge
                result.problems.append(f"The delta of {module.removeprefix(PROJECTOR)} is zero.")


def _tensor_problems(config: DeltaLlavaConfig, tensors: dict[str, LazyTensor]) -> list[str]:
    _adapt_tower(config.vision_config, tensors)
    problems = compare_shapes(tensors, expected_shapes(config))
    (rows, *_) = tensors[EMBEDDINGS].shape or (0,) if EMBEDDINGS in tensors else (0,)
    if config.image_token_id >= rows:
        problems.append(f"image_token_id={config.image_token_id} is not one of the {rows} rows of the embeddings.")
    return problems


def _components(tensors: dict[str, LazyTensor]) -> dict[str, Component]:
    parts: dict[str, list[LazyTensor]] = {component: [] for component in _COMPONENTS}
    for name, tensor in tensors.items():
        part = next((part for part, word in _COMPONENTS.items() if word and word in name), "language model")
        parts[part].append(tensor)
    return {
        component: Component(
            parameters=sum(tensor.numel() for tensor in own),
            tensors=len(own),
            num_bytes=sum(tensor.num_bytes for tensor in own),
            dtypes=dict(Counter(dtype_name(tensor.dtype) for tensor in own)),
        )
        for component, own in parts.items()
        if own
    }
