"""Numbers by projection and level."""

import pytest
import torch

from tests.modeling.delta_cases import LAYOUTS, make
from transformers_delta_llava.deltas import delta_stats, extract_deltas


EXPECTED = {
    "released": [("query", None), *((p, level) for p in ("key", "value") for level in (None, 1, 2, 3))],
    "paper": [("query", None), *((p, level) for p in ("key", "value") for level in (1, 2, 3))],
    "paper, one base": [("q", None), *((p, level) for p in "kv" for level in (1, 2, 3))],
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows(layout, tmp_path):
    model = make(**LAYOUTS[layout])
    model.save_pretrained(tmp_path / "repo")
    rows = delta_stats(tmp_path / "repo")
    assert [(row.projection, row.level) for row in rows] == EXPECTED[layout]
    projector = model.model.multi_modal_projector.requires_grad_(False)
    if layout == "released":
        dense = projector.key.get_delta_weight()[:, 64:128], projector.key.weight[:, 64:128]
        row = rows[3]
    elif layout == "paper":
        dense, row = (projector.key.get_delta_weight((1,)), projector.key.weight), rows[2]
    else:
        dense, row = (projector.qkv.get_delta_weight((1, 1)), projector.qkv.weight), rows[2]
    assert (row.projection[0], row.level, row.rank) == ("k", 2, 4)
    assert row.norm == pytest.approx(float(dense[0].norm()), rel=1e-5)
    assert row.base_norm == pytest.approx(float(dense[1].norm()), rel=1e-5)
    assert row.ratio == pytest.approx(row.norm / row.base_norm)
    torch.testing.assert_close(
        torch.tensor(row.singular_values), torch.linalg.svdvals(dense[0])[:4], atol=1e-4, rtol=1e-4
    )
    assert rows[0].norm == pytest.approx(
        float(
            getattr(projector, "query" if "one" not in layout else "qkv")
            .get_delta_weight((0,) if "one" in layout else ())
            .norm()
        ),
        rel=1e-5,
    )

    extract_deltas(tmp_path / "repo", tmp_path / "deltas")
    alone, beside = delta_stats(tmp_path / "deltas"), delta_stats(tmp_path / "deltas", base=tmp_path / "repo")
    assert all(row.base_norm is None and row.ratio is None for row in alone)
    assert [row.ratio for row in beside] == pytest.approx([row.ratio for row in rows])


def test_zero_deltas_have_no_norm(tmp_path):
    model = make()
    model.load_delta_state_dict({n: torch.zeros_like(t) for n, t in model.delta_state_dict().items()})
    model.save_pretrained(tmp_path / "repo")
    rows = delta_stats(tmp_path / "repo")
    assert all(row.norm == 0 and row.rank_99 == 1 for row in rows)


def test_bad_input(tmp_path, released_repo):
    deltas = released_repo.parent / "deltas"
    with pytest.raises(ValueError, match="the base is a model"):
        delta_stats(deltas, base=deltas)
    make(**LAYOUTS["paper"]).save_pretrained(tmp_path / "paper")
    with pytest.raises(ValueError, match="no base of the shape"):
        delta_stats(deltas, base=tmp_path / "paper")
