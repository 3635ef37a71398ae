"""Runs the code of the pages in docs/."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from transformers_delta_llava.cli.main import main


DOCS = Path(__file__).parents[1] / "docs"


def run_page(page: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run every ```python block, all in one namespace, and every `delta-llava` command of a ```bash block, in order.

    Returns:
        The namespace of the Python blocks.
    """
    names: dict[str, Any] = {}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S):
        if language == "python":
            exec(compile(block, page, "exec"), names)
            continue
        assert language == "bash", f"{page} has a block of {language}"
        for line in block.replace("\\\n", " ").splitlines():
            run_command(line, monkeypatch)
    return names


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one `delta-llava` command in this process; it must succeed."""
    command = shlex.split(line, comments=True)
    assert command[0] == "delta-llava", line
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, line
