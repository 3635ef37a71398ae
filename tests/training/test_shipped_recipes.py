"""Every shipped recipe, built on a tiny model; every accelerate config, as accelerate reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import AutoModelForImageTextToText

from tests.training.tiny_run import make_image_processor, make_model, make_processor, write_data, write_parts
from transformers_delta_llava.training import load_recipe, make_trainer, train
from transformers_delta_llava.training.sampler import Request


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
QLORA = ROOT / "examples" / "recipes" / "finetune-7b-qlora.yaml"
STAGES = [path for path in RECIPES if path.name.startswith(("pretrain", "finetune")) and path != QLORA]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """What the recipes name, tiny."""
    folder = tmp_path_factory.mktemp("shipped")
    write_parts(folder, side=48)  # 24 x 24 patches, as the real tower has
    write_data(folder / "data", 8)
    model = make_model(vision={"image_size": 48})
    model.save_pretrained(folder / "stage1")
    processor = make_processor(num_visual_tokens=144, visual_token_budgets=model.config.visual_token_budgets)
    processor.image_processor = make_image_processor(48)
    processor.save_pretrained(folder / "stage1")
    return folder


def changes(folder: Path, out: Path, file: Path) -> list[str]:
    """The least that makes a recipe run here."""
    if file.name.startswith("pretrain"):
        model = [f"model.vision={folder / 'vision'}", f"model.language={folder / 'language'}"]
        model += ["model.config.vision_feature_levels=[1, 2, 3]"]
    else:
        model = [f"model.path={folder / 'stage1'}"]
    data = [
        f"data.path={folder / 'data' / 'rows.json'}",
        f"data.images={folder / 'data'}",
    ]
    run = [
        "max_steps=1",
        "use_cpu=true",
        "per_device_train_batch_size=1",
        "dataloader_num_workers=0",
        "disable_tqdm=true",
    ]
    return [*model, *data, *(f"arguments.{change}" for change in [*run, f"output_dir={out}"])]


def test_all_sizes_have_both_stages() -> None:
    names = {f"{stage}-{size}.yaml" for stage in ("pretrain", "finetune") for size in ("7b", "13b", "qwen-7b")}
    assert {path.name for path in STAGES} == names | {"finetune-7b-eagle.yaml"}


@pytest.mark.parametrize("file", STAGES, ids=lambda path: path.stem)
def test_a_shipped_recipe_trains_and_says_what_the_paper_says(folder: Path, tmp_path: Path, file: Path) -> None:
    recipe = load_recipe(file, changes(folder, tmp_path / "out", file))
    pretrain = file.name.startswith("pretrain")
    arguments = recipe.arguments
    assert recipe.num_visual_tokens == 144
    assert recipe.train == (["projector"] if pretrain else ["projector", "language_model"])
    assert arguments["learning_rate"] == (1e-3 if pretrain else 2e-5)
    assert (arguments["lr_scheduler_type"], arguments["warmup_steps"], arguments["weight_decay"]) == (
        "cosine",
        0.03,
        0,
    )
    assert arguments["bf16"] and arguments["num_train_epochs"] == 1
    as_shipped = load_recipe(file, [c for c in changes(folder, tmp_path / "out", file) if "per_device" not in c])
    rows = as_shipped.arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * 8
    assert rows == (256 if pretrain else 128)
    if pretrain:
        assert recipe.data.chat_template == "plain"
    else:
        assert recipe.data.chat_template == ("chatml" if "qwen" in file.name else "vicuna_v1")
    model = AutoModelForImageTextToText.from_pretrained(train(recipe))
    assert model.config.num_visual_tokens == 144 and model.dtype == torch.bfloat16


def test_the_shipped_qlora_recipe_trains(folder: Path, tmp_path: Path) -> None:
    overrides = [*changes(folder, tmp_path / "out", QLORA), "arguments.gradient_accumulation_steps=1"]
    recipe = load_recipe(QLORA, overrides)
    assert recipe.model.quantization_config["load_in_4bit"] and recipe.train == ["projector", "lora"]
    assert (recipe.arguments["learning_rate"], recipe.projector_lr) == (2e-4, 2e-5)
    shipped = yaml.safe_load(QLORA.read_text())["arguments"]
    assert shipped["per_device_train_batch_size"] * shipped["gradient_accumulation_steps"] == 128
    pytest.importorskip("bitsandbytes")
    model = AutoModelForImageTextToText.from_pretrained(train(recipe))
    assert model.config.image_seq_length == 144 and model.dtype == torch.bfloat16


def test_every_budget_of_the_paper_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    file, budgets = ROOT / "examples" / "recipes" / "pretrain-7b.yaml", [144, 64, 36, 16, 4, 1]
    trainer = make_trainer(load_recipe(file, [*changes(folder, tmp_path, file), f"num_visual_tokens={budgets}"]))
    for budget in budgets:
        input_ids = trainer.train_dataset[Request(0, budget)]["input_ids"]
        assert (input_ids == trainer.processing_class.image_token_id).sum() == budget


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed-zero2", "deepspeed-zero3"])
def test_accelerate_reads_the_configs(name: str) -> None:
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 8
    if name == "fsdp2":
        assert str(config.distributed_type).endswith("FSDP") and config.fsdp_config["fsdp_version"] == 2
        return
    assert str(config.distributed_type).endswith("DEEPSPEED")
    file = ROOT / config.deepspeed_config["deepspeed_config_file"]
    deepspeed = HfDeepSpeedConfig(json.loads(file.read_text()))
    assert deepspeed.is_zero2() == name.endswith("2") and deepspeed.is_zero3() == name.endswith("3")
    # Left to the recipe.
    assert {deepspeed.get_value(key) for key in ("train_batch_size", "gradient_accumulation_steps")} == {"auto"}
