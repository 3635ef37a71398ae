"""The language models of the authors' checkpoints: their type in transformers, their tokenizer and their prompt format."""

from dataclasses import dataclass

from ..utils.errors import DeltaLlavaError, show


@dataclass(frozen=True)
class LanguageModel:
    """What a checkpoint's `model_type` stands for.

    Attributes:
        text_model_type: `model_type` in transformers.
        architecture: the class of the authors' code.
        conversation: conversation format of a checkpoint about which nothing else is known.
        evidence: what tells the conversation format, in this order: the tokenizer's own chat template (`own`), the base
            model's `name`, special tokens of the `vocabulary`, or the `type`, which means `conversation`.
        sentencepiece_class: tokenizer class for a folder that holds only a `tokenizer.model`.
    """

    text_model_type: str
    architecture: str
    conversation: str
    evidence: tuple[str, ...]
    sentencepiece_class: str | None = None


# By `model_type` of the checkpoint. The authors' code writes the first five; the others follow LLaVA's names. All of them
# keep their weights under the usual names below `model.`.
LANGUAGE_MODELS = {
    # Llama 1 to 3, Vicuna, Hermes, and whatever else their code takes for a Llama.
    "llava_llama": LanguageModel(
        "llama", "LlavaLlamaForCausalLM", "vicuna_v1", ("name", "own", "vocabulary"), "LlamaTokenizer"
    ),
    "llava_mistral": LanguageModel(
        "mistral", "LlavaMistralForCausalLM", "mistral_instruct", ("name", "vocabulary", "type"), "LlamaTokenizer"
    ),
    "llava_gemma": LanguageModel("gemma", "LlavaGemmaForCausalLM", "gemma", ("type",), "GemmaTokenizer"),
    "llava_Phi3": (_PHI_3 := LanguageModel("phi3", "LlavaPhi3ForCausalLM", "phi_3", ("type",), "LlamaTokenizer")),
    # Their training renders the tokenizer's own template for it.
    "llava_seed_oss": LanguageModel("seed_oss", "LlavaSeedOssForCausalLM", "hermes-4", ("own", "name")),
    "llava_phi3": _PHI_3,
    "llava_qwen": (_QWEN_2 := LanguageModel("qwen2", "LlavaQwenForCausalLM", "chatml", ("own", "type"))),
    "llava_qwen2": _QWEN_2,
    "llava_qwen3": LanguageModel("qwen3", "LlavaQwen3ForCausalLM", "qwen3", ("own", "type")),
}
# Types that the authors' code writes and that do not convert, with the reason.
UNSUPPORTED = {
    "llava_mpt": "MPT names its weights differently (transformer.blocks) and has no position embeddings (ALiBi), so it "
    "cannot be converted; of the authors' models, those on Llama, Mistral, Gemma, Phi-3 and SeedOss can"
}


def find_language_model(model_type: object) -> LanguageModel:
    """The language model of a checkpoint's `model_type`.

    Raises:
        DeltaLlavaError: it is unknown or not supported.
    """
    if isinstance(model_type, str) and model_type in LANGUAGE_MODELS:
        return LANGUAGE_MODELS[model_type]
    if isinstance(model_type, str) and model_type in UNSUPPORTED:
        raise DeltaLlavaError(f"config.json has model_type={show(model_type)}: {UNSUPPORTED[model_type]}.")
    known = ", ".join(LANGUAGE_MODELS)
    raise DeltaLlavaError(
        f"config.json has model_type={show(model_type)}; a Delta-LLaVA checkpoint has one of {known}."
    )


def language_models_of(text_model_type: str) -> dict[str, LanguageModel]:
    """The entries of `LANGUAGE_MODELS` whose `model_type` in transformers is `text_model_type`, the preferred one first."""
    return {name: model for name, model in LANGUAGE_MODELS.items() if model.text_model_type == text_model_type}
