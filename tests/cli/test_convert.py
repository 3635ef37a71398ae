"""`delta-llava convert`: data on stdout, talk on stderr, one sentence and code 2 where something is wrong."""

import shutil
import subprocess
import sys

import pytest

from examples.make_checkpoint import write_checkpoint
from transformers_delta_llava import __version__


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "llava-tiny"
    write_checkpoint(folder)
    return folder


def test_convert(call, checkpoint, tmp_path):
    options = ["--dtype", "bfloat16", "--chat-template", "chatml", "--max-shard-size", "3MB"]
    code, out, err = call("convert", checkpoint, tmp_path / "out", *options)
    assert (code or 0, out) == (0, f"{tmp_path / 'out'}\n")
    assert "457 tensors (457 from llava-tiny), 16 visual tokens per image\n" in err
    assert "chat template: chatml (as requested)\n" in err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2
    code, _, err = call("convert", checkpoint, tmp_path / "out")
    assert code == 2
    assert "--overwrite" in err
    assert call("convert", checkpoint, tmp_path / "out", "--overwrite")[0] in (0, None)


def test_verify_and_export(call, checkpoint, tmp_path):
    assert call("convert", checkpoint, tmp_path / "out", "--verify")[0] in (0, None)
    code, out, err = call("export", tmp_path / "out", tmp_path / "back", "--format", "released")
    assert (code or 0, out) == (0, f"{tmp_path / 'back'}\n")
    assert "457 tensors in 1 files, layout released, 320 rows" in err
    code, out, err = call("export", tmp_path / "out", tmp_path / "back")
    assert (code, out) == (2, "")
    assert "--overwrite" in err
    options = ["--overwrite", "--projector-only"]
    assert call("export", tmp_path / "out", tmp_path / "back", *options)[0] in (0, None)
    assert (tmp_path / "back" / "mm_projector.bin").is_file()


def test_warnings_go_to_stderr(call, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    code, out, err = call("convert", source, tmp_path / "out")
    assert (code or 0, out) == (0, f"{tmp_path / 'out'}\n")
    assert "warning: generation_config.json: left out" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "dtype='int8': use one of float32, bfloat16, float16."),
        (["--vision-tower", "/no/tower"], "The vision tower /no/tower is not a folder"),
        (["--tokenizer", "/no/tokenizer"], "The tokenizer /no/tokenizer is not a folder"),
        (["--chat-template", "strange"], "The chat template strange is neither a file nor one of"),
        (["--max-shard-size", "0"], "max_shard_size='0' is not a size"),
    ],
)
def test_a_wrong_option(call, checkpoint, tmp_path, options, message):
    code, out, err = call("convert", checkpoint, tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("delta-llava: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_wrong_source(call, tmp_path):
    code, out, err = call("convert", tmp_path, tmp_path / "out")
    assert (code, out) == (2, "")
    assert err == f"delta-llava: The source {tmp_path} is not a folder with a config.json.\n"


def test_an_output_that_cannot_be_written(call, checkpoint, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = call("convert", checkpoint, tmp_path / "file" / "out")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("delta-llava: ")
    assert "file" in err


def test_wrong_usage(call):
    assert call("convert")[0] == 2
    code, out, err = call("no-such-command")
    assert (code, out) == (2, "")
    assert "no-such-command" in err


def test_version(call):
    assert call("--version") == (0, f"{__version__}\n", "")


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "transformers_delta_llava", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")
