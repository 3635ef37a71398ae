"""What can be learnt of trained models, and done to their deltas, without running them."""

from .delta_models import apply_deltas, merge_deltas
from .delta_report import DeltaReport
from .delta_repos import extract_deltas, truncate_deltas
from .delta_stats import DeltaRow, delta_stats, write_plot


__all__ = [
    "DeltaReport",
    "DeltaRow",
    "apply_deltas",
    "delta_stats",
    "extract_deltas",
    "merge_deltas",
    "truncate_deltas",
    "write_plot",
]
