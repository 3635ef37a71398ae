"""Partial checkpoints on their base: a projector only, and LoRA runs against PEFT's own merge."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from examples.make_checkpoint import write_tokenizer, write_weights
from tests.checkpoints import edit_json, read_tensors
from transformers_delta_llava.conversion import convert_checkpoint, convert_state_dict
from transformers_delta_llava.errors import DeltaLlavaError


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
    convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")
    kept = {name: tensor for name, tensor in partial.items() if "vision_tower" not in name}
    assert_repo_holds(tmp_path / "out", {**kept, **tower_of(pristine)})
    noted = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert noted["base_model"]["name"] == "base"
    assert sorted(noted["source"]["sha256"]) == ["config.json", "mm_projector.bin"]
    assert len(noted["base_model"]["sha256"]) == 3


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
    ("options", "tied", "message"),
    [
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False, None),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False, None),
        ({"modules_to_save": ["embed_tokens"]}, False, None),
        ({"bias": "all"}, False, None),
        ({"bias": "lora_only"}, False, None),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True, None),
        # PEFT trains a copy of only one of the two, or merges one update into both.
        ({"modules_to_save": ["embed_tokens"]}, True, "tie_word_embeddings"),
        ({"modules_to_save": ["lm_head"]}, True, "tie_word_embeddings"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, True, "tie_word_embeddings"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True, "tie_word_embeddings"),
        ({"target_modules": ["q_proj", "lm_head"]}, True, "tie_word_embeddings"),
    ],
)
def test_what_peft_saves_besides_the_factors(pristine, partial, tmp_path, options, tied, message):
    for folder in ("base", "run"):
        edit_json(tmp_path / folder / "config.json", tie_word_embeddings=tied, attention_bias=True)
    if tied:
        del partial["lm_head.weight"]
    biases = {f"model.layers.{i}.self_attn.{name}_proj.bias": torch.randn(32) for i in (0, 1) for name in "qkvo"}
    partial |= {name: bias[: len(partial[name.replace("bias", "weight")])] for name, bias in biases.items()}
    options = {"r": 4, "target_modules": ["q_proj"], **options}
    merged = peft_run(tmp_path, partial, torch.float32, options, "embed_tokens" in str(options))
    if message:
        with pytest.raises(DeltaLlavaError, match=message):
            convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")
        return
    convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")
    if tied:
        del merged["lm_head.weight"]
    assert_repo_holds(tmp_path / "out", {**merged, **projector(partial), **tower_of(pristine)})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "use_dora=True"),
        ({"peft_type": "IA3"}, {}, "peft_type=IA3"),
        ({"alora_invocation_tokens": [1, 2]}, {}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights=pissa"),
        ({}, {f"{Q_PROJ}.lora_magnitude_vector": (32,)}, "lora_magnitude_vector"),
        ({}, {"model.layers.0.mlp.new.weight": (2, 32)}, "mlp.new.weight"),
        ({}, {"lm_head.base_layer.weight": (2, 3), "lm_head.modules_to_save.weight": (3, 2)}, "two different lm_head"),
        ({}, {"model.layers.7.mlp.up_proj.lora_A.weight": (2, 32)}, r"does not fit model\.layers\.7\.mlp\.up_proj"),
        ({}, {f"{Q_PROJ}.lora_A.weight": (2, 32)}, f"does not fit {Q_PROJ}"),
        ({}, {f"{Q_PROJ}.lora_A.weight": (2, 5), f"{Q_PROJ}.lora_B.weight": (32, 2)}, f"does not fit {Q_PROJ}"),
    ],
)
def test_adapters_that_are_refused(pristine, partial, tmp_path, settings, tensors, message):
    tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in tensors.items()}
    save_file(
        {"base_model.model.model.norm.weight": torch.ones(32), **tensors},
        tmp_path / "run" / "adapter_model.safetensors",
    )
    torch.save(projector(partial), tmp_path / "run" / "non_lora_trainables.bin")
    (tmp_path / "run" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": 8, **settings})
    )
    with pytest.raises(DeltaLlavaError, match=message):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")


def test_a_partial_checkpoint_needs_the_right_base(pristine, partial, tmp_path):
    torch.save(projector(partial), tmp_path / "run" / "mm_projector.bin")
    with pytest.raises(DeltaLlavaError, match="only a projector; pass .* base_model"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(DeltaLlavaError, match="model_type=mistral, but the checkpoint was trained on a llama"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", base_model=tmp_path / "base")
    with pytest.raises(DeltaLlavaError, match="full checkpoint; leave base_model out"):
        convert_checkpoint(pristine / "llava-tiny", tmp_path / "out", base_model=tmp_path / "base")
