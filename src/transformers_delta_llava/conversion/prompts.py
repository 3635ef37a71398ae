"""Which chat template a checkpoint was tuned with, and the evidence for it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..hub.repo_files import TEMPLATE_FILE
from ..processing import CHAT_TEMPLATES, load_chat_template
from ..processing.chat_templates import adapt_template, find_conversation
from ..utils.errors import DeltaLlavaError, explain_errors
from ..utils.files import EXPORTED_FROM, REPORT_FILE, read_optional_json, read_text
from ..utils.templates import check_template, time_limit
from .config import SourceConfig


# Stands for the tokenizer's own template, as an argument and in reports.
TOKENIZER_TEMPLATE = "tokenizer"
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
    config: SourceConfig,
    base_model: str | None,
    tokenizer: PreTrainedTokenizerBase,
    own: str | None,
) -> ChatTemplate:
    """The template that a checkpoint was tuned with, from what evidence there is: no checkpoint states it.

    Args:
        requested: the user's choice: a name, a Jinja file, or `tokenizer`.
        config: of the checkpoint.
        base_model: name of the model that a projector or a LoRA run was trained on.
        tokenizer: with its tokens added.
        own: the tokenizer's own template.

    Raises:
        DeltaLlavaError: the user's choice cannot be used.
    """
    if requested is not None:
        is_own = requested == TOKENIZER_TEMPLATE
        name = requested if is_own else find_conversation(requested) or Path(requested).name
        return ChatTemplate(name, read_chat_template(requested, tokenizer, own), "as requested")
    fallback = (config.language_model.conversation, "nothing in the checkpoint says which", True)
    name, reason, is_guess = next(_candidates(config, base_model, tokenizer, own), fallback)
    return ChatTemplate(name, read_chat_template(name, tokenizer, own), reason, is_guess)


def _candidates(
    config: SourceConfig, base_model: str | None, tokenizer: PreTrainedTokenizerBase, own: str | None
) -> Iterator[tuple[str, str, bool]]:
    """Names of templates with the reason for each and whether that is a guess, the best first."""
    language_model, model_type = config.language_model, config.settings["model_type"]
    vocabulary = tokenizer.get_vocab()
    for evidence in language_model.evidence:
        if evidence == "own" and own is not None and _is_usable(own, tokenizer):
            if language_model.evidence[0] == "own":
                yield TOKENIZER_TEMPLATE, f"the tokenizer's own, which {model_type} checkpoints are tuned with", False
            else:
                yield TOKENIZER_TEMPLATE, "the tokenizer has its own, and nothing else is known", True
        elif evidence == "name":
            for path in (base_model, config.settings.get("_name_or_path")):
                if isinstance(path, str) and (match := _by_name(path)):
                    yield match[0], f"the base model is called {match[1]}", False
        elif evidence == "vocabulary":
            for token, conversation in _VOCABULARY.items():
                if token in vocabulary:
                    yield conversation, f"the tokenizer has {token}", True
        elif evidence == "type":
            yield language_model.conversation, f"the format of {model_type} checkpoints", False


def _is_usable(own: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        read_chat_template(TOKENIZER_TEMPLATE, tokenizer, own)
    except DeltaLlavaError:
        return False
    return True


def _by_name(name: str) -> tuple[str, str] | None:
    """The conversation that a base model's name or path tells, and the part that tells it; the last part counts most."""
    for part in reversed(re.split(r"[/\\]", name)):
        for pattern, conversation in _NAMES.items():
            if re.search(pattern, part, re.IGNORECASE):
                return conversation, part[:100]
    return None


def chat_template_warnings(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a user should know about a template that was taken: that it is a guess, or does not suit the tokenizer."""
    warnings = []
    if template.is_guess:
        warnings.append(
            f"the chat template {template.name} is a guess ({template.reason}), and a wrong one gives poor answers; give the "
            "one that the checkpoint was tuned with: pass `chat_template=...`"
        )
    end = answer_end(template.text, tokenizer)
    if end.strip() and not _special_ids(end, tokenizer):
        warnings.append(
            f"the chat template {template.name} ends an answer with {end.strip()[:100]!r}, which is not a special token of the "
            "tokenizer; if the checkpoint was tuned with another template, pass `chat_template=...`"
        )
    return warnings


def exported_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The template that `export` wrote into a folder, with which the model was used before; None in any other folder."""
    template = folder / TEMPLATE_FILE
    origin = read_optional_json(folder / REPORT_FILE) if template.is_file() else {}
    if EXPORTED_FROM not in origin:
        return None
    name = str(origin.get("chat_template") or TEMPLATE_FILE)
    reason = str(origin.get("chat_template_reason") or "that of the repo that was exported")
    return ChatTemplate(name, read_chat_template(str(template), tokenizer), reason)


def read_chat_template(name_or_file: str, tokenizer: PreTrainedTokenizerBase, own: str | None = None) -> str:
    """A conversation format by name, the tokenizer's `own` template made to take images, or a Jinja file as it is.

    Raises:
        DeltaLlavaError: it is none of these, or does not render a plain conversation.
    """
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    if find_conversation(name_or_file) is not None:
        return load_chat_template(name_or_file, bos=adds_bos)
    if name_or_file == TOKENIZER_TEMPLATE:
        if own is None:
            raise DeltaLlavaError(
                "The tokenizer has no chat template of its own; name another: pass `chat_template=...`."
            )
        end = answer_end(own, tokenizer, "The tokenizer's own chat template")
        template = adapt_template(own, end)
        if adds_bos and not render(template, tokenizer, "Hi").startswith(str(tokenizer.bos_token)):
            template = "{{- bos_token -}}\n" + template
        return template
    path = Path(name_or_file)
    if not path.is_file():
        names = ", ".join((*CHAT_TEMPLATES, TOKENIZER_TEMPLATE))
        raise DeltaLlavaError(f"The chat template {name_or_file} is neither a file nor one of {names}.")
    template = read_text(path)
    answer_end(template, tokenizer, f"The chat template {path.name}")
    return template


def recognise_template(text: str, report: dict) -> ChatTemplate:
    """A repo's template under its name: that of the conversation it is, else what the conversion's `report` calls it."""
    reported = report.get("chat_template")
    known = next((name for name in CHAT_TEMPLATES if load_chat_template(name) in text), None)
    name = known or ("its own" if reported is None or reported in CHAT_TEMPLATES else str(reported))
    reason = report.get("chat_template_reason") if name == reported else None
    return ChatTemplate(name, text, str(reason or f"what {TEMPLATE_FILE} holds"))


def render(template: str, tokenizer: PreTrainedTokenizerBase, content: object) -> str:
    """The prompt of a first question with this content, up to where the model answers.

    Raises:
        DeltaLlavaError: the template does not render it.
    """
    messages = [{"role": "user", "content": content}]
    return _render(messages, template, tokenizer, "The chat template", add_generation_prompt=True)


def answer_end(template: str, tokenizer: PreTrainedTokenizerBase, name: str = "The chat template") -> str:
    """What `template` writes behind an answer to end it, such as `<|im_end|>`.

    Raises:
        DeltaLlavaError: it does not render a conversation; the text calls it `name`.
    """
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _ANSWER}]
    text = _render(messages, template, tokenizer, name)
    end = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
    return end.rstrip() or end


def answer_end_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that end an answer in `template`; none where plain text ends it."""
    return _special_ids(answer_end(template, tokenizer), tokenizer)


def _special_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    special = tokenizer.added_tokens_decoder
    return [token for token in tokenizer.encode(text, add_special_tokens=False) if token in special]


def _render(
    messages: Sequence[Mapping[str, object]],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    **options: object,
) -> str:
    check_template(template, name, messages, {**tokenizer.special_tokens_map, **options})
    with explain_errors(f"{name} does not render a conversation"), time_limit(name):
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
