"""Code blocks of README.md and docs/, read with sybil."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sybil import Document
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer


ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
# Sections whose blocks tests/integration runs, each in the environment of its engine.
ENGINE_SECTIONS = {
    "engines.md": {"accelerate", "torch.compile", "Quantised", "vLLM", "transformers serve", "TRL and PEFT"},
    "onnx.md": {"Node"},
    "evaluation.md": {"lmms-eval", "The paper's tables"},
}
# Programs that a page may call: their commands are read, not run.
PROGRAMS = "accelerate delta-llava hf make npm pip python torchrun unzip vllm transformers wget"


class Block(NamedTuple):
    """A fenced block, the heading above it, and the line where it begins."""

    section: str
    language: str
    text: str
    line: int


def read_blocks(page: str, section: str | None = None) -> list[Block]:
    """The blocks of a page, or of one section of it; there must be some."""
    text = prose = PAGES[page].read_text(encoding="utf-8")
    regions = list(FencedCodeBlockLexer(r"\w*")(Document(text, page)))
    for region in regions:  # a comment in code is no heading
        prose = prose[: region.start] + " " * (region.end - region.start) + prose[region.end :]
    blocks = []
    for region in regions:
        headings = re.findall(r"^#+ (.*)", prose[: region.start], re.MULTILINE)
        line = text[: region.start].count("\n") + 1
        blocks.append(Block(headings[-1], region.lexemes["language"], region.lexemes["source"].text, line))
    if section is not None:
        assert section in ENGINE_SECTIONS[page], f"add {section} of {page} to ENGINE_SECTIONS"
        blocks = [block for block in blocks if block.section == section]
    assert blocks, f"{page} has no code{f' under {section}' if section else ''}"
    return blocks


def filled(text: str, changes: Mapping[str, str]) -> str:
    """A block with every key of `changes` replaced; each must be in it, or the page has changed."""
    missing = [old for old in changes if old not in text]
    assert not missing, f"{missing} not in:\n{text}"
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def commands_of(text: str) -> list[list[str]]:
    """The commands of a bash block as lists of words, as bash reads them: loops unrolled, variables and `*` replaced."""
    functions = [f'{name}() {{ printf "%s\\0" "$#" {name} "$@" >&3; }}' for name in PROGRAMS.split()]
    # What a page asks Python for in `$(python -c ...)` is run.
    functions.append('eval "record_$(declare -f python)"')
    functions.append('python() { if [[ ${1-} == -c ]]; then "$PYTHON" "$@"; else record_python "$@"; fi; }')
    result = subprocess.run(
        ["bash", "-c", "exec 3>&1 1>&2\nset -euo pipefail\n" + "\n".join([*functions, text])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "src")},
        timeout=300,
    )
    assert result.returncode == 0, f"{text}\n{result.stderr}"
    words = iter(result.stdout.split("\0")[:-1])
    return [[next(words) for _ in range(int(count) + 1)] for count in words]


def script_of(page: str) -> str:
    """All code of a page as one bash script, for users who have installed the package."""
    script, code = ["set -euxo pipefail"], ""
    for block in [*read_blocks(page), Block("", "bash", "", 0)]:
        if block.language == "python":
            code += block.text
            continue
        if code:
            script.append(f"python - <<'PYTHON'\n{code}PYTHON")
            code = ""
        script += [line for line in block.text.splitlines() if not line.startswith("pip install")]
    return "\n".join(script) + "\n"


if __name__ == "__main__":
    sys.stdout.write(script_of(sys.argv[1]))
