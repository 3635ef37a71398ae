"""The README of a repo."""

import yaml

from transformers_delta_llava import DeltaLlavaConfig
from transformers_delta_llava.conversion.model_card import ModelCard


def card(**changes):
    facts = {
        "name": "delta-llava-7b-144",
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "base_models": ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"],
        "cast_to": None,
        "new_rows": 64,
        "new_tokens": ["<image>", "<pad>"],
    }
    return ModelCard.of(DeltaLlavaConfig(), **{**facts, **changes}).render()


def test_the_header():
    start, header, body = card().split("---\n", 2)
    assert start == ""
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"],
        "tags": ["delta-llava", "vision-language-model", "visual-token-reduction", "custom_code"],
    }
    assert body.lstrip().startswith("# delta-llava-7b-144\n")


def test_no_base_model_is_made_up():
    assert "base_model" not in yaml.safe_load(card(base_models=[]).split("---\n")[1])


def test_the_budgets_are_the_configs():
    rows = [line.strip("| \n").split("|") for line in card().splitlines() if line.startswith("| ")][1:]
    tokens = [(int(row[0]), int(row[1])) for row in rows]
    assert tokens == [(576, 1), (144, 2), (64, 3), (36, 4), (16, 6), (9, 8), (4, 12), (1, 24)]
    assert [row[0].strip() for row in rows if "default" in row[-1]] == ["144"]


def test_what_was_done_to_the_weights():
    assert "cast to" not in card()
    assert "cast to bfloat16" in card(cast_to="bfloat16")
    assert "64 rows more, for `<image>`, `<pad>`" in card()
    assert "rows more" not in card(new_rows=0)
