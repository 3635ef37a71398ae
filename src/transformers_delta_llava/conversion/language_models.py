"""What depends on the language model's family: its transformers type, prompt format, tokenizer and stop tokens."""

from dataclasses import dataclass

from .errors import ConversionError


@dataclass(frozen=True)
class LanguageModel:
    """One family. `sentencepiece_class` names the tokenizer class for a folder that only holds a `tokenizer.model`."""

    text_model_type: str
    chat_template: str
    sentencepiece_class: str | None = None


# `model_type` of the authors' checkpoints. All of these keep their weights' usual names below `model.`.
LANGUAGE_MODELS = {
    "llava_llama": LanguageModel("llama", "vicuna_v1", "LlamaTokenizer"),
    "llava_mistral": LanguageModel("mistral", "llama_2", "LlamaTokenizer"),
    "llava_gemma": LanguageModel("gemma", "gemma", "GemmaTokenizer"),
    "llava_phi3": LanguageModel("phi3", "phi_3", "LlamaTokenizer"),
    "llava_seed_oss": LanguageModel("seed_oss", "vicuna_v1"),
    "llava_qwen": LanguageModel("qwen2", "chatml"),
    "llava_qwen2": LanguageModel("qwen2", "chatml"),
    "llava_qwen3": LanguageModel("qwen3", "chatml"),
}

# A llava_llama checkpoint was tuned in the format of its base model; these words in the base's name tell which.
BASE_NAME_TEMPLATES = {"hermes": "hermes", "llama-2": "llama_2"}

# Tokens that end a turn in a prompt format, next to the end-of-sequence token of the language model.
TURN_ENDS = {"chatml": "<|im_end|>", "hermes": "<|im_end|>", "gemma": "<end_of_turn>", "phi_3": "<|end|>"}


def language_model(model_type: object) -> LanguageModel:
    """The family of a checkpoint's `model_type`; ConversionError for one that is not known."""
    family = LANGUAGE_MODELS.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(LANGUAGE_MODELS)
        raise ConversionError(
            f"config.json has model_type={model_type!r}; a Delta-LLaVA checkpoint has one of {known}."
        )
    return family


def default_chat_template(config: dict) -> str:
    """Name of the prompt format that fits a checkpoint's config: the base model's where its name tells, else the family's."""
    family = language_model(config.get("model_type"))
    if config["model_type"] == "llava_llama":
        base = str(config.get("_name_or_path", "")).rsplit("/", 1)[-1].lower()
        return next((name for word, name in BASE_NAME_TEMPLATES.items() if word in base), family.chat_template)
    return family.chat_template
