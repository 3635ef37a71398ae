"""What lies beside the graphs: config, processor, tokenizer and prompts in the words of LLaVA, and the card."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import GenerationConfig

from ..modeling import DeltaLlavaConfig
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError
from ..utils.files import read_json, write_json
from ..utils.prompts import max_prompt_tokens
from ..utils.templates import card_template
from .verify import Comparison


# By `model_type`, what transformers.js calls a language model whose cache has this form.
LANGUAGE_MODELS = {
    **{name: name for name in ("llama", "mistral", "gemma", "phi3", "qwen2", "qwen3")},
    "seed_oss": "llama",
}
# What decides about pixel values.
_IMAGE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
_QUESTION = "What is it?"


def encoder_name(number: int, default: int) -> str:
    """The graph that gives `number` visual tokens."""
    return "vision_encoder" if number == default else f"vision_encoder_{number}"


def write_settings(
    folder: Path,
    config: DeltaLlavaConfig,
    processor: DeltaLlavaProcessor,
    generation: GenerationConfig,
    numbers: list[int],
    dtypes: list[str],
    weight_files: dict[str, int],
) -> None:
    """Everything but graphs, card and report.

    Args:
        folder: to write to.
        config, processor, generation: of the repo.
        numbers: of visual tokens, the default first.
        dtypes: precisions, the default first.
        weight_files: how many files of weights a graph has, for those that transformers.js has to know.
    """
    sizes = {str(number): patch_size(config.vision_config.image_size, number) for number in numbers}
    text = config.text_config.to_dict()
    text["model_type"] = LANGUAGE_MODELS[text["model_type"]]
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    settings = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": numbers[0],
        "image_token_index": config.image_token_id,
        "model_type": "llava",
        "text_config": text,
        "vision_config": config.vision_config.to_dict(),
        "transformers.js_config": {"dtype": dtypes[0], "use_external_data_format": weight_files},
        "onnx_export": {
            "do_pad": processor.do_pad,
            "dtypes": dtypes,
            "image_token": processor.image_token,
            "max_prompt_tokens": max_prompt_tokens(config),
            "num_visual_tokens": numbers[0],
            "patch_sizes": sizes,
            "prompts": {"image": split_prompt(processor, True), "text": split_prompt(processor, False)},
            "vision_encoders": {str(number): encoder_name(number, numbers[0]) for number in numbers},
        },
    }
    write_json(json.loads(json.dumps(settings, default=str)), folder / "config.json")
    write_json(json.loads(generation.to_json_string()), folder / "generation_config.json")
    images = json.loads(processor.image_processor.to_json_string())
    images = {name: images[name] for name in _IMAGE_SETTINGS if images.get(name) is not None}
    kind = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    names = {"image_processor_type": kind, "processor_class": "LlavaProcessor"}
    write_json({"do_center_crop": False, **images, **names}, folder / "preprocessor_config.json")
    placeholders = {
        "image_token": processor.image_token,
        "num_additional_image_tokens": 0,
        "patch_size": sizes[str(numbers[0])],
        "processor_class": "LlavaProcessor",
    }
    write_json(placeholders, folder / "processor_config.json")
    _write_tokenizer(processor, folder)


def patch_size(image_size: int, num_visual_tokens: int) -> int | float:
    """The size of a patch with which LLaVA's processor counts `num_visual_tokens` placeholders."""
    side = round(num_visual_tokens**0.5)
    whole = image_size // side
    return whole if image_size // whole == side else image_size / (side + 0.5)


def split_prompt(processor: DeltaLlavaProcessor, with_image: bool) -> list[str]:
    """What stands before and after the question in a first turn.

    Raises:
        DeltaLlavaError: the chat template changes the question.
    """
    content = [{"type": "image"}] * with_image + [{"type": "text", "text": _QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, question, after = prompt.rpartition(_QUESTION)
    if not question:
        raise DeltaLlavaError(
            "The repo's chat template does not write the question as it is, so it gives no prompt to export."
        )
    return [before, after]


def _write_tokenizer(processor: DeltaLlavaProcessor, folder: Path) -> None:
    """The tokenizer, which leaves special tokens to the template; that also where transformers.js looks for it."""
    processor.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DeltaLlavaError("The repo's tokenizer has no tokenizer.json, which is all that the export can use.")
    tokenizer = read_json(path)
    # A prompt that the template has written begins with BOS; a second one would change the answer.
    if (tokenizer.get("post_processor") or {}).get("type") == "TemplateProcessing":
        tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    template = processor.chat_template
    template = template["default"] if isinstance(template, dict) else template
    settings = read_json(folder / "tokenizer_config.json")
    write_json({**settings, "chat_template": template}, folder / "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_card(
    folder: Path, name: str, repo: Path, report: dict[str, Any], sizes: dict[str, int], compared: Iterable[Comparison]
) -> None:
    """`README.md`, with the licence and the base models of the repo's own card."""
    own = repo / "README.md"
    given = ModelCard.load(own, ignore_metadata_errors=True).data if own.is_file() else ModelCardData()
    header = ModelCardData(
        base_model=given.get("base_model"),
        library_name="transformers.js",
        license=given.get("license"),
        pipeline_tag="image-text-to-text",
        tags=["delta-llava", "onnx", "visual-token-reduction"],
    ).to_yaml()
    template = card_template(__package__, "card.md.jinja")
    card = template.render(header=header, name=name, report=report, sizes=sizes, compared=list(compared))
    (folder / "README.md").write_text(card, encoding="utf-8")
