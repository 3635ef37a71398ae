"""Writing weights in files of a limited size."""

import json
from functools import partial

import pytest
import torch
from safetensors import SafetensorError, safe_open

from tests.conversion.test_tensor_plan import lazily
from transformers_delta_llava.conversion import checkpoint
from transformers_delta_llava.conversion.checkpoint import (
    LazyTensor,
    parse_size,
    read_checkpoint,
    same_bits,
    verify_shards,
    write_shards,
)
from transformers_delta_llava.utils.errors import DeltaLlavaError


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1.5 kb", 1500), ("2GiB", 2**31), ("7", 7), (10**9, 10**9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 parsecs", "-1GB", "0", 0, "0.1", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(DeltaLlavaError, match="max_shard_size=.*for instance 2GB"):
        parse_size(text)


SHARED = torch.randn(8, 4)
TENSORS = {
    "big": torch.randn(40),
    "transposed": SHARED.t(),
    "one": torch.randn(3),
    "shared": SHARED,
    "half": torch.randn(5).half(),
}


def test_one_file(tmp_path):
    assert write_shards(lazily(TENSORS).tensors, tmp_path, 10**6) == ["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())


def test_shards_and_index(tmp_path):
    steps = []
    names = write_shards(lazily(TENSORS).tensors, tmp_path, 150, lambda *step: steps.append(step))
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [names.index(index["weight_map"][name]) for name in TENSORS] == [0, 1, 1, 2, 2]
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["metadata"] == {"total_parameters": 112, "total_size": total}
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)
    read = read_checkpoint(tmp_path).tensors
    assert all(torch.equal(read[name].load(), tensor) for name, tensor in TENSORS.items())


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "other").touch()
    write_shards(lazily(TENSORS).tensors, tmp_path, 10**6)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failure_to_write_is_an_os_error(tmp_path, monkeypatch):
    def save_file(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: No space left"):
        write_shards(lazily(TENSORS).tensors, tmp_path, 10**6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers_are_refused(tmp_path, value, dtype):
    tensor = torch.ones(5, 7, dtype=dtype)
    tensor[2, 3] = value
    with pytest.raises(DeltaLlavaError, match="b.weight holds NaN or Inf"):
        write_shards({"b.weight": LazyTensor((5, 7), dtype, lambda: tensor)}, tmp_path, 1000)


def test_verification_sees_a_single_bit(tmp_path):
    tensors = {
        name: LazyTensor((3,), torch.float32, partial(torch.full, (3,), float(i))) for i, name in enumerate("abc")
    }
    write_shards(tensors, tmp_path, 12)
    seen = []
    verify_shards(tensors, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(12, 36), (24, 36), (36, 36)]
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 128]))
    with pytest.raises(DeltaLlavaError, match="Verification failed: b is not on the disk"):
        verify_shards(tensors, tmp_path)
    with pytest.raises(DeltaLlavaError, match="Verification failed: the files differ in c"):
        verify_shards({name: tensors[name] for name in "ab"}, tmp_path)


def test_zeros_of_different_sign_differ():
    assert torch.equal(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert same_bits(torch.ones(2, 3).t(), torch.ones(3, 2))
