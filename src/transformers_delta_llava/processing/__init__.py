"""The processor and the conversation formats; importing them registers the processor with transformers."""

from transformers import AutoProcessor

from ..modeling import DeltaLlavaConfig
from .chat_templates import CONVERSATIONS, conversation_template, find_conversation
from .processing_delta_llava import DeltaLlavaProcessor


CHAT_TEMPLATES = tuple(CONVERSATIONS)


def load_chat_template(name: str, bos: bool = False) -> str:
    """
    The Jinja template of a conversation format of LLaVA, for `DeltaLlavaProcessor(chat_template=...)`.

    Args:
        name: One of `CHAT_TEMPLATES`, or another name or spelling of it: `v1`, `llama_3`, `hermes_4`, ...
        bos: Let the template write BOS where its format does not. Say so for a tokenizer that adds BOS: an engine that
            renders a chat and then tokenises it without special tokens gets it as well, and the processor never doubles it.

    Raises:
        ValueError: If there is no such format.
    """
    known = find_conversation(name)
    if known is None:
        raise ValueError(f"There is no chat template {name!r}; use one of {', '.join(CHAT_TEMPLATES)}.")
    template = conversation_template(known)
    return "{{- bos_token -}}\n" + template if bos and not CONVERSATIONS[known].start else template


AutoProcessor.register(DeltaLlavaConfig, DeltaLlavaProcessor)
DeltaLlavaProcessor.register_for_auto_class()

__all__ = ["CHAT_TEMPLATES", "DeltaLlavaProcessor", "load_chat_template"]
