"""Every tensor of the source has a target, every target is filled, and new tokens never win."""

import pytest
import torch
from transformers import CLIPVisionConfig

from examples.make_checkpoint import LLAVA_KEYS, TEXT, TOWER, Recipe, checkpoint_tensors, projector_shapes, write_tower
from tests.reference.names import package_state_dict
from transformers_delta_llava.conversion import convert_state_dict
from transformers_delta_llava.conversion.config import convert_config, read_config
from transformers_delta_llava.conversion.names import (
    EMBEDDINGS,
    HEAD,
    NAMES,
    PROJECTOR,
    SOURCE_PROJECTOR,
    map_names,
    plan_tensors,
    released_name,
)
from transformers_delta_llava.conversion.weights import Checkpoint, LazyTensor
from transformers_delta_llava.errors import DeltaLlavaError


OTHERS = {
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.31.self_attn.q_proj.weight": "model.language_model.layers.31.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_up_proj.weight": "model.language_model.layers.0.mlp.gate_up_proj.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "model.norm.bias": "model.language_model.norm.bias",
    "lm_head.weight": "lm_head.weight",
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.vision_model.pre_layrnorm.bias",
    "model.vision_tower.vision_tower.encoder.layers.3.mlp.fc1.bias": (
        "model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"
    ),
    # DINOv2, whose files have no inner level.
    **{
        f"model.vision_tower.vision_tower.{name}": f"model.vision_tower.{name}"
        for name in (
            "encoder.layer.3.attention.attention.query.weight",
            "layernorm.bias",
            "embeddings.cls_token",
            "embeddings.patch_embeddings.projection.weight",
        )
    },
}
CONVOLUTION = "model.mm_projector.combined_block.ntb.patch_embed.conv.weight"


def test_the_projector_by_an_independent_table():
    """1x1 convolutions become matrices, and nothing else changes."""
    released = {name: torch.randn(shape).bfloat16() for name, shape in projector_shapes(128, 64).items()}
    converted = convert_state_dict({SOURCE_PROJECTOR + name: tensor for name, tensor in released.items()})
    expected = {PROJECTOR + name: tensor for name, tensor in package_state_dict(released).items()}
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert converted[name].dtype is torch.bfloat16
        assert torch.equal(converted[name], tensor), name


def test_other_tensors():
    tensors = {name: torch.randn(3, 2) for name in OTHERS}
    converted = convert_state_dict(tensors)
    assert converted.keys() == set(OTHERS.values())
    assert all(torch.equal(converted[target], tensors[name]) for name, target in OTHERS.items())


def test_every_name_is_used_and_goes_back():
    names = {**dict.fromkeys(SOURCE_PROJECTOR + name for name in projector_shapes(128, 64)), **OTHERS}
    targets = map_names(names)
    lost = "model.vision_tower.vision_tower.encoder.layers.3.mlp.fc1.bias"  # the level that it lacks is added
    assert {name: released_name(target) for name, target in targets.items() if name != lost} == {
        name: name for name in targets if name != lost
    }
    used = {next(old for old, _ in NAMES if name.startswith(old)) for name in names}
    unused = {old for old, _ in NAMES} - used
    assert unused == {
        f"model.vision_tower.vision_tower.embeddings.{name}"
        for name in ("mask_token", "register_tokens", "position_embeddings")
    }
    with pytest.raises(DeltaLlavaError, match="no name for model.extra"):
        released_name("model.extra")


def test_computed_buffers_are_left_out():
    names = [
        "model.mm_projector.pos_embed",
        "model.layers.7.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    ]
    assert convert_state_dict({name: torch.zeros(2) for name in names}) == {}


UNKNOWN = ["model.image_newline", "model.mm_projector.z_proj_1.U", "model.mm_projector.0.weight", "q_proj_1.U"]
CLASHING = ["model.vision_tower.vision_tower.vision_model.x.weight", "model.vision_tower.vision_tower.x.weight"]


@pytest.mark.parametrize("names", [UNKNOWN, CLASHING])
def test_names_that_are_refused(names):
    with pytest.raises(DeltaLlavaError) as error:
        map_names(["model.norm.weight", *names])
    assert all(name in str(error.value) for name in names)
    assert "model.norm.weight" not in str(error.value)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def tensors(tower):
    return checkpoint_tensors(Recipe(), tower)


def make_lazy(tensors):
    return Checkpoint({n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}, ())


def plan(tensors, tower=None, dtype=None, vocabulary=None, vision=None, **config):
    source = make_lazy(tensors)
    settings = {**TEXT, **LLAVA_KEYS, "model_type": "llava_llama", **config}
    rows, image, *pad = vocabulary or (320, 319)
    tower_config = CLIPVisionConfig(**{**TOWER, **(vision or {})})
    config = convert_config(
        read_config(settings),
        tower_config,
        vocab_size=rows,
        image_token_id=image,
        pad_token_id=pad[0] if pad else None,
    )
    return plan_tensors(source, tower and make_lazy(tower), config, dtype)


def load(tensors, **options):
    return {name: tensor.load() for name, tensor in plan(tensors, **options).tensors.items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("tower_inside", [True, False])
def test_all_tensors_bit_for_bit(tensors, tower, tower_inside, dtype):
    source = {name: tensor for name, tensor in tensors.items() if tower_inside or "vision_tower" not in name}
    result, expected = load(source, tower=None if tower_inside else tower, dtype=dtype), convert_state_dict(tensors)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name].to(dtype or torch.float32)) for name in expected)


def test_shapes_and_dtypes_are_known_before_reading(tensors):
    for tensor in plan(tensors, vocabulary=(384, 320), dtype=torch.float16).tensors.values():
        value = tensor.load()
        assert (tensor.shape, tensor.dtype, tensor.num_bytes) == (tuple(value.shape), value.dtype, value.nbytes)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, {}, r"^missing tensors: .*layers\.1\.mlp\.up_proj\.weight"),
        ({"model.mm_projector.q_proj_1.U": None}, {}, r"^missing tensors: .*query\.delta_u"),
        ({"lm_head.weight": None}, {}, r"^missing tensors: lm_head\.weight"),
        ({"model.layers.2.mlp.up_proj.weight": (2, 2)}, {}, r"does not have: .*layers\.2\.mlp\.up_proj\.weight"),
        ({"model.norm.weight": (5,)}, {}, r"language_model\.norm\.weight is \(5,\) instead of \(32,\)"),
        ({CONVOLUTION: (4, 4, 3, 3)}, {}, r"block\.stem\.weight is \(4, 4, 3, 3\) instead of"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.uint8)}, {}, r"quantised.*norm\.weight"),
        ({}, {"hidden_act": "no-such-activation"}, "no-such-activation"),
        ({}, {"tie_word_embeddings": True}, "differs from the embeddings"),
        ({"lm_head.weight": (319, 32)}, {"tie_word_embeddings": True}, "differs from the embeddings"),
        *(
            ({}, {"vision": {key: value}}, rf"this clip_vision_model of .*{key}={value}.* is .* instead of")
            for key, value in (("hidden_size", 256), ("patch_size", 8), ("num_hidden_layers", 25))
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors, changes, options, message):
    source = {**tensors, **{n: torch.ones(v) if isinstance(v, tuple) else v for n, v in changes.items()}}
    options = {"vocabulary": (384, 320), **options}
    with pytest.raises((DeltaLlavaError, KeyError), match=message):
        plan({name: tensor for name, tensor in source.items() if tensor is not None}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_never_win_an_argmax(tensors, tied, dtype):
    """Also where a row that was trained, row 0 above all, wins often."""
    source = {name: tensor.to(dtype) for name, tensor in tensors.items() if not (tied and name == "lm_head.weight")}
    result = load(source, vocabulary=(384, 320, 321), tie_word_embeddings=tied)
    old, new = source["model.embed_tokens.weight"], result[EMBEDDINGS]
    assert new.shape == (384, 32)
    assert torch.equal(new[:320], old)
    assert torch.equal(new[320], old.float().mean(0).to(dtype))
    assert (new == new[320]).all(-1).sum() == 1  # models that are given embeddings find their placeholders by it
    head = new if tied else result[HEAD]
    assert (HEAD in result) is not tied
    assert torch.equal(head[:320], old if tied else source["lm_head.weight"])
    states = torch.randn(5000, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    states[:500] = 10 * head[0] + states[:500] * 0.01
    states[500] = 0
    winners = (states @ head.T).argmax(-1)
    assert winners.max() < 320
    assert (winners[:500] == 0).sum() > 400


def test_rows_that_exist_stay(tensors):
    result = load(tensors, vocabulary=(320, 300))
    assert torch.equal(result[EMBEDDINGS], tensors["model.embed_tokens.weight"])


def test_a_tied_head_that_repeats_the_embeddings_is_left_out(tensors):
    source = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    planned = plan(source, tie_word_embeddings=True)
    assert HEAD not in planned.tensors
    assert "equal to the embeddings" in planned.ignored["lm_head.weight"]
