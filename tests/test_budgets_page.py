"""docs/budgets.md: every block of code in it runs, in order."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from transformers_delta_llava.cli.main import main


ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8"), re.M | re.S)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs").mkdir()
    names: dict = {}
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "docs/budgets.md", "exec"), names)
            continue
        for line in code.splitlines():
            command = shlex.split(line)
            assert command[0] == "delta-llava", line
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as caught:
                main()
            assert not caught.value.code, line
    assert (tmp_path / "runs" / "chelsea.png").is_file()
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
