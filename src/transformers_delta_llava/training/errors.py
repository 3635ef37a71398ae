"""Errors of training that a user can act on."""

from ..utils.errors import DeltaLlavaError


class RecipeError(DeltaLlavaError):
    """A recipe, or a run of one, that cannot go on as it stands."""


class DataError(DeltaLlavaError):
    """Data that cannot be trained on. The text names the row."""


class RowError(DataError):
    """A row that cannot be trained on. The text is the reason, without the row's name."""
