"""Export gives a checkpoint back, bit for bit, and conversion gives the repo back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from examples.make_checkpoint import Tensors, write_checkpoint
from tests.checkpoints import SHALLOW, edit_json, read_tensors
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import convert_checkpoint, export_checkpoint
from transformers_delta_llava.conversion.names import published_name
from transformers_delta_llava.conversion.weights import same_bits
from transformers_delta_llava.errors import DeltaLlavaError


def assert_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert same_bits(one[name], other[name]), name


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def test_both_directions_without_the_towers_weights(tmp_path):
    """With them: tests/test_every_checkpoint.py. Tokens without a row are left out: the authors' code would look it up."""
    source, repo, exported, again = (tmp_path / name for name in ("source", "repo", "exported", "again"))
    text = {"vocab_size": 300}
    write_checkpoint(source, tower=False, dtype=torch.bfloat16, form="bin", shards=2, text=text, **SHALLOW)
    convert_checkpoint(source, repo)
    report = export_checkpoint(repo, exported)
    assert_same(read_tensors(exported), read_tensors(source))
    assert (report.vocab_size, report.tensors_written) == (300, len(read_tensors(source)))
    before, after = (PreTrainedTokenizerFast.from_pretrained(folder) for folder in (source, exported))
    assert after.get_vocab() == before.get_vocab()
    assert after.pad_token is None
    assert read_json(exported / "config.json").get("pad_token_id") is None
    assert not {"pad_token_id", "suppress_tokens"} & read_json(exported / "generation_config.json").keys()

    convert_checkpoint(exported, again)  # the tower is next to the checkpoint, as the first time
    assert_same(read_tensors(again), read_tensors(repo))
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"):
        assert read_json(again / name) == read_json(repo / name)
    assert (again / "chat_template.jinja").read_text() == (repo / "chat_template.jinja").read_text()

    # A row that is kept keeps its token.
    export_checkpoint(repo, tmp_path / "whole", vocab_size=320)
    assert "<image>" in PreTrainedTokenizerFast.from_pretrained(tmp_path / "whole").get_vocab()


def test_the_authors_keys(repo, pristine, tmp_path):
    export_checkpoint(repo, tmp_path / "exported")
    before, after = (read_json(folder / "config.json") for folder in (pristine / "llava-tiny", tmp_path / "exported"))
    changed = {"mm_vision_tower", "freeze_mm_mlp_adapter", "tokenizer_padding_side", "tune_mm_mlp_adapter"}
    keys = {name for name in before if name.startswith("mm_") or name in ("scale_factor", "model_type", "vocab_size")}
    assert {name: after[name] for name in keys - changed} == {name: before[name] for name in keys - changed}
    assert after["mm_vision_tower"] == "vision-tower"
    assert (tmp_path / "exported" / "vision-tower" / "preprocessor_config.json").is_file()


def test_the_projector_alone(repo, pristine, tmp_path):
    export_checkpoint(repo, tmp_path / "exported", projector_only=True)
    names = ("mm_projector.bin", "config.json", "conversion.json", "vision-tower")
    assert {path.name for path in (tmp_path / "exported").iterdir()} == set(names)
    expected = {n: t for n, t in read_tensors(pristine / "llava-tiny").items() if "mm_projector" in n}
    assert_same(torch.load(tmp_path / "exported" / "mm_projector.bin", weights_only=True), expected)
    convert_checkpoint(tmp_path / "exported", tmp_path / "again", base_model=pristine / "llava-tiny")
    assert_same(read_tensors(tmp_path / "again"), read_tensors(repo))


def test_rows_that_were_trained_since_stay(repo, tmp_path):
    changed = shutil.copytree(repo, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    image = read_json(changed / "config.json")["image_token_id"]
    tensors["model.language_model.embed_tokens.weight"][image] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    report = export_checkpoint(changed, tmp_path / "exported")
    assert report.vocab_size == len(tensors["lm_head.weight"])
    convert_checkpoint(tmp_path / "exported", tmp_path / "again")
    assert_same(read_tensors(tmp_path / "again"), tensors)
    assert export_checkpoint(changed, tmp_path / "cut", vocab_size=100).vocab_size == 100
    assert read_tensors(tmp_path / "cut")["lm_head.weight"].shape[0] == 100
    with pytest.raises(DeltaLlavaError, match="vocab_size=0 is not between"):
        export_checkpoint(changed, tmp_path / "none", vocab_size=0)


def change_tensors(repo: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors of a repo; None deletes one."""
    tensors = {**load_file(repo / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, repo / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda repo: edit_json(repo / "config.json", model_type="llava"), "is a llava, not a delta_llava"),
        (lambda repo: edit_json(repo / "config.json", projector_layout="paper"), "projector_layout=paper"),
        (
            lambda repo: edit_json(repo / "config.json", text_config={"model_type": "opt", "vocab_size": 320}),
            "no language model opt; it has gemma, llama",
        ),
        (lambda repo: change_tensors(repo, extra=torch.ones(1)), "released layout has no name for extra"),
    ],
)
def test_a_repo_that_cannot_be_exported(repo, tmp_path, damage, message):
    other = shutil.copytree(repo, tmp_path / "other")
    damage(other)
    with pytest.raises(DeltaLlavaError, match=message):
        export_checkpoint(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"delta_rank": 3},
        {"vision_feature_levels": [0, 2, 4, 4]},
        {"vision_feature_levels": [2]},
        {"vision_feature_layer": -1, "scale_factor": 3},
        {"projector_head_dim": 16, "projector_num_attention_heads": 4},
        {"projector_mix_ratio": 0.5, "projector_mlp_ratio": 1, "projector_hidden_act": "relu"},
        {"use_emhsa": False},
        {"use_transformer_block": False},
        {"use_delta_projection": False},
        {"text": {"tie_word_embeddings": True}},
        {"text": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}},
        {"vision": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"},
    ],
    ids=str,
)
def test_a_trained_model_of_any_shape(tmp_path, settings):
    """What `delta-llava train` can write, also where the released code has only one choice."""
    torch.manual_seed(0)
    config = tiny_config(**settings)
    repo, exported, again = (tmp_path / name for name in ("repo", "exported", "again"))
    DeltaLlavaForConditionalGeneration(config).save_pretrained(repo)
    tiny_processor(config).save_pretrained(repo)
    report = export_checkpoint(repo, exported)
    assert report.vocab_size == 100
    extras = {field for field in settings if field.startswith(("projector_", "use_"))} | {"vision_feature_levels"}
    assert report.extra_keys == sorted(f"mm_{field}" for field in extras)
    # In the words of transformers 4, which would not read `rope_parameters`, and start from defaults.
    written = read_json(exported / "config.json")
    assert "rope_parameters" not in written and written["torch_dtype"] == "float32"
    rope = config.text_config.rope_parameters
    assert written["rope_theta"] == rope["rope_theta"]
    assert written["rope_scaling"] == ({"rope_type": "linear", "factor": 2.0} if "factor" in rope else None)
    convert_checkpoint(exported, again)
    trained = {published_name(name): tensor for name, tensor in read_tensors(repo).items()}
    assert_same(read_tensors(again), trained)
    before, after = (read_json(folder / "config.json") for folder in (repo, again))
    for config in (before, after):
        for part in (config, config["text_config"], config["vision_config"]):
            part.pop("dtype", None)
        config["vision_config"].setdefault("vision_use_head", True)  # older SigLIP configs do not write it
    assert after == before
