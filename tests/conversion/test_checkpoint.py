"""Reading weights: every form, and every way in which a file can be wrong or hostile."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.make_checkpoint import write_weights
from transformers_delta_llava.conversion.checkpoint import read_checkpoint, verify_archives
from transformers_delta_llava.utils.errors import DeltaLlavaError


TENSORS = {
    "a.weight": torch.randn(4, 3),
    "b.weight": torch.randn(5).to(torch.bfloat16),
    "c.weight": torch.randn(2, 2, 1, 1).half(),
    "d.weight": torch.randn(7, 2),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_every_form_reads_the_same(tmp_path, form, shards):
    write_weights(tmp_path, TENSORS, form, shards)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        entry = checkpoint.tensors[name]
        assert (entry.shape, entry.dtype, entry.num_bytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert torch.equal(entry.load(), tensor)
    assert {file.name for file in checkpoint.files} == {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_without_an_index(tmp_path, form):
    write_weights(tmp_path, TENSORS, form, shards=2)
    next(tmp_path.glob("*.index.json")).unlink()
    assert read_checkpoint(tmp_path).tensors.keys() == TENSORS.keys()
    next(tmp_path.glob("*-00001-of-00002*")).unlink()
    with pytest.raises(DeltaLlavaError, match="Shards are missing"):
        read_checkpoint(tmp_path)


def test_safetensors_come_before_pickles(tmp_path):
    write_weights(tmp_path, TENSORS)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert read_checkpoint(tmp_path).tensors.keys() == TENSORS.keys()


def test_parameters_and_shared_storage_are_plain_tensors(tmp_path):
    base = torch.randn(4, 4)
    torch.save({"a": torch.nn.Parameter(base), "b": base, "c": base.t()}, tmp_path / "pytorch_model.bin")
    tensors = read_checkpoint(tmp_path).tensors
    assert not tensors["a"].load().requires_grad
    assert torch.equal(tensors["c"].load(), base.t())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tensor_in_two_shards_is_refused(tmp_path, form):
    write_weights(tmp_path, TENSORS, form, shards=2)
    second = next(tmp_path.glob("*-00002-of-00002*"))
    if form == "safetensors":
        save_file({"a.weight": torch.ones(1), "d.weight": torch.ones(1)}, second)
    else:
        torch.save({"a.weight": torch.ones(1), "d.weight": torch.ones(1)}, second)
    with pytest.raises(DeltaLlavaError, match=r"twice: a\.weight \(in .*-00001-of-00002.* and .*-00002-of-00002"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update({"z.weight": "model-00001-of-00002.safetensors"}), "z.weight"),
        (lambda index: index["weight_map"].pop("a.weight"), "disagree about a.weight"),
        (lambda index: index["weight_map"].update({"a.weight": "model-00002-of-00002.safetensors"}), "a.weight"),
        (lambda index: index["weight_map"].update({"a.weight": "../model.safetensors"}), "outside its own folder"),
        (lambda index: index["weight_map"].update({"a.weight": "/etc/passwd"}), "outside its own folder"),
        (lambda index: index["weight_map"].update({"a.weight": 5}), "outside its own folder: 5"),
        (lambda index: index["weight_map"].update({"a.weight": "gone.safetensors"}), "not there: gone.safetensors"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, change, message):
    write_weights(tmp_path, TENSORS, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DeltaLlavaError) as error:
        read_checkpoint(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\ud800".encode("utf-8", "surrogatepass")])
def test_an_index_that_is_no_json_object(tmp_path, text):
    write_weights(tmp_path, TENSORS, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DeltaLlavaError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_empty_tensors_are_refused_by_name(tmp_path, form):
    write_weights(tmp_path, {**TENSORS, "e.weight": torch.empty(0)}, form)
    with pytest.raises(DeltaLlavaError, match=r"ZeRO-3.*: e\.weight; save"):
        read_checkpoint(tmp_path)


class _Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_malicious_pickle_is_refused_without_running_it(tmp_path, raw, hidden):
    mark = tmp_path / "was-run"
    contents = {**TENSORS, "z": _Malicious(mark)} if hidden else _Malicious(mark)
    path = tmp_path / "pytorch_model.bin"
    if raw:
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path)
    with pytest.raises(DeltaLlavaError, match=r"pytorch_model\.bin") as error:
        read_checkpoint(tmp_path)
    assert not mark.exists()
    assert "\n" not in str(error.value)
    assert raw or "without running it" in str(error.value)
    # The pickle is no dud: it was the refusal that kept it from running.
    pickle.loads(path.read_bytes()) if raw else torch.load(path, weights_only=False)
    assert mark.exists()


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
def test_a_pickle_of_other_things(tmp_path, contents, message):
    torch.save(contents, tmp_path / "pytorch_model.bin")
    with pytest.raises(DeltaLlavaError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_file(tmp_path, form, keep):
    write_weights(tmp_path, TENSORS, form)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DeltaLlavaError, match=path.name):
        read_checkpoint(tmp_path)


def test_an_archive_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(DeltaLlavaError, match="not a readable PyTorch checkpoint"):
        read_checkpoint(tmp_path)


def test_an_unsupported_dtype(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(DeltaLlavaError, match="a in model.safetensors has the unsupported type F8_E4M3"):
        read_checkpoint(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(DeltaLlavaError, match="No weights in"):
        read_checkpoint(tmp_path)
    (tmp_path / "global_step10").mkdir()
    with pytest.raises(DeltaLlavaError, match=r"consolidate them with zero_to_fp32\.py"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.pt", "model.pt", "consolidated.pt", "pytorch_model_fsdp.bin"])
@pytest.mark.parametrize("wrapper", [None, "module", "state_dict"])
def test_what_training_frameworks_leave(tmp_path, name, wrapper):
    torch.save({wrapper: TENSORS} if wrapper else TENSORS, tmp_path / name)
    assert read_checkpoint(tmp_path).tensors.keys() == TENSORS.keys()
    torch.save({f"module.{key}": tensor for key, tensor in TENSORS.items()}, tmp_path / name)
    assert read_checkpoint(tmp_path).tensors.keys() == TENSORS.keys()


def test_a_bit_that_flipped_in_a_bin_file_is_found(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(1000)}, file)
    verify_archives([file])
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert read_checkpoint(tmp_path).tensors["w"].load().any(), "PyTorch does not see it"
    with pytest.raises(DeltaLlavaError, match=r"^pytorch_model\.bin is damaged: Bad CRC-32 for file '.*'\.$"):
        verify_archives([file])


def test_an_archive_whose_parts_are_elsewhere_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(1000)}, file)
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(b"PK\x03\x04", 10) + 1] ^= 1  # the head of the second part
    file.write_bytes(damaged)
    with pytest.raises(DeltaLlavaError, match="is damaged: Bad magic number"):
        read_checkpoint(tmp_path)


def test_a_dtype_that_no_repo_has_is_refused(tmp_path):
    torch.save({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DeltaLlavaError, match=r"unsupported types: w \(torch.float8_e4m3fn\)"):
        read_checkpoint(tmp_path)


def test_a_very_long_file_name_is_one_short_sentence(tmp_path):
    index = {"weight_map": {"w": "x" * 5000}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DeltaLlavaError, match="outside its own folder") as caught:
        read_checkpoint(tmp_path)
    assert len(str(caught.value)) < 400


def rewrite(path, change):
    """Copies a zip archive entry by entry; `change` may alter an entry's settings or its content."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries:
            copy = zipfile.ZipInfo(entry.filename)
            archive.writestr(copy, change(copy, content))


def deflate(entry, content):
    if entry.filename.endswith("data/0"):
        entry.compress_type = zipfile.ZIP_DEFLATED
    return content


def shorten(entry, content):
    return content[:-8] if entry.filename.endswith("data/0") else content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deflate, "data/0 is compressed, which PyTorch would read as weights"),
        (shorten, "other sizes than their entries"),
    ],
)
def test_a_repacked_archive_is_refused(tmp_path, change, message):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64)}, path)
    rewrite(path, change)
    with pytest.raises(DeltaLlavaError, match=message):
        read_checkpoint(tmp_path)


def test_an_archive_repacked_without_compression_reads_the_same(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    rewrite(path, lambda entry, content: content)
    assert all(torch.equal(tensor.load(), TENSORS[name]) for name, tensor in read_checkpoint(tmp_path).tensors.items())


def test_an_entry_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("pytorch_model/data/0", b"x" * 48)
    with pytest.raises(DeltaLlavaError, match="data/0 is there twice"):
        read_checkpoint(tmp_path)


CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


@pytest.mark.parametrize(
    ("header", "place", "value", "message"),
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
def test_headers_that_disagree_are_refused(tmp_path, header, place, value, message):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.randn(64, 64)}, path)
    data = bytearray(path.read_bytes())
    begin = data.index(header) + place
    data[begin : begin + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(DeltaLlavaError, match=f"pytorch_model.bin is damaged: .*({message})"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [lambda data: b"xx" + data, lambda data: data + b"xx"])
def test_bytes_around_an_archive_are_refused(tmp_path, change):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DeltaLlavaError, match="pytorch_model.bin"):
        read_checkpoint(tmp_path)


def test_files_older_than_zip_archives_are_read(tmp_path, monkeypatch):
    torch.save(
        {f"module.{name}": tensor for name, tensor in TENSORS.items()},
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    tensors = read_checkpoint(tmp_path).tensors
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensor.load(), TENSORS[name]) for name, tensor in tensors.items())


def test_code_in_a_file_older_than_zip_archives_is_not_run(tmp_path):
    mark = tmp_path / "run"
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": _Malicious(mark)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(DeltaLlavaError, match="refused without running it"):
        read_checkpoint(tmp_path)
    assert not mark.exists()


def test_a_name_that_claims_thousands_of_millions_of_shards(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-99999999999.safetensors")
    with pytest.raises(DeltaLlavaError, match="Shards are missing"):
        read_checkpoint(tmp_path)
