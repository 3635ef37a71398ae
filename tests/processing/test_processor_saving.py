"""What a processor is, survives saving; a saved folder works where this package is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformers_delta_llava.processing import DeltaLlavaProcessor, load_chat_template, processing_delta_llava


SETTINGS = {
    "num_visual_tokens": 9,
    "visual_token_budgets": [81, 9, 1],
    "do_pad": False,
    "image_token": "<picture>",
    "image_seq_length": 81,
}


@pytest.fixture
def registered(monkeypatch: Any) -> None:
    """The package registers the class when it is imported; here the test does, and undoes it."""
    monkeypatch.setattr(DeltaLlavaProcessor, "_auto_class", None)
    DeltaLlavaProcessor.register_for_auto_class("AutoProcessor")


def test_every_argument_is_saved_under_its_own_name_and_comes_back(
    make_processor: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(special=["<s>", "</s>", "<pad>", "<picture>"])
    processor = make_processor(tokenizer=tokenizer, chat_template=load_chat_template("gemma"), **SETTINGS)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert {name: saved[name] for name in SETTINGS} == {**SETTINGS, "visual_token_budgets": [81, 9, 1]}
    assert saved["processor_class"] == "DeltaLlavaProcessor"
    again = DeltaLlavaProcessor.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in SETTINGS} == SETTINGS
    # Saving a registered class writes down where its code is.
    assert again.to_dict() == {key: value for key, value in processor.to_dict().items() if key != "auto_map"}
    assert again.chat_template == load_chat_template("gemma")
    assert again.tokenizer.padding_side == "left"


def test_the_models_own_count_is_the_processors_default_unless_said(make_processor: Any) -> None:
    assert make_processor().image_seq_length == 4
    assert make_processor(num_visual_tokens=9).image_seq_length == 9


def test_a_default_overridden_on_loading_is_announced_to_the_model(
    make_processor: Any, make_picture: Any, tmp_path: Path
) -> None:
    make_processor().save_pretrained(tmp_path)
    processor = DeltaLlavaProcessor.from_pretrained(tmp_path, num_visual_tokens=9, do_pad=False)
    assert (processor.num_visual_tokens, processor.image_seq_length, processor.do_pad) == (9, 4, False)
    batch = processor(images=make_picture(), text="<image>")
    assert batch["input_ids"][0].count(processor.image_token_id) == 9
    assert batch["num_visual_tokens"] == [9]
    # The override is a default: what is set later counts, in the tokenizer it leaves no trace.
    processor.num_visual_tokens, processor.do_pad = 16, True
    batch = processor(images=make_picture(), text="<image>")
    assert batch["num_visual_tokens"] == [16]
    plain = make_processor()(images=make_picture())["pixel_values"]
    np.testing.assert_array_equal(batch["pixel_values"], plain)
    processor.save_pretrained(tmp_path / "again")
    assert "num_visual_tokens" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())


CHILD = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers_delta_llava":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoProcessor

folder, picture = sys.argv[1:]
for source in (folder, folder + "/again"):
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "What?"}]}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(chat, **options, processor_kwargs={"num_visual_tokens": 9})
    found = {key: batch[key] if isinstance(batch[key], list) else batch[key].tolist() for key in batch}
    found["pixel_values"] = [pixels.tolist() for pixels in found["pixel_values"]]
    print(json.dumps([type(processor).__name__, type(processor).__module__.split(".")[0], found]))
    processor.save_pretrained(folder + "/again")
"""


@pytest.mark.usefixtures("registered")
def test_a_saved_folder_works_in_a_fresh_process_without_the_package(
    make_processor: Any, make_picture: Any, tmp_path: Path
) -> None:
    processor = make_processor(chat_template=load_chat_template("vicuna_v1"))
    folder = tmp_path / "repo"
    processor.save_pretrained(folder)
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_delta_llava.DeltaLlavaProcessor"}
    for source in Path(processing_delta_llava.__file__).parent.glob("*_delta_llava.py"):
        assert (folder / source.name).read_text() == source.read_text()

    make_picture(50, 30).save(tmp_path / "picture.png")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    arguments = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "picture.png")]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    first, second = (json.loads(line) for line in run.stdout.splitlines()[-2:])
    assert first[:2] == ["DeltaLlavaProcessor", "transformers_modules"]
    assert first == second
    chat = [{"role": "user", "content": [{"type": "image", "image": make_picture(50, 30)}]}]
    chat[0]["content"].append({"type": "text", "text": "What?"})
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    here = processor.apply_chat_template(chat, **options, processor_kwargs={"num_visual_tokens": 9})
    assert first[2]["input_ids"] == here["input_ids"]
    assert first[2]["num_visual_tokens"] == here["num_visual_tokens"] == [9]
    np.testing.assert_array_equal(np.array(first[2]["pixel_values"], np.float32), here["pixel_values"])


def test_the_hub_files_import_nothing_that_a_hub_repo_lacks() -> None:
    imported, siblings = set(), set()
    for file in Path(processing_delta_llava.__file__).parent.glob("*_delta_llava.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                (siblings if node.level else imported).add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"PIL", "numpy", "torch", "transformers"}
    assert siblings == {"auto_budget_delta_llava", "image_utils_delta_llava"}
