"""What trained models do and cost."""

from .budgets import BudgetComparison, BudgetRun, compare_budgets
from .explain import Explanation, explain, explain_budgets
from .figures import (
    bar_plot,
    check_figure_path,
    overlay_saliency,
    plot_comparison,
    plot_delta_stats,
    plot_explanations,
)
from .inference import load_config, load_image, load_repo
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
    "check_figure_path",
    "compare_budgets",
    "explain",
    "explain_budgets",
    "load_config",
    "load_image",
    "load_repo",
    "overlay_saliency",
    "paper_flops",
    "plot_comparison",
    "plot_delta_stats",
    "plot_explanations",
    "profile_model",
    "roofline",
    "shape_config",
]
