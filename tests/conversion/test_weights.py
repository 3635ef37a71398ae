"""Weights: read in every form and refused where something is wrong, written in files of a limited size, verified."""

import json
import os
import struct
from functools import partial

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from examples.make_checkpoint import write_weights
from tests.checkpoints import read_tensors
from transformers_delta_llava.conversion.weights import (
    LazyTensor,
    read_checkpoint,
    same_bits,
    split_shards,
    verify_shards,
    write_shards,
)
from transformers_delta_llava.utils.errors import DeltaLlavaError


SHARED = torch.randn(8, 4)
TENSORS = {
    "a.weight": torch.randn(40),
    "b.weight": SHARED.t(),
    "c.weight": torch.randn(3).bfloat16(),
    "d.weight": SHARED,
    "e.weight": torch.randn(2, 2, 1, 1).half(),
}
PLAIN = {name: tensor.contiguous().clone() for name, tensor in TENSORS.items()}
LAZY = {
    name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
    for name, tensor in TENSORS.items()
}


def write(folder, tensors=LAZY, size=10**6, progress=None):
    shards = split_shards(tensors, size)
    write_shards(tensors, shards, folder, progress)
    return shards


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_every_form_reads_the_same(tmp_path, form, shards):
    write_weights(tmp_path, PLAIN, form, shards)
    weights = read_checkpoint(tmp_path)
    assert weights.tensors.keys() == PLAIN.keys()
    for name, tensor in PLAIN.items():
        entry = weights.tensors[name]
        assert (entry.shape, entry.dtype, entry.num_bytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert torch.equal(entry.load(), tensor)
        assert not entry.load().requires_grad
    assert {file.name for file in weights.files} == {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_without_an_index(tmp_path, form):
    write_weights(tmp_path, PLAIN, form, shards=2)
    next(tmp_path.glob("*.index.json")).unlink()
    assert read_checkpoint(tmp_path).tensors.keys() == PLAIN.keys()
    next(tmp_path.glob("*-00001-of-00002*")).unlink()
    with pytest.raises(DeltaLlavaError, match="Shards are missing"):
        read_checkpoint(tmp_path)


def test_safetensors_come_before_pickles(tmp_path):
    write_weights(tmp_path, PLAIN)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert read_checkpoint(tmp_path).tensors.keys() == PLAIN.keys()


@pytest.mark.parametrize("name", ["pytorch_model.pt", "model.pt", "consolidated.pt", "pytorch_model_fsdp.bin"])
@pytest.mark.parametrize("wrapper", [None, "module", "state_dict"])
def test_files_of_training_frameworks(tmp_path, name, wrapper):
    torch.save({wrapper: PLAIN} if wrapper else PLAIN, tmp_path / name)
    assert read_checkpoint(tmp_path).tensors.keys() == PLAIN.keys()
    torch.save({f"module.{key}": tensor for key, tensor in PLAIN.items()}, tmp_path / name)
    assert read_checkpoint(tmp_path).tensors.keys() == PLAIN.keys()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tensor_in_two_shards_is_refused(tmp_path, form):
    write_weights(tmp_path, PLAIN, form, shards=2)
    save = save_file if form == "safetensors" else torch.save
    save({"a.weight": torch.ones(1)}, next(tmp_path.glob("*-00002-of-00002*")))
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
        (lambda index: index["weight_map"].update({"a.weight": "x" * 5000}), "outside its own folder"),
        (
            lambda index: index["weight_map"].update({"a.weight": "gone.safetensors"}),
            "missing files: gone.safetensors",
        ),
        (lambda index: index.pop("weight_map"), "no weight_map"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, change, message):
    write_weights(tmp_path, PLAIN, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DeltaLlavaError) as error:
        read_checkpoint(tmp_path)
    assert message in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", [b"{", b"[1]", "\ud800".encode("utf-8", "surrogatepass")])
def test_an_index_that_is_not_a_json_object(tmp_path, content):
    write_weights(tmp_path, PLAIN, shards=2)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(DeltaLlavaError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(0), r"ZeRO-3.*: z\.weight; save"),
        (torch.ones(2).to(torch.float8_e4m3fn), r"unsupported dtypes: z\.weight \((F8_E4M3|torch.float8_e4m3fn)\)"),
    ],
)
def test_a_tensor_that_no_repo_can_have(tmp_path, form, tensor, message):
    write_weights(tmp_path, {**PLAIN, "z.weight": tensor}, form)
    with pytest.raises(DeltaLlavaError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 300])
def test_a_truncated_safetensors_file(tmp_path, size):
    write_weights(tmp_path, PLAIN)
    os.truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(DeltaLlavaError, match=r"model\.safetensors"):
        read_checkpoint(tmp_path)


def test_headers_and_names_that_promise_far_too_much(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}")
    with pytest.raises(DeltaLlavaError, match=r"model\.safetensors is not a readable"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-99999999999.safetensors")
    with pytest.raises(DeltaLlavaError, match="Shards are missing"):
        read_checkpoint(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(DeltaLlavaError, match="No weights in"):
        read_checkpoint(tmp_path)
    (tmp_path / "global_step10").mkdir()
    with pytest.raises(DeltaLlavaError, match=r"consolidate them with zero_to_fp32\.py"):
        read_checkpoint(tmp_path)


def test_one_file_with_the_usual_permissions(tmp_path):
    (tmp_path / "other").touch()
    assert list(write(tmp_path)) == ["model.safetensors"]
    file = tmp_path / "model.safetensors"
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in TENSORS.items())


def test_shards_and_index(tmp_path):
    steps = []
    names = list(write(tmp_path, size=160, progress=lambda *step: steps.append(step)))
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [names.index(index["weight_map"][name]) for name in TENSORS] == [0, 1, 1, 2, 2]
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["metadata"] == {"total_parameters": 111, "total_size": total}
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read_tensors(tmp_path).items())


def test_sizes():
    assert len(split_shards(LAZY, "2GB")) == 1
    assert len(split_shards(LAZY, "0.1KB")) > 2
    for size in ("", "lots", "2 parsecs", "1e9"):
        with pytest.raises(DeltaLlavaError, match=f"max_shard_size='{size}' is not a size such as 2GB"):
            split_shards(LAZY, size)


def test_a_failure_to_write_is_an_os_error(tmp_path, monkeypatch):
    def save_file(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: No space left"):
        write(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_are_refused(tmp_path, value, dtype):
    tensor = torch.ones(5, 7, dtype=dtype)
    tensor[2, 3] = value
    with pytest.raises(DeltaLlavaError, match="b.weight holds NaN or Inf"):
        write(tmp_path, {"b.weight": LazyTensor((5, 7), dtype, lambda: tensor)})


def test_verification_notices_a_single_bit(tmp_path):
    tensors = {
        name: LazyTensor((3,), torch.float32, partial(torch.full, (3,), float(i))) for i, name in enumerate("abc")
    }
    write(tmp_path, tensors, 12)
    steps = []
    verify_shards(tensors, tmp_path, lambda *step: steps.append(step))
    assert steps == [(12, 36), (24, 36), (36, 36)]
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 128]))
    with pytest.raises(DeltaLlavaError, match="Verification failed: b differs"):
        verify_shards(tensors, tmp_path)
    with pytest.raises(DeltaLlavaError, match="Verification failed: the files differ in c"):
        verify_shards({name: tensors[name] for name in "ab"}, tmp_path)


def test_zeros_of_different_sign_differ():
    assert torch.equal(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert same_bits(torch.ones(2, 3).t(), torch.ones(3, 2))
