"""Chat templates from outside, checked and stopped before they take too much time or memory; and the templates of cards."""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from datetime import datetime
from functools import cache, lru_cache, reduce, wraps
from importlib.resources import files
from types import FrameType, GeneratorType, MappingProxyType
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .errors import DeltaLlavaError, explain_errors


MAX_CHARACTERS = 1_000_000
MAX_SECONDS = 5.0
# What one step of a template may make, in characters or entries, and the largest number that it may be given.
_LARGEST_RESULT = 10**8
_LARGEST_NUMBER = 10**5
# What transformers adds to the language: marks around what the assistant said.
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


def check_template(
    source: str, name: str, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]
) -> None:
    """Refuse a template that could not be stopped once it renders `messages`: single steps may take any time and memory.

    Args:
        source: the template.
        name: what errors call it.
        messages: the conversation that transformers will render with it afterwards.
        variables: what else the template gets, such as the tokenizer's special tokens.

    Raises:
        DeltaLlavaError: one sentence that begins with `name`.
    """
    if len(source) > MAX_CHARACTERS:
        raise DeltaLlavaError(f"{name} has more than {MAX_CHARACTERS:,} characters.")
    try:
        with explain_errors(f"{name} is not a template"):
            template = _compile(source)
        with time_limit(name):
            template.render(**{"messages": messages, "tools": None, "documents": None, **variables})
    except _LargeStep as error:
        raise DeltaLlavaError(f"{name} {error}, which no prompt needs and which may take for ever.") from error
    except RecursionError as error:
        raise DeltaLlavaError(f"{name} nests values or calls too deeply.") from error
    except DeltaLlavaError:
        raise
    except Exception:  # the rendering by transformers will say
        pass


class _LargeStep(DeltaLlavaError):
    """A step that would make something large."""


@lru_cache(maxsize=16)  # a conversion renders one template several times
def _compile(source: str) -> Template:
    environment = _SmallSteps()
    tree = environment.parse(_GENERATION.sub("", source))
    if tree.find(nodes.Pow):
        raise _LargeStep("computes powers (**)")
    code = environment.compile(_JoinByPlus().visit(tree))
    return Template.from_code(environment, code, environment.make_globals(None))


class _SmallSteps(ImmutableSandboxedEnvironment):
    """transformers' environment of templates, in which sizes are looked at before each step that Python cannot stop."""

    intercepted_binops = frozenset("+*%")

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_checked
        )
        self.filters.update(tojson=_to_json)
        self.filters = {name: _small(name, function) for name, function in self.filters.items()}
        self.globals.update(raise_exception=_raise, strftime_now=lambda text: datetime.now().strftime(text))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, Sized):
            _check_size(_size(left) + _size(right))
        elif operator == "*":
            _check_size(_size(left) * _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_arguments("format", (left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # `format` comes wrapped
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int, list, tuple)):
            args = tuple(_check_arguments(method.__name__, (owner, *args), kwargs)[1:])
        return super().call(context, function, *args, **kwargs)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What joins the output of a block, of a macro and of the whole template."""
        return "".join(_checked(list(parts)))


class _JoinByPlus(NodeTransformer):
    """Writes `a ~ b` as `a|string + b|string`, for an environment that sees only the latter."""

    def visit_Concat(self, node: nodes.Concat) -> Any:
        options: Any = {"lineno": node.lineno}
        parts: Any = (nodes.Filter(self.visit(part), "string", [], [], None, None, **options) for part in node.nodes)
        return reduce(lambda left, right: nodes.Add(left, right, **options), parts)


def _small(name: str, function: Callable) -> Callable:
    """A filter whose arguments are looked at first."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment, or the context

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return function(*args[:skipped], *_check_arguments(name, args[skipped:], kwargs), **kwargs)

    return guarded


def _check_arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
    """The arguments, the object of the method or filter `name` first, if they cannot make anything large together."""
    # Of a generator nobody knows the length.
    owner, *rest = (list(value) if isinstance(value, GeneratorType) else value for value in args)
    _check_size(_size(owner) * (1 + sum(map(_size, (*rest, *kwargs.values())))))
    if name in ("format", "format_map") and isinstance(owner, str):
        _check_size(max(map(int, re.findall(r"\d{1,9}", owner)), default=0) * 10**3)
    return [owner, *rest]


def _size(value: Any) -> float:
    """Characters or entries of `value`, with those inside it; a number stands for as many as it says."""
    if isinstance(value, int):
        return max(1, abs(value)) if abs(value) <= _LARGEST_NUMBER else math.inf
    if isinstance(value, Mapping):
        return 1 + sum(map(_size, value.values()))
    if isinstance(value, (list, tuple)):
        return 1 + sum(map(_size, value))
    return len(value) if isinstance(value, Sized) else 1


def _checked(value: Any) -> Any:
    """A value that is about to be written, which may be a list."""
    _check_size(1 if isinstance(value, int) else _size(value))
    return value


def _check_size(size: float) -> None:
    if size > _LARGEST_RESULT:
        raise _LargeStep(f"makes more than {_LARGEST_RESULT:,} characters in one step")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def render_question(processor: Any, what: str) -> str:
    """The prompt for a question about an image, by the template of a repo, which may come from anybody.

    Args:
        processor: of the repo.
        what: what errors call its template.

    Raises:
        DeltaLlavaError: a template that runs too long, or that `check_template` refuses.
        ValueError: whatever else it raises.
    """
    template, options = processor.chat_template, {"add_generation_prompt": True}
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    for source in template.values() if isinstance(template, dict) else [template]:
        check_template(str(source or ""), what, messages, {**processor.tokenizer.special_tokens_map, **options})
    with time_limit(what):
        return processor.apply_chat_template(messages, **options)


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Stops Python code in the block, in this thread, that takes more than `MAX_SECONDS` of the processor's time.

    Raises:
        DeltaLlavaError: saying that `what` takes too long.
    """
    deadline = time.thread_time() + MAX_SECONDS  # not the wall clock: the machine may be busy

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > deadline:
            raise DeltaLlavaError(f"{what} takes more than {MAX_SECONDS:g} seconds.")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


@cache
def card_template(package: str, file: str) -> Template:
    """A card's template, a file beside the modules of a package; a name that it does not get is an error."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    return environment.from_string(files(package).joinpath(file).read_text("utf-8"))
