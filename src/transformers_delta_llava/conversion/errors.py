"""Errors of the conversion."""

from collections.abc import Iterable


class ConversionError(ValueError):
    """A source that cannot be converted; the text is one sentence that says what is wrong and what would do."""


def listed(names: Iterable[str], limit: int = 20) -> str:
    """`names` sorted and joined for an error message; past `limit` only their number is given, and long ones are cut."""
    ordered = [name if len(name) <= 200 else f"{name[:200]}..." for name in sorted(names)]
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest
