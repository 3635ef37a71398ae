"""Features of a frozen tower on disk, and what the log says of visual tokens."""

import json

import pytest
import torch

from examples.smol.finetune import finetune
from examples.smol.frozen_features import FrozenFeatures
from tests.training.tiny_run import (
    make_model,
    recipe_content,
    write_data,
    write_model,
    write_parts,
)
from transformers_delta_llava.training import make_recipe, train


def count_runs(model) -> list[int]:
    """Images that the tower was run on, from now on."""
    runs: list[int] = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda _, args, output: runs.append(len(output)))
    return runs


@torch.no_grad()
def test_images_seen_before_are_read(tmp_path):
    model, pixels = make_model().eval(), torch.randn(3, 3, 24, 24)
    expected = torch.stack(model.get_image_features(pixels).pooler_output)
    features = FrozenFeatures(model, tmp_path)
    runs = count_runs(model)
    first = torch.stack(model.get_image_features(pixels[:2]).pooler_output)
    again = torch.stack(model.get_image_features(pixels).pooler_output)
    assert runs == [2, 1]
    assert torch.equal(first, again[:2])
    torch.testing.assert_close(again, expected, rtol=0, atol=2e-3)  # float16 on disk
    assert len(list(features.folder.iterdir())) == 3
    assert features.load(features.keep(pixels)).shape == (3, 3, 144, 64)  # levels 1, 2, 3; the layer before last is 3


@torch.no_grad()
def test_another_tower_has_another_folder(tmp_path):
    other = make_model()
    other.model.vision_tower.post_layernorm.bias[-1] += 1e-6
    settings = make_model()
    settings.config.vision_config.layer_norm_eps = 1e-3
    assert len({FrozenFeatures(model, tmp_path).folder for model in (make_model(), other, settings)}) == 3


def test_a_run_computes_each_image_once_and_logs_its_visual_tokens(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    write_data(tmp_path / "data", 8, text_only_every=9)
    kept: list[int] = []
    keep = FrozenFeatures.keep
    monkeypatch.setattr(
        FrozenFeatures, "keep", lambda self, pixels, **k: kept.append(len(pixels)) or keep(self, pixels)
    )
    out = finetune(make_recipe(recipe_content(tmp_path, arguments={"max_steps": 8})), tmp_path / "features")
    assert sum(kept) == 16  # two epochs
    assert len(list((tmp_path / "features").glob("*/*.npy"))) == 8
    log = [entry for entry in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert all(entry["visual_token_rms"] > 0 for entry in log)
    assert all(0 <= entry["visual_token_spread"] <= entry["visual_token_rms"] for entry in log)


def test_two_joined_parts_start_as_loud_as_text(tmp_path):
    write_data(tmp_path / "data", 8, text_only_every=9)
    content = recipe_content(tmp_path, train=["projector"], arguments={"max_steps": 1})
    content["model"] = write_parts(tmp_path)
    out = train(make_recipe(content))
    log = json.loads((out / "trainer_state.json").read_text())["log_history"][0]
    assert log["visual_token_rms"] == pytest.approx(1, abs=0.2)
    assert log["visual_token_spread"] > 0.2


@torch.no_grad()
def test_a_damaged_file_is_named(tmp_path):
    features = FrozenFeatures(make_model(), tmp_path)
    (file,) = features.keep(torch.ones(1, 3, 24, 24))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=file.name):
        features.load([file])
