"""Errors that a user can mend."""


class RecipeError(ValueError):
    """A recipe that cannot be run as it stands. The message is one sentence that names the key and what would do."""


class DataError(ValueError):
    """Data that cannot be trained on. The message names the row."""
