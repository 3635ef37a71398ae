"""All steps of a new user, for every kind of checkpoint: convert, inspect, ask, export, compare."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

from examples.make_checkpoint import write_checkpoint
from tests.checkpoints import SHALLOW, read_tensors
from transformers_delta_llava.conversion.checkpoint import same_bits


QUESTION = "What is in this image?"
_CHATML = "<|im_start|>user\n<image>\nWhat is in this image?<|im_end|>\n<|im_start|>assistant\n"
# What the first prompt of each type holds around the image and the question; two types have a second name.
PROMPTS = {
    "llava_llama": "USER: <image>\nWhat is in this image? ASSISTANT:",
    "llava_mistral": "[INST] <image>\nWhat is in this image? [/INST]",
    "llava_gemma": "<start_of_turn>user\n<image>\nWhat is in this image?<end_of_turn>\n<start_of_turn>model\n",
    "llava_seed_oss": "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is in this image?<|eot_id|>",
    "llava_Phi3": "<|user|>\n<image>\nWhat is in this image?<|end|>\n<|assistant|>\n",
    "llava_qwen": _CHATML,
    "llava_qwen3": _CHATML,
}


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a repo but those that name the folder they came from."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("conversion.json", "README.md")}


@pytest.mark.parametrize("model_type", PROMPTS)
def test_convert_inspect_ask_export_compare(model_type, tmp_path, call):
    source, repo, exported, again = (tmp_path / name for name in ("source", "repo", "exported", "again"))
    write_checkpoint(
        source, model_type=model_type, tokenizer="real", form="bin", shards=2, dtype=torch.bfloat16, **SHALLOW
    )

    assert call("convert", source, repo)[0] == 0
    assert call("inspect", repo)[0] == 0

    chat = pipeline("image-text-to-text", model=str(repo), trust_remote_code=True)
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), "green")}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    prompt = chat.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert PROMPTS[model_type] in prompt
    (answer,) = chat(text=messages, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
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
