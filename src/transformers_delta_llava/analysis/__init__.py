"""What trained models do and cost."""

from .budget_pictures import write_comparison
from .budgets import BudgetComparison, BudgetRun, compare_budgets
from .loading import load_picture, load_repo


__all__ = ["BudgetComparison", "BudgetRun", "compare_budgets", "load_picture", "load_repo", "write_comparison"]
