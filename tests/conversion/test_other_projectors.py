"""Checkpoints that look like the authors' and have another projector."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from examples.make_checkpoint import write_weights
from tests.checkpoints import read_tensors
from transformers_delta_llava.conversion import convert_checkpoint, inspect_model
from transformers_delta_llava.utils.errors import DeltaLlavaError


LEVEL = "model.mm_projector."
LINEAR = {"weight": (32, 128), "bias": (32,)}
MLP = {"0.weight": (32, 128), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
TOKEN_PACKER = {
    "q_proj_1.weight": (128, 128),
    **{f"{x}_proj_1.{i}.weight": (128, 512 if i == 0 else 128) for x in "kv" for i in (0, 2)},
    **{f"ln_{x}_1.{part}": (128,) for x in "qkv" for part in ("weight", "bias")},
    "clip_attn.in_proj_weight": (384, 128),
    "clip_attn.out_proj.weight": (128, 128),
    "mlp.0.weight": (32, 128),
    "mlp.2.weight": (32, 32),
}
CASES = {
    "linear": (LINEAR, "a single linear layer (linear), 128 -> 32 wide"),
    "mlp2x_gelu": (MLP, "LLaVA's own MLP (mlp2x_gelu), 128 -> 32 -> 32 wide"),
    "mlp3x_gelu": ({**MLP, "4.weight": (32, 32), "4.bias": (32,)}, "mlp3x_gelu"),
    "TokenPacker": (TOKEN_PACKER, "is TokenPacker's"),
    "resampler": ({"query": (8, 32), "attn.in_proj_weight": (96, 32)}, "of an unknown kind"),
}


@pytest.fixture
def put_projector(source: Path):
    """Replaces the projector of a checkpoint by tensors of the given names and shapes."""

    def put(shapes: dict[str, tuple[int, ...]]) -> Path:
        tensors = {name: tensor for name, tensor in read_tensors(source).items() if not name.startswith(LEVEL)}
        tensors |= {LEVEL + name: torch.ones(shape) for name, shape in shapes.items()}
        (source / "model.safetensors").unlink()
        write_weights(source, tensors)
        return source

    return put


@pytest.mark.parametrize("case", CASES)
def test_another_projector_is_named(case, put_projector, tmp_path):
    shapes, words = CASES[case]
    folder = put_projector(shapes)
    with pytest.raises(DeltaLlavaError) as error:
        convert_checkpoint(folder, tmp_path / "out")
    assert words in str(error.value)
    assert "not a delta projector" in str(error.value) and "delta-llava train" in str(error.value)
    assert not (tmp_path / "out").exists()
    seen = inspect_model(folder)
    assert seen.problems == [str(error.value)]
    assert seen.components["projector"].tensors == len(shapes)
    assert {"vision tower", "language model", "head"} <= seen.components.keys()


def test_it_is_named_before_the_config_is_refused(put_projector, edit_config, tmp_path):
    """LLaVA-1.5's own config says `llava`, and a sentence about model types would help nobody."""
    folder = put_projector(MLP)
    edit_config(model_type="llava", scale_factor=None)
    with pytest.raises(DeltaLlavaError, match="LLaVA's own MLP"):
        convert_checkpoint(folder, tmp_path / "out")
    assert "LLaVA's own MLP" in inspect_model(folder).problems[0]


def test_a_delta_projector_is_one_whatever_its_config_says(source, edit_config, tmp_path):
    edit_config(mm_projector_type="mlp2x_gelu")  # as the config of the checkpoint that the authors link
    assert convert_checkpoint(source, tmp_path / "out").config_keys.ignored["mm_projector_type"]


def test_a_projector_alone(pristine, tmp_path):
    folder = tmp_path / "stage-1"
    folder.mkdir()
    shutil.copy(pristine / "llava-tiny" / "config.json", folder)
    torch.save({LEVEL + name: torch.ones(shape) for name, shape in MLP.items()}, folder / "mm_projector.bin")
    with pytest.raises(DeltaLlavaError, match="LLaVA's own MLP"):
        convert_checkpoint(folder, tmp_path / "out", base_model=pristine / "llava-tiny")
    assert "LLaVA's own MLP" in inspect_model(folder).problems[0]
    ours = {n: tensor for n, tensor in read_tensors(pristine / "llava-tiny").items() if n.startswith(LEVEL)}
    torch.save(ours, folder / "mm_projector.bin")
    seen = inspect_model(folder)
    assert (seen.kind, seen.problems, list(seen.components)) == ("projector", [], ["projector"])
    assert seen.num_visual_tokens == 16 and [delta.rank for delta in seen.deltas] == [16, 16, 16]


def test_sources_that_need_no_conversion_or_have_no_projector(repo, put_projector, tmp_path):
    with pytest.raises(DeltaLlavaError, match="is already a Delta-LLaVA repo, which needs no conversion"):
        convert_checkpoint(repo, tmp_path / "out")
    folder = put_projector({})
    with pytest.raises(DeltaLlavaError, match=r"has no projector .*`base_model=...`"):
        convert_checkpoint(folder, tmp_path / "out")
    llava = tmp_path / "llava-hf"
    llava.mkdir()
    (llava / "config.json").write_text(json.dumps({"model_type": "llava"}))
    write_weights(llava, {"model.multi_modal_projector.linear_1.weight": torch.ones(2, 2)})
    with pytest.raises(DeltaLlavaError, match="in the layout of transformers, which needs no conversion"):
        convert_checkpoint(llava, tmp_path / "out")
