"""Extract, truncate and merge on disk, compared with what a loaded model does."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.modeling.delta_cases import LAYOUTS, is_delta, logits, make
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.deltas import extract, merge, truncate
from transformers_delta_llava.modeling.deltas_delta_llava import read_deltas


@pytest.fixture(params=LAYOUTS)
def repo(request, tmp_path):
    make(projector_layout=request.param).save_pretrained(tmp_path / "repo", max_shard_size="200KB")
    return tmp_path / "repo"


@pytest.fixture
def released(tmp_path):
    """A repo, and deltas for it: its own times two."""
    model = make()
    model.save_pretrained(tmp_path / "repo", max_shard_size="200KB")
    model.add_deltas("double")
    with torch.no_grad():
        for name, tensor in model.delta_state_dict().items():
            tensor.copy_(model.delta_state_dict("default")[name] * 2)
    model.save_deltas(tmp_path / "deltas")
    return tmp_path / "repo"


def load(folder, deltas=None) -> DeltaLlavaForConditionalGeneration:
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder)
    if deltas:
        model.load_deltas(deltas)
    return model


@torch.no_grad()
def updates(model) -> list[torch.Tensor]:
    """What is added to the bases, (out, in) in float64, projection by projection and level by level."""
    return [
        projection.summed_weight(level, torch.float64) - projection.weight.double()
        for projection in model.model.multi_modal_projector.delta_projections().values()
        for level in range(projection.num_updates)
    ]


def energy(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    lost = sum(float((one - other).square().sum()) for one, other in zip(before, after))
    return 1 - lost / sum(float(one.square().sum()) for one in before)


def test_extract_writes_what_the_model_saves(repo, tmp_path):
    assert extract(repo, tmp_path / "out") == (4, 1.0, ())
    load(repo).save_deltas(tmp_path / "saved")
    one, other = (read_deltas(tmp_path / name) for name in ("out", "saved"))
    assert one[1] == other[1] and all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


def test_extract_approximates_the_difference_of_two_models(repo, tmp_path):
    """The fine-tuned model has bases that moved by a matrix of rank 2, and its own deltas as they were."""
    tuned = load(repo)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for projection in tuned.model.multi_modal_projector.delta_projections().values():
            out, width = projection.weight.shape
            u, v = torch.randn(out, 2, generator=generator), torch.randn(2, width, generator=generator)
            projection.weight.add_(u @ v)
        tuned.model.multi_modal_projector.feed_forward.fc1.bias.add_(1)
    tuned.save_pretrained(tmp_path / "tuned")
    written = extract(tmp_path / "tuned", tmp_path / "out", base=repo, rank=6)
    assert written == (6, pytest.approx(1, abs=1e-9), ("feed_forward.fc1.bias",))
    loaded = load(repo, tmp_path / "out")
    loaded.model.multi_modal_projector.feed_forward.load_state_dict(
        tuned.model.multi_modal_projector.feed_forward.state_dict()
    )
    torch.testing.assert_close(logits(loaded), logits(tuned), atol=1e-4, rtol=1e-4)
    low = extract(tmp_path / "tuned", tmp_path / "low", base=repo, rank=1)
    assert low.rank == 1 and low.energy < 1


@pytest.mark.parametrize("rank", [1, 3])
def test_truncate_is_the_best_approximation_and_reports_its_energy(released, tmp_path, rank):
    written = truncate(tmp_path / "deltas", tmp_path / "out", rank=rank)
    before, after = updates(load(released, tmp_path / "deltas")), updates(load(released, tmp_path / "out"))
    assert written.rank == rank and written.energy == pytest.approx(energy(before, after), abs=1e-6)
    best = sum(float(torch.linalg.svdvals(matrix)[rank:].square().sum()) for matrix in before)
    assert 1 - written.energy == pytest.approx(best / sum(float(m.square().sum()) for m in before), abs=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_truncate_to_an_energy_takes_the_lowest_rank_of_a_model(repo, tmp_path, share):
    written = truncate(repo, tmp_path / "out", energy=share)
    assert written.energy >= share - 1e-9
    load(repo, tmp_path / "out")
    if share == 1.0:
        assert written.rank == 4
    elif written.rank > 1:
        truncate(repo, tmp_path / "lower", rank=written.rank - 1)
        pairs = zip(updates(load(repo)), updates(load(repo, tmp_path / "lower")))
        assert min(energy([one], [other]) for one, other in pairs) < share


@pytest.mark.parametrize("rank", [0, 4])
def test_merge_adds_the_deltas_once(released, tmp_path, rank):
    merge(released, tmp_path / "out", tmp_path / "deltas", rank=rank)
    original, merged = load(released, tmp_path / "deltas"), load(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(original))
    base, own = (model.model.multi_modal_projector.key for model in (original, merged))
    assert torch.equal(own.weight, base.summed_weight(dtype=torch.float64).float())
    assert merged.config.use_delta_projection is bool(rank)
    if rank:
        assert own.delta_u.any() and not own.delta_v.any()
        with pytest.raises(ValueError, match="another base"):
            merged.load_deltas(tmp_path / "deltas")
    before, after = (
        {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        for folder in (released, tmp_path / "out")
    )
    touched = {n for n in before if is_delta(n) or n.endswith(("query.weight", "key.weight", "value.weight"))}
    assert all(torch.equal(after[n], before[n]) for n in before if n not in touched or "projector" not in n)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    again = extract(tmp_path / "out", tmp_path / "again", base=released, rank=4)
    assert again.energy == pytest.approx(1, abs=1e-9)


def test_what_cannot_be_done_leaves_no_output(released, tmp_path):
    paper, none, other = tmp_path / "paper", tmp_path / "none", tmp_path / "other"
    make(projector_layout="paper").save_pretrained(paper)
    make(use_delta_projection=False).save_pretrained(none)
    make(seed=1).save_deltas(other)
    out = tmp_path / "out"
    for call, message in (
        (lambda: merge(paper, out), "projector_layout='paper'"),
        (lambda: merge(released, out, other), "another base"),
        (lambda: merge(released, other), "exists"),
        (lambda: extract(none, out), "use_delta_projection=False"),
        (lambda: truncate(released, out), "rank or an energy"),
        (lambda: truncate(released, out, rank=5), "rank=5: .* 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="size"):
        extract(released, out, base=paper)
    assert not out.exists()
