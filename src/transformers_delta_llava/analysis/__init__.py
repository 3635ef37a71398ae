"""What trained models do and cost, and what can be done to their deltas without running them."""

from .budget_pictures import write_comparison
from .budgets import BudgetComparison, BudgetRun, compare_budgets
from .delta_models import apply_deltas, merge_deltas
from .delta_report import DeltaReport
from .delta_repos import extract_deltas, truncate_deltas
from .delta_stats import DeltaRow, delta_stats, write_plot
from .loading import load_picture, load_repo


__all__ = [
    "BudgetComparison",
    "BudgetRun",
    "DeltaReport",
    "DeltaRow",
    "apply_deltas",
    "compare_budgets",
    "delta_stats",
    "extract_deltas",
    "load_picture",
    "load_repo",
    "merge_deltas",
    "truncate_deltas",
    "write_comparison",
    "write_plot",
]
