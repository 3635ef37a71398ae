"""Who knows the commands on the pages of the documentation: each is run, or held against what it is about."""

import argparse
import contextlib
import io
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest

from transformers_delta_llava.cli.main import main


ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / "tests" / "integration" / "environments"


def run_delta_llava(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`delta-llava ...`, run in this process; it must succeed. A server never ends, so its options are checked only."""
    if command[1] == "serve":
        return check_tested(command, monkeypatch)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, " ".join(command)


def check_pip(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install`: of this package, with extras that it has, or of what an engine's environment holds."""
    assert command[1] == "install", command
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^([\w-]+) = \[", section.split("\n[")[0], re.M)
    written = " ".join(path.read_text() for path in ENVIRONMENTS.glob("*.txt"))
    for wanted in (word for word in command[2:] if not word.startswith("-")):
        own = re.fullmatch(r"(?:\.|transformers-delta-llava)(?:\[([\w,-]+)\])?", wanted)
        if own is None:
            assert re.search(rf"\b{re.escape(wanted)}\b", written), f"nothing here installs {wanted}"
        else:
            assert set((own[1] or "").split(",")) <= {"", *extras}, f"{wanted}: there are {', '.join(extras)}"


def check_make(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`make TARGET VARIABLE=...`: the Makefile has the target and reads the variable, and what it names exists."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in command[1:]:
        name, equals, value = word.partition("=")
        if not equals:
            assert re.search(rf"^{re.escape(name)}:.*## ", makefile, re.M), f"there is no make {name}"
            continue
        assert re.search(rf"^(export )?{re.escape(name)}\b", makefile, re.M), f"make reads no {name}"
        places = {"ENGINES": (ENVIRONMENTS, ".txt"), "BENCH": (ROOT / "benchmarks", ".py"), "TESTS": (ROOT, "")}
        folder, suffix = places.get(name, (ROOT, ""))
        missing = [part for part in value.split() if name in places and not (folder / f"{part}{suffix}").exists()]
        assert not missing, f"{word}: there is no {missing}"


def check_script(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python benchmarks/x.py --flag`: the script exists, and its help knows the flags. It may take hours to run."""
    script = ROOT / command[1]
    assert script.is_relative_to(ROOT) and script.is_file(), f"there is no {command[1]}"
    known = re.findall(r"--[\w-]+", help_of(script))
    assert {word.split("=")[0] for word in command[2:] if word.startswith("--")} <= set(known), " ".join(command)


@cache
def help_of(script: Path) -> str:
    """What `python SCRIPT --help` prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(script.parent))
        patch.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(script), run_name="__main__")
    assert not stopped.value.code, script
    return printed.getvalue()


def check_accelerate(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch ...`, as accelerate reads it: its options, the config file, and a module that exists."""
    from accelerate.commands.launch import launch_command_parser

    assert command[1] == "launch", command
    arguments = launch_command_parser().parse_args(command[2:])
    assert arguments.config_file is None or (ROOT / arguments.config_file).is_file(), arguments.config_file
    check_module(arguments)


def check_torchrun(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun ...`, as PyTorch reads it, with a module that exists."""
    from torch.distributed.run import get_args_parser

    check_module(get_args_parser().parse_args(command[1:]))


def check_module(arguments: argparse.Namespace) -> None:
    """What is launched is `-m transformers_delta_llava train RECIPE`, and there is such a recipe."""
    script, *rest = arguments.training_script, *arguments.training_script_args
    assert arguments.module and [script, rest[0]] == ["transformers_delta_llava", "train"], arguments
    assert (ROOT / rest[1]).is_file(), f"there is no {rest[1]}"


def check_tested(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server or an evaluation that a test in tests/integration starts: with options that stand on the pages it reads."""
    pages = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("engines.md", "evaluation.md")]
    known = set(re.findall(r"--[\w-]+", " ".join(pages)))
    assert {word.split("=")[0] for word in command if word.startswith("--")} <= known, " ".join(command)


def ignore(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of others that fetch from the network: `hf download`, `wget`, `unzip`."""


HANDLERS = {
    "accelerate": check_accelerate,
    "delta-llava": run_delta_llava,
    "hf": ignore,
    "make": check_make,
    "pip": check_pip,
    "python": check_script,
    "python -m lmms_eval": check_tested,
    "torchrun": check_torchrun,
    "unzip": ignore,
    "vllm": check_tested,
    "wget": ignore,
}
