"""The language models of the authors' checkpoints: their transformers type, tokenizer, and how their prompts are known."""

from dataclasses import dataclass

from ..utils.errors import DeltaLlavaError


@dataclass(frozen=True)
class LanguageModel:
    """
    One family.

    Attributes:
        text_model_type: `model_type` in transformers.
        conversation: the conversation of a checkpoint about which nothing else is known.
        evidence: what tells the conversation, the first that does: the tokenizer's `own` chat template, the base model's
            `name`, special tokens of the `vocabulary`, or the `type`, which means `conversation`.
        sentencepiece_class: the tokenizer class for a folder that only holds a `tokenizer.model`.
    """

    text_model_type: str
    conversation: str
    evidence: tuple[str, ...]
    sentencepiece_class: str | None = None


# Every `model_type` of a checkpoint. The first five are those that the authors' code writes; the others follow LLaVA's
# names, and stand first for nothing. All of these keep their weights' usual names below `model.`.
LANGUAGE_MODELS = {
    # Llama 1 to 3, Vicuna, Hermes, and whatever else their code takes for a Llama.
    "llava_llama": LanguageModel("llama", "vicuna_v1", ("name", "own", "vocabulary"), "LlamaTokenizer"),
    "llava_mistral": LanguageModel("mistral", "mistral_instruct", ("name", "vocabulary", "type"), "LlamaTokenizer"),
    "llava_gemma": LanguageModel("gemma", "gemma", ("type",), "GemmaTokenizer"),
    "llava_Phi3": LanguageModel("phi3", "phi_3", ("type",), "LlamaTokenizer"),
    # Their training renders the tokenizer's own template for it.
    "llava_seed_oss": LanguageModel("seed_oss", "hermes-4", ("own", "name")),
    "llava_phi3": LanguageModel("phi3", "phi_3", ("type",), "LlamaTokenizer"),
    "llava_qwen": LanguageModel("qwen2", "chatml", ("own", "type")),
    "llava_qwen2": LanguageModel("qwen2", "chatml", ("own", "type")),
    "llava_qwen3": LanguageModel("qwen3", "qwen3", ("own", "type")),
}
# Types that their code writes and that are refused, with the reason.
REFUSED = {
    "llava_mpt": "an MPT has its weights under names of its own (transformer.blocks) and no positions (ALiBi), and there is "
    "no conversion for it; of the authors' models, those on Llama, Mistral, Gemma, Phi-3 and SeedOss convert"
}


def language_model(model_type: object) -> LanguageModel:
    """The family of a checkpoint's `model_type`; DeltaLlavaError for one that is not known, or that is refused."""
    if isinstance(model_type, str) and model_type in REFUSED:
        raise DeltaLlavaError(f"config.json has model_type={model_type!r}: {REFUSED[model_type]}.")
    family = LANGUAGE_MODELS.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(LANGUAGE_MODELS)
        raise DeltaLlavaError(
            f"config.json has model_type={model_type!r}; a Delta-LLaVA checkpoint has one of {known}."
        )
    return family
