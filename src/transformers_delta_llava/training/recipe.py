"""Recipes: YAML files that describe a training run, checked before anything is loaded."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..conversion.prompts import TOKENIZER_TEMPLATE
from ..processing import CHAT_TEMPLATES
from ..processing.chat_templates import find_conversation
from ..utils.errors import RecipeError, one_line, shorten, suggestion
from ..utils.files import read_text
from ..utils.validation import DTYPES, validate
from .arguments import check_arguments, check_lora


MAX_VALUES = 10_000  # in a recipe, each use of an alias counted: a few lines of YAML can expand to billions
MAX_RECIPE_BYTES = 2**20
# Never written to a file: keys named like a secret, and values that look like one.
SECRET_NAME = re.compile(r"(^|_)(api_?key|secret|password|(hub|auth|access|hf)_token)$|^token$")
SECRET_VALUE = re.compile(r"\bhf_\w{16,}|://[^/\s:@]*:[^/\s@]+@")


def _check_model_id(model_id: str) -> str:
    """A local path must exist; any other id may be on the Hub."""
    looks_local = model_id.startswith((".", "/", "~")) or model_id.count("/") > 1
    if not model_id or looks_local and not Path(model_id).expanduser().exists():
        raise ValueError(f"there is no folder {model_id!r}")
    return model_id


def _check_file(path: str) -> str:
    if not Path(path).expanduser().is_file():
        raise ValueError(f"there is no file {path!r}")
    return path


def _check_folder(path: str) -> str:
    if not Path(path).expanduser().is_dir():
        raise ValueError(f"there is no folder {path!r}")
    return path


def _check_budgets(value: Any) -> Any:
    """One number of visual tokens, or a list of them."""
    budgets = value if isinstance(value, list) and value else [value]
    if any(type(budget) is not int or budget < 1 for budget in budgets):
        raise ValueError(f"{shorten(value)} is not a number of tokens per image, such as 144, nor a list of them")
    return value


FROZEN_DTYPES = ("auto", *DTYPES)
ModelId = Annotated[str, AfterValidator(_check_model_id)]
Options = dict[str, Any]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Values keep their YAML type, and unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"{shorten(key)} is not a key of a recipe{suggestion(key, list(cls.model_fields))}")
        return values


class ModelRecipe(Section):
    """The model: a Delta-LLaVA (`path`), two pretrained parts and a new projector, or two configs (untrained).

    Args:
        path: Delta-LLaVA folder or Hub id.
        vision, language: CLIP, SigLIP or DINOv2 tower, and causal language model: folders or Hub ids. The new
            projector starts from `calibrate_projector` on some images of the data.
        vision_config, text_config: configs of untrained parts, with `model_type`.
        tokenizer: folder or Hub id; that of `language` by default, needed with `text_config`.
        image_processor: folder or Hub id; that of `vision` by default, else CLIP's at the tower's size.
        config: further arguments of `DeltaLlavaConfig`; with `path`, changes to its config.
        dtype: dtype of frozen weights; `auto` follows `bf16` and `fp16` of the arguments, else float32. Trained weights
            are always float32 and compute in the precision that the arguments set.
        attn_implementation: as in `from_pretrained`.
        quantization_config: arguments of `BitsAndBytesConfig`, for QLoRA: the language model's linear layers are
            quantized; vision tower, projector and head are not.
    """

    path: ModelId | None = None
    vision: ModelId | None = None
    language: ModelId | None = None
    vision_config: Options | None = None
    text_config: Options | None = None
    tokenizer: ModelId | None = None
    image_processor: ModelId | None = None
    config: Options = {}
    dtype: Literal[FROZEN_DTYPES] = "auto"  # type: ignore[valid-type]
    attn_implementation: str | None = None
    quantization_config: Options | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> "ModelRecipe":
        pairs = (("vision", "language"), ("vision_config", "text_config"))
        given = [pair for pair in (("path",), *pairs) if any(getattr(self, name) is not None for name in pair)]
        if len(given) != 1:
            raise ValueError("give one of: path; vision and language; vision_config and text_config")
        for name in given[0]:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: {' and '.join(given[0])} go together")
        if self.text_config is not None and self.tokenizer is None:
            raise ValueError("tokenizer is missing: name the folder of the tokenizer that text_config is for")
        if self.quantization_config is not None and self.path is None:
            raise ValueError("quantization_config needs a path: QLoRA adapts a Delta-LLaVA that exists")
        return self


class DataRecipe(Section):
    """The training data.

    Args:
        path: a file in LLaVA's format, `.json` (an array) or `.jsonl` (one row per line).
        dataset: instead of `path`, a dataset of the `datasets` library (a folder or a Hub id) with the columns
            `messages` and `images`.
        split: the split of `dataset`.
        images: folder that the rows' image names are relative to.
        chat_template: name of a chat template, `tokenizer` for the language model's own, or a Jinja file. By default a
            Delta-LLaVA keeps its own, and a new one has `vicuna_v1`.
        max_length: tokens, visual ones included, to which a row is truncated.
        pad_images: pad images to squares; by default as the processor does.
        on_error: `fail` at the first unusable row, or `skip` such rows, counted and named.
        cache: folder of the row index.
        frozen_features: folder that keeps what the vision tower computes of each image, in float16, so that it runs once
            an image and not once an epoch. For towers that are not trained.
    """

    path: Annotated[str, AfterValidator(_check_file)] | None = None
    dataset: ModelId | None = None
    split: str = "train"
    images: Annotated[str, AfterValidator(_check_folder)] | None = None
    chat_template: str | None = None
    max_length: Count = 2048
    pad_images: bool | None = None
    on_error: Literal["fail", "skip"] = "fail"
    cache: str = "~/.cache/transformers-delta-llava"
    frozen_features: str | None = None

    @model_validator(mode="after")
    def _check_source(self) -> "DataRecipe":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give one of: path (a LLaVA JSON or JSONL file); dataset (of `datasets`)")
        if self.path is not None and Path(self.path).suffix not in (".json", ".jsonl"):
            raise ValueError(f"path={self.path}: name a .json or .jsonl file in LLaVA's format")
        name = self.chat_template
        if name not in (None, TOKENIZER_TEMPLATE) and find_conversation(name) is None and not Path(name).is_file():
            known = ", ".join((*CHAT_TEMPLATES, TOKENIZER_TEMPLATE))
            raise ValueError(f"chat_template={name}: use one of {known}, or a Jinja file")
        return self


class Recipe(Section):
    """A training run.

    Args:
        model: the model.
        data: the training data.
        train: the parts that are trained.
        num_visual_tokens: visual tokens per image, or a list of budgets from which every step draws one.
        projector_lr: learning rate of the projector; by default `arguments.learning_rate`.
        lora: arguments of PEFT's `LoraConfig`, if `train` has `lora`.
        arguments: arguments of transformers' `TrainingArguments`.
    """

    model: ModelRecipe
    data: DataRecipe
    train: Annotated[
        list[Literal["vision_tower", "projector", "deltas", "language_model", "lora"]], Field(min_length=1)
    ]
    num_visual_tokens: Annotated[int | list[int], BeforeValidator(_check_budgets)]
    projector_lr: Annotated[float, Field(gt=0)] | None = None
    lora: Annotated[Options, AfterValidator(check_lora)] = {}
    arguments: Annotated[Options, AfterValidator(check_arguments)]

    @model_validator(mode="after")
    def _check_train(self) -> "Recipe":
        if "lora" not in self.train:
            if self.lora:
                raise ValueError("lora is given but train does not name it: add lora to train, or leave it out")
            if self.model.quantization_config is not None:
                raise ValueError("model.quantization_config needs train: [lora]: quantized weights cannot be trained")
        elif "language_model" in self.train:
            raise ValueError("train names language_model and lora, which adapts it: leave one of them out")
        elif self.model.path is None:
            raise ValueError("train names lora, which adapts a Delta-LLaVA that exists: name it as model.path")
        if self.data.frozen_features is not None and "vision_tower" in self.train:
            raise ValueError(
                "data.frozen_features keeps what a tower computes, and train names vision_tower: drop one"
            )
        if self.projector_lr is not None and not {"projector", "deltas"} & set(self.train):
            raise ValueError("projector_lr is given but train names neither projector nor deltas: leave it out")
        return self

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budgets that steps draw from."""
        number = self.num_visual_tokens
        return (number,) if isinstance(number, int) else tuple(number)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as `load_recipe` reads it, without unset values and without secrets."""
        return _without_secrets(self.model_dump(exclude_none=True))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: changes, each `key=value` with dots in the key (`arguments.max_steps=10`); values are YAML.

    Raises:
        RecipeError: a file that is missing or not YAML, an unknown key, a bad value, a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}.")
    content = _parse(read_text(path, MAX_RECIPE_BYTES), str(path))
    if not isinstance(content, dict):
        raise RecipeError(f"{path} should hold key: value pairs.")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                f"The change {shorten(override)}: write it as key=value, for example num_visual_tokens=36."
            )
        _set(content, key.strip().split("."), _parse(text, key), override)
    return make_recipe(content, path.name)


def make_recipe(content: dict[str, Any], name: str = "recipe") -> Recipe:
    """
    Check a recipe given as a dictionary.

    Args:
        content: the keys and values of a recipe.
        name: name of the recipe in error messages.

    Raises:
        RecipeError: an unknown key, a bad value, or a missing file.
    """
    return validate(Recipe, content, name, RecipeError)


def write_yaml(content: dict[str, Any], path: Path) -> None:
    """Write `content` as YAML, keys in their order."""
    import yaml

    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _parse(text: str, name: str) -> Any:
    """A YAML value of strings, numbers, booleans, lists and dictionaries.

    Raises:
        RecipeError: PyYAML is missing, or the text is anything else.
    """
    try:
        import yaml
    except ImportError as error:
        raise RecipeError("Recipes need PyYAML: pip install 'transformers-delta-llava[train]'.") from error

    class Loader(yaml.SafeLoader):
        """YAML 1.1, except that `1e-3` is a number, as in YAML 1.2."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    try:
        return _plain(yaml.load(text, Loader=Loader), [0])
    except RecursionError:
        raise RecipeError(f"{shorten(name)} is nested too deep.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise RecipeError(f"{shorten(name)} is not YAML that a recipe can hold: {one_line(error)}.") from error


def _plain(value: Any, count: list[int]) -> Any:
    """A copy of `value` with aliases expanded; `count[0]` is the number of values copied so far."""
    count[0] += 1
    if count[0] > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {shorten(key)} is a {type(key).__name__}, not text; put it in quotes")
        return {key: _plain(inner, count) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, count) for inner in value]
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{shorten(value)} is a {type(value).__name__}; put it in quotes to make it text")
    if isinstance(value, int) and abs(value) >= 2**63 or isinstance(value, float) and math.isnan(value):
        raise ValueError("a number in it is out of range")
    return value


def _set(content: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise RecipeError(
                f"The change {shorten(override)}: {key} holds a value, so there is nothing below it to set."
            )
    content[keys[-1]] = value


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_secrets(inner)
            for key, inner in value.items()
            if not SECRET_NAME.search(key.lower()) and not (isinstance(inner, str) and SECRET_VALUE.search(inner))
        }
    if isinstance(value, list):
        return [_without_secrets(v) for v in value if not (isinstance(v, str) and SECRET_VALUE.search(v))]
    return value
