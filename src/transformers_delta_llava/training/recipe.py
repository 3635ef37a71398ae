"""A training run as data: what a recipe may say, and the check of what it says."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..processing import CHAT_TEMPLATES
from .errors import RecipeError
from .yaml_files import parse_value, read_yaml


TRAINABLE = ("vision_tower", "projector", "deltas", "language_model", "lora")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelRecipe:
    """Where the model comes from: a Delta-LLaVA (`path`), two pretrained parts, or two configs (untrained).

    Args:
        path: Delta-LLaVA folder or Hub id.
        vision, language: CLIP or SigLIP tower, and causal language model: folders or Hub ids.
        vision_config, text_config: configs of parts that start untrained; `model_type` is in each.
        tokenizer: folder or Hub id; that of `language` by default, needed with `text_config`.
        image_processor: folder or Hub id; that of `vision` by default, else CLIP's at the tower's size.
        config: further arguments of `DeltaLlavaConfig`; with `path`, changes to its config.
        dtype: of the weights that are not trained; `auto` is bfloat16 or float16 where the arguments say so, else
            float32. Trained weights are float32 always, and compute in the precision that the arguments name.
        attn_implementation: as in `from_pretrained`.
    """

    path: str | None = None
    vision: str | None = None
    language: str | None = None
    vision_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    tokenizer: str | None = None
    image_processor: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    attn_implementation: str | None = None


@dataclass
class DataRecipe:
    """What is trained on.

    Args:
        path: a file in LLaVA's format, `.json` (an array) or `.jsonl` (a row a line).
        dataset: instead of `path`, a dataset of the `datasets` library (a folder or a Hub id) with the columns
            `messages` and `images`.
        split: the split of `dataset`.
        images: folder that the image names of the rows start from.
        chat_template: name of a conversation format, or a Jinja file.
        max_length: tokens, visual ones included, that a row is cut to.
        pad_images: pad images to squares; as the processor does by default.
        on_error: `fail` at the first row that cannot be used, or `skip` such rows, counted and named.
        cache: folder of the row index.
    """

    path: str | None = None
    dataset: str | None = None
    split: str = "train"
    images: str | None = None
    chat_template: str = "vicuna_v1"
    max_length: int = 2048
    pad_images: bool | None = None
    on_error: str = "fail"
    cache: str = "~/.cache/transformers-delta-llava"


@dataclass
class Recipe:
    """A training run.

    Args:
        model: where the model comes from.
        data: what is trained on.
        train: what is trained, some of `TRAINABLE`.
        visual_tokens: visual tokens per image, or several budgets, of which every step takes one by chance.
        lora: arguments of PEFT's `LoraConfig`, if `train` names `lora`.
        arguments: arguments of transformers' `TrainingArguments`.
    """

    model: ModelRecipe
    data: DataRecipe
    train: list[str]
    visual_tokens: int | list[int]
    lora: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budgets that steps draw from."""
        return (self.visual_tokens,) if isinstance(self.visual_tokens, int) else tuple(self.visual_tokens)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as `load_recipe` reads it, without what is unset."""
        return {
            key: {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value
            for key, value in dataclasses.asdict(self).items()
        }


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: changes, each `key=value` with dots in the key (`arguments.max_steps=10`); values are YAML.

    Raises:
        RecipeError: a file that is missing or no YAML, an unknown key, a bad value, a missing file.
    """
    content = read_yaml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {override}: write it as key=value, for example visual_tokens=36.")
        _set(content, key.strip().split("."), parse_value(text, key), override)
    return make_recipe(content)


def make_recipe(content: dict[str, Any]) -> Recipe:
    """
    The recipe of a dictionary such as a YAML file holds.

    Raises:
        RecipeError: an unknown key, a bad value, or a file that is not there.
    """
    content = dict(content)
    for name, section in (("model", ModelRecipe), ("data", DataRecipe)):
        content[name] = _section(section, content.get(name), name)
    for name in ("train", "visual_tokens"):
        if name not in content:
            hint = f"a list of {', '.join(TRAINABLE)}" if name == "train" else "a number, for example 144"
            raise RecipeError(f"{name} is missing: give {hint}.")
    recipe = _section(Recipe, content, "")
    _check_model(recipe.model)
    _check_data(recipe.data)
    _check_train(recipe)
    _check_budgets(recipe)
    for name in ("lora", "arguments"):
        if not isinstance(getattr(recipe, name), dict):
            raise RecipeError(f"{name}={getattr(recipe, name)!r}: write key: value pairs below it.")
    from .arguments import check_arguments  # transformers' TrainingArguments take a while to import

    check_arguments(recipe.arguments)
    return recipe


def _section(section: type, content: Any, name: str) -> Any:
    """A dataclass from a dictionary, which may hold its fields only."""
    place = f"{name}." if name else ""
    if not isinstance(content, dict):
        raise RecipeError(f"{name or 'The recipe'} must be key: value pairs, not {content!r}.")
    fields = [item.name for item in dataclasses.fields(section)]
    for key in content:
        if key not in fields:
            raise RecipeError(f"{place}{key} is no key of a recipe{suggestion(key, fields)}.")
    return section(**content)


def suggestion(key: Any, known: Sequence[str]) -> str:
    """What may have been meant by an unknown key."""
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {close[0]}" if close else f"; there are {', '.join(known)}" if len(known) < 20 else ""


def _set(content: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise RecipeError(f"--set {override}: {key} holds a value, so there is nothing below it to set.")
    content[keys[-1]] = value


def _check_model(model: ModelRecipe) -> None:
    ways = {
        "path": model.path is not None,
        "vision and language": model.vision is not None or model.language is not None,
        "vision_config and text_config": model.vision_config is not None or model.text_config is not None,
    }
    if sum(ways.values()) != 1:
        raise RecipeError(f"model must have one of: path; vision and language; {list(ways)[-1]}.")
    for first, second in (("vision", "language"), ("vision_config", "text_config")):
        if (getattr(model, first) is None) != (getattr(model, second) is None):
            missing = first if getattr(model, first) is None else second
            raise RecipeError(f"model.{missing} is missing: {first} and {second} go together.")
    if model.text_config is not None and model.tokenizer is None:
        raise RecipeError("model.tokenizer is missing: name the folder of the tokenizer that text_config is for.")
    for name in ("config", "vision_config", "text_config"):
        if not isinstance(getattr(model, name) or {}, dict):
            raise RecipeError(f"model.{name}={getattr(model, name)!r}: write key: value pairs below it.")
    for name in ("path", "vision", "language", "tokenizer", "image_processor"):
        _check_source(f"model.{name}", getattr(model, name))
    _check_choice("model.dtype", model.dtype, DTYPES)


def _check_data(data: DataRecipe) -> None:
    if (data.path is None) == (data.dataset is None):
        raise RecipeError("data must have one of path (a LLaVA JSON or JSONL file) and dataset (of `datasets`).")
    if data.path is not None:
        if Path(data.path).suffix not in (".json", ".jsonl"):
            raise RecipeError(f"data.path={data.path}: name a .json or .jsonl file in LLaVA's format.")
        if not Path(data.path).expanduser().is_file():
            raise RecipeError(f"data.path={data.path}: there is no such file.")
    _check_source("data.dataset", data.dataset)
    if data.images is not None and not Path(data.images).expanduser().is_dir():
        raise RecipeError(f"data.images={data.images}: there is no such folder.")
    if data.chat_template not in CHAT_TEMPLATES and not Path(data.chat_template).is_file():
        raise RecipeError(
            f"data.chat_template={data.chat_template}: use one of {', '.join(CHAT_TEMPLATES)}, or a file."
        )
    _check_choice("data.on_error", data.on_error, ("fail", "skip"))
    if not is_whole(data.max_length) or data.max_length < 1:
        raise RecipeError(f"data.max_length={data.max_length!r}: use a whole number of at least 1.")
    if data.pad_images not in (None, True, False):
        raise RecipeError(f"data.pad_images={data.pad_images!r}: use true or false, or leave it out.")


def _check_train(recipe: Recipe) -> None:
    if not isinstance(recipe.train, list) or not recipe.train:
        raise RecipeError(f"train={recipe.train!r}: give a list of {', '.join(TRAINABLE)}.")
    for name in recipe.train:
        _check_choice("train", name, TRAINABLE)
    if "lora" in recipe.train and "language_model" in recipe.train:
        raise RecipeError("train names language_model and lora, which adapts it: leave one of them out.")
    if recipe.lora and "lora" not in recipe.train:
        raise RecipeError("lora is given but train does not name it: add lora to train, or leave the section out.")


def _check_budgets(recipe: Recipe) -> None:
    if isinstance(recipe.visual_tokens, (list, int)) and recipe.budgets:
        bad = [budget for budget in recipe.budgets if not is_whole(budget) or budget < 1]
        if not bad:
            return
    raise RecipeError(
        f"visual_tokens={recipe.visual_tokens!r}: give a number of tokens per image, for example 144, or a list of them."
    )


def _check_source(name: str, source: str | None) -> None:
    """A folder must be there; anything else may be on the Hub."""
    if source is None:
        return
    if not isinstance(source, str) or not source:
        raise RecipeError(f"{name}={source!r}: name a folder or a Hub id.")
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not Path(source).expanduser().exists():
        raise RecipeError(f"{name}={source}: there is no such folder.")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RecipeError(f"{name}={value!r}: use one of {', '.join(choices)}.")


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
