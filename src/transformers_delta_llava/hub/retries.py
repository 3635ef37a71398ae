"""Retries of requests to the Hub, and one sentence for each of its errors."""

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..utils.errors import DeltaLlavaError


# About ten minutes in all, of which a restart of the Hub or of a router needs two or three.
ATTEMPTS = 24
LONGEST_WAIT = 30.0
# The client waits for ever by default. A commit of many files may take a minute to be answered.
SILENCE = 180.0
# HTTP errors that another attempt may not see again; all above 499 besides.
_TRANSIENT = {408, 425, 429}
# Errors of the HTTP library that huggingface_hub uses, whichever it is.
_CONNECTION_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)

Result = TypeVar("Result")
Talk = Callable[[str], None]


class Patience:
    """Makes calls that may be made twice until they succeed, with growing pauses; huggingface_hub does so for some only.

    Attributes:
        retries: how many calls had to be made again.
    """

    def __init__(self, target: str, first_wait: float, silence: float, talk: Talk) -> None:
        """Take what the errors name, the first pause in seconds, the longest silence, and who hears of retries."""
        self.target, self.first_wait, self.silence, self.talk = target, first_wait, silence, talk
        self.retries = 0

    def __call__(self, what: str, call: Callable[[], Result]) -> Result:
        """Return what `call` returns.

        Raises:
            DeltaLlavaError: one sentence, when `call` failed for good or too often.
        """
        wait = self.first_wait
        for attempt in range(1, ATTEMPTS + 1):
            get_session().timeout = self.silence
            try:
                return call()
            except DeltaLlavaError:
                raise
            except Exception as error:  # an odd answer may raise anything
                if attempt == ATTEMPTS or not _may_pass(error):
                    raise explain(
                        error, self.target, f"{self.target} is not complete on the Hub; push again to go on"
                    ) from error
                reason = _first_line(error)
            self.retries += 1
            self.talk(f"{what}: attempt {attempt} of {ATTEMPTS} failed ({reason}); the next one in {wait:g} s.")
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError  # the last attempt returns or raises


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _may_pass(error: Exception) -> bool:
    """Whether another attempt could go better: the server stumbled or the connection broke."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code >= 500 or cause.response.status_code in _TRANSIENT
        if isinstance(cause, _CONNECTION_ERRORS):
            return not isinstance(cause, OfflineModeIsEnabled)
    # hf_xet's errors are plain RuntimeErrors; a server's answer in half is a ValueError of the JSON parser.
    return type(error) is RuntimeError or isinstance(error, json.JSONDecodeError)


def explain(error: Exception, target: str, otherwise: str) -> DeltaLlavaError:
    """What to tell a user about an error of the Hub: that `target` needs a login or a right, or `otherwise`."""
    status = next((c.response.status_code for c in _causes(error) if isinstance(c, HfHubHTTPError)), None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return DeltaLlavaError(f"The Hub wants a login for {target}: run `hf auth login`, or set HF_TOKEN.")
    if status == 403:
        return DeltaLlavaError(f"The Hub's answer for {target} is 403: your token may not write there.")
    return DeltaLlavaError(f"{otherwise} ({_first_line(error)}).")


def _first_line(error: Exception) -> str:
    """What went wrong at the bottom, without the query of a URL: that of an upload holds a signature."""
    reason = str(next((c for c in _causes(error) if isinstance(c, (HfHubHTTPError, *_CONNECTION_ERRORS))), error))
    return re.sub(r"\?\S*", "", next(iter(reason.strip().splitlines()), "") or type(error).__name__).rstrip(".")[:200]
