"""`model_cards/`: every card is what `make cards` makes of the facts."""

import json

import yaml

from tools import render_cards


BENCHMARKS = {"GQA", "MMB", "MME", "POPE", "SQA", "TextVQA", "VizWiz", "VQAv2", "NoCaps CIDEr", "Flickr30k CIDEr"}


def test_no_card_is_stale():
    stored = {path.name: path.read_text(encoding="utf-8") for path in render_cards.CARDS.glob("*.md")}
    assert stored == render_cards.render_cards(), "run `make cards`"


def test_every_row_of_the_paper_is_in_one_card_and_each_card_has_some():
    """And none of them in a model index: nobody has verified them."""
    rows = json.loads((render_cards.CARDS / "paper.json").read_text())["rows"]
    texts = {path.name: path.read_text() for path in render_cards.CARDS.glob("*.md")}
    del texts["delta-llava-easy-vqa.md"]
    cards = []
    for row in rows:
        assert row["values"].keys() <= BENCHMARKS
        start = f'| table {row["table"]}, "{row["row"]}" | {row["num_visual_tokens"]} |'
        matches = [
            name
            for name, text in texts.items()
            for line in text.splitlines()
            if line.startswith(start) and all(f" {value} |" in line for value in row["values"].values())
        ]
        assert len(matches) == 1, row
        cards += matches
    assert set(cards) == texts.keys() and len(texts) == 11
    assert not any("model-index" in text for text in texts.values())


def test_the_papers_numbers_are_written_in_one_place(tmp_path):
    """No other tracked text file has them, but the cards that are rendered from it."""
    values = {"62.34", "1466.52", "1527.41", "61.77", "1345.03"}
    files = [
        path for folder in ("src", "docs", "examples", "tools") for path in (render_cards.ROOT / folder).rglob("*")
    ]
    texts = [
        path for path in [*files, render_cards.ROOT / "README.md"] if path.suffix in {".md", ".py", ".yaml", ".jinja"}
    ]
    assert len(texts) > 50
    assert not [path.name for path in texts if any(value in path.read_text(encoding="utf-8") for value in values)]


def test_what_was_measured_on_easy_vqa_gets_into_its_card(tmp_path, monkeypatch):
    recipe = {
        "model": {
            "vision_config": {
                "model_type": "clip_vision_model",
                "image_size": 64,
                "patch_size": 8,
                "num_hidden_layers": 3,
            },
            "text_config": {"model_type": "llama", "hidden_size": 128},
            "config": {"vision_feature_levels": [1, 2]},
        },
        "num_visual_tokens": [16, 4],
        "arguments": {"num_train_epochs": 2},
    }
    facts = json.loads((render_cards.CARDS / "configurations.json").read_text())["easy_vqa"]
    for name in facts["recipes"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(recipe))
    results = [
        {"num_visual_tokens": n, "scores": {"overall": {"accuracy": value}}} for n, value in ((16, 98.765), (4, 90))
    ]
    (tmp_path / facts["results"]).parent.mkdir(parents=True)
    (tmp_path / facts["results"]).write_text(json.dumps({"results": results}))
    monkeypatch.setattr(render_cards, "ROOT", tmp_path)
    text = render_cards.render_cards()["delta-llava-easy-vqa.md"]
    header = yaml.safe_load(text.split("---\n")[1])
    (result,) = header["model-index"][0]["results"]
    measured = [(metric["name"], metric["value"]) for metric in result["metrics"]]
    assert measured == [("accuracy at 16 visual tokens", 98.77), ("accuracy at 4 visual tokens", 90)]
    assert header["license"] == "apache-2.0"
    assert "| 16 | 2 | default |" in text
    assert "has no weights" not in text
