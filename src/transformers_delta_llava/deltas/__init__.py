"""Delta repos and the DeltaProjections of stored models: read, re-rank, apply and merge without running the model."""

from .edit import DeltaReport, apply_deltas, extract_deltas, merge_into_base, truncate_deltas
from .stats import DeltaRow, delta_stats


__all__ = [
    "DeltaReport",
    "DeltaRow",
    "apply_deltas",
    "delta_stats",
    "extract_deltas",
    "merge_into_base",
    "truncate_deltas",
]
