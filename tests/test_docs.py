"""The code of every page of the documentation runs as it stands, on small models under the names that the page uses."""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from typer.main import get_command

from examples.make_checkpoint import DEMO, write_checkpoint
from tests.pages import ENGINE_SECTIONS, PAGES, ROOT, commands_of, read_blocks
from tests.tiny import tiny_config
from tests.training.tiny_run import write_data
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.cli.main import app, main, split_values
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.training import load_recipe
from transformers_delta_llava.training.data import to_messages


# Commands of ours that a page shows in full and a test runs with less: what is added.
ADDED = {"convert": ["--overwrite"], "push": ["--dry-run"]}


@pytest.fixture(scope="module")
def models(easy_vqa_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model, checkpoint and file that a page names. Only to be copied."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("REPO", "runs/pretrain-7b", "runs/finetune-7b"):
        shutil.copytree(easy_vqa_repo, folder / name)
    write_checkpoint(folder / "llava-v1.5-7b-144", DEMO)
    linked = {"mm_projector_type": "mlp2x_gelu", "_name_or_path": "NousResearch/Hermes-4.3-36B"}
    write_checkpoint(folder / "DeltaLLaVA-36B-144", replace(DEMO, model_type="llava_seed_oss", config=linked))
    convert_checkpoint(folder / "llava-v1.5-7b-144", folder / "delta-llava-7b-144")

    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(tiny_config(vision={"num_hidden_layers": 24})).eval()
    AutoModel.from_config(model.config.vision_config).save_pretrained(folder / "clip")
    AutoModelForCausalLM.from_config(model.config.text_config).save_pretrained(folder / "vicuna")
    model.save_pretrained(folder / "delta-llava-7b")
    for name in ("charts", "maps"):
        model.add_deltas(name)
        for tensor in model.delta_state_dict().values():
            tensor.normal_(std=1 / 8)
        model.save_deltas(folder / f"deltas-{name}")
    model.save_pretrained(folder / "delta-llava-7b-tuned")

    write_data(folder / "own-data", 12).with_name("held-out.json").write_text(
        (folder / "own-data" / "rows.json").read_text()
    )
    for file in ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Instruct/llava_v1_5_mix665k.json"):
        (folder / "data" / file).parent.joinpath("images").mkdir(parents=True)
        (folder / "data" / file).write_text("[]")
    (folder / "rows.json").write_text("[]")
    (folder / "FOLDER").mkdir()
    shutil.copy(ROOT / "examples" / "images" / "chelsea.jpg", folder / "photo.jpg")
    (folder / "images").mkdir()
    shutil.copy(folder / "photo.jpg", folder / "images")
    row = {"image": "../photo.jpg", "prompt": "what color is the shape?", "answer": "red"}
    (folder / "runs" / "test.jsonl").write_text(json.dumps(row))
    shutil.copy(ROOT / "examples" / "recipes" / "finetune-7b.yaml", folder / "RECIPE.yaml")
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page runs."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_of_performance() -> dict[str, Any]:
    """What the code in performance.md takes for granted."""
    model = DeltaLlavaForConditionalGeneration(tiny_config()).eval()
    ids = torch.tensor([model.config.num_visual_tokens * [model.config.image_token_id] + list(range(5, 12))] * 2)
    return {
        "model": model,
        "prompts": ["one", "two"],
        "pixel_values_of_one_image": torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2),
        "tokens": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 2},
    }


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if "```" in path.read_text(encoding="utf-8")])
def test_code_of_page(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = names_of_performance() if page == "performance.md" else {}
    expected = []
    for section, language, text, line in read_blocks(page):
        if section in ENGINE_SECTIONS.get(page, ()):
            continue
        text = re.sub(r'"http://images.cocodataset.org\S*"', '"photo.jpg"', text)
        if language == "python":
            exec(compile("\n" * line + text, page, "exec"), names)
            expected += re.findall(r"^print\(.*\)  # (.*)", text, re.MULTILINE)
        elif language == "bash":
            for command in commands_of(text):
                run(command, monkeypatch)
        elif language == "yaml":
            (folder / "RECIPE.yaml").write_text(text)
            load_recipe("RECIPE.yaml")
        elif language == "json":
            assert [turn["role"] for turn in to_messages(json.loads(text))] == ["user", "assistant"]
        else:
            assert language == "text", f"{page}:{line}: nothing runs a block of {language or 'no language'}"
    printed = iter([text.strip() for text in capsys.readouterr().out.splitlines() if text.strip()])
    for comment in expected:  # `print(x)  # what it prints`, in this order
        assert any(comment.startswith(text) for text in printed), f"{page}: nothing printed {comment}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_commands_in_the_text_of_page(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in re.findall(
        r"`((?:python (?:benchmarks|examples|tools)/|make )[^`]+)`", (PAGES.get(page) or ROOT / page).read_text()
    ):
        run(shlex.split(command), monkeypatch)


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of ours in this process; hold one that takes hours, or another program's, against what it is about."""
    program, *words = command
    if words[:1] == ["-m"]:
        words[:2] = [f"{words[1].replace('.', '/')}.py"]
    files = [word for word in words if re.match(r"(benchmarks|docs|examples/[\w/-]+\.|tests|tools)\S*$", word)]
    assert not [file for file in files if not (ROOT / file).exists()], command
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    if program == "delta-llava":
        run_delta_llava(words, monkeypatch)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = {extra for word in words for extra in re.findall(r"[\w-]+", word.partition("[")[2])}
        assert extras <= set(metadata("transformers-delta-llava").get_all("Provides-Extra") or ()), command
    elif program == "python" and files:
        assert flags <= set(re.findall(r"--[\w-]+", help_of(ROOT / files[0]))), command
    elif program in ("accelerate", "torchrun"):
        from accelerate.commands.launch import launch_command_parser
        from torch.distributed.run import get_args_parser

        parser = launch_command_parser() if program == "accelerate" else get_args_parser()
        arguments = parser.parse_args(words[program == "accelerate" :])
        assert arguments.module and arguments.training_script == "transformers_delta_llava"
        run_delta_llava(arguments.training_script_args, monkeypatch)


def run_delta_llava(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`delta-llava ...` must succeed. Servers never end, 7B models train for days and tracing takes half a
    minute (tests/onnx does it), so of these the options are only read."""
    name = words[0]
    is_small = "examples/recipes/lora-own-data.yaml" in words
    if name == "app" or (name == "train" and not is_small) or "onnx" in words:
        given = get_command(app).commands[name].make_context(name, split_values(words[1:])).params  # type: ignore[attr-defined]
        if name == "train":
            load_recipe(given["recipe"], given["changes"])
        return
    monkeypatch.setattr(sys, "argv", ["delta-llava", *words, *ADDED.get(name, [])])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, words


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
