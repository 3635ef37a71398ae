"""What arguments of several commands have in common."""


def number_or_word(text: str) -> int | str:
    """A number where the text is one, else the text: budgets may be `auto`, tokens may be words."""
    return int(text) if text.isdecimal() else text
