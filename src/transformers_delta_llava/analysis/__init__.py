"""What a model costs."""

from .flops import PAPER_NOTE, PARTS, SHAPES, BudgetProfile, ModelProfile, paper_flops, profile_model, shape_config
from .plot import bar_plot, line_plot


__all__ = [
    "PAPER_NOTE",
    "PARTS",
    "SHAPES",
    "BudgetProfile",
    "ModelProfile",
    "bar_plot",
    "line_plot",
    "paper_flops",
    "profile_model",
    "shape_config",
]
