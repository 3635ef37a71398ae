"""The model and the processor that a recipe names."""

import inspect
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.image_processing_base import ImageProcessingMixin

from ..conversion.chat_templates import read_chat_template
from ..conversion.generation import fit_generation_config, keep_valid_flags
from ..conversion.language_models import LANGUAGE_MODELS
from ..conversion.tokenizer import TokenIds, add_tokens, load_tokenizer, read_own_template
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.errors import one_line
from .errors import RecipeError
from .recipe import ModelRecipe, Recipe


def build_model(
    recipe: Recipe, arguments: TrainingArguments
) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """
    Load or make what is to be trained, on the CPU.

    The first of the recipe's budgets becomes the default of model and processor.

    Raises:
        RecipeError: a budget that the model's grid cannot give, or parts that cannot be put together.
    """
    dtype = _dtype(recipe.model, arguments)
    try:
        make = _load if recipe.model.path is not None else _join if recipe.model.language is not None else _create
        model, processor = make(recipe, dtype)
        for budget in recipe.budgets:
            model.config.scale_factor_for(budget)
    except Exception as error:  # of every kind: configs and weights are strangers'
        raise RecipeError(f"model: {one_line(error)}.") from error
    budget = recipe.budgets[0]
    model.config.scale_factor = model.config.scale_factor_for(budget)
    processor.visual_token_budgets = list(model.config.visual_token_budgets)
    processor.num_visual_tokens = processor.image_seq_length = budget
    return model, processor


def _dtype(model: ModelRecipe, arguments: TrainingArguments) -> torch.dtype:
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def _options(model: ModelRecipe, dtype: torch.dtype) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": dtype}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if (quantization := model.quantization_config) is not None:
        known = set(inspect.signature(BitsAndBytesConfig.__init__).parameters)
        for name in quantization:
            if name not in known:
                raise ValueError(f"quantization_config.{name} is not an argument of BitsAndBytesConfig")
        options["quantization_config"] = BitsAndBytesConfig(
            **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, **quantization}
        )
    return options


def _load(recipe: Recipe, dtype: torch.dtype) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """A Delta-LLaVA."""
    path = str(recipe.model.path)
    config = DeltaLlavaConfig.from_pretrained(path, **recipe.model.config)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(path, config=config, **_options(recipe.model, dtype))
    saved = DeltaLlavaProcessor.from_pretrained(path)
    tokenizer = saved.tokenizer
    pad_images = saved.do_pad if recipe.data.pad_images is None else recipe.data.pad_images
    template = saved.chat_template
    if recipe.data.chat_template is not None:
        template = read_chat_template(recipe.data.chat_template, tokenizer)
    processor = _processor(saved.image_processor, tokenizer, template, recipe, pad_images)
    count = max(tokenizer.get_vocab().values()) + 1
    _fit_generation(model, processor, TokenIds(config.image_token_id, tokenizer.pad_token_id, count, []))
    return model, processor


def _join(recipe: Recipe, dtype: torch.dtype) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """Two pretrained parts, and a new projector between them."""
    vision, language = str(recipe.model.vision), str(recipe.model.language)
    text_config = AutoConfig.from_pretrained(language)
    processor, ids = _new_processor(recipe, language, text_config, recipe.model.image_processor or vision)
    model = DeltaLlavaForConditionalGeneration.from_vision_text_pretrained(
        vision, language, processor=processor, dtype=dtype, **recipe.model.config
    )
    if recipe.model.attn_implementation is not None:
        model.set_attn_implementation(recipe.model.attn_implementation)
    _fit_generation(model, processor, ids)
    return model, processor


def _create(recipe: Recipe, dtype: torch.dtype) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """Nothing pretrained."""
    vision_config, text_config = recipe.model.vision_config or {}, dict(recipe.model.text_config or {})
    text_config.setdefault("model_type", "llama")
    image_processor = recipe.model.image_processor or vision_config
    processor, ids = _new_processor(recipe, None, AutoConfig.for_model(**text_config), image_processor)
    tokenizer = processor.tokenizer
    text_config.setdefault("vocab_size", ids.count)
    if text_config["vocab_size"] < ids.count:
        raise ValueError(f"text_config.vocab_size={text_config['vocab_size']}: the tokenizer has {ids.count} tokens.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text_config.setdefault(name, getattr(tokenizer, name))
    config = DeltaLlavaConfig(vision_config, text_config, image_token_id=ids.image, **recipe.model.config)
    with torch.device("cpu"):
        model = DeltaLlavaForConditionalGeneration._from_config(config, **_options(recipe.model, dtype))
    _fit_generation(model, processor, ids)
    return model, processor


def _new_processor(
    recipe: Recipe, language: str | None, text_config: PreTrainedConfig, image_processor: str | dict[str, Any]
) -> tuple[DeltaLlavaProcessor, TokenIds]:
    """A processor for a tokenizer that has seen no images yet."""
    families = (family for family in LANGUAGE_MODELS.values() if family.text_model_type == text_config.model_type)
    sentencepiece_class = next((family.sentencepiece_class for family in families), None)
    tokenizer = load_tokenizer(str(recipe.model.tokenizer or language), text_config, sentencepiece_class)
    ids = add_tokens(tokenizer)
    own = read_own_template(str(recipe.model.tokenizer or language))
    template = read_chat_template(recipe.data.chat_template or "vicuna_v1", tokenizer, own)
    images = _clip_images(image_processor) if isinstance(image_processor, dict) else image_processor
    loaded = _load_image_processor(images) if isinstance(images, str) else images
    pad_images = True if recipe.data.pad_images is None else recipe.data.pad_images
    return _processor(loaded, tokenizer, template, recipe, pad_images), ids


def _processor(
    image_processor: Any, tokenizer: PreTrainedTokenizerBase, template: str, recipe: Recipe, pad_images: bool
) -> DeltaLlavaProcessor:
    return DeltaLlavaProcessor(
        image_processor,
        tokenizer,
        chat_template=template,
        num_visual_tokens=recipe.budgets[0],
        visual_token_budgets=recipe.budgets,  # until the model is there to say which it has
        do_pad=pad_images,
    )


def _clip_images(vision_config: dict[str, Any]) -> Any:
    """CLIP's image processor at the size of a tower."""
    side = vision_config.get("image_size", 224)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
        return _load_image_processor(folder)


def _load_image_processor(source: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(source)
    except ImportError:
        # Before 5.19 transformers wants torchvision here; its image processors on Pillow do without.
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
        name = str(settings.get("image_processor_type", "CLIPImageProcessor")).removesuffix("Fast").removesuffix("Pil")
        if not hasattr(transformers, f"{name}Pil"):
            raise
        return getattr(transformers, f"{name}Pil").from_dict(settings)


def _fit_generation(model: DeltaLlavaForConditionalGeneration, processor: DeltaLlavaProcessor, ids: TokenIds) -> None:
    """Generation settings that end answers as the format does, and that can be saved (Vicuna's own cannot)."""
    config, dropped = keep_valid_flags(model.generation_config.to_dict())
    if dropped:
        warnings.warn(
            f"generation_config.json: left out what transformers refuses there: {sorted(dropped)}.", stacklevel=2
        )
    fit_generation_config(config, processor.tokenizer, ids, model.config.text_config, processor.chat_template)
    model.generation_config = config
