"""What is said to input that makes no sense, in an environment that need not have the package. Prints one JSON object.

    python bad_input.py REPO IMAGE

By the name of the fault and of who was asked: the kind of the error and its message.
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline


def faults(image: str) -> dict[str, dict]:
    """By name: the messages of a chat, or a text and images for it, and options of the processor."""

    def chat(url: str, *roles: str) -> list[dict]:
        content = [{"type": "image", "url": url}, {"type": "text", "text": "what shape is it?"}]
        return [{"role": role, "content": content if role == "user" else "red"} for role in roles or ("user",)]

    return {
        "unknown budget": {"chat": chat(image), "num_visual_tokens": 7},
        "no image": {"chat": chat(str(Path(__file__).resolve()))},
        "unreachable": {"chat": chat("http://127.0.0.1:9/a.png")},
        "roles out of order": {"chat": chat(image, "assistant", "user")},
        "unknown role": {"chat": chat(image, "user", "wizard")},
        "image without a place": {"text": "what shape is it?", "images": [image]},
        "place without an image": {"text": "<image>\nwhat shape is it?", "images": None},
        "too many images": {"text": "<image>\nwhat shape is it?", "images": [image] * 3},
    }


def refusal(function, *arguments, **options) -> str:
    """The error that a call ends with; engines have kinds of ValueError of their own."""
    try:
        function(*arguments, **options)
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else type(error)
        return f"{kind.__name__}: {error}"
    return "answered"


def refusals(processor, pipe, image: str) -> dict[str, dict[str, str]]:
    """Every fault, given to the processor and to the pipeline."""
    found = {}
    for name, fault in faults(image).items():
        budget = {"num_visual_tokens": fault["num_visual_tokens"]} if "num_visual_tokens" in fault else {}
        if "chat" in fault:
            tokenize = {"tokenize": True, "return_dict": True, "processor_kwargs": dict(budget)}
            found[name] = {"processor": refusal(processor.apply_chat_template, fault["chat"], **tokenize)}
            given = {"text": fault["chat"]}
        else:
            given = {"text": fault["text"], "images": fault["images"]}
            found[name] = {"processor": refusal(processor, **given)}
        if given.get("images", True) is not None:  # without images the pipeline takes a text for a chat
            found[name]["pipeline"] = refusal(pipe, **given, processor_kwargs=dict(budget), max_new_tokens=2)
    return found


def main() -> None:
    """Ask everything, then something that makes sense."""
    repo, image = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    good = [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "?"}]}]
    print(json.dumps({**refusals(processor, pipe, image), "after": refusal(pipe, text=good, max_new_tokens=2)}))


if __name__ == "__main__":
    main()
