"""Finding a vision tower, and refusing other things."""

import json
import shutil

import pytest
import torch

from examples.make_checkpoint import write_tower, write_weights
from transformers_delta_llava import DeltaLlavaConfig, loading
from transformers_delta_llava.conversion.config import KNOWN_TOWERS, TOWERS, adapt_to_weights
from transformers_delta_llava.conversion.sources import find_vision_tower, load_vision_tower
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.modeling.configuration_delta_llava import SELECT_STRATEGIES


@pytest.mark.parametrize("model_type", SELECT_STRATEGIES)
def test_every_tower_of_the_model_has_its_preprocessing(tmp_path, model_type):
    write_tower(tmp_path, model_type.removesuffix("_vision_model"))
    tower = load_vision_tower(str(tmp_path), with_weights=True)
    assert tower.image_processor["image_mean"] == list(TOWERS[model_type].mean)
    config = DeltaLlavaConfig(
        vision_config=tower.config,
        vision_feature_levels=[1],
        vision_feature_select_strategy=SELECT_STRATEGIES[model_type],
    )
    assert config.num_prefix_tokens == (SELECT_STRATEGIES[model_type] == "default") + getattr(
        tower.config, "num_register_tokens", 0
    )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tower_type", ["clip", "siglip"])
def test_a_folder(tmp_path, tower_type, whole):
    tensors = write_tower(tmp_path / "my-tower", tower_type, whole=whole)
    tower = load_vision_tower(str(tmp_path / "my-tower"), with_weights=True)
    assert tower.name == "my-tower"
    assert tower.config.model_type == f"{tower_type}_vision_model"
    assert (tower.config.hidden_size, tower.config.image_size) == (128, 32)
    assert tower.checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(tower.checkpoint.tensors[name].load(), tensors[name]) for name in tensors)


def test_names_without_the_inner_level_and_old_buffers(tmp_path):
    tensors = write_tower(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_weights(tmp_path, {**tensors, "embeddings.position_ids": torch.arange(3)}, "bin")
    tower = load_vision_tower(str(tmp_path), with_weights=True)
    assert tower.checkpoint.tensors.keys() == tensors.keys()


@pytest.mark.parametrize("model_id", KNOWN_TOWERS)
def test_known_towers_need_no_download_for_their_geometry(model_id):
    tower = load_vision_tower(model_id, with_weights=False)
    assert tower.name == model_id
    assert tower.checkpoint is None
    side = tower.config.image_size
    processor = tower.image_processor
    if "siglip" in model_id:
        assert (tower.config.image_size // tower.config.patch_size, tower.config.hidden_size) == (27, 1152)
        assert processor["size"] == {"height": side, "width": side}
        assert "crop_size" not in processor
        assert processor["image_mean"] == [0.5, 0.5, 0.5]
    else:
        assert (tower.config.hidden_size, tower.config.num_hidden_layers) == (1024, 24)
        assert processor["size"] == {"shortest_edge": side}
        assert processor["crop_size"] == {"height": side, "width": side}
        assert [int(mean * 255) for mean in processor["image_mean"]] == [122, 116, 104]


def test_the_folders_own_preprocessing_counts(tmp_path):
    write_tower(tmp_path)
    own = {"image_mean": [0.1, 0.2, 0.3], "size": 32, "crop_size": {"height": 32, "width": 32}, "auto_map": {"A": "b"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**own, "image_processor_type": "Evil"}))
    processor = load_vision_tower(str(tmp_path), with_weights=False).image_processor
    assert processor["image_mean"] == [0.1, 0.2, 0.3]
    assert processor["size"] == {"shortest_edge": 32}
    assert processor["image_processor_type"] == "CLIPImageProcessor"
    assert "auto_map" not in processor


@pytest.mark.parametrize("size", [336, {"shortest_edge": 336}])
def test_preprocessing_of_another_size_is_refused(tmp_path, size):
    write_tower(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    with pytest.raises(DeltaLlavaError, match="image_size=32.*336"):
        load_vision_tower(str(tmp_path), with_weights=False)


def test_folders_that_are_not_a_tower(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        load_vision_tower(str(tmp_path), with_weights=False)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(DeltaLlavaError, match="model_type='vit'; choose one of clip, siglip, .*dinov2"):
        load_vision_tower(str(tmp_path), with_weights=False)


def test_the_siglip_head_is_optional(tmp_path):
    names = write_tower(tmp_path, "siglip").keys()
    config = load_vision_tower(str(tmp_path), with_weights=False).config
    adapt_to_weights(config, names)
    assert config.vision_use_head is True
    adapt_to_weights(config, [name for name in names if not name.startswith("head.")])
    assert config.vision_use_head is False


def test_a_hub_id_is_downloaded_safetensors_first(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    tensors = write_tower(repo)
    asked = []

    def snapshot_download(repo_id, allow_patterns, revision):
        asked.append((repo_id, allow_patterns))
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in repo.glob(pattern):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    tower = load_vision_tower("owner/tower", with_weights=True)
    assert tower.name == "owner/tower"
    assert tower.checkpoint.tensors.keys() == tensors.keys()
    assert [repo_id for repo_id, _ in asked] == ["owner/tower"]
    assert not any("bin" in pattern for pattern in asked[0][1])

    shutil.rmtree(tmp_path / "cache")
    (repo / "model.safetensors").unlink()
    write_weights(repo, tensors, "bin")
    assert load_vision_tower("owner/tower", with_weights=True).checkpoint.tensors.keys() == tensors.keys()


KNOWN = "openai/clip-vit-large-patch14-336"
CACHED = "/root/.cache/huggingface/hub/models--openai--clip-vit-large-patch14-336/snapshots/" + 40 * "c"


@pytest.mark.parametrize(
    ("named", "there", "found"),
    [
        (KNOWN, [], KNOWN),
        (f"/data/models/{KNOWN.split('/')[1]}", [], KNOWN),
        (f"../models/{KNOWN.split('/')[1]}/", [], KNOWN),
        (CACHED, [], KNOWN),
        ("owner/other-tower", [], "owner/other-tower"),
        (
            "vision-tower",
            ["run/llava/vision-tower", "run/vision-tower", "here/vision-tower"],
            "run/llava/vision-tower",
        ),
        ("vision-tower", ["run/vision-tower", "here/vision-tower"], "run/vision-tower"),
        ("vision-tower", ["here/vision-tower"], "vision-tower"),
        ("a/b/tower", ["run/llava/a/b/tower", "run/llava/tower"], "run/llava/a/b/tower"),
        ("a/b/tower", ["run/tower", "here/a/b/tower"], "run/tower"),
        ("../towers/tower", ["run/towers/tower"], "run/llava/../towers/tower"),
        ("/data/models/tower", ["run/tower"], "run/tower"),
        (CACHED, [f"run/{KNOWN.split('/')[1]}"], f"run/{KNOWN.split('/')[1]}"),
    ],
)
def test_where_a_named_tower_is_looked_for(named, there, found, tmp_path, monkeypatch):
    for folder in ("run/llava", "here", *there):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for folder in there:
        (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    expected = str(tmp_path / found) if found.startswith("run/") else found
    assert find_vision_tower(named, tmp_path / "run" / "llava") == expected


def test_a_tower_that_is_not_here(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text("{}")  # the checkpoint itself is not its tower
    for named in (None, "/data/other-tower", "../other-tower", "llava"):
        with pytest.raises(DeltaLlavaError, match="mm_vision_tower.*as vision_tower"):
            find_vision_tower(named, tmp_path / "llava")


def test_a_folder_of_settings_is_passed_by_where_weights_are_needed(tmp_path):
    for folder in ("llava/tower", "tower"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "tower" / "model.safetensors").write_bytes(b"")
    assert find_vision_tower("tower", tmp_path / "llava") == str(tmp_path / "llava" / "tower")
    assert find_vision_tower("tower", tmp_path / "llava", with_weights=True) == str(tmp_path / "tower")
