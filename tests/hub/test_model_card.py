"""The README of a repo."""

import yaml

from transformers_delta_llava import DeltaLlavaConfig
from transformers_delta_llava.hub.model_card import Conversion, Measured, ModelCard, PaperResult


CONVERSION = Conversion(cast_to=None, new_rows=64, new_tokens=["<image>", "<pad>"])


def card(**changes):
    facts = {
        "name": "delta-llava-7b-144",
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "base_models": ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"],
        "conversion": CONVERSION,
    }
    return ModelCard.from_config(DeltaLlavaConfig(), **{**facts, **changes}).render()


def test_the_header():
    start, header, body = card().split("---\n", 2)
    assert start == ""
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "license": "llama2",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"],
        "tags": ["delta-llava", "vision-language-model", "visual-token-reduction", "custom_code"],
    }
    assert body.lstrip().startswith("# delta-llava-7b-144\n")


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_no_base_model_and_no_licence_is_made_up():
    assert not {"base_model", "license"} & header(card(base_models=[])).keys()
    other = card(base_models=["someone/llama", "openai/clip-vit-large-patch14-336"])
    assert "license" not in header(other)
    assert "check both before use" in other


def test_the_examples_name_the_repo_and_the_title_does_not_name_the_owner():
    text = card(name="org/tiny")
    assert "\n# tiny\n" in text
    assert text.count('"org/tiny"') == 3


def test_the_deltas_are_counted():
    # At rank 16: the query's (1024 + 1024) x 16, and twice (4 x 1024 + 1024) x 16 for keys and values.
    assert "196,608 of the projector's 42,503,680 parameters" in card()
    assert "rank 16" in card()
    without = DeltaLlavaConfig(use_delta_projection=False)
    assert "## Deltas" not in ModelCard.from_config(without, name="a", vision_tower="b", base_models=[]).render()


MEASURED = Measured("easy-VQA", "easy-vqa", "test", "accuracy", 99.5, 16, "a script")
PAPER = PaperResult(1, "Delta-LLaVA (Ours)", 144, {"GQA": 62.34, "MME": 1466.52})


def test_what_was_measured_is_in_the_index_and_the_papers_numbers_are_not():
    text = card(measured=(MEASURED,), paper=(PAPER, PaperResult(6, "144", 144, {"CIDEr": 72.1})))
    (model,) = header(text)["model-index"]
    assert model["name"] == "delta-llava-7b-144"
    (result,) = model["results"]
    assert result["dataset"]["type"] == "easy-vqa"
    metrics = [(metric["name"], metric["type"], metric["value"]) for metric in result["metrics"]]
    assert metrics == [("accuracy at 16 visual tokens", "accuracy", 99.5)]
    assert "| easy-VQA | test | 16 | accuracy | 99.5 | `a script` |" in text
    assert '| table 1, "Delta-LLaVA (Ours)" | 144 | 62.34 | 1466.52 |  |' in text
    assert '| table 6, "144" | 144 |  |  | 72.1 |' in text
    assert "the paper's numbers, not verified" in text
    assert "Nothing was measured" not in text
    assert "model-index" not in header(card(paper=(PAPER,)))
    assert "Nothing was measured on this repository" in card(paper=(PAPER,))


def test_a_configuration_without_weights_says_so():
    assert "has no weights of this configuration" in card(conversion=None)
    assert "has no weights of this configuration" not in card()
    assert "has no weights of this configuration" not in card(conversion=None, weights="They are there.")


def test_the_budgets_are_the_configs():
    rows = [line.strip("| \n").split("|") for line in card().splitlines() if line.startswith("| ")][1:]
    rows = [row for row in rows if row[0].strip().isdigit()]
    tokens = [(int(row[0]), int(row[1])) for row in rows]
    assert tokens == [(576, 1), (144, 2), (64, 3), (36, 4), (16, 6), (9, 8), (4, 12), (1, 24)]
    assert [row[0].strip() for row in rows if "default" in row[-1]] == ["144"]


def test_what_was_done_to_the_weights():
    assert "cast to" not in card()
    assert "cast to bfloat16" in card(conversion=Conversion("bfloat16", 64, ["<image>"]))
    assert "64 rows more, for `<image>`, `<pad>`" in card()
    assert "rows more" not in card(conversion=Conversion(None, 0, []))
