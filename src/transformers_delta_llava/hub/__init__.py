"""Repos on the Hub: their files, their model card, and pushing them."""

from .push import PushReport, push_folder
from .repo_files import CodeUpdate, update_code


__all__ = ["CodeUpdate", "PushReport", "push_folder", "update_code"]
