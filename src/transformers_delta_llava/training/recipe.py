"""Recipes: YAML files that describe a training run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import TrainingArguments

from ..errors import DeltaLlavaError, one_line


DEFAULTS = {
    "report_to": "none",
    "logging_steps": 0.05,  # a twentieth of the run
    "logging_nan_inf_filter": False,  # a loss of nan or inf is an error here, not a gap in the log
    "ddp_find_unused_parameters": False,  # every trained parameter has a gradient in every step, see `Collator`
    "remove_unused_columns": False,
}
# Other initialisations change the base weights, so the adapter does not fit the original model.
LORA_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# Adapters with these cannot be merged into the base model.
UNMERGEABLE = ("lora_bias", "alora_invocation_tokens")


class Section(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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

    path: str | None = None
    vision: str | None = None
    language: str | None = None
    vision_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    tokenizer: str | None = None
    image_processor: str | None = None
    config: dict[str, Any] = {}
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> "ModelRecipe":
        kinds = [("path",), ("vision", "language"), ("vision_config", "text_config")]
        given = [kind for kind in kinds if any(getattr(self, name) is not None for name in kind)]
        if len(given) != 1 or any(getattr(self, name) is None for name in given[0]):
            raise ValueError("give one of: path; vision and language; vision_config and text_config")
        if self.text_config is not None and self.tokenizer is None:
            raise ValueError("text_config needs a tokenizer")
        if self.quantization_config is not None and self.path is None:
            raise ValueError("quantization_config needs a path: QLoRA adapts a Delta-LLaVA")
        return self


class DataRecipe(Section):
    """The training data.

    Args:
        path: a file in LLaVA's format, `.json` (an array) or `.jsonl` (one row per line).
        dataset: instead of `path`, a dataset of the `datasets` library (a folder or a Hub id) with the columns
            `messages` and `images`.
        split: the split of `dataset`.
        images: folder that the rows' image names are relative to.
        eval_path: a file of held-out rows, for `eval_strategy` of the arguments.
        chat_template: name of a chat template, `tokenizer` for the language model's own, or a Jinja file. By default a
            Delta-LLaVA keeps its own, and a new one has `vicuna_v1`.
        max_length: tokens, visual ones included, to which a row is truncated.
        pad_images: pad images to squares; by default as the processor does.
        max_tiles: most tiles of an image whose row has no `max_tiles`; by default the processor's.
        num_frames: frames of a video; by default the processor's.
        on_error: `fail` at the first unusable row, or `skip` such rows, counted and named.
    """

    path: str | None = None
    dataset: str | None = None
    split: str = "train"
    images: str | None = None
    eval_path: str | None = None
    chat_template: str | None = None
    max_length: Annotated[int, Field(ge=1)] = 2048
    pad_images: bool | None = None
    max_tiles: Annotated[int, Field(ge=1)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    on_error: Literal["fail", "skip"] = "fail"

    @model_validator(mode="after")
    def _check_source(self) -> "DataRecipe":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give one of: path (a LLaVA JSON or JSONL file); dataset (of `datasets`)")
        return self


class Recipe(Section):
    """A training run.

    Args:
        model: the model.
        data: the training data.
        train: the parts that are trained.
        num_visual_tokens: visual tokens per image, or a list of budgets from which every step draws one; the model's own by
            default.
        pack: put several rows into one sequence, up to about `data.max_length` tokens, in which they do not see one another.
        projector_lr: learning rate of the projector; by default `arguments.learning_rate`.
        lora: arguments of PEFT's `LoraConfig`, if `train` has `lora`.
        arguments: arguments of transformers' `TrainingArguments`.
    """

    model: ModelRecipe
    data: DataRecipe
    train: Annotated[
        list[Literal["vision_tower", "projector", "deltas", "language_model", "lora"]], Field(min_length=1)
    ]
    num_visual_tokens: int | list[int] | None = None
    pack: bool = False
    projector_lr: Annotated[float, Field(gt=0)] | None = None
    lora: dict[str, Any] = {}
    arguments: dict[str, Any]

    @field_validator("lora")
    @classmethod
    def _check_lora(cls, lora: dict[str, Any]) -> dict[str, Any]:
        if lora.get("init_lora_weights", True) not in LORA_INITIALISATIONS:
            raise ValueError(f"init_lora_weights={lora['init_lora_weights']} changes the base weights; leave it out")
        for name in UNMERGEABLE:
            if lora.get(name):
                raise ValueError(f"{name}: such an adapter cannot be merged into the finished model; leave it out")
        return lora

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        # YAML 1.1 reads `no` as false.
        arguments = {n: "no" if v is False and n.endswith("_strategy") else v for n, v in arguments.items()}
        if arguments.get("label_smoothing_factor"):
            raise ValueError(
                "label_smoothing_factor: transformers' Trainer would compare labels with the wrong logits"
            )
        if not arguments.get("output_dir"):
            raise ValueError("output_dir is missing")
        return arguments

    @model_validator(mode="after")
    def _check_train(self) -> "Recipe":
        if "lora" not in self.train:
            if self.lora:
                raise ValueError("lora is given, but train does not name it")
            if self.model.quantization_config is not None:
                raise ValueError("model.quantization_config needs train: [lora]: quantized weights cannot be trained")
        elif "language_model" in self.train:
            raise ValueError("train names language_model and lora, which adapts it; leave one of them out")
        elif self.model.path is None:
            raise ValueError("train names lora, which adapts a Delta-LLaVA: name it as model.path")
        if self.projector_lr is not None and not {"projector", "deltas"} & set(self.train):
            raise ValueError("projector_lr is given, but train names neither projector nor deltas")
        if self.num_visual_tokens is None and self.model.path is None:
            raise ValueError("num_visual_tokens is missing: a new model has no default")
        return self

    @property
    def budgets(self) -> tuple[int, ...] | None:
        """The numbers of visual tokens that steps draw from; the model's own when `None`."""
        numbers = self.num_visual_tokens
        return (numbers,) if isinstance(numbers, int) else None if numbers is None else tuple(numbers)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as `load_recipe` reads it, without a token of the Hub."""
        content = self.model_dump(exclude_none=True)
        content["arguments"].pop("hub_token", None)
        return content

    def training_arguments(self) -> TrainingArguments:
        """`TrainingArguments` with the defaults of this package."""
        values = {**DEFAULTS, **self.arguments}
        if "lora" in self.train:
            values.setdefault("learning_rate", 2e-4)  # transformers' default, 5e-5, is for whole models
        if values.get("logging_steps") == DEFAULTS["logging_steps"] and values.get("max_steps", -1) in range(1, 20):
            values["logging_steps"] = 1
        # From 5.23 on it is called activation_checkpointing.
        new, old = "activation_checkpointing", "gradient_checkpointing"
        renamed = hasattr(TrainingArguments, new)
        for one, other in ((old, new) if renamed else (new, old), (f"{old}_kwargs", f"{new}_kwargs")):
            if one in values and renamed == one.startswith(old):
                values[other] = values.pop(one)
        checkpointing = new if renamed else old
        if values.get(checkpointing):
            # The reentrant form needs inputs with gradients, which a frozen embedding does not give.
            values[f"{checkpointing}_kwargs"] = {
                "use_reentrant": False,
                **(values.get(f"{checkpointing}_kwargs") or {}),
            }
        return TrainingArguments(**values)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: changes, each `key=value` with dots in the key (`arguments.max_steps=10`); values are YAML.

    Raises:
        DeltaLlavaError: an unknown key or a bad value.
        OSError: the file cannot be read.
    """
    path = Path(path)
    content = parse_yaml(path.read_text(encoding="utf-8"))
    for override in overrides:
        name, _, text = override.partition("=")
        *sections, key = name.strip().split(".")
        section = content
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = parse_yaml(text)
    return make_recipe(content, path.name)


def make_recipe(content: dict[str, Any], name: str = "recipe") -> Recipe:
    """The recipe of a dictionary; `name` is for messages.

    Raises:
        DeltaLlavaError: an unknown key or a bad value.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise DeltaLlavaError(f"{name}: {one_line(error)}") from error


def parse_yaml(text: str) -> Any:
    """YAML 1.1, except that `1e-3` is a number, as in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return yaml.load(text, Loader=Loader)


def write_yaml(content: dict[str, Any], path: Path) -> None:
    """Write `content` as YAML, keys in their order."""
    import yaml

    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
