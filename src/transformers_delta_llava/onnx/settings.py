"""Config, processor, tokenizer and prompts of an export, under LLaVA's names, as transformers.js reads them."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedConfig

from ..errors import DeltaLlavaError, read_json, write_json
from ..modeling import DeltaLlavaConfig
from ..processing import DeltaLlavaProcessor


# transformers.js's model type of each language model whose cache has this form.
LANGUAGE_MODELS = {
    **{name: name for name in ("llama", "mistral", "gemma", "phi3", "qwen2", "qwen3")},
    "seed_oss": "llama",
}
# Image processor settings that decide about pixel values.
IMAGE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
QUESTION = "What is it?"


def check_language_model(config: PreTrainedConfig) -> None:
    """Refuse a language model that cannot be exported.

    Raises:
        DeltaLlavaError: it has another kind of cache, or position embeddings that change with the length of the prompt.
    """
    if config.model_type not in LANGUAGE_MODELS:
        raise DeltaLlavaError(f"text_config.model_type={config.model_type!r}: use one of {', '.join(LANGUAGE_MODELS)}")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in ("dynamic", "longrope"):
        raise DeltaLlavaError(f"rope_type={rope_type!r} depends on the prompt's length, which a graph cannot do")


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
    """
    Write everything but graphs, card and report.

    Args:
        folder: to write to.
        config, processor, generation: of the repo.
        numbers: of visual tokens, the default first.
        dtypes: precisions, the default first.
        weight_files: number of weight files per graph, for those that transformers.js has to know.
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
            "max_prompt_tokens": getattr(config.text_config, "max_position_embeddings", None),
            "num_visual_tokens": numbers[0],
            "patch_sizes": sizes,
            "prompts": {"image": split_prompt(processor, True), "text": split_prompt(processor, False)},
            "vision_encoders": {str(number): encoder_name(number, numbers[0]) for number in numbers},
        },
    }
    write_json(json.loads(json.dumps(settings, default=str)), folder / "config.json")
    write_json(json.loads(generation.to_json_string()), folder / "generation_config.json")
    images = json.loads(processor.image_processor.to_json_string())
    kind = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    images = {name: images[name] for name in IMAGE_SETTINGS if images.get(name) is not None}
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
    """The text before and after the question in a first turn."""
    content: list[dict[str, Any]] = [{"type": "image"}] * with_image + [{"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, question, after = prompt.rpartition(QUESTION)
    if not question:
        raise DeltaLlavaError("the chat template changes the text of the question, so there is no prompt to export")
    return [before, after]


def _write_tokenizer(processor: DeltaLlavaProcessor, folder: Path) -> None:
    """The tokenizer, which leaves special tokens to the template; the template also where transformers.js looks for it."""
    processor.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    # A prompt that the template has written begins with BOS; a second one would change the answer.
    if (tokenizer.get("post_processor") or {}).get("type") == "TemplateProcessing":
        tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    settings = read_json(folder / "tokenizer_config.json")
    write_json({**settings, "chat_template": processor.chat_template}, folder / "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")


def write_card(folder: Path, name: str, repo: Path, numbers: list[int], dtypes: list[str]) -> None:
    """`README.md`, with the licence and the base models of the repo's own card."""
    own = repo / "README.md"
    given = ModelCard.load(own, ignore_metadata_errors=True).data if own.is_file() else ModelCardData()
    data = ModelCardData(
        base_model=given.get("base_model"),
        library_name="transformers.js",
        license=given.get("license"),
        pipeline_tag="image-text-to-text",
        tags=["delta-llava", "onnx", "visual-token-reduction"],
    )
    text = f"""# {name}

[Delta-LLaVA](https://arxiv.org/abs/2512.18910) as ONNX graphs ({", ".join(dtypes)}). An image becomes {numbers[0]} visual tokens by
default; there are graphs for {", ".join(map(str, numbers))}.

```bash
pip install onnxruntime tokenizers pillow numpy
python run_onnx.py "What is in this image?" photo.jpg --num-visual-tokens {numbers[-1]}
```

In Node and browsers, `LlavaForConditionalGeneration` of `@huggingface/transformers` loads it. Pad images to a square of the mean
colour first; `onnx_export` in `config.json` names the graph and the `patch_size` of every number of visual tokens.
"""
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
