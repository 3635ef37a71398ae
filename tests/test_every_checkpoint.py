"""All steps of a new user, for every kind of checkpoint: convert, inspect, ask, export, compare."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

from examples.make_checkpoint import write_checkpoint
from tests.checkpoints import SHALLOW, read_tensors
from transformers_delta_llava.conversion.prompts import LANGUAGE_MODELS
from transformers_delta_llava.conversion.weights import same_bits


QUESTION = "What is in this image?"
# Of every language model one type: two have a second name.
MODEL_TYPES = [name for name in LANGUAGE_MODELS if name not in ("llava_phi3", "llava_qwen2")]


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a repo but those that name the folder they came from."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("conversion.json", "README.md")}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_convert_inspect_ask_export_compare(model_type, tmp_path, call):
    source, repo, exported, again = (tmp_path / name for name in ("source", "repo", "exported", "again"))
    write_checkpoint(
        source, model_type=model_type, tokenizer="real", form="bin", shards=2, dtype=torch.bfloat16, **SHALLOW
    )

    assert call("convert", source, repo)[0] == 0
    assert call("inspect", repo)[0] == 0

    chat = pipeline("image-text-to-text", model=str(repo), trust_remote_code=True)
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), "green")}, {"type": "text", "text": QUESTION}]
    (answer,) = chat(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert isinstance(answer["generated_text"], str)

    assert call("export", repo, exported)[0] == 0
    before, after = read_tensors(source), read_tensors(exported)
    assert before.keys() == after.keys()
    assert all(same_bits(tensor, after[name]) for name, tensor in before.items())
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert isinstance(settings.get("extra_special_tokens", {}), dict)  # all that transformers 4 reads there
    assert call("inspect", exported)[0] == 0

    assert call("convert", exported, again)[0] == 0
    assert read_bytes(again) == read_bytes(repo)
