"""Cases of the tests as requests of the OpenAI API."""

import base64
from pathlib import Path


def data_url(image: str) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"


def messages(case: dict) -> list[dict]:
    """The case's content as a user message, its images as data URLs."""
    content = []
    for item in case["content"]:
        if item["type"] == "image":
            content.append({"type": "image_url", "image_url": {"url": data_url(item["url"])}})
        else:
            content.append(item)
    return [{"role": "user", "content": content}]
