"""What trained models do and cost."""

from .budgets import BudgetComparison, BudgetRun, compare_budgets
from .explain import Explanation, explain
from .figures import bar_plot, draw_explanations, draw_heat, line_plot, write_comparison
from .inference import load_config, load_picture, load_repo
from .profile import (
    PAPER_NOTE,
    PARTS,
    SHAPES,
    BudgetProfile,
    Floor,
    ModelProfile,
    paper_flops,
    profile_model,
    roofline,
    shape_config,
)


__all__ = [
    "PAPER_NOTE",
    "PARTS",
    "SHAPES",
    "BudgetComparison",
    "BudgetProfile",
    "BudgetRun",
    "Explanation",
    "Floor",
    "ModelProfile",
    "bar_plot",
    "compare_budgets",
    "draw_explanations",
    "draw_heat",
    "explain",
    "line_plot",
    "load_config",
    "load_picture",
    "load_repo",
    "paper_flops",
    "profile_model",
    "roofline",
    "shape_config",
    "write_comparison",
]
