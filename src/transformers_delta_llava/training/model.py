"""The model and processor of a recipe, and the parameters that it trains."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..conversion.prompts import fit_generation_config, keep_valid_flags, language_models_of, read_chat_template
from ..conversion.tokenizer import TokenIds, add_tokens, load_tokenizer, read_own_template
from ..errors import DeltaLlavaError, format_names
from ..loading import DTYPES
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from .recipe import ModelRecipe, Recipe


# Every visual token passes through tower and projector, and they are small compared with the language model.
NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def build_model(
    recipe: Recipe, arguments: TrainingArguments
) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """
    Load or create the model of a recipe, on the CPU.

    The first of the recipe's budgets becomes the default of model and processor.

    Raises:
        ValueError: a budget that the model's grid cannot give, or parts that do not fit together.
    """
    dtype = _dtype(recipe.model, arguments)
    build = _load if recipe.model.path is not None else _join if recipe.model.language is not None else _create
    with _unsharded(arguments):
        model, processor = build(recipe, dtype)
    budgets = recipe.budgets or (model.config.num_visual_tokens,)
    for budget in budgets:
        model.config.scale_factor_for(budget)  # raises
    model.config.num_visual_tokens = budgets[0]
    processor.visual_token_budgets = list(model.config.visual_token_budgets)
    processor.num_visual_tokens = processor.image_seq_length = budgets[0]
    return model, processor


@contextmanager
def _unsharded(arguments: TrainingArguments) -> Iterator[None]:
    """Models built inside are whole in every process, as under DDP and FSDP.

    Under ZeRO-3 transformers would shard them: the random numbers, and so a new projector or adapter, would be others,
    and weights would be saved under other names. DeepSpeed shards the model when training starts.
    """
    config = getattr(arguments, "hf_deepspeed_config", None) or getattr(arguments.deepspeed_plugin, "dschf", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def _dtype(model: ModelRecipe, arguments: TrainingArguments) -> torch.dtype:
    if model.dtype != "auto":
        return DTYPES[model.dtype]
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def _options(model: ModelRecipe, dtype: torch.dtype) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": dtype}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.quantization_config is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            **{
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": dtype,
                "llm_int8_skip_modules": NOT_QUANTIZED,
                **model.quantization_config,
            }
        )
    return options


def _load(recipe: Recipe, dtype: torch.dtype) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """A Delta-LLaVA."""
    path = str(recipe.model.path)
    config = DeltaLlavaConfig.from_pretrained(path, **recipe.model.config)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(path, config=config, **_options(recipe.model, dtype))
    processor = DeltaLlavaProcessor.from_pretrained(path)
    tokenizer = processor.tokenizer
    if recipe.data.pad_images is not None:
        processor.do_pad = recipe.data.pad_images
    if recipe.data.chat_template is not None:
        processor.chat_template = read_chat_template(recipe.data.chat_template, tokenizer)
    count = max(tokenizer.get_vocab().values()) + 1
    ids = TokenIds(config.image_token_id, config.video_token_id, tokenizer.pad_token_id, count, [])
    _fit_generation(model, processor, ids)
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
    """An untrained model."""
    vision_config = recipe.model.vision_config or {}
    text_config = {"model_type": "llama", **(recipe.model.text_config or {})}
    image_processor = recipe.model.image_processor or vision_config
    processor, ids = _new_processor(recipe, None, AutoConfig.for_model(**text_config), image_processor)
    text_config.setdefault("vocab_size", ids.count)
    if text_config["vocab_size"] < ids.count:
        raise DeltaLlavaError(f"text_config.vocab_size={text_config['vocab_size']}, but the tokenizer has {ids.count}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text_config.setdefault(name, getattr(processor.tokenizer, name))
    config = DeltaLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=ids.image,
        video_token_id=ids.video,
        **recipe.model.config,
    )
    model = DeltaLlavaForConditionalGeneration._from_config(config, **_options(recipe.model, dtype))
    _fit_generation(model, processor, ids)
    return model, processor


def _new_processor(
    recipe: Recipe, language: str | None, text_config: PreTrainedConfig, image_processor: str | dict[str, Any]
) -> tuple[DeltaLlavaProcessor, TokenIds]:
    """A processor for a language model's tokenizer, with the tokens of images added."""
    language_models = language_models_of(text_config.model_type).values()
    sentencepiece_class = next((model.sentencepiece_class for model in language_models), None)
    source = str(recipe.model.tokenizer or language)
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(source, text_config, sentencepiece_class)
    ids = add_tokens(tokenizer, getattr(text_config, "vocab_size", 0))
    if isinstance(image_processor, dict):  # the config of an untrained tower: CLIP's preprocessing at its size
        side = image_processor.get("image_size", 224)
        loaded = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    else:
        loaded = _load_image_processor(image_processor)
    budgets = recipe.budgets or (1,)
    processor = DeltaLlavaProcessor(
        loaded,
        tokenizer,
        chat_template=read_chat_template(
            recipe.data.chat_template or "vicuna_v1", tokenizer, read_own_template(source)
        ),
        num_visual_tokens=budgets[0],
        visual_token_budgets=budgets,  # replaced by the model's own in `build_model`
        do_pad=True if recipe.data.pad_images is None else recipe.data.pad_images,
    )
    return processor, ids


def _load_image_processor(model_id: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(model_id)
    except ImportError:
        # Before 5.19 this needs torchvision, which the image processors on Pillow do not.
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model_id)
        name = str(settings.get("image_processor_type", "CLIPImageProcessor")).removesuffix("Fast").removesuffix("Pil")
        return getattr(transformers, f"{name}Pil").from_dict(settings)


def _fit_generation(model: DeltaLlavaForConditionalGeneration, processor: DeltaLlavaProcessor, ids: TokenIds) -> None:
    """Generation settings that stop where answers end, and that can be saved (Vicuna's own cannot)."""
    config, _ = keep_valid_flags(model.generation_config.to_dict())
    fit_generation_config(config, processor.tokenizer, ids, model.config.text_config, processor.chat_template)
    model.generation_config = config


# Parameters by name. PEFT adds its own names before and between these.
PATTERNS = {
    "vision_tower": re.compile(r"(^|\.)vision_tower\."),
    "projector": re.compile(r"(^|\.)multi_modal_projector\."),
    "deltas": re.compile(r"(^|\.)multi_modal_projector\..*delta_[uv]$"),
    "language_model": re.compile(r"(^|\.)(language_model|lm_head)\."),
}
VISION_MODULES = {"vision_tower": "vision_tower"} | dict.fromkeys(("projector", "deltas"), "multi_modal_projector")
# LLaVA's own LoRA recipe.
LORA_DEFAULTS = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}


def select_trainable(
    model: DeltaLlavaForConditionalGeneration, train: Sequence[str], lora: dict[str, Any]
) -> nn.Module:
    """
    Enable gradients for trained parameters, in float32, and disable them for all others.

    Layers of the vision tower above the deepest one that the projector reads are never trained, because they do not
    run. With LoRA, PEFT decides what `lora` trains (adapters, `modules_to_save`, biases, tokens), and the other parts
    in `train` are saved with the adapters.

    Args:
        model: the model, on the CPU or a device.
        train: `Recipe.train`.
        lora: arguments of PEFT's `LoraConfig`; by default LLaVA's rank and alpha on every linear layer of the language
            model. The projector and layers that do not run never get adapters.

    Returns:
        The model, or with `lora` a `PeftModel` around it.

    Raises:
        DeltaLlavaError: the model has no such parameters, or PEFT would not save a trained one.
    """
    patterns = [PATTERNS[name] for name in train if name != "lora"]
    unused = _unused_layers(model)
    trained: nn.Module = model
    to_save = frozenset(lora.get("modules_to_save") or ())
    if "lora" in train:
        trained = _add_lora(model, train, lora, unused)
    for name, parameter in trained.named_parameters():
        plain = name.replace("modules_to_save.default.", "")
        wanted = any(pattern.search(plain) for pattern in patterns)
        if "lora" in train and not wanted:
            # PEFT decides, except for modules that only `train` adds to `modules_to_save`.
            added = ".modules_to_save." in name and not any(f".{module}." in f".{name}" for module in to_save)
            wanted = parameter.requires_grad and not added
        parameter.requires_grad_(wanted and ".original_module." not in name and not unused.search(plain))
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    names = [name.replace("modules_to_save.default.", "") for name in trained_names(trained)]
    for entry in train:
        if entry != "lora" and not any(PATTERNS[entry].search(name) for name in names):
            raise DeltaLlavaError(f"train: {entry}: this model has no such parameters")
    if "lora" in train:
        _check_saved(trained)
    if not any(PATTERNS["vision_tower"].search(name) for name in names):
        # Also, gradient checkpointing then skips the tower.
        model.model.get_patch_features = torch.no_grad()(model.model.get_patch_features)  # type: ignore[method-assign]
    return trained


def packs_for_flash(model: DeltaLlavaForConditionalGeneration) -> bool:
    """Whether rows of one sequence are kept apart by FlashAttention's arguments, and not by attention masks.

    Raises:
        DeltaLlavaError: this language model or attention would mix them.
    """
    config = model.config.text_config
    attention = str(config._attn_implementation)
    mixing = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    known = "flash" in attention or attention in ("eager", "sdpa", "flex_attention")
    if mixing or not known or not model.model.language_model._supports_attention_backend:
        kind = format_names(mixing) or attention
        raise DeltaLlavaError(f"pack: {config.model_type} with {kind} does not keep packed rows apart; leave it out")
    return "flash" in attention


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def trains_vision(model: nn.Module) -> bool:
    """Whether parameters are trained that only images reach."""
    names = trained_names(model)
    return any(PATTERNS[part].search(name) for part in ("vision_tower", "projector") for name in names)


def _unused_layers(model: DeltaLlavaForConditionalGeneration) -> re.Pattern[str]:
    """Matches the vision tower's parameters that no visual token depends on."""
    config = model.config
    deepest, layers = config.vision_feature_indices[-1], config.vision_config.num_hidden_layers
    above = "|".join(str(index) for index in range(deepest, layers)) or "none"
    return re.compile(rf"vision_tower\.(.*\.)?(layers?\.({above})\.|post_layernorm\.|head\.)")


def _add_lora(
    model: DeltaLlavaForConditionalGeneration, train: Sequence[str], lora: dict[str, Any], unused: re.Pattern[str]
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = {**LORA_DEFAULTS, **lora}
    if settings.get("target_modules") is None and settings.get("target_parameters") is None:
        modules = model.model.language_model.named_modules()
        linear = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
        settings["target_modules"] = rf".*\.language_model\..*\.({'|'.join(sorted(linear))})"
    else:
        excluded = [rf".*multi_modal_projector.*|.*({unused.pattern}).*"]
        given = settings.get("exclude_modules")
        if isinstance(given, str):
            excluded.append(given)
        elif given:
            excluded.append(rf"(.*\.)?({'|'.join(map(re.escape, given))})")
        settings["exclude_modules"] = "|".join(f"({pattern})" for pattern in excluded)
    to_save = list(settings.get("modules_to_save") or ())
    added = sorted({VISION_MODULES[name] for name in train if name in VISION_MODULES} - set(to_save))
    settings["modules_to_save"] = to_save + added or None
    return get_peft_model(model, LoraConfig(**settings))


def _check_saved(model: nn.Module) -> None:
    """Refuse to train parameters that PEFT does not save in the adapter."""
    from peft import get_peft_model_state_dict

    saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    for name in trained_names(model):
        if model.get_parameter(name).data_ptr() not in saved:
            raise DeltaLlavaError(f"lora: PEFT does not save {name} with the adapter, so it cannot be trained")
