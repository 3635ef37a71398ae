"""Five kinds of pickles that would run code when loaded, in every file that a source may hold. None of them runs."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.conversion.checkpoint import read_checkpoint
from transformers_delta_llava.utils.errors import DeltaLlavaError


class _Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class _SetsState:
    """Pickles to a harmless object whose state calls."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return dict, (), None, None, iter([("weight", self.inner)])


def _system(mark: Path) -> bytes:
    return _torch_file({"a": _Calls(os.system, f"touch {mark}")})


def _builtin(mark: Path) -> bytes:
    return _torch_file(_Calls(eval, f"open({str(mark)!r}, 'w').close()"))


def _in_the_items_of_a_dict(mark: Path) -> bytes:
    return _torch_file({"a": torch.ones(1), "b": _SetsState(_Calls(os.system, f"touch {mark}"))})


def _bare(mark: Path) -> bytes:
    """A pickle by hand, without torch's archive around it: the oldest opcodes, which name a function by text."""
    return b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."


def _old_format(mark: Path) -> bytes:
    """torch.save before version 1.6: pickles in a row."""
    stream = io.BytesIO()
    torch.save({"a": _Calls(os.system, f"touch {mark}")}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _torch_file(contents: object) -> bytes:
    stream = io.BytesIO()
    torch.save(contents, stream)
    return stream.getvalue()


KINDS = {
    "a call": _system,
    "a builtin": _builtin,
    "in a dict's items": _in_the_items_of_a_dict,
    "bare opcodes": _bare,
    "the old format": _old_format,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "mm_projector.bin", "adapter_model.bin", "non_lora_trainables.bin"]
)
def test_no_pickle_runs(pristine, tmp_path, kind, file):
    source, mark = tmp_path / "source", tmp_path / "was-run"
    source.mkdir()
    config = pristine / "llava-tiny" / "config.json"
    shutil.copyfile(config, source / "config.json")
    if file == "non_lora_trainables.bin":
        torch.save({"base_model.model.lm_head.weight": torch.ones(320, 32)}, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    if file in ("pytorch_model.bin", "mm_projector.bin"):
        (source / "adapter_config.json").unlink()
    (source / file).write_bytes(KINDS[kind](mark))
    base = None if file == "pytorch_model.bin" else pristine / "llava-tiny"
    with pytest.raises(DeltaLlavaError) as error:
        convert_checkpoint(source, tmp_path / "out", base_model=base)
    assert str(error.value).startswith(file)
    assert "\n" not in str(error.value)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    # It is no dud: nothing but the refusal kept it from running.
    _load_with_open_eyes(source / file, kind)
    assert mark.exists()


def _load_with_open_eyes(path: Path, kind: str) -> None:
    if kind == "bare opcodes":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)


def test_code_in_a_source_is_never_imported(pristine, tmp_path):
    source, mark = tmp_path / "source", tmp_path / "was-run"
    shutil.copytree(pristine / "llava-tiny", source)
    code = f"open({str(mark)!r}, 'w').close()\n"
    names = ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "sitecustomize.py", "json.py")
    for name in names:
        (source / name).write_text(code)
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}, "tokenizer_class": "Evil"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "training_args.bin").write_bytes(_system(mark))
    (source / "optimizer.pt").write_bytes(_system(mark))
    try:
        convert_checkpoint(source, tmp_path / "out")
    except DeltaLlavaError:
        assert not (tmp_path / "out").exists()
    else:
        found = {path.name for path in (tmp_path / "out").iterdir()}
        assert not found & {*names, "training_args.bin", "optimizer.pt"}
        assert "evil" not in (tmp_path / "out" / "config.json").read_text().lower()
    assert not mark.exists()


def test_a_safetensors_header_that_claims_the_world(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}")
    with pytest.raises(DeltaLlavaError, match=r"model\.safetensors is not a readable"):
        read_checkpoint(tmp_path)


def test_an_archive_that_unpacks_to_too_much(tmp_path):
    """A storage that is compressed in the archive: its bytes cannot be mapped, and must not be unpacked in memory."""
    whole = tmp_path / "whole.bin"
    torch.save({"a": torch.zeros(1 << 20)}, whole)
    with (
        zipfile.ZipFile(whole) as old,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(DeltaLlavaError, match=r"pytorch_model\.bin"):
        read_checkpoint(tmp_path)
