"""Every tensor of the source has a place, every place is filled, and new tokens never win."""

import pytest
import torch
from transformers import CLIPVisionConfig

from examples.make_checkpoint import LLAVA_KEYS, TEXT, TOWER, Recipe, checkpoint_tensors, write_tower
from transformers_delta_llava.conversion import convert_config, convert_state_dict
from transformers_delta_llava.conversion.checkpoint import Checkpoint, LazyTensor
from transformers_delta_llava.conversion.config_mapping import Vocabulary
from transformers_delta_llava.conversion.weight_mapping import EMBEDDINGS, HEAD, map_names, plan_tensors
from transformers_delta_llava.utils.errors import DeltaLlavaError


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def tensors(tower):
    return checkpoint_tensors(Recipe(), tower)


def lazily(tensors):
    return Checkpoint({n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}, ())


def plan(tensors, tower=None, dtype=None, vocabulary=None, vision=None, **config):
    source = lazily(tensors)
    settings = {**TEXT, **LLAVA_KEYS, "mm_hidden_size": None, "model_type": "llava_llama", **config}
    vocabulary = vocabulary or Vocabulary(320, 319)
    config = convert_config(settings, CLIPVisionConfig(**{**TOWER, **(vision or {})}), vocabulary)
    return plan_tensors(source, map_names(source.tensors), tower and lazily(tower), config, dtype)


def loaded(tensors, **options):
    return {name: tensor.load() for name, tensor in plan(tensors, **options).tensors.items()}


def test_all_tensors_bit_for_bit(tensors):
    result = loaded(tensors)
    expected = convert_state_dict(tensors)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_shapes_and_dtypes_are_known_before_reading(tensors):
    planned = plan(tensors, vocabulary=Vocabulary(384, 320), dtype=torch.float16)
    for tensor in planned.tensors.values():
        value = tensor.load()
        assert (tensor.shape, tensor.dtype, tensor.num_bytes) == (tuple(value.shape), value.dtype, value.nbytes)


def test_the_tower_from_elsewhere(tensors, tower):
    rest = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    result = loaded(rest, tower=tower)
    expected = convert_state_dict(tensors)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_casting(tensors):
    result = loaded(tensors, dtype=torch.bfloat16)
    expected = convert_state_dict(tensors)
    assert all(torch.equal(result[name], expected[name].bfloat16()) for name in expected)


def test_missing_tensors_are_listed(tensors):
    gone = ["model.layers.1.mlp.up_proj.weight", "model.mm_projector.q_proj_1.U"]
    with pytest.raises(DeltaLlavaError) as error:
        plan({name: tensor for name, tensor in tensors.items() if name not in gone})
    assert "lacks" in str(error.value)
    assert all(name in str(error.value) for name in convert_state_dict({name: tensors[name] for name in gone}))


def test_tensors_without_a_place_are_listed(tensors):
    extra = {"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}
    with pytest.raises(
        DeltaLlavaError, match=r"has no place for model\.language_model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        plan({**tensors, **extra})


def test_a_renamed_tensor_shows_under_both_names(tensors):
    renamed = {name.replace("layers.1.input_layernorm", "layers.1.input_norm"): t for name, t in tensors.items()}
    with pytest.raises(
        DeltaLlavaError, match=r"^The checkpoint lacks .*1\.input_layernorm.*no place for .*1\.input_norm"
    ):
        plan(renamed)


def test_wrong_shapes_are_listed(tensors):
    with pytest.raises(DeltaLlavaError, match=r"language_model\.norm\.weight is \(5,\) instead of \(32,\)"):
        plan({**tensors, "model.norm.weight": torch.ones(5)})


@pytest.mark.parametrize(
    "name", ["model.mm_projector.q_proj_1.shared_weight.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_number_is_no_matrix(tensors, name):
    with pytest.raises(DeltaLlavaError, match=r"is \(\) instead of"):
        plan({**tensors, name: torch.tensor(1.0)}, vocabulary=Vocabulary(384, 320))


def test_a_tower_of_another_width_is_refused(tensors):
    with pytest.raises(DeltaLlavaError, match="trained on a vision tower 128 wide, but this tower is 256 wide"):
        plan(tensors, vision={"hidden_size": 256})


def test_quantised_weights_are_refused(tensors):
    with pytest.raises(DeltaLlavaError, match=r"quantised.*norm\.weight \(torch\.uint8\)"):
        plan({**tensors, "model.norm.weight": torch.ones(32, dtype=torch.uint8)})


def test_settings_that_make_no_model(tensors):
    with pytest.raises(DeltaLlavaError, match="No model can be built"):
        plan(tensors, hidden_act="no-such-activation")


def test_computed_buffers_do_not_get_in_the_way(tensors):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert name in plan({**tensors, name: torch.arange(3)}).ignored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_never_win_an_argmax(tensors, tied, dtype):
    """Also where a row that was trained, row 0 above all, wins often."""
    source = {name: tensor.to(dtype) for name, tensor in tensors.items() if not (tied and name == "lm_head.weight")}
    result = loaded(source, vocabulary=Vocabulary(384, 320), tie_word_embeddings=tied)
    old, new = source["model.embed_tokens.weight"], result[EMBEDDINGS]
    assert new.shape == (384, 32)
    assert torch.equal(new[:320], old)
    assert torch.equal(new[320], old.float().mean(0).to(dtype))
    head = new if tied else result[HEAD]
    assert (HEAD in result) is not tied
    assert torch.equal(head[:320], old if tied else source["lm_head.weight"])
    states = torch.randn(5000, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    states[:500] = 10 * head[0] + states[:500] * 0.01
    states[500] = 0
    winners = (states @ head.T).argmax(-1)
    assert winners.max() < 320
    assert (winners[:500] == 0).sum() > 400


def test_the_image_tokens_embedding_is_like_no_other(tensors):
    """A model that is given embeddings finds its placeholders by it."""
    rows = loaded(tensors, vocabulary=Vocabulary(384, 320, 321))[EMBEDDINGS]
    assert (rows == rows[320]).all(-1).sum() == 1


def test_rows_that_exist_stay(tensors):
    result = loaded(tensors, vocabulary=Vocabulary(320, 300))
    assert torch.equal(result[EMBEDDINGS], tensors["model.embed_tokens.weight"])


def test_a_tied_head_that_repeats_the_embeddings_is_left_out(tensors):
    source = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    planned = plan(source, tie_word_embeddings=True)
    assert HEAD not in planned.tensors
    assert "equal to the embeddings" in planned.ignored["lm_head.weight"]


def test_a_tied_head_that_differs_is_refused(tensors):
    with pytest.raises(DeltaLlavaError, match="differs from them"):
        plan(tensors, tie_word_embeddings=True)
    with pytest.raises(DeltaLlavaError, match="differs from them"):
        plan({**tensors, "lm_head.weight": torch.ones(319, 32)}, tie_word_embeddings=True)


def test_a_head_that_is_missing_is_missed(tensors):
    with pytest.raises(DeltaLlavaError, match=r"lacks tensors that the model needs: lm_head\.weight"):
        plan({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
