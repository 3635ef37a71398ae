"""Render `model_cards/*.md` from the facts beside them: `make cards`.

Nothing in a card is typed: configurations stand in `configurations.json`, the paper's numbers in `paper.json`, what was
measured in the files that the measuring scripts wrote, and the words in the template of the conversion.
"""

import json
from pathlib import Path

import yaml

from transformers_delta_llava import DeltaLlavaConfig
from transformers_delta_llava.conversion.vision_tower import KNOWN_TOWERS
from transformers_delta_llava.hub.model_card import Measured, ModelCard, PaperResult


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"


def render_cards() -> dict[str, str]:
    """Every card by the name of its file."""
    facts = json.loads((CARDS / "configurations.json").read_text(encoding="utf-8"))
    paper = json.loads((CARDS / "paper.json").read_text(encoding="utf-8"))["rows"]
    cards = {f"{entry['name']}.md": _paper_card(entry, facts, paper).render() for entry in facts["cards"]}
    easy_vqa = facts["easy_vqa"]
    if all((ROOT / recipe).is_file() for recipe in easy_vqa["recipes"]):
        cards[f"{easy_vqa['name']}.md"] = _easy_vqa_card(easy_vqa).render()
    return cards


def _paper_card(entry: dict, facts: dict, paper: list[dict]) -> ModelCard:
    tower = facts["towers"][entry["tower"]]["name"]
    language = facts["language_models"][entry["language_model"]]
    config = _config(KNOWN_TOWERS[tower], language["config"], entry["num_visual_tokens"])
    return ModelCard.from_config(
        config,
        name=entry["name"],
        vision_tower=tower,
        base_models=[language["name"], tower],
        training=_paper_training(entry),
        paper=tuple(
            PaperResult(row["table"], row["row"], row["num_visual_tokens"], row["values"])
            for row in paper
            if (row["model"], row["num_visual_tokens"]) == (entry["of"], entry["num_visual_tokens"])
        ),
        notes=tuple(entry.get("notes", ())),
    )


def _paper_training(entry: dict) -> tuple[str, ...]:
    """The recipes of this repository for a configuration, and what the paper says of its own training."""
    size = entry["of"] if entry["of"] in ("13b", "qwen-7b") else "7b"
    return (
        "The paper: one epoch each of the projector on 558K captions and of projector and language model on LLaVA's 665K "
        "mixture, on 8 H100 GPUs.",
        f"Here: `examples/recipes/pretrain-{size}.yaml`, then `examples/recipes/finetune-{size}.yaml`, with "
        f"`num_visual_tokens={entry['num_visual_tokens']}` and this vision tower. Nobody has run them at full size with this package.",
    )


def _easy_vqa_card(entry: dict) -> ModelCard:
    stages = [yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8")) for recipe in entry["recipes"]]
    model, budgets = stages[0]["model"], stages[-1]["num_visual_tokens"]
    config = _config(model["vision_config"], model["text_config"], budgets[0], **model["config"])
    results = ROOT / entry["results"]
    steps = [f"`{r}`: {s['arguments']['num_train_epochs']} epochs" for r, s in zip(entry["recipes"], stages)]
    return ModelCard.from_config(
        config,
        name=entry["name"],
        vision_tower="CLIP's architecture, trained from nothing",
        base_models=[],
        license="apache-2.0",
        weights=f"The weights are in `{results.parent.relative_to(ROOT)}` of this project, in the layout of the authors' trainer; "
        f"`delta-llava convert {results.parent.relative_to(ROOT)} {entry['name']}` makes the repository of them.",
        training=(f"{', then '.join(steps)}, from random weights.", f"Each step drew one of {budgets} visual tokens."),
        measured=read_easy_vqa(results) if results.is_file() else (),
        notes=tuple(entry["notes"]),
    )


def read_easy_vqa(path: Path) -> tuple[Measured, ...]:
    """What `delta-llava evaluate easy-vqa` wrote: the overall accuracy in percent at each number of visual tokens."""
    script = "delta-llava evaluate easy-vqa"
    return tuple(
        Measured(
            "easy-VQA", "easy-vqa", "test", "accuracy", round(entry["scores"]["overall"]["accuracy"], 2),
            entry["num_visual_tokens"], script,
        )
        for entry in json.loads(path.read_text(encoding="utf-8"))["results"]
    )  # fmt: skip


def _config(tower: dict, text: dict, num_visual_tokens: int, **settings: object) -> DeltaLlavaConfig:
    if tower["model_type"] == "siglip_vision_model":  # it has no class token to leave out
        settings["vision_feature_select_strategy"] = "full"
    config = DeltaLlavaConfig(vision_config=tower, text_config=text, image_token_id=0, scale_factor=1, **settings)
    config.scale_factor = config.scale_factor_for(num_visual_tokens)
    return config


def main() -> None:
    """Write all cards, and delete those that no configuration has any more."""
    cards = render_cards()
    for path in CARDS.glob("*.md"):
        if path.name not in cards:
            path.unlink()
    for name, text in cards.items():
        (CARDS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
