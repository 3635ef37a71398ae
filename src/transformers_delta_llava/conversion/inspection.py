"""What is in a repo or a checkpoint, and what is wrong with it; reads headers, and of the values only the projector's."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import REPORT_FILE, format_names, one_line, read_json, read_optional_json
from ..hub import TEMPLATE_FILE, read_code
from ..loading import load_config, local_folder
from ..modeling import DeltaLlavaConfig
from .config import SourceConfig, adapt_to_weights, convert_config, read_config
from .names import (
    EMBEDDINGS,
    PROJECTOR,
    SOURCE_EMBEDDINGS,
    check_projector,
    compare_shapes,
    expected_shapes,
    find_delta_rank,
    map_names,
    rename,
    tower_part,
)
from .prompts import QUESTION, ChatTemplate, choose_chat_template, recognise_template, render
from .sources import find_vision_tower, load_vision_tower, open_trained
from .tokenizer import has_tokenizer, load_tokenizer, read_own_template
from .weights import LazyTensor, dtype_name


# Parts of the model, and words in the names of their tensors, in repos and in checkpoints; the rest is the language model.
_COMPONENTS = {"vision tower": "vision_tower.", "projector": "projector.", "language model": "", "head": "lm_head."}
_REPO_FILES = ("generation_config.json", "processor_config.json", TEMPLATE_FILE, "README.md")
_FILES = ("*.json", "*.py", "*.jinja", "README.md", "model*.safetensors*", "tokenizer.model", "merges.txt")


@dataclass(frozen=True)
class Component:
    """A part of the model: how many parameters, in how many tensors and bytes, and of which dtypes (tensors by dtype)."""

    parameters: int
    tensors: int
    num_bytes: int
    dtypes: dict[str, int]


@dataclass
class Inspection:
    """Result of `inspect_model`.

    Attributes:
        name: of the folder.
        kind: `repo`, `checkpoint` or `projector`.
        components: by the part of the model.
        visual_token_budgets: possible numbers of visual tokens per image; `num_visual_tokens`, the default.
        delta_rank: of the projector's updates; None where it has none.
        code_version: of a repo's code.
        chat_template: the one that a repo has or a conversion would choose.
        first_prompt: a question about an image, up to where the model answers.
        problems: a line on each; empty where nothing is wrong.
    """

    name: str
    kind: str
    components: dict[str, Component]
    visual_token_budgets: tuple[int, ...] = ()
    num_visual_tokens: int | None = None
    delta_rank: int | None = None
    code_version: str | None = None
    chat_template: ChatTemplate | None = None
    first_prompt: str | None = None
    problems: list[str] = field(default_factory=list)


def inspect_model(model_id: str | Path) -> Inspection:
    """Look into a repo of ours, or a checkpoint in the released layout: a full one, or only its projector.

    Args:
        model_id: folder or Hub id.

    Raises:
        DeltaLlavaError: there are no weights that can be read.
        OSError: there is no config.json.
    """
    folder = local_folder(model_id, _FILES)
    settings = read_json(folder / "config.json")
    tensors = open_trained(folder).tensors
    if settings.get("model_type") == DeltaLlavaConfig.model_type:
        kind = "repo"
    else:
        kind = "checkpoint" if SOURCE_EMBEDDINGS in tensors else "projector"
    result = Inspection(folder.name, kind, _components(tensors))
    try:
        if kind == "repo":
            _inspect_repo(result, folder, tensors)
        else:
            _inspect_checkpoint(result, folder, read_config(settings), tensors)
    except ValueError as error:
        result.problems.append(one_line(error))
    if kind != "projector" and not has_tokenizer(folder):
        result.problems.append("there is no tokenizer")
    return result


def _inspect_repo(result: Inspection, folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    code = read_code(folder)
    result.code_version = code.version
    result.problems += [f"there is no {name}" for name in _REPO_FILES if not (folder / name).is_file()]
    result.problems += [f"there is no {name}, so the repo does not load without this package" for name in code.missing]
    result.problems += [f"{name} is older code; update the repo" for name in code.outdated]
    result.problems += [f"{name} was changed by hand" for name in code.edited]
    config = load_config(folder)
    _inspect_tensors(result, tensors, config)
    processor = read_optional_json(folder / "processor_config.json")
    result.visual_token_budgets = tuple(processor.get("visual_token_budgets", result.visual_token_budgets))
    if (number := processor.get("num_visual_tokens", config.num_visual_tokens)) != config.num_visual_tokens:
        result.problems.append(
            f"num_visual_tokens is {number} in the processor, {config.num_visual_tokens} in the model"
        )
    if (folder / TEMPLATE_FILE).is_file() and has_tokenizer(folder):
        text = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        template = recognise_template(text, read_optional_json(folder / REPORT_FILE))
        _render(result, template, load_tokenizer(folder, config.text_config, None))


def _inspect_checkpoint(
    result: Inspection, folder: Path, source: SourceConfig, released: Mapping[str, LazyTensor]
) -> None:
    check_projector(released, folder.name)
    tensors = rename(released, map_names(released))
    tower = load_vision_tower(find_vision_tower(source.settings.get("mm_vision_tower"), folder), with_weights=False)
    rows = tensors[EMBEDDINGS].shape[0] if EMBEDDINGS in tensors else source.text_config.vocab_size
    rank = find_delta_rank(tensors)
    config = convert_config(source, tower.config, vocab_size=rows, image_token_id=rows - 1, delta_rank=rank)
    _inspect_tensors(result, tensors, config)
    if source.unknown:
        result.problems.append(f"config.json has unknown keys: {format_names(source.unknown)}")
    if has_tokenizer(folder):
        tokenizer = load_tokenizer(folder, source.text_config, source.language_model.sentencepiece_class)
        own = read_own_template(folder)
        _render(result, choose_chat_template(None, source.settings, None, tokenizer, own, folder), tokenizer)


def _inspect_tensors(result: Inspection, tensors: Mapping[str, LazyTensor], config: DeltaLlavaConfig) -> None:
    result.visual_token_budgets, result.num_visual_tokens = config.visual_token_budgets, config.num_visual_tokens
    result.delta_rank = find_delta_rank(tensors)
    of_tower = [part for name in tensors if (part := tower_part(name)) is not None]
    adapt_to_weights(config.vision_config, of_tower)
    expected = expected_shapes(config)
    if result.kind == "projector":
        expected = {name: shape for name, shape in expected.items() if name.startswith(PROJECTOR)}
    elif result.kind == "checkpoint" and not of_tower:  # its config names the tower
        expected = {name: shape for name, shape in expected.items() if tower_part(name) is None}
    result.problems += compare_shapes(tensors, expected)
    for name, tensor in tensors.items():
        if name.startswith(PROJECTOR) and not torch.isfinite(tensor.load()).all():
            result.problems.append(f"{name} holds NaN or Inf")


def _render(result: Inspection, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
    result.chat_template = template
    try:
        result.first_prompt = render(template.text, tokenizer, QUESTION)
    except Exception as error:  # a template raises what it likes
        result.problems.append(f"the chat template does not render a question: {one_line(error)}")


def _components(tensors: Mapping[str, LazyTensor]) -> dict[str, Component]:
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
