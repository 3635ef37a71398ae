"""Partial checkpoints on their base: a projector alone, and LoRA runs against PEFT's own merge."""

import json
import shutil
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from examples.make_checkpoint import write_tokenizer, write_weights
from tests.checkpoints import edit_json, read_tensors
from transformers_delta_llava.conversion import convert_checkpoint, convert_state_dict, lora
from transformers_delta_llava.conversion.lora import LoraSettings, read_lora_settings
from transformers_delta_llava.utils.errors import DeltaLlavaError


def is_language(name: str) -> bool:
    return "mm_projector" not in name and "vision_tower" not in name


@pytest.fixture
def partial(pristine, tmp_path):
    """Splits the checkpoint: `base/` holds the language model, `run/` config and nothing trained yet; returns all tensors."""
    tensors = read_tensors(pristine / "llava-tiny")
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir(), run.mkdir()
    write_weights(base, {name: tensor for name, tensor in tensors.items() if is_language(name)}, "bin", 2)
    write_tokenizer(base)
    for folder in (base, run):
        shutil.copyfile(pristine / "llava-tiny" / "config.json", folder / "config.json")
    edit_json(base / "config.json", model_type="llama")
    return tensors


def projector(tensors):
    return {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}


def tower_of(pristine):
    inner = read_tensors(pristine / "vision-tower")
    return {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in inner.items()}


def assert_repo_holds(repo, tensors):
    tensors_written, expected = read_tensors(repo), convert_state_dict(tensors)
    assert tensors_written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors_written[name][: len(tensor)], tensor), name


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_projector_alone(pristine, partial, tmp_path, prefix):
    torch.save({prefix + name: t for name, t in projector(partial).items()}, tmp_path / "run" / "mm_projector.bin")
    report = convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")
    kept = {name: tensor for name, tensor in partial.items() if "vision_tower" not in name}
    assert_repo_holds(tmp_path / "out", {**kept, **tower_of(pristine)})
    assert report.base_model.name == "base"
    assert sorted(report.source.sha256) == ["config.json", "mm_projector.bin"]
    assert len(report.base_model.sha256) == 3


def test_the_projector_replaces_that_of_a_full_base(pristine, partial, tmp_path):
    changed = {name: tensor + 1 for name, tensor in projector(partial).items()}
    torch.save(changed, tmp_path / "run" / "mm_projector.bin")
    convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=pristine / "llava-tiny")
    assert_repo_holds(tmp_path / "out", {**partial, **changed})


def peft_run(tmp_path, tensors, dtype, options, save_embedding_layers=False):
    """A LoRA run as the authors' trainer saves it; returns what PEFT merges it to."""
    base = tmp_path / "base"
    for file in base.glob("pytorch_model*"):
        file.unlink()
    write_weights(base, {name: tensor.to(dtype) for name, tensor in tensors.items() if is_language(name)})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            parameter.data.normal_(generator=generator, std=0.3)
    model.save_pretrained(tmp_path / "run", save_embedding_layers=save_embedding_layers)
    beside = {f"base_model.model.{name}": tensor.to(dtype) for name, tensor in projector(tensors).items()}
    torch.save(beside, tmp_path / "run" / "non_lora_trainables.bin")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), tmp_path / "run")
    return dict(again.merge_and_unload().state_dict())


LORA = [
    {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"o_proj": 2}},
    {"r": 3, "target_modules": ["v_proj", "up_proj"], "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
    {"r": 2, "target_modules": ["embed_tokens", "k_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize(
    ("dtype", "form", "options"),
    [(torch.float32, "safetensors", LORA[0]), *((torch.bfloat16, "bin", options) for options in LORA)],
)
def test_lora_is_merged_as_peft_merges(pristine, partial, tmp_path, dtype, form, options):
    merged = peft_run(tmp_path, partial, dtype, {"lora_dropout": 0.1, **options})
    if form == "bin":
        adapter = tmp_path / "run" / "adapter_model.safetensors"
        torch.save(load_file(adapter), adapter.with_suffix(".bin"))
        adapter.unlink()
    convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=str(tmp_path / "base"))
    merged |= {name: tensor.to(dtype) for name, tensor in projector(partial).items()}
    assert_repo_holds(tmp_path / "out", {**merged, **tower_of(pristine)})
    before = partial["model.layers.1.self_attn.q_proj.weight"].to(dtype)
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(read_tensors(tmp_path / "out")[name], before) is (
        "q_proj" not in str(options) and "all" not in str(options)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which is more than a low-rank sum"),
        ({"peft_type": "IA3"}, "peft_type='IA3'; only LORA"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"alpha_pattern": {"(": 1}}, "'(' in alpha_pattern is not a valid pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern.q_proj='8': input should be a valid number"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=[1, 2], which is more than a low-rank sum"),
        ({"something_newer": {"a": 1}}, "something_newer={'a': 1}, which is more than a low-rank sum"),
        *(
            ({"init_lora_weights": start}, f"init_lora_weights='{start}', which changes the base weights")
            for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something_newer")
        ),
    ],
)
def test_other_adapters_are_refused(tmp_path, config, message):
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "adapter_config.json", **config)
    with pytest.raises(DeltaLlavaError) as error:
        read_lora_settings(tmp_path).scalings({"q_proj": 4})
    assert message in str(error.value)


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_unchanged(tmp_path, start):
    LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start).save_pretrained(tmp_path)
    assert read_lora_settings(tmp_path).init_lora_weights == start


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "bias": "all"}, False),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, False),
    ],
)
def test_what_peft_saves_beside_the_factors(pristine, partial, tmp_path, options, tied):
    for folder in ("base", "run"):
        edit_json(tmp_path / folder / "config.json", tie_word_embeddings=tied, attention_bias=True)
    if tied:
        del partial["lm_head.weight"]
    biases = {f"model.layers.{i}.self_attn.{name}_proj.bias": torch.randn(32) for i in (0, 1) for name in "qkvo"}
    partial |= {name: bias[: len(partial[name.replace("bias", "weight")])] for name, bias in biases.items()}
    merged = peft_run(
        tmp_path, partial, torch.float32, {"r": 4, **options}, save_embedding_layers="embed_tokens" in str(options)
    )
    report = convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")
    still_tied = torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert still_tied is (tied and options.get("ensure_weight_tying", False))
    if still_tied:
        del merged["lm_head.weight"]
    assert_repo_holds(tmp_path / "out", {**merged, **projector(partial), **tower_of(pristine)})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is still_tied
    assert ("no longer tied" in str(report.warnings)) is (tied and not still_tied)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_factors_for_one_of_two_tied_weights_are_refused(partial, tmp_path, target):
    for folder in ("base", "run"):
        edit_json(tmp_path / folder / "config.json", tie_word_embeddings=True)
    del partial["lm_head.weight"]
    peft_run(tmp_path, partial, torch.float32, {"r": 4, "target_modules": ["q_proj", target]}, "auto")
    with pytest.raises(DeltaLlavaError, match=rf"factors for .*{target}.* ties its head to its embeddings"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")


def test_a_pattern_that_backtracks_for_ever_is_refused_in_seconds(monkeypatch):
    monkeypatch.setattr(lora, "_PATTERN_SECONDS", 0.2)
    settings = LoraSettings.model_validate({"lora_alpha": 8, "alpha_pattern": {"(a|aa)+b": 4}})
    begun = time.monotonic()
    with pytest.raises(DeltaLlavaError, match="take more than 0 seconds to match"):
        settings.scalings({"a" * 200: 4})
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.0.mlp.up_proj.lora_A.extra": (2, 32)}, "is of an unknown kind"),
        ({"model.layers.0.mlp.new.weight": (2, 32)}, "that the base model does not have: .*new"),
        (
            {"lm_head.base_layer.weight": (2, 3), "lm_head.modules_to_save.weight": (3, 2)},
            "holds two different lm_head",
        ),
        ({"model.layers.7.mlp.up_proj.lora_A.weight": (2, 32)}, "no such weight in the base model"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": (2, 32)}, "only one of its two factors"),
        (
            {
                "model.layers.0.self_attn.q_proj.lora_A.weight": (2, 5),
                "model.layers.0.self_attn.q_proj.lora_B.weight": (32, 2),
            },
            "do not fit its weight",
        ),
        ({"model.layers.0.self_attn.q_proj.lora_magnitude_vector": (32,)}, "is of an unknown kind"),
    ],
)
def test_a_broken_adapter_is_refused(partial, tmp_path, tensors, message):
    contents = {f"base_model.model.{name}": torch.ones(shape) for name, shape in tensors.items()}
    save_file(contents, tmp_path / "run" / "adapter_model.safetensors")
    (tmp_path / "run" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    with pytest.raises(DeltaLlavaError, match=message):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")


def test_a_partial_checkpoint_needs_the_right_base(pristine, partial, tmp_path):
    torch.save(projector(partial), tmp_path / "run" / "mm_projector.bin")
    with pytest.raises(DeltaLlavaError, match=r"holds the projector only; pass .* `base_model=\.\.\.`"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(DeltaLlavaError, match="model_type='mistral', but the checkpoint was trained on a llama"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")
    with pytest.raises(DeltaLlavaError, match="is a full checkpoint, which needs no base model"):
        convert_checkpoint(pristine / "llava-tiny", tmp_path / "out", base_model=tmp_path / "base")
    torch.save({**projector(partial), "lm_head.weight": torch.ones(1)}, tmp_path / "run" / "mm_projector.bin")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(DeltaLlavaError, match=r"more than a projector: lm_head\.weight"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")


def test_a_folder_with_the_name_of_a_file_is_refused(partial, tmp_path):
    peft_run(tmp_path, partial, torch.float32, {"r": 4, "target_modules": ["q_proj"]})
    (tmp_path / "run" / "non_lora_trainables.bin").unlink()
    (tmp_path / "run" / "non_lora_trainables.bin").mkdir()
    with pytest.raises(DeltaLlavaError, match="non_lora_trainables.bin in run is not a regular file"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")
