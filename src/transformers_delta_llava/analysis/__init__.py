"""What trained models do and cost, and what can be done to their deltas without running them."""

from .budget_pictures import write_comparison
from .budgets import BudgetComparison, BudgetRun, compare_budgets
from .delta_models import apply_deltas, merge_deltas
from .delta_report import DeltaReport
from .delta_repos import extract_deltas, truncate_deltas
from .delta_stats import DeltaRow, delta_stats, write_plot
from .explain import Explanation, explain
from .explain_pictures import draw_explanations, draw_heat
from .flops import PAPER_NOTE, PARTS, SHAPES, BudgetProfile, ModelProfile, paper_flops, profile_model, shape_config
from .loading import load_config, load_picture, load_repo
from .plot import bar_plot, line_plot
from .roofline import Floor, roofline


__all__ = [
    "PAPER_NOTE",
    "PARTS",
    "SHAPES",
    "BudgetComparison",
    "BudgetProfile",
    "BudgetRun",
    "DeltaReport",
    "DeltaRow",
    "Explanation",
    "Floor",
    "ModelProfile",
    "apply_deltas",
    "bar_plot",
    "compare_budgets",
    "delta_stats",
    "draw_explanations",
    "draw_heat",
    "explain",
    "extract_deltas",
    "line_plot",
    "load_config",
    "load_picture",
    "load_repo",
    "merge_deltas",
    "paper_flops",
    "profile_model",
    "roofline",
    "shape_config",
    "truncate_deltas",
    "write_comparison",
    "write_plot",
]
