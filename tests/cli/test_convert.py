"""`delta-llava convert` and `export`: paths on stdout, sentences on stderr, one line and code 2 for bad input."""

import runpy
import sys

import pytest
from huggingface_hub import metadata_load

from transformers_delta_llava import __version__


def test_convert_and_export(call, source, tmp_path):
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    repo, back = tmp_path / "out", tmp_path / "back"
    options = ["--dtype", "bfloat16", "--chat-template", "chatml", "--max-shard-size", "200KB", "--verify"]
    code, out, err = call("convert", source, repo, *options)
    assert (code, out) == (0, f"{repo}\n")
    assert f"137 tensors, verified (137 from {source}), 16 visual tokens per image\n" in err
    assert "chat template: chatml (as requested)\n" in err and "warning: left out temperature=0.9" in err
    assert len(list(repo.glob("model-*.safetensors"))) > 1
    code, out, err = call("convert", source, repo)
    assert (code, out) == (2, "") and "overwrite" in err
    card = ["--license", "mit", "--card-base-model", "org/base"]
    code, out, err = call("convert", source, repo, "--overwrite", *card)
    header = metadata_load(repo / "README.md")
    assert (header["license"], header["base_model"]) == ("mit", ["org/base"]) and "README.md names no" not in err
    assert call("update", repo, "--num-visual-tokens", "4")[:2] == (
        0,
        "config.json\nprocessor_config.json\nREADME.md\n",
    )

    code, out, err = call("export", repo, back, "--format", "released")
    assert (code, out) == (0, f"{back}\n") and "137 tensors in 1 files, layout released, 320 rows" in err
    code, out, err = call("export", repo, back)
    assert (code, out) == (2, "") and "overwrite" in err
    assert call("export", repo, back, "--overwrite", "--projector-only")[0] == 0
    assert (back / "mm_projector.bin").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "dtype=int8"),
        (["--tokenizer", "/no/tokenizer"], "/no/tokenizer"),
        (["--max-shard-size", "0"], "Got '0'"),
    ],
)
def test_bad_options(call, pristine, tmp_path, options, message):
    code, out, err = call("convert", pristine / "llava-tiny", tmp_path / "out", *options)
    assert (code, out) == (2, "") and message in err and not (tmp_path / "out").exists()
    assert err.strip().splitlines()[-1].startswith("delta-llava convert: ") and "Traceback" not in err


def test_a_bad_source_or_output(call, pristine, tmp_path):
    code, out, err = call("convert", tmp_path, tmp_path / "out")
    assert (code, out) == (2, "") and err.startswith("delta-llava convert: ") and "config.json" in err
    (tmp_path / "file").touch()
    code, out, err = call("convert", pristine / "llava-tiny", tmp_path / "file" / "out")
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("delta-llava convert: ") and "file" in err


def test_usage(call):
    assert call("convert")[0] == 2
    code, out, err = call("no-such-command")
    assert (code, out) == (2, "") and "no-such-command" in err
    assert call("--version") == (0, f"{__version__}\n", "")


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transformers_delta_llava", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("transformers_delta_llava", run_name="__main__")
    assert capsys.readouterr().out == f"{__version__}\n"
