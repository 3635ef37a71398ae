"""The processor and the conversation formats."""

from importlib.resources import files

from .processing_delta_llava import DeltaLlavaProcessor


CHAT_TEMPLATES = ("vicuna_v1", "plain", "chatml", "llama_2", "phi_3", "gemma", "hermes")


def load_chat_template(name: str, bos: bool = False) -> str:
    """
    The Jinja template of a conversation format of LLaVA, for `DeltaLlavaProcessor(chat_template=...)`.

    Args:
        name: One of `CHAT_TEMPLATES`.
        bos: Let the template write BOS. Say so for a tokenizer that adds BOS: an engine that renders a chat and then
            tokenises it without special tokens gets it as well, and the processor never doubles it.

    Raises:
        ValueError: If there is no such format.
    """
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"There is no chat template {name!r}; there are {', '.join(CHAT_TEMPLATES)}.")
    template = (files(__name__) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return "{{- bos_token -}}\n" + template if bos else template


__all__ = ["CHAT_TEMPLATES", "DeltaLlavaProcessor", "load_chat_template"]
