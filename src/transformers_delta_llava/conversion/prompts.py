"""The language models of released checkpoints, the chat template that each was tuned with, and what ends an answer."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import REPORT_FILE, DeltaLlavaError, read_optional_json
from ..hub import TEMPLATE_FILE
from ..processing import CHAT_TEMPLATES, load_chat_template
from ..processing.chat_templates import adapt_template, find_conversation
from .tokenizer import TokenIds


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


def find_language_model(model_type: object) -> LanguageModel:
    """The language model of a checkpoint's `model_type`; DeltaLlavaError where it is unknown."""
    if model_type not in LANGUAGE_MODELS:
        raise DeltaLlavaError(f"config.json has model_type={model_type!r}; choose from {', '.join(LANGUAGE_MODELS)}")
    return LANGUAGE_MODELS[str(model_type)]


def language_models_of(text_model_type: str) -> dict[str, LanguageModel]:
    """The entries of `LANGUAGE_MODELS` whose `model_type` in transformers is `text_model_type`, the preferred one first."""
    return {name: model for name, model in LANGUAGE_MODELS.items() if model.text_model_type == text_model_type}


# Stands for the tokenizer's own template, as an argument and in reports.
TOKENIZER_TEMPLATE = "tokenizer"
# In the report of a checkpoint that export wrote: what it was exported from.
EXPORTED_FROM = "exported_from"
QUESTION = [{"type": "image"}, {"type": "text", "text": "What is in this image?"}]
_ANSWER = "<the answer>"

# After a version: not part of a number of parameters, as in `llama-30b`, `open_llama_3b`, `llama-2.7b`.
_NO_SIZE = r"(?!\d|b|\.\d+b)"
# Words in a base model's name, and the conversation that LLaVA's users tune such a model with; the first match counts.
_NAMES = {
    rf"hermes[-_ ]?4{_NO_SIZE}": "hermes-4",
    r"hermes": "hermes-2",
    r"vicuna|llava[-_ ]?v?1": "vicuna_v1",
    rf"llama[-_ ]?3{_NO_SIZE}": "llama3",
    rf"llama[-_ ]?2{_NO_SIZE}": "llava_llama_2",
    r"mistral|mixtral": "mistral_instruct",
    r"phi[-_ ]?3": "phi_3",
    r"gemma": "gemma",
}
# Special tokens that only one kind of conversation needs.
_VOCABULARY = {
    "<|eot_id|>": "llama3",
    "<|im_end|>": "chatml_direct",
    "<start_of_turn>": "gemma",
    "<|end|>": "phi_3",
    "[INST]": "mistral_instruct",
}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with its name and the reason for the choice. `is_guess`: whether the reason may mislead."""

    name: str
    text: str
    reason: str
    is_guess: bool = False


def choose_chat_template(
    requested: str | None,
    settings: Mapping[str, Any],
    base_model: str | None,
    tokenizer: PreTrainedTokenizerBase,
    own: str | None,
    folder: Path | None = None,
) -> ChatTemplate:
    """The template that a checkpoint was tuned with, from what evidence there is: no released checkpoint states it.

    Args:
        requested: the user's choice: a name, a Jinja file, or `tokenizer`.
        settings: the checkpoint's `config.json`.
        base_model: name of the model that a projector or a LoRA run was trained on.
        tokenizer: with its tokens added.
        own: the tokenizer's own template.
        folder: of the checkpoint; a template that `export` wrote there is taken as it is.

    Raises:
        DeltaLlavaError: the user's choice is not a template.
    """
    if requested is not None:
        is_own = requested == TOKENIZER_TEMPLATE
        name = requested if is_own else find_conversation(requested) or Path(requested).name
        return ChatTemplate(name, read_chat_template(requested, tokenizer, own), "as requested")
    if folder is not None and (exported := _exported_template(folder)):
        return exported
    name, reason, is_guess = next(_candidates(settings, base_model, tokenizer, own))
    return ChatTemplate(name, read_chat_template(name, tokenizer, own), reason, is_guess)


def _exported_template(folder: Path) -> ChatTemplate | None:
    """The template that `export` wrote into a folder; None in any other folder."""
    origin, template = read_optional_json(folder / REPORT_FILE), folder / TEMPLATE_FILE
    if EXPORTED_FROM not in origin or not template.is_file():
        return None
    reason = origin.get("chat_template_reason", "that of the repo that was exported")
    return ChatTemplate(origin.get("chat_template", TEMPLATE_FILE), template.read_text(encoding="utf-8"), reason)


def _candidates(
    settings: Mapping[str, Any], base_model: str | None, tokenizer: PreTrainedTokenizerBase, own: str | None
) -> Iterator[tuple[str, str, bool]]:
    """Names of templates with the reason for each and whether that is a guess, the best first."""
    model_type = settings["model_type"]
    language_model = find_language_model(model_type)
    for evidence in language_model.evidence:
        if evidence == "own" and own is not None:
            if language_model.evidence[0] == "own":
                yield TOKENIZER_TEMPLATE, f"the tokenizer's own, which {model_type} checkpoints are tuned with", False
            else:
                yield TOKENIZER_TEMPLATE, "the tokenizer has its own, and nothing else is known", True
        elif evidence == "name":
            for path in (base_model, settings.get("_name_or_path")):
                if path and (match := _by_name(path)):
                    yield match[0], f"the base model is called {match[1]}", False
        elif evidence == "vocabulary":
            for token, conversation in _VOCABULARY.items():
                if token in tokenizer.get_vocab():
                    yield conversation, f"the tokenizer has {token}", True
        elif evidence == "type":
            yield language_model.conversation, f"the format of {model_type} checkpoints", False
    yield language_model.conversation, "nothing in the checkpoint says which", True


def _by_name(name: str) -> tuple[str, str] | None:
    """The conversation that a base model's name or path tells, and the part that tells it; the last part counts most."""
    for part in reversed(re.split(r"[/\\]", name)):
        for pattern, conversation in _NAMES.items():
            if re.search(pattern, part, re.IGNORECASE):
                return conversation, part
    return None


def chat_template_warnings(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a user should know about a chosen template: that it is a guess, or does not suit the tokenizer."""
    warnings = []
    if template.is_guess:
        warnings.append(
            f"the chat template {template.name} is a guess ({template.reason}), and a wrong one gives poor answers; pass the "
            "one that the checkpoint was tuned with as chat_template"
        )
    end = answer_end(template.text, tokenizer)
    if end.strip() and not answer_end_ids(template.text, tokenizer):
        warnings.append(
            f"the chat template {template.name} ends an answer with {end.strip()!r}, which is not a special token of the "
            "tokenizer; if the checkpoint was tuned with another template, pass that as chat_template"
        )
    return warnings


def read_chat_template(name_or_file: str, tokenizer: PreTrainedTokenizerBase, own: str | None = None) -> str:
    """A conversation format by name, the tokenizer's `own` template made to take images, or a Jinja file as it is.

    Raises:
        DeltaLlavaError: it is none of these.
    """
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    if find_conversation(name_or_file) is not None:
        return load_chat_template(name_or_file, bos=adds_bos)
    if name_or_file == TOKENIZER_TEMPLATE:
        if own is None:
            raise DeltaLlavaError("the tokenizer has no chat template of its own; pass another one as chat_template")
        template = adapt_template(own, answer_end(own, tokenizer))
        if adds_bos and not render(template, tokenizer, "Hi").startswith(str(tokenizer.bos_token)):
            template = "{{- bos_token -}}\n" + template
        return template
    if not Path(name_or_file).is_file():
        names = ", ".join((*CHAT_TEMPLATES, TOKENIZER_TEMPLATE))
        raise DeltaLlavaError(f"chat_template={name_or_file!r} is neither a file nor one of {names}")
    return Path(name_or_file).read_text(encoding="utf-8")


def recognise_template(text: str, report: Mapping[str, Any]) -> ChatTemplate:
    """A repo's template under its name: that of the conversation it is, else what the conversion's `report` calls it."""
    reported = report.get("chat_template")
    known = next((name for name in CHAT_TEMPLATES if load_chat_template(name) in text), None)
    name = known or ("its own" if reported is None or reported in CHAT_TEMPLATES else reported)
    reason = report.get("chat_template_reason") if name == reported else None
    return ChatTemplate(name, text, reason or f"what {TEMPLATE_FILE} holds")


def render(template: str, tokenizer: PreTrainedTokenizerBase, content: object) -> str:
    """The prompt of a first question with this content, up to where the model answers."""
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)


def answer_end(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What `template` writes behind an answer to end it, such as `<|im_end|>`."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _ANSWER}]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    end = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
    return end.rstrip() or end


def answer_end_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that end an answer in `template`; none where plain text ends it."""
    end, special = answer_end(template, tokenizer), tokenizer.added_tokens_decoder
    return [token for token in tokenizer.encode(end, add_special_tokens=False) if token in special]


# These have no effect without do_sample, and transformers refuses to save some of them then: Vicuna's own file has them.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def keep_valid_flags(values: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """Generation settings from flags by name, and the flags of sampling that were left out because it is off."""
    flags = {name: value for name, value in values.items() if not name.startswith("_") and value is not None}
    config = GenerationConfig.from_dict(dict(flags))
    if config.do_sample:
        return config, {}
    try:
        config.validate(strict=True)
        return config, {}
    except ValueError:
        dropped = {name: flags.pop(name) for name in _SAMPLING if name in flags}
        return GenerationConfig.from_dict(flags), dropped


def fit_generation_config(
    config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    ids: TokenIds,
    text_config: PreTrainedConfig,
    chat_template: str,
) -> None:
    """Set the tokens that end an answer, that fill a batch, and that no answer may hold; in place.

    No answer may hold the tokens that this package adds. Rows above the tokenizer's ids need no suppression, since they
    repeat row 0 or are close to the mean row, and must have none: tokens that a user adds get these ids.

    Args:
        config: the settings to complete.
        tokenizer: with its tokens added, and `ids`, what was added.
        text_config: config of the language model, of the final vocabulary.
        chat_template: its Jinja source.
    """
    own = config.eos_token_id if config.eos_token_id is not None else text_config.eos_token_id
    ends = [*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(id for id in [*ends, *answer_end_ids(chat_template, tokenizer)] if id is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    config.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    config.pad_token_id = ids.pad
    added = {ids.image, *tokenizer.convert_tokens_to_ids(ids.added)}
    config.suppress_tokens = sorted(added.union(config.suppress_tokens or ()))
