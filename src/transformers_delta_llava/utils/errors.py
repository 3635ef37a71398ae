"""Errors that a user can act on, and how any error becomes one sentence."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from pydantic import ValidationError

from ..errors import DeltaLlavaError


# Errors of the HTTP library that huggingface_hub uses, whichever it is.
CONNECTION_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)


def one_line(error: BaseException | str, limit: int = 500) -> str:
    """What `error` says, in one line of at most `limit` characters, without a final full stop.

    Characters that a terminal would act on are escaped, so that names from files can be printed.
    """
    if isinstance(error, ValidationError):
        text = _describe_validation(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif isinstance(error, KeyError):  # its text is the bare key
        text = f"there is no {error}"
    else:
        text = str(error)
    if not text.strip():
        text = type(error).__name__
    return shorten(text, limit).rstrip(".")


def shorten(value: object, limit: int = 200) -> str:
    """`value` as printable text in one line of at most `limit` characters."""
    text = str(value)[: 10 * limit]
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def show(value: object, limit: int = 200) -> str:
    """A value from a file, as Python writes it, for a message; shortened."""
    try:
        return shorten(repr(value), limit)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return f"a {type(value).__name__} too long to print"


def printable(text: str) -> str:
    r"""`text` with control characters, invisible ones and lone surrogates escaped (`\x1b`)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_names(names: Iterable[str], limit: int = 20) -> str:
    """`names` sorted and joined for an error message; past `limit` only their number is given, and long ones are cut."""
    ordered = [shorten(name) for name in sorted(names)]
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest


def suggestion(name: object, known: Sequence[str]) -> str:
    """What may have been meant by an unknown name, as the end of a sentence."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]}" if close else f"; there are {', '.join(known)}" if len(known) < 20 else ""


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Whatever a library raises in the block becomes one sentence, `what: reason`.

    Rust libraries panic with an exception that is not an `Exception`. What the machine refuses (a full disk, a permission,
    memory) is raised as it is.

    Raises:
        DeltaLlavaError: on any other error.
    """
    try:
        yield
    except (DeltaLlavaError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DeltaLlavaError(f"{what}: {one_line(error)}.") from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def describe_hub_error(error: Exception, target: str, otherwise: str) -> DeltaLlavaError:
    """One sentence on an error of the Hub or of the connection: `target` needs a login or a right, or `otherwise`.

    Queries of URLs are left out: those of uploads hold a signature.
    """
    cause = next((c for c in causes(error) if isinstance(c, (HfHubHTTPError, *CONNECTION_ERRORS))), error)
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return DeltaLlavaError(f"The Hub needs a login for {target}: run `hf auth login`, or set HF_TOKEN.")
    if status == 403:
        return DeltaLlavaError(f"The Hub's answer for {target} is 403: your token has no write access to it.")
    first_line = str(cause).strip().partition("\n")[0]
    reason = one_line(re.sub(r"\?\S*", "", first_line) or cause, 200)
    return DeltaLlavaError(f"{otherwise} ({reason}).")


def _describe_validation(error: ValidationError, limit: int = 3) -> str:
    """The first `limit` faults that pydantic lists, each with the key, the value and what would do."""
    faults = error.errors(include_url=False)
    parts = []
    for fault in faults[:limit]:
        key = shorten(".".join(map(str, fault["loc"])), 100)
        message = fault["msg"].removeprefix("Value error, ").rstrip(".")
        if fault["type"] == "missing":
            parts.append(f"{key} is missing")
        elif fault["type"] == "extra_forbidden":
            parts.append(f"{key} is unknown")
        elif fault["type"] in ("value_error", "assertion_error"):
            parts.append(f"{key}: {message}" if key else message)
        else:
            parts.append(f"{key}={show(fault['input'], 60)}: {message[0].lower()}{message[1:]}".lstrip("="))
    rest = f"; and {len(faults) - limit} more" if len(faults) > limit else ""
    return "; ".join(parts) + rest


class RecipeError(DeltaLlavaError):
    """A recipe, or a run of one, that cannot continue as it is."""


class DataError(DeltaLlavaError):
    """Data that cannot be trained on. The text names the row."""


class RowError(DataError):
    """A row that cannot be trained on. The text is the reason, without the row's name."""
