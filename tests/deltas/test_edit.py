"""Extract, truncate, apply and merge, from folder to folder; compared with what the loaded model does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.modeling.delta_cases import LAYOUTS, make
from tests.tiny import prompt
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import convert_checkpoint, inspect_model
from transformers_delta_llava.deltas import apply_deltas, extract_deltas, merge_into_base, truncate_deltas
from transformers_delta_llava.modeling.delta_projection_delta_llava import delta_weight


@torch.no_grad()
def logits(model) -> torch.Tensor:
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    return model(input_ids=prompt([36])[None], pixel_values=pixels).logits


def load(folder, deltas=None) -> DeltaLlavaForConditionalGeneration:
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder)
    if deltas:
        model.load_deltas(deltas)
    return model


def updates_of(model) -> dict[tuple, torch.Tensor]:
    """(out, in) in float64: what is added to the bases."""
    return {
        (name, update): delta_weight(
            *(model.delta_state_dict()[f"{name}.{f}"].double() for f in ("delta_u", "delta_v")), update
        ).double()
        for name, projection in model.model.multi_modal_projector.delta_projections().items()
        for update in projection.spec.updates
    }


def energy(before: dict, after: dict, name: str = "") -> float:
    keys = [key for key in before if key[0].startswith(name)]
    lost = sum(float((before[key] - after[key]).square().sum()) for key in keys)
    return 1 - lost / sum(float(before[key].square().sum()) for key in keys)


def test_extract_gives_what_the_model_saves(model, repo, tmp_path):
    report = extract_deltas(repo, tmp_path / "out")
    assert (report.rank, report.energy) == (4, pytest.approx(1, abs=1e-12))
    model.save_deltas(tmp_path / "saved")
    for name, tensor in load_file(tmp_path / "saved" / "deltas.safetensors").items():
        assert torch.equal(load_file(tmp_path / "out" / "deltas.safetensors")[name], tensor)
    assert torch.equal(logits(load(repo, tmp_path / "out")), logits(model))

    rounded = extract_deltas(repo, tmp_path / "rounded", dtype=torch.bfloat16)
    assert 0.9999 < rounded.energy < 1
    assert json.loads((tmp_path / "rounded" / "delta_config.json").read_text())["dtype"] == "bfloat16"


def test_deltas_of_a_checkpoint_fit_its_converted_repo(checkpoint, tmp_path):
    convert_checkpoint(checkpoint, tmp_path / "repo")
    extract_deltas(checkpoint, tmp_path / "deltas")
    model = load(tmp_path / "repo", tmp_path / "deltas")
    for name, tensor in model.delta_state_dict().items():
        assert torch.equal(tensor, model.delta_state_dict("default")[name])


def test_a_known_difference_is_recovered(model, repo, tmp_path):
    """The fine-tuned model has bases that moved by a matrix of rank 2, and no use for its own deltas."""
    tuned = load(repo)
    generator = torch.Generator().manual_seed(5)
    known = {}
    with torch.no_grad():
        for name, projection in tuned.model.multi_modal_projector.delta_projections().items():
            out, width = projection.weight.shape
            u, v = torch.randn(width, 2, generator=generator), torch.randn(2, out, generator=generator)
            known[name] = (u @ v).T
            projection.weight.add_(known[name])
            projection.delta_v.zero_()
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_deltas(tmp_path / "tuned", tmp_path / "out", base=repo, rank=2)
    assert report.rank == 2 and report.energy == pytest.approx(1, abs=1e-9)
    loaded = load(repo, tmp_path / "out")
    for (name, _), update in updates_of(loaded).items():
        assert (update - known[name]).norm() / known[name].norm() < 1e-5
    torch.testing.assert_close(logits(loaded), logits(tuned), atol=1e-4, rtol=1e-4)


def test_the_difference_counts_the_deltas_of_the_fine_tuned_model(model, repo, tmp_path):
    tuned = load(repo)
    tuned.load_delta_state_dict({n: t * 3 for n, t in tuned.delta_state_dict().items()})
    with torch.no_grad():
        tuned.model.multi_modal_projector.feed_forward.fc1.bias.add_(1)
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_deltas(tmp_path / "tuned", tmp_path / "out", base=repo)
    assert report.left_out == ["feed_forward.fc1.bias"]
    assert report.rank == 4 and report.energy == pytest.approx(1, abs=1e-9)
    loaded = load(repo, tmp_path / "out")
    for key, update in updates_of(tuned).items():
        torch.testing.assert_close(updates_of(loaded)[key], update, atol=1e-6, rtol=1e-5)
    low = extract_deltas(tmp_path / "tuned", tmp_path / "low", base=repo, rank=1)
    loaded.load_deltas(tmp_path / "low")
    assert low.energy == pytest.approx(energy(updates_of(tuned), updates_of(loaded)), abs=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncate_reports_the_true_energy(model, repo, tmp_path, rank, dtype):
    report = truncate_deltas(repo, tmp_path / "out", rank=rank, dtype=dtype)
    before = updates_of(model)
    model.load_deltas(tmp_path / "out")
    after = updates_of(model)
    assert report.rank == rank == next(iter(model.delta_state_dict().values())).shape[-1]
    assert report.energy == pytest.approx(energy(before, after), abs=1e-6)
    for name, kept in report.energy_by_projection.items():
        assert kept == pytest.approx(energy(before, after, name), abs=1e-6)
    # No update of this rank is closer.
    for (name, update), matrix in before.items():
        summed = model.model.multi_modal_projector.delta_projections()[name].spec.num_summed(update)
        best = torch.linalg.svdvals(matrix)[rank * summed :].square().sum()
        lost = (matrix - after[name, update]).square().sum()
        assert lost <= best * 1.001 + 1e-4 * matrix.square().sum()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1.0])
def test_truncate_to_an_energy_takes_the_lowest_rank(model, repo, tmp_path, share):
    before = updates_of(model)

    def least(folder) -> float:
        model.load_deltas(folder)
        after = updates_of(model)
        return min(energy({key: before[key]}, after) for key in before)

    report = truncate_deltas(repo, tmp_path / "out", energy=share)
    assert least(tmp_path / "out") >= share - 1e-6
    if report.rank > 1:
        truncate_deltas(repo, tmp_path / "lower", rank=report.rank - 1)
        assert least(tmp_path / "lower") < share


def test_truncate_a_delta_repo_keeps_its_base(repo, tmp_path):
    extract_deltas(repo, tmp_path / "deltas")
    truncate_deltas(tmp_path / "deltas", tmp_path / "from deltas", rank=2)
    truncate_deltas(repo, tmp_path / "from repo", rank=2)
    first, second = (load_file(tmp_path / n / "deltas.safetensors") for n in ("from deltas", "from repo"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    load(repo, tmp_path / "from deltas")


def test_apply_is_what_loading_does(model, repo, tmp_path):
    model.load_delta_state_dict({n: t * 2 for n, t in model.delta_state_dict().items()})
    model.save_deltas(tmp_path / "deltas")
    report = apply_deltas(repo, tmp_path / "out", tmp_path / "deltas")
    assert report.rank == 4
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    truncate_deltas(tmp_path / "deltas", tmp_path / "low", rank=1)
    apply_deltas(repo, tmp_path / "low out", tmp_path / "low")
    low = load(tmp_path / "low out")
    assert low.config.delta_rank == 1
    model.load_deltas(tmp_path / "low")
    torch.testing.assert_close(logits(low), logits(model))


def test_apply_leaves_the_rest_to_the_bit(released_repo, tmp_path):
    apply_deltas(released_repo, tmp_path / "out", released_repo.parent / "deltas", max_shard_size="200KB")
    before, after = (
        {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
        for folder in (released_repo, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) != (".delta_" in n) for n in before)
    assert "with the deltas of deltas in the place of its own" in (tmp_path / "out" / "README.md").read_text()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("rank", [0, 4])
def test_merge_adds_once(released_repo, tmp_path, rank):
    original = load(released_repo)
    report = merge_into_base(released_repo, tmp_path / "merged", rank=rank)
    merged = load(tmp_path / "merged")
    assert report.rank == rank
    torch.testing.assert_close(logits(merged), logits(original))
    own, base = (m.model.multi_modal_projector.key for m in (merged, original))
    exact = base.weight.double() + (base.delta_u.double() @ base.delta_v.double()).T
    assert torch.equal(own.weight, exact.float())
    assert merged.config.use_delta_projection is bool(rank)
    if rank:
        assert not own.delta_v.any() and own.delta_u.any() and merged.config.delta_rank == 4
        with pytest.raises(ValueError, match="another base"):
            merged.load_deltas(released_repo.parent / "deltas")
        assert "is zero" not in " ".join(inspect_model(tmp_path / "merged").problems)
    else:
        assert own.delta_u is None


def test_merged_deltas_can_be_extracted_again(released_repo, tmp_path):
    deltas = released_repo.parent / "deltas"
    merge_into_base(released_repo, tmp_path / "merged", deltas=deltas)
    expected = logits(load(released_repo, deltas))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected)
    report = extract_deltas(tmp_path / "merged", tmp_path / "extracted", base=released_repo, rank=4)
    assert report.energy == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(logits(load(released_repo, tmp_path / "extracted")), expected)


def test_shared_bases_are_not_merged_on_disk(tmp_path):
    for number, layout in enumerate(("paper", "paper, one base")):
        make(**LAYOUTS[layout]).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match="one base for several levels"):
            merge_into_base(tmp_path / str(number), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(source, target, **tensors) -> str:
    shutil.copytree(source, target)
    contents = load_file(target / "deltas.safetensors")
    contents.update(tensors)
    save_file({n: t for n, t in contents.items() if t.numel()}, target / "deltas.safetensors")
    return str(target)


def test_bad_input_is_one_error_and_no_output(released_repo, checkpoint, tmp_path):
    deltas, other = released_repo.parent / "deltas", released_repo.parent / "other-deltas"
    paper = tmp_path / "paper"
    make(**LAYOUTS["paper"]).save_pretrained(paper)
    extract_deltas(paper, tmp_path / "paper-deltas")
    make(use_delta_projection=False).save_pretrained(tmp_path / "none")
    nan = broken(deltas, tmp_path / "nan", **{"query.delta_v": torch.full((4, 64), float("nan"))})
    extra = broken(deltas, tmp_path / "extra", **{"query.weight": torch.ones(3)})
    missing = broken(deltas, tmp_path / "missing", **{"query.delta_v": torch.ones(0)})
    mixed = broken(deltas, tmp_path / "mixed", **{"query.delta_v": torch.ones(3, 64)})
    narrow = broken(deltas, tmp_path / "narrow", **{"value.delta_v": torch.ones(4, 32)})
    out = tmp_path / "out"
    cases = [
        (lambda: apply_deltas(released_repo, out, other), "other-deltas belongs to another base"),
        (lambda: merge_into_base(released_repo, out, deltas=other), "other-deltas belongs to another base"),
        (lambda: apply_deltas(released_repo, out, tmp_path / "paper-deltas"), "projector_layout='paper'"),
        (lambda: apply_deltas(released_repo, out, nan), "query.delta_v holds NaN or Inf"),
        (lambda: apply_deltas(released_repo, out, extra), "query.weight: this projector has no such deltas"),
        (lambda: apply_deltas(released_repo, out, missing), "there is no query.delta_v"),
        (lambda: apply_deltas(released_repo, out, mixed), "query.delta_v is"),
        (lambda: apply_deltas(released_repo, out, narrow), r"value.delta_v is \(4, 32\)"),
        (lambda: apply_deltas(deltas, out, deltas), "Expected a model and a delta repo"),
        (lambda: apply_deltas(released_repo, out, released_repo), "Expected a model and a delta repo"),
        (lambda: merge_into_base(deltas, out), "deltas holds deltas only"),
        (lambda: merge_into_base(tmp_path / "none", out), "none has no deltas"),
        (lambda: merge_into_base(released_repo, out, rank=65), "rank=65"),
        (lambda: extract_deltas(deltas, out), "deltas holds deltas only"),
        (lambda: extract_deltas(tmp_path / "none", out), "none has no deltas"),
        (lambda: extract_deltas(released_repo, out, rank=2), "A rank needs a base"),
        (lambda: extract_deltas(released_repo, out, base=paper), "other layouts or levels"),
        (lambda: extract_deltas(released_repo, out, base=deltas), "deltas holds deltas only"),
        (
            lambda: extract_deltas(released_repo, out, base=checkpoint),
            r"query.weight is \(64, 64\) in repo and \(128, 128\) in llava-tiny",
        ),
        (lambda: extract_deltas(released_repo, out, base=released_repo, rank=99), "rank=99"),
        (lambda: extract_deltas(tmp_path, out), "has no weights"),
        (lambda: truncate_deltas(deltas, out), "either a rank or an energy"),
        (lambda: truncate_deltas(deltas, out, rank=1, energy=0.5), "either a rank or an energy"),
        (lambda: truncate_deltas(deltas, out, rank=5), "rank=5: the deltas of deltas have rank 4"),
        (lambda: truncate_deltas(deltas, out, rank=0), "rank=0"),
        (lambda: truncate_deltas(deltas, out, energy=1.5), "energy=1.5"),
        (lambda: truncate_deltas(nan, out, rank=1), "NaN"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
        assert not out.exists(), message
    apply_deltas(released_repo, out, other, force=True)
    for call in (
        lambda: extract_deltas(released_repo, out),
        lambda: truncate_deltas(deltas, out, rank=1),
        lambda: apply_deltas(released_repo, out, deltas),
        lambda: merge_into_base(released_repo, out),
    ):
        with pytest.raises(FileExistsError, match="exists; choose another one, or remove it yourself"):
            call()


@pytest.mark.parametrize("factor", ["value.delta_v", "value.delta_u", "key.delta_u", "query.delta_u"])
@pytest.mark.parametrize("shape", [(1, -1), (-1,), (1, 1)])
def test_factors_of_other_dimensions_are_refused(released_repo, tmp_path, factor, shape):
    deltas = shutil.copytree(released_repo.parent / "deltas", tmp_path / "deltas")
    path = deltas / "deltas.safetensors"
    tensors = load_file(path)
    tensor = tensors[factor]
    tensors[factor] = tensor.reshape(-1) if shape == (-1,) else tensor.reshape(*[1] * len(shape), *tensor.shape)
    save_file(tensors, path)
    for use in (
        lambda: truncate_deltas(deltas, tmp_path / "out", rank=1),
        lambda: apply_deltas(released_repo, tmp_path / "out", deltas),
    ):
        with pytest.raises(ValueError, match="deltas: .* is .* and should be .* of a float dtype"):
            use()
    assert not (tmp_path / "out").exists()
