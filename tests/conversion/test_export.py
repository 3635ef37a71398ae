"""There and back again, bit for bit, from both ends."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from examples.make_checkpoint import write_checkpoint
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import convert_checkpoint, export_checkpoint
from transformers_delta_llava.conversion.checkpoint import read_checkpoint, same_bits
from transformers_delta_llava.conversion.weight_mapping import published_name
from transformers_delta_llava.utils.errors import DeltaLlavaError


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in read_checkpoint(folder).tensors.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert same_bits(one[name], other[name]), name


def contents(repo: Path, *names: str) -> dict[str, object]:
    return {name: json.loads((repo / name).read_text()) for name in names}


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_gemma"])
def test_both_directions_without_the_towers_weights(tmp_path, model_type):
    """With them: tests/test_every_checkpoint.py."""
    source = tmp_path / "source"
    write_checkpoint(
        source,
        model_type=model_type,
        tower=False,
        dtype=torch.bfloat16,
        form="bin",
        shards=2,
        text={"vocab_size": 299},
    )
    convert_checkpoint(source, tmp_path / "repo")
    report = export_checkpoint(tmp_path / "repo", tmp_path / "back")
    assert_same(read(tmp_path / "back"), read(source))
    assert report.vocab_size == 299
    assert report.tensors_written == len(read(source))
    # And on to a repo again; the tower is found beside the checkpoint, where it was the first time.
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    assert_same(read(tmp_path / "again"), read(tmp_path / "repo"))
    files = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json")
    assert contents(tmp_path / "again", *files) == contents(tmp_path / "repo", *files)
    template = "chat_template.jinja"
    assert (tmp_path / "again" / template).read_text() == (tmp_path / "repo" / template).read_text()


def test_the_authors_keys(repo, pristine, tmp_path):
    export_checkpoint(repo, tmp_path / "back")
    before, after = (
        contents(folder, "config.json")["config.json"] for folder in (pristine / "llava-tiny", tmp_path / "back")
    )
    changed = {"mm_vision_tower", "freeze_mm_mlp_adapter", "tokenizer_padding_side", "tune_mm_mlp_adapter"}
    keys = {name for name in before if name.startswith("mm_") or name in ("scale_factor", "model_type", "vocab_size")}
    assert {name: after[name] for name in keys - changed} == {name: before[name] for name in keys - changed}
    assert after["mm_vision_tower"] == "vision-tower"
    assert (tmp_path / "back" / "vision-tower" / "preprocessor_config.json").is_file()


def test_the_projector_alone(repo, pristine, tmp_path):
    export_checkpoint(repo, tmp_path / "back", projector_only=True)
    assert {p.name for p in (tmp_path / "back").iterdir()} == {
        *("mm_projector.bin", "config.json", "conversion.json", "vision-tower")
    }
    expected = {n: t for n, t in read(pristine / "llava-tiny").items() if "mm_projector" in n}
    assert_same(torch.load(tmp_path / "back" / "mm_projector.bin", weights_only=True), expected)
    # The exported projector goes back onto its language model.
    convert_checkpoint(tmp_path / "back", tmp_path / "again", base_model=pristine / "llava-tiny")
    assert_same(read(tmp_path / "again"), read(repo))


def test_rows_that_were_trained_since_stay(repo, tmp_path):
    changed = shutil.copytree(repo, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    image = json.loads((changed / "config.json").read_text())["image_token_id"]
    tensors["model.language_model.embed_tokens.weight"][image] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    report = export_checkpoint(changed, tmp_path / "back")
    assert report.vocab_size == len(tensors["lm_head.weight"])
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    assert_same(read(tmp_path / "again"), tensors)
    assert export_checkpoint(changed, tmp_path / "cut", vocab_size=100).vocab_size == 100
    assert read(tmp_path / "cut")["lm_head.weight"].shape[0] == 100
    with pytest.raises(DeltaLlavaError, match="vocab_size=0 is not between"):
        export_checkpoint(changed, tmp_path / "none", vocab_size=0)


def test_what_cannot_be_exported(repo, pristine, tmp_path):
    with pytest.raises(DeltaLlavaError, match="is not a Delta-LLaVA repo: .*'llava_llama'"):
        export_checkpoint(pristine / "llava-tiny", tmp_path / "out")
    with pytest.raises(DeltaLlavaError, match="one folder"):
        export_checkpoint(repo, repo, overwrite=True)
    other = shutil.copytree(repo, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "projector_layout": "paper"}))
    with pytest.raises(DeltaLlavaError, match="projector_layout='paper', for which the authors' layout has no names"):
        export_checkpoint(other, tmp_path / "out")
    (other / "config.json").write_text(json.dumps(config))
    (other / "conversion.json").write_text('{"trained_vocab_size": "many"}')
    with pytest.raises(DeltaLlavaError, match=r"conversion\.json: trained_vocab_size='many\'"):
        export_checkpoint(other, tmp_path / "out")
    (other / "config.json").write_text(json.dumps({**config, "vision_feature_levels": "x"}))
    with pytest.raises(DeltaLlavaError, match=r"config\.json of other is not usable"):
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
        {"projector_sr_ratio": 2},
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
    """What `delta-llava train` can leave behind, also where the released code has only one choice."""
    torch.manual_seed(0)
    config = tiny_config(**settings)
    DeltaLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "repo")
    tiny_processor(config).save_pretrained(tmp_path / "repo")
    report = export_checkpoint(tmp_path / "repo", tmp_path / "back")
    assert report.vocab_size == 100
    fixed = {field for field in settings if field.startswith(("projector_", "use_"))} | {"vision_feature_levels"}
    written = contents(tmp_path / "back", "config.json")["config.json"]
    # In the words of transformers 4, which would not read `rope_parameters`, and start from defaults.
    assert "rope_parameters" not in written and written["torch_dtype"] == "float32"
    rope = config.text_config.rope_parameters
    assert written["rope_theta"] == rope["rope_theta"]
    assert written["rope_scaling"] == ({"rope_type": "linear", "factor": 2.0} if "factor" in rope else None)
    assert report.own_keys == sorted(f"mm_{field}" for field in fixed)
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    trained = {published_name(name): tensor for name, tensor in read(tmp_path / "repo").items()}
    assert_same(read(tmp_path / "again"), trained)
    before, after = (contents(tmp_path / name, "config.json")["config.json"] for name in ("repo", "again"))
    for config in (before, after):
        config.pop("dtype", None)
        config["text_config"].pop("dtype", None)
        config["vision_config"].pop("dtype", None)
        config["vision_config"].setdefault("vision_use_head", True)  # older SigLIP configs do not write it
    assert after == before


def test_tokens_without_a_row_stay_behind(tmp_path):
    """The authors' code would look up a row that the embeddings do not have."""
    write_checkpoint(tmp_path / "source", text={"vocab_size": 300})
    convert_checkpoint(tmp_path / "source", tmp_path / "repo")
    export_checkpoint(tmp_path / "repo", tmp_path / "back")
    before, after = (PreTrainedTokenizerFast.from_pretrained(tmp_path / name) for name in ("source", "back"))
    assert after.get_vocab() == before.get_vocab()
    assert after.pad_token is None
    config = contents(tmp_path / "back", "config.json", "generation_config.json")
    assert config["config.json"].get("pad_token_id") is None
    assert "pad_token_id" not in config["generation_config.json"]
    assert "suppress_tokens" not in config["generation_config.json"]
    # A row that is kept keeps its token.
    export_checkpoint(tmp_path / "repo", tmp_path / "whole", vocab_size=320)
    assert "<image>" in PreTrainedTokenizerFast.from_pretrained(tmp_path / "whole").get_vocab()
