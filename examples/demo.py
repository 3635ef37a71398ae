"""The main job, end to end: a checkpoint in the authors' format becomes a repo that answers about a photo.

    make demo

No trained Delta-LLaVA weights have been published. The checkpoint is made from a seed (`make_checkpoint.py`), so the
answer is noise; all the rest is as it will be with trained weights.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from make_checkpoint import DEMO, write_checkpoint


ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "demo-output"
PHOTO = ROOT / "examples" / "images" / "chelsea.jpg"
QUESTION = "What is in this picture?"
BUDGETS = (144, 16)


def main() -> None:
    """Run all steps in `demo-output/` and print what came out."""
    console = Console()
    console.print(
        "Weights: random, from a seed. No trained Delta-LLaVA weights exist yet, so the answers are noise.\n"
    )
    shutil.rmtree(OUTPUT, ignore_errors=True)
    checkpoint, repo = OUTPUT / "llava-tiny", OUTPUT / "delta-llava-tiny"
    table = Table("step", "seconds", "result", title="A checkpoint becomes a Hub repo")

    start = time.perf_counter()
    write_checkpoint(checkpoint, DEMO)
    table.add_row("write a checkpoint in the authors' format", _since(start), _contents(checkpoint))

    start = time.perf_counter()
    _run([sys.executable, "-m", "transformers_delta_llava", "convert", str(checkpoint), str(repo)])
    table.add_row("delta-llava convert", _since(start), _contents(repo))

    report = ask_without_package(repo)
    seconds = f"{report['seconds_to_load']:.1f}"
    table.add_row("load the repo where the package is absent", seconds, "the model's code came with the repo")
    for answer in report["answers"]:
        result = f"{answer['visual_tokens']} visual tokens\n{answer['text']!r}"
        table.add_row(f"ask: {QUESTION}", f"{answer['seconds']:.1f}", escape(result))
    console.print(table)
    console.print(f"The repo is in {repo}, the photo is {PHOTO}.", soft_wrap=True)


def ask_without_package(repo: Path) -> dict:
    """Run `ask.py` on `repo` in a process that has the dependencies and not this package, and return its report.

    `make` installs the package in editable mode: a .pth file in site-packages, which only the `site` module reads.
    With `-S` Python leaves that module out, and PYTHONPATH brings the dependencies back. The process says itself
    whether it could import the package.
    """
    command = [sys.executable, "-S", str(ROOT / "examples" / "ask.py"), str(repo), str(PHOTO), QUESTION]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))),
        "HF_HUB_OFFLINE": "1",  # nothing may come from the network
        "HF_MODULES_CACHE": str(OUTPUT / "modules"),  # nor from an earlier run
    }
    output = _run([*command, "--num-visual-tokens", *map(str, BUDGETS)], environment)
    report = json.loads(output.splitlines()[-1])
    if report["package_importable"]:
        sys.exit("The second process can import transformers_delta_llava: install it with pip install --editable.")
    if not report["model_code"].startswith("transformers_modules."):
        sys.exit(f"The model's code came from {report['model_code']}, not from the repo.")
    return report


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, env=environment, cwd=OUTPUT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\nfailed:\n{result.stdout}{result.stderr}")
    return result.stdout


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f}"


def _contents(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
