"""Conversation formats as chat templates: a table of their differences, and Jinja files for what they share."""

import json
from dataclasses import dataclass, fields
from importlib.resources import files


@dataclass(frozen=True)
class Conversation:
    """
    The strings of one conversation format; the names of formats are LLaVA's.

    Attributes:
        default_system: The system message where the chat has none.
        start: Text before everything else.
        system: Text before and after a system message that is not empty.
        system_in_user: Whether the system message is in the first user turn, before its text.
        user: Text before and after a user's text.
        later_user: Text before every user turn but the first.
        assistant: Text that opens an answer, the generation prompt.
        gap: Text between that and an answer. A model writes it, so it is trained on.
        end: Text that ends an answer, and is trained on.
        after: Text after that, which is not trained on.
        captions: Whether it is for images with captions: a turn of images only, and a pair of question and answer that is
            trained on, render without the question, as `<image>caption`.
    """

    default_system: str = ""
    start: str = ""
    system: tuple[str, str] = ("", "")
    system_in_user: bool = False
    user: tuple[str, str] = ("", "")
    later_user: str = ""
    assistant: str = ""
    gap: str = ""
    end: str = ""
    after: str = ""
    captions: bool = False


_CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your "
    "answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please "
    "ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, "
    "or is not factually coherent, explain why instead of answering something not correct. If you don't know the answer "
    "to a question, please don't share false information."
)


def _inst(default_system: str, later_user: str) -> Conversation:
    """Formats like Llama 2's and Mistral's."""
    return Conversation(
        default_system,
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_user=True,
        user=("[INST] ", " [/INST]"),
        later_user=later_user,
        gap=" ",
        end=" </s>",
    )


def _chatml(default_system: str, after: str = "", user: str = "\n", assistant: str = "\n") -> Conversation:
    """ChatML: `<|im_start|>role\ntext<|im_end|>`, with the text `after` each turn and those that open a user's text and an answer."""
    return Conversation(
        default_system,
        system=("<|im_start|>system\n", f"<|im_end|>{after}"),
        user=(f"<|im_start|>user{user}", f"<|im_end|>{after}"),
        assistant=f"<|im_start|>assistant{assistant}",
        end="<|im_end|>",
        after=after,
    )


def _llama_3(default_system: str, start: str = "") -> Conversation:
    """Formats like Llama 3's."""
    opening = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    return Conversation(
        default_system,
        start,
        system=(opening("system"), "<|eot_id|>"),
        user=(opening("user"), "<|eot_id|>"),
        assistant=opening("assistant"),
        end="<|eot_id|>",
    )


CONVERSATIONS = {
    "vicuna_v1": Conversation(
        _CURIOUS, system=("", " "), user=("USER: ", " "), assistant="ASSISTANT:", gap=" ", end="</s>"
    ),
    "llama_2": _inst(_LLAMA_2, later_user="<s>"),
    "llava_llama_2": _inst(_LANGUAGE_AND_VISION, later_user="<s>"),
    "mistral_instruct": _inst("", later_user=""),
    "llama3": _llama_3(_CURIOUS, start="<|begin_of_text|>"),
    "hermes-4": _llama_3(_LANGUAGE_AND_VISION),
    "hermes-2": _chatml("Answer the questions."),
    "chatml_direct": _chatml("Answer the questions."),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "chatml": _chatml("You are a helpful assistant.", after="\n"),  # `qwen_1_5` in LLaVA-NeXT
    "qwen3": _chatml("You are a helpful assistant.", after="\n", user="\n\n", assistant="\n<think>\n\n</think>\n\n\n"),
    "phi_3": Conversation(
        system=("<|system|>\n", "<|end|>\n"),
        user=("<|user|>\n", "<|end|>\n"),
        assistant="<|assistant|>\n",
        end="<|end|>",
        after="\n",
    ),
    "gemma": Conversation(
        system=("", "\n\n"),
        system_in_user=True,
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant="<start_of_turn>model\n",
        end="<end_of_turn>\n<eos>",
    ),
    "plain": Conversation(user=("", "\n"), end="\n", captions=True),
}
_SEPARATORS = str.maketrans("", "", "-_.")
_OTHER_NAMES = {
    "v1": "vicuna_v1",
    "mistral": "mistral_instruct",
    "mistral_direct": "chatml_direct",
    "qwen_1_5": "chatml",
}


def find_conversation(name: str) -> str | None:
    """The name in `CONVERSATIONS` that `name` means (`llama_3` is `llama3`, `v1` is `vicuna_v1`), or None."""
    plain = {key.translate(_SEPARATORS): key for key in CONVERSATIONS}
    name = _OTHER_NAMES.get(name, name)
    return plain.get(name.lower().translate(_SEPARATORS))


def conversation_template(name: str) -> str:
    """The chat template of the conversation called `name` in `CONVERSATIONS`."""
    conversation = CONVERSATIONS[name]
    values = {field.name: getattr(conversation, field.name) for field in fields(conversation)}
    settings = [f"{{%- set {key} = {_literal(value)} -%}}\n" for key, value in values.items()]
    return f"{{#- The conversation `{name}`. -#}}\n" + "".join(settings) + _part("messages") + _part("conversation")


def adapt_template(template: str, end: str) -> str:
    """
    A language model's own chat template, made to take images and to mark what is trained on.

    Images come first in their turn, one `<image>` a line, and each answer is marked from its text to `end`, unless the
    template marks answers itself. Text chats render as before.

    Args:
        template: The Jinja source.
        end: What the template writes behind an answer to end it.
    """
    if _part("messages") in template:
        return template  # adapted before, or one of ours
    if "{% generation" in template or "{%- generation" in template:
        return _part("messages") + "{%- set messages = chat.messages %}\n" + template
    template = template.removesuffix("\n")  # as Jinja does at the end of a source
    macro = "{%- macro render(messages, add_generation_prompt) %}\n" + template + "{% endmacro -%}\n"
    return _part("messages") + macro + f"{{%- set end = {_literal(end)} -%}}\n" + _part("marks")


def _part(name: str) -> str:
    return (files(__name__) / f"{name}.jinja").read_text(encoding="utf-8")


def _literal(value: str | bool | tuple[str, ...]) -> str:
    """`value` as Jinja writes it."""
    return json.dumps(value, ensure_ascii=False)
