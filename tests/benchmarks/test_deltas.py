"""The benchmark of deltas, on a tiny projector: its counts are those of the model."""

import torch

from benchmarks.deltas import measure_merge, measure_sets, measure_training, table_of
from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaModel


def test_everything_is_measured(tmp_path):
    torch.manual_seed(0)
    model = DeltaLlavaModel(tiny_config()).eval()
    numbers = sum(t.numel() for t in model.delta_state_dict().values())
    projector = sum(p.numel() for p in model.multi_modal_projector.parameters())
    results = measure_sets(model, tmp_path, 4)
    assert results["numbers"] == numbers and results["base_same_bits_after_swaps"] is True
    assert 2 * numbers < results["repo_bytes_bfloat16"] < 2 * numbers + 4000
    merged = measure_merge(model)
    assert merged["same_bits_after_unmerge"] is True and 0 < merged["merged_relative_error"] < 1e-5
    trained = measure_training(model, 1, 2)
    # In float32 a gradient and two moments for each number.
    assert trained["deltas_gradient_and_optimizer_bytes"] == 12 * numbers
    assert trained["full_gradient_and_optimizer_bytes"] == 12 * projector
    assert trained["trained_share"] == numbers / projector
    assert {"figure", "result", "target"} == table_of(results | merged | trained)[0].keys()
