"""`.bin` files that are damaged or hostile: refused in one sentence, and no code in them runs."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.checkpoints import edit_json
from transformers_delta_llava.conversion import convert_checkpoint, weights
from transformers_delta_llava.conversion.pickles import open_pickle
from transformers_delta_llava.conversion.weights import read_checkpoint, verify_archives
from transformers_delta_llava.utils.errors import DeltaLlavaError


TENSORS = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(64, 64).bfloat16()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file."""
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class SetItem:
    """Pickles to a dictionary one of whose items is `value`."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return dict, (), None, None, iter([("weight", self.value)])


def saved(contents: object, **options: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(contents, stream, **options)
    return stream.getvalue()


MALICIOUS = {
    "a call": lambda mark: saved({"a": Call(os.system, f"touch {mark}")}),
    "a builtin": lambda mark: saved(Call(eval, f"open({str(mark)!r}, 'w').close()")),
    "in a dict's items": lambda mark: saved({"b": SetItem(Call(os.system, f"touch {mark}"))}),
    "bare opcodes": lambda mark: b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
    "the old format": lambda mark: saved(
        {"a": Call(os.system, f"touch {mark}")}, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("kind", MALICIOUS)
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "mm_projector.bin", "adapter_model.bin", "non_lora_trainables.bin"]
)
def test_no_pickle_runs(pristine, tmp_path, kind, name):
    source, mark = tmp_path / "source", tmp_path / "was-run"
    source.mkdir()
    shutil.copyfile(pristine / "llava-tiny" / "config.json", source / "config.json")
    if name == "non_lora_trainables.bin":
        torch.save({"base_model.model.lm_head.weight": torch.ones(320, 32)}, source / "adapter_model.bin")
    if name in ("adapter_model.bin", "non_lora_trainables.bin"):
        (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    (source / name).write_bytes(MALICIOUS[kind](mark))
    base = None if name == "pytorch_model.bin" else pristine / "llava-tiny"
    with pytest.raises(DeltaLlavaError, match=rf"^{name}[^\n]*$"):
        convert_checkpoint(source, tmp_path / "out", base_model=base)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    # The pickle works: nothing but the refusal kept it from running.
    if kind == "bare opcodes":
        pickle.loads((source / name).read_bytes())
    else:
        torch.load(source / name, weights_only=False)
    assert mark.exists()


def test_code_in_a_source_is_never_imported(source, tmp_path):
    mark = tmp_path / "was-run"
    names = ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "sitecustomize.py", "json.py")
    for name in names:
        (source / name).write_text(f"open({str(mark)!r}, 'w').close()\n")
    edit_json(source / "config.json", auto_map={"AutoConfig": "configuration_evil.Evil"})
    auto_map = {"AutoTokenizer": [None, "tokenization_evil.Evil"]}
    edit_json(source / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    for name in ("training_args.bin", "optimizer.pt"):
        (source / name).write_bytes(MALICIOUS["a call"](mark))
    convert_checkpoint(source, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not written & {*names, "training_args.bin", "optimizer.pt"}
    assert "evil" not in (tmp_path / "out" / "config.json").read_text().lower()
    assert not mark.exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"a": torch.ones(1), "epoch": 3}, "not plain tensors: epoch"),
        ({"model": {"a": 1}}, "not plain tensors: a"),
        ({"other": {"a": torch.ones(1)}}, "not plain tensors: other"),
        ({"model": {"a": torch.ones(1)}, "module": {}}, "not plain tensors: model, module"),
        ({5: torch.ones(1)}, "not plain tensors: 5"),
        ({"a": torch.eye(3).to_sparse()}, "not plain tensors: a"),
        ({"a": torch.empty(3, device="meta")}, "not plain tensors: a"),
    ],
)
def test_contents_that_are_not_tensors_by_name(file, contents, message):
    torch.save(contents, file)
    with pytest.raises(DeltaLlavaError, match=message):
        open_pickle(file)


def test_parameters_and_shared_storages_are_plain_tensors(file):
    base = torch.randn(4, 4)
    torch.save({"a": torch.nn.Parameter(base), "b": base, "c": base.t()}, file)
    assert torch.equal(open_pickle(file)["c"], base.t())


def test_a_flipped_bit_is_noticed_by_verification(file):
    verify_archives([file])
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert not torch.equal(open_pickle(file)["b.weight"], TENSORS["b.weight"]), "PyTorch does not notice"
    with pytest.raises(DeltaLlavaError, match=r"^pytorch_model\.bin is damaged: Bad CRC-32 for file '.*'\.$"):
        verify_archives([file])


def repack(file: Path, change) -> None:
    """Copy a zip archive entry by entry; `change` may alter an entry's settings and its content."""
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            entry = zipfile.ZipInfo(name)
            archive.writestr(entry, change(entry, content) if name.endswith("data/0") else content)


def compress(entry, content):
    entry.compress_type = zipfile.ZIP_DEFLATED
    return content


def test_an_archive_repacked_without_compression_reads_the_same(file):
    repack(file, lambda entry, content: content)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in open_pickle(file).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compress, "data/0 is compressed, which PyTorch would read as weights"),
        (lambda entry, content: content[:-8], "other sizes than their entries"),
    ],
)
def test_a_repacked_archive_is_refused(file, change, message):
    repack(file, change)
    with pytest.raises(DeltaLlavaError, match=message):
        open_pickle(file)


CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


@pytest.mark.parametrize(
    ("header", "offset", "value", "message"),
    [
        (CENTRAL, 8, b"\x01", "is encrypted"),
        (LOCAL, 6, b"\x01", "is encrypted"),
        (LOCAL, 8, b"\x08", "is compressed"),
        (CENTRAL, 10, b"\x08", "is compressed"),
        (CENTRAL, 24, b"\x01\x00\x00\x00", "sizes of .* disagree"),
        (CENTRAL, 20, b"\x01\x00\x00\x00", "sizes of .* disagree"),
        (LOCAL, 22, b"\x01\x00\x00\x00", "sizes of .* disagree"),
        (CENTRAL, 42, b"\xff\xff\xff\x7f", "overlaps"),
    ],
)
def test_headers_that_disagree_are_refused(file, header, offset, value, message):
    data = bytearray(file.read_bytes())
    begin = data.index(header) + offset
    data[begin : begin + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(DeltaLlavaError, match=f"pytorch_model.bin is damaged: .*({message})"):
        open_pickle(file)


def append_entry(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("pytorch_model/data/0", b"x" * 48)


def write_other_archive(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "hello")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (append_entry, "data/0 is there twice"),
        (write_other_archive, "not a readable PyTorch checkpoint"),
        (lambda file: file.write_bytes(b"xx" + file.read_bytes()), "pytorch_model.bin"),
        (lambda file: file.write_bytes(file.read_bytes() + b"xx"), "pytorch_model.bin"),
        *((lambda file, size=size: os.truncate(file, size), "is (damaged|not a readable)") for size in (0, 10, 300)),
    ],
)
def test_a_damaged_archive_is_refused(file, damage, message):
    damage(file)
    with pytest.raises(DeltaLlavaError, match=message):
        open_pickle(file)


@pytest.mark.parametrize("wrapped", [False, True])
def test_files_older_than_pytorch_1_6_are_read(file, wrapped):
    old = {f"module.{name}": tensor for name, tensor in TENSORS.items()}
    torch.save({"state_dict": old} if wrapped else old, file, _use_new_zipfile_serialization=False)
    tensors = read_checkpoint(file.parent).tensors
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensor.load(), TENSORS[name]) for name, tensor in tensors.items())
    verify_archives([file])  # has nothing to compare


def test_old_files_are_in_memory_one_at_a_time(tmp_path):
    for index, name in enumerate(TENSORS, start=1):
        path = tmp_path / f"pytorch_model-0000{index}-of-00002.bin"
        torch.save({name: TENSORS[name]}, path, _use_new_zipfile_serialization=False)
    tensors = read_checkpoint(tmp_path).tensors
    for name in [*TENSORS, *TENSORS]:
        assert torch.equal(tensors[name].load(), TENSORS[name])
    assert weights._read_old_pickle.cache_info().currsize == 1
