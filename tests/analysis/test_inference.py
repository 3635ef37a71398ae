"""Loading repos and images, encoding a question, and finding a token of an answer."""

import base64
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from transformers_delta_llava import DeltaLlavaProcessor
from transformers_delta_llava.analysis import load_config, load_image, load_repo
from transformers_delta_llava.analysis.inference import find_token
from transformers_delta_llava.processing import image_utils_delta_llava


def drop_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


# What is wrong with a repo: the text of config.json, or a change of the folder; and what the error says.
BAD_REPOS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a model: it has no config.json."),
    "no JSON": ("{", "is not a model: config.json is not valid JSON: "),
    "deep JSON": ("[" * 10**5, "is not a model: config.json is not valid JSON: "),
    "no type": ("{}", "is not a model: its config.json names no model_type."),
    "a number as type": ('{"model_type": 7}', "is not a model: its config.json names no model_type."),
    "another model": ('{"model_type": "llava"}', "is a llava, not a delta_llava; `delta-llava convert` makes a repo"),
    "a word as scale factor": ('{"model_type": "delta_llava", "scale_factor": "two"}', "cannot be loaded: "),
    "a number as tower": (
        '{"model_type": "delta_llava", "vision_config": 3}',
        "is not a model: config.json: vision_config=3: ",
    ),
    "no such language model": (
        '{"model_type": "delta_llava", "text_config": {"model_type": "none"}}',
        "cannot be loaded: ",
    ),
    "no processor": (
        lambda folder: (folder / "processor_config.json").unlink(),
        "has no processor: its processor_config.json is missing.",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: "),
    "cut weights": (cut_weights, "cannot be loaded: "),
    "missing weights": (drop_head, "cannot be used: 1 weights are missing, among them lm_head.weight."),
}


@pytest.mark.parametrize("case", BAD_REPOS)
def test_a_bad_repo_is_refused_in_one_sentence(case: str, tiny_repo: Path, tmp_path: Path) -> None:
    change, message = BAD_REPOS[case]
    folder = shutil.copytree(tiny_repo, tmp_path / "damaged")
    if isinstance(change, str):
        (folder / "config.json").write_text(change)
    else:
        change(folder)
    # Config and weights are not read where the fault shows before.
    for load in (load_config, load_repo) if isinstance(change, str) else (load_repo,):
        with pytest.raises(ValueError, match=r"\.$") as caught:
            load(str(folder))
        assert str(caught.value).startswith(f"{folder} {message}") and "\n" not in str(caught.value)


def test_a_pipe_among_the_files_is_refused(tiny_repo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_repo, tmp_path / "repo")
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json in .* is not a regular file"):
        load_config(str(folder))


def test_a_repo_is_loaded_as_asked(tiny_repo: Path) -> None:
    model, processor = load_repo(str(tiny_repo), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tuple(processor.visual_token_budgets) == tuple(model.config.visual_token_budgets)


def test_images_come_from_data_uris_and_bad_ones_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    image.save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    loaded = load_image("data:image/png;base64," + base64.b64encode(data).decode())
    assert np.array_equal(np.asarray(loaded), np.asarray(image))
    with pytest.raises(ValueError, match="is not an image that can be read"):
        load_image("data:image/png;base64," + base64.b64encode(data[: len(data) // 2]).decode())
    monkeypatch.setattr(image_utils_delta_llava, "URL_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="timed out"):
        load_image(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")


def test_a_token_is_found_by_position_and_by_text(easy_vqa_repo: Path) -> None:
    processor = DeltaLlavaProcessor.from_pretrained(easy_vqa_repo)
    ids = processor.tokenizer.encode("yes blue yes xylophone", add_special_tokens=False)
    pieces = [processor.decode([index]).strip() for index in ids]
    assert pieces == ["y", "es", "blue", "yes", "", "x", "y", "lo", "p", "h", "o", "n", "e"]
    assert find_token(processor, ids, 3, 16) == 3
    words = ("yes", "y", "es", " blue ", "xylophone", "yes blue")
    assert [find_token(processor, ids, text, 16) for text in words] == [0, 0, 1, 2, 5, 0]
    assert find_token(processor, ids[2:], "yes", 16) == 1
    accents = processor.tokenizer.encode("blue é 🦒", add_special_tokens=False)  # characters of two and of four bytes
    assert [find_token(processor, accents, text, 16) for text in ("é", "🦒")] == [len(accents) - 7, len(accents) - 4]
    listed = "the answer with 16 visual tokens does not have it; its tokens are 0 'y', 1 'es', 2 'blue', 3"
    for token in (len(ids), -1, "xyloph0ne", "xylophones", "yesblue", "lu", "", " "):
        with pytest.raises(ValueError, match=listed):
            find_token(processor, ids, token, 16)
    with pytest.raises(ValueError, match=r"19 'y' and 4 more\.$"):
        find_token(processor, ids[:1] * 24, 24, 16)
