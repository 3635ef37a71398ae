"""Everything that a tiny training run needs: tokenizer, image processor, model folder, rows with images, recipes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.tiny import TEXT, VISION, make_image_processor, make_tokenizer
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion.names import published_name
from transformers_delta_llava.processing import DeltaLlavaProcessor, load_chat_template
from transformers_delta_llava.training import Recipe, make_recipe, train
from transformers_delta_llava.training.trainer import COUNTS


BUDGETS = (144, 36, 16, 9, 4, 1)  # of a 12 x 12 grid


def make_processor(template: str = "vicuna_v1", **kwargs: Any) -> DeltaLlavaProcessor:
    """A processor at 4 visual tokens per image."""
    kwargs = {"num_visual_tokens": 4, "visual_token_budgets": BUDGETS, **kwargs}
    return DeltaLlavaProcessor(
        make_image_processor(), make_tokenizer(), chat_template=load_chat_template(template, bos=True), **kwargs
    )


def make_model(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **config: Any
) -> DeltaLlavaForConditionalGeneration:
    """An untrained model for `make_processor`, always the same."""
    torch.manual_seed(0)
    text = {**TEXT, "vocab_size": 320, "eos_token_id": 258, "pad_token_id": 256, **(text or {})}
    config = {"vision_feature_levels": [1, 2, 3], "scale_factor": 6, **config}
    return DeltaLlavaForConditionalGeneration(
        DeltaLlavaConfig(vision_config={**VISION, **(vision or {})}, text_config=text, image_token_id=259, **config)
    )


def write_model(folder: Path, **config: Any) -> Path:
    """A Hub folder with model and processor."""
    make_model(**config).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def write_parts(folder: Path, side: int = 24) -> dict[str, Any]:
    """A vision tower and a language model, as on the Hub; returns the `model` section of a recipe that joins them."""
    config = make_model().config
    vision_config = type(config.vision_config)(**{**VISION, "image_size": side})
    AutoModel.from_config(vision_config).save_pretrained(folder / "vision")
    make_image_processor(side).save_pretrained(folder / "vision")
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained(folder / "language")
    make_tokenizer().save_pretrained(folder / "language")
    parts = {name: str(folder / name) for name in ("vision", "language")}
    return {**parts, "config": {"vision_feature_levels": [1, 2, 3]}}


def make_image(seed: int, width: int = 30, height: int = 24) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def make_rows(count: int, text_only_every: int = 4) -> list[dict[str, Any]]:
    """Rows in LLaVA's format; every `text_only_every`-th is without an image."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        with_image = number % text_only_every != text_only_every - 1
        question = f"What is {'x' * (number % 5)}?"
        row: dict[str, Any] = {
            "id": f"r{number}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}" if with_image else question},
                {"from": "gpt", "value": f"Answer {number}."},
            ],
        }
        if with_image:
            row["image"] = f"{number}.png"
        rows.append(row)
    return rows


def write_data(folder: Path, count: int = 24, suffix: str = ".json", text_only_every: int = 4) -> Path:
    """Rows and their images in `folder`; returns the file of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(count, text_only_every)
    for number, row in enumerate(rows):
        if "image" in row:
            make_image(number).save(folder / row["image"])
    return write_rows(folder / f"rows{suffix}", rows)


def write_rows(file: Path, rows: list[Any]) -> Path:
    """Rows as JSON or JSONL."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text(
        "\n".join(lines) + "\n" if file.suffix == ".jsonl" else json.dumps(rows, ensure_ascii=False, indent=1)
    )
    return file


def recipe_content(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for `write_model` and `write_data` in `folder`; dictionaries in `changes` are merged into its sections."""
    content: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {
            "path": str(folder / "data" / "rows.json"),
            "images": str(folder / "data"),
        },
        "train": ["projector", "language_model"],
        "num_visual_tokens": 4,
        "arguments": {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "disable_tqdm": True,
            "train_sampling_strategy": "group_by_length",
        },
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
    return content


def recipe_for(folder: Path, out: Path, arguments: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """The recipe of `recipe_content` that writes to `out`; `save_steps` in `arguments` also sets the strategy."""
    arguments = {"output_dir": str(out), **(arguments or {})}
    if "save_steps" in arguments:
        arguments["save_strategy"] = "steps"
    return make_recipe(recipe_content(folder, arguments=arguments, **changes))


def run(folder: Path, out: Path, resume: bool = False, **changes: Any) -> Path:
    """Train `recipe_for` the same arguments."""
    return train(recipe_for(folder, out, **changes), resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model's folder, by published name: `save_pretrained` writes others of a new model."""
    return {published_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}


def assert_same_weights(one: Any, other: Any, atol: float = 1e-6, rtol: float = 0.0) -> None:
    """`one` and `other` are folders or state dicts."""
    first, second = (weights(x) if isinstance(x, Path) else x for x in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=atol, rtol=rtol, msg=name)


def losses(folder: Path) -> list[float]:
    """The loss of every step of a finished run."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def modalities_with_gradients(trainer: Any) -> set[bool]:
    """Runs all batches backward, each must give every trained parameter a gradient; whether they have images."""
    seen = set()
    for batch in trainer.get_train_dataloader():
        counts = {name: batch.pop(name) for name in COUNTS}
        seen.add(counts["num_images"] > 0)
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert trained and not [name for name, parameter in trained.items() if parameter.grad is None]
    return seen
