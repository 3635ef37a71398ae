"""Which names of models may be published."""

from pathlib import Path

import pytest

from transformers_delta_llava.utils.files import hub_id_of, public_name


COMMIT = 40 * "a"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"),
        (f"/data/hub/models--lmsys--vicuna-7b-v1.5/snapshots/{COMMIT}", "lmsys/vicuna-7b-v1.5"),
        ("checkpoints/vicuna-7b", None),
        ("./checkpoints/vicuna-7b", None),
        ("pretrained_models/vicuna-7b", None),
        ("llava-tiny/checkpoint-5000", None),
        ("someone/checkpoint-5000", None),
        (f"someone/{COMMIT}", None),
        ("someone/two--dashes", None),
        ("vicuna-7b", None),
        ("a/b/c", None),
        (["lmsys/vicuna-7b-v1.5"], None),
    ],
)
def test_only_a_hub_id_is_published_as_base_model(name, published, tmp_path):
    (tmp_path / "llava-tiny" / "checkpoint-5000").mkdir(parents=True)
    assert hub_id_of(name, tmp_path) == published


def test_names_to_publish_hold_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("local/tower").mkdir(parents=True)
    tower = "openai/clip-vit-large-patch14-336"
    cached = tmp_path / f"models--{tower.replace('/', '--')}" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    names = {tower: tower, "local/tower": "tower", "../tower/": "tower", cached: tower, tmp_path / "x" / COMMIT: "x"}
    assert {name: public_name(str(name)) for name in names} == names
