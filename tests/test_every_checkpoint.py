"""The whole way of a new user, for every kind of checkpoint: convert, inspect, ask, export, compare."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

from examples.make_checkpoint import write_checkpoint
from transformers_delta_llava.cli.main import main
from transformers_delta_llava.conversion.checkpoint import read_checkpoint
from transformers_delta_llava.conversion.language_models import LANGUAGE_MODELS


QUESTION = "What is in this picture?"
# What the first prompt of each type holds around the image and the question.
PROMPTS = {
    "llava_llama": "USER: <image>\nWhat is in this picture? ASSISTANT:",
    "llava_mistral": "[INST] <image>\nWhat is in this picture? [/INST]",
    "llava_gemma": "<start_of_turn>user\n<image>\nWhat is in this picture?<end_of_turn>\n<start_of_turn>model\n",
    "llava_Phi3": "<|user|>\n<image>\nWhat is in this picture?<|end|>\n<|assistant|>\n",
    "llava_phi3": "<|user|>\n<image>\nWhat is in this picture?<|end|>\n<|assistant|>\n",
    "llava_seed_oss": "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is in this picture?<|eot_id|>",
    "llava_qwen": "<|im_start|>user\n<image>\nWhat is in this picture?<|im_end|>\n<|im_start|>assistant\n",
    "llava_qwen2": "<|im_start|>user\n<image>\nWhat is in this picture?<|im_end|>\n<|im_start|>assistant\n",
    "llava_qwen3": "<|im_start|>user\n<image>\nWhat is in this picture?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.fixture
def run(monkeypatch, capsys):
    """`delta-llava ...` in this process: its exit code and what it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["delta-llava", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return stopped.value.code or 0, printed.out + printed.err

    return call


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a repo but those that name the folder they came from."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("conversion.json", "README.md")}


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_convert_inspect_ask_export_compare(model_type, tmp_path, run):
    source, repo, back, again = (tmp_path / name for name in ("source", "repo", "back", "again"))
    write_checkpoint(source, model_type=model_type, tokenizer="real", form="bin", shards=2, dtype=torch.bfloat16)

    code, printed = run("convert", source, repo)
    assert code == 0, printed
    code, printed = run("inspect", repo)
    assert code == 0, printed

    chat = pipeline("image-text-to-text", model=str(repo), trust_remote_code=True)
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), "green")}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    prompt = chat.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert PROMPTS[model_type] in prompt
    (answer,) = chat(text=messages, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
    assert isinstance(answer["generated_text"], str)

    code, printed = run("export", repo, back)
    assert code == 0, printed
    before, after = (read_checkpoint(folder).tensors for folder in (source, back))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor.load(), after[name].load()), name
    settings = json.loads((back / "tokenizer_config.json").read_text())
    assert isinstance(settings.get("extra_special_tokens", {}), dict)  # all that transformers 4 reads there
    code, printed = run("inspect", back)
    assert code == 0, printed

    code, printed = run("convert", back, again)
    assert code == 0, printed
    assert read_bytes(again) == read_bytes(repo)
