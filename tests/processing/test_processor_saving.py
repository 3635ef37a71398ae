"""A processor's settings survive saving."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from transformers_delta_llava.processing import DeltaLlavaProcessor, load_chat_template


SETTINGS = {
    "num_visual_tokens": 9,
    "visual_token_budgets": [81, 9, 1],
    "do_pad": False,
    "image_token": "<img>",
    "image_seq_length": 81,
    "auto_min_detail": 0.5,
}


def test_every_argument_is_saved_under_its_own_name_and_comes_back(
    make_processor: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(special=["<s>", "</s>", "<pad>", "<img>"])
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
    make_processor: Any, make_image: Any, tmp_path: Path
) -> None:
    make_processor().save_pretrained(tmp_path)
    processor = DeltaLlavaProcessor.from_pretrained(tmp_path, num_visual_tokens=9, do_pad=False)
    assert (processor.num_visual_tokens, processor.image_seq_length, processor.do_pad) == (9, 4, False)
    batch = processor(images=make_image(), text="<image>")
    assert batch["input_ids"][0].count(processor.image_token_id) == 9
    assert batch["num_visual_tokens"] == [9]
    # The override is a default: what is set later counts, in the tokenizer it leaves no trace.
    processor.num_visual_tokens, processor.do_pad = 16, True
    batch = processor(images=make_image(), text="<image>")
    assert batch["num_visual_tokens"] == [16]
    plain = make_processor()(images=make_image())["pixel_values"]
    np.testing.assert_array_equal(batch["pixel_values"], plain)
    processor.save_pretrained(tmp_path / "again")
    assert "num_visual_tokens" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
