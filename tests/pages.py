"""Reads the pages of the documentation and runs their code: Python as it stands, commands by who knows them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.page_commands import HANDLERS


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Who runs a section's blocks instead of `run_page`: a test file beside this one, and how many blocks it takes.
Elsewhere = Mapping[str, tuple[str, int]]
Handler = Callable[[list[str], pytest.MonkeyPatch], None]


class Block(NamedTuple):
    """A fenced block: the heading above it, its language and what is in it."""

    section: str
    language: str
    text: str


def path_of(page: str) -> Path:
    """`README.md` and other pages at the top, or a page in docs/."""
    return ROOT / page if (ROOT / page).is_file() else DOCS / page


def read_blocks(page: str, section: str | None = None) -> list[Block]:
    """The blocks of a page, or of one section of it; there must be some."""
    found, heading, opened = [], "", None
    for line in path_of(page).read_text(encoding="utf-8").splitlines():
        if opened is None and line.startswith("```"):
            opened = Block(heading, line[3:].strip(), "")
        elif opened is not None and line.startswith("```"):
            found.append(opened)
            opened = None
        elif opened is not None:
            opened = opened._replace(text=f"{opened.text}{line}\n")
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
    assert opened is None, f"{page}: a block is not closed"
    found = [block for block in found if section in (None, block.section)]
    assert found, f"{page} has no code{f' under {section}' if section else ''}"
    return found


def run_page(
    page: str,
    monkeypatch: pytest.MonkeyPatch,
    names: Mapping[str, Any] | None = None,
    replace: Mapping[str, str] | None = None,
    handlers: Mapping[str, Handler] | None = None,
    readers: Mapping[str, Callable[[str], None]] | None = None,
    elsewhere: Elsewhere | None = None,
) -> dict[str, Any]:
    """Run every block of a page, in order, in the current folder.

    Args:
        page: its name in docs/, or README.md.
        names: what the Python blocks may take for granted.
        replace: texts of the blocks to be replaced by others, a name of a model by a folder, say.
        handlers: who runs a command, by the command's name, beside those of `page_commands.py`.
        readers: what to do with blocks of data, by language.
        elsewhere: the sections whose blocks a test of its own runs.

    Returns:
        The namespace of the Python blocks, all of which share one.
    """
    elsewhere = elsewhere or {}
    namespace = dict(names or {})
    for section, (file, count) in elsewhere.items():
        assert len(read_blocks(page, section)) == count, f"{page}: {file} runs {count} blocks under {section}"
        source = next(Path(__file__).parent.rglob(file)).read_text(encoding="utf-8")
        assert f'"{page}", "{section}"' in source, f"{file} does not read {page}, {section}"
    for block in read_blocks(page):
        if block.section in elsewhere:
            continue
        text = replaced(block.text, replace or {})
        if block.language == "python":
            exec(compile(text, page, "exec"), namespace)
        elif block.language == "bash":
            for command in commands_of(text):
                run_command(command, monkeypatch, handlers or {})
        elif block.language in (readers or {}):
            readers[block.language](text)
        else:
            assert block.language == "text", f"{page}: nothing runs a block of {block.language or 'no language'}"
    return namespace


def filled(text: str, changes: Mapping[str, str]) -> str:
    """A block with every key of `changes` replaced; each must be in it, or the page has changed."""
    missing = [old for old in changes if old not in text]
    assert not missing, f"{missing} not in:\n{text}"
    return replaced(text, changes)


def replaced(text: str, replace: Mapping[str, str]) -> str:
    """`text` with every key of `replace` that is in it replaced."""
    for old, new in replace.items():
        text = text.replace(old, new)
    return text


def run_command(command: list[str], monkeypatch: pytest.MonkeyPatch, handlers: Mapping[str, Handler]) -> None:
    """Hand a command to who knows it."""
    known = {**HANDLERS, **handlers}
    name = " ".join(command[:3]) if command[:2] == ["python", "-m"] else command[0]
    assert name in known, f"nothing runs {' '.join(command)}"
    known[name](command, monkeypatch)


# Names that a page may call. Bash itself sees to variables, loops and file names; what it would call, is written down.
RECORDED = (
    "accelerate",
    "delta-llava",
    "deepspeed",
    "git",
    "hf",
    "make",
    "pip",
    "python",
    "torchrun",
    "unzip",
    "vllm",
    "wget",
)
STUBS = """
set -euo pipefail
record() { printf '%s\\0' "$#" "$@" >&3; }
python() { if [[ ${1-} == -c ]]; then "$PYTHON" "$@"; else record python "$@"; fi; }
"""


def commands_of(text: str, names: Collection[str] = RECORDED) -> list[list[str]]:
    """The commands of a bash block as lists of words, loops unrolled, in the current folder. Other programs are run."""
    stubs = STUBS + "".join(f'{name}() {{ record {name} "$@"; }}\n' for name in names if name != "python")
    result = subprocess.run(
        ["bash", "-c", f"exec 3>&1 1>&2\n{stubs}\n{text}"],
        capture_output=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "src")},
        timeout=300,
    )
    assert result.returncode == 0, f"{text}\n{result.stderr.decode()}"
    words = result.stdout.decode().split("\0")[:-1]
    commands = []
    while words:
        count = int(words[0])
        commands.append(words[1 : count + 1])
        words = words[count + 1 :]
    return commands


def indented_code(page: str) -> list[str]:
    """Lines of code that stand indented, outside of fences, where nothing would find them."""
    text = re.sub(r"^```.*?^```$", "", path_of(page).read_text(encoding="utf-8"), flags=re.M | re.S)
    found = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("    ") and line.strip() and not previous.strip():
            found.append(line.strip())
        previous = line
    return found
