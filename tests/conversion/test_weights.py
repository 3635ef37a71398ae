"""Weights: read in every form and refused where something is wrong, written in files of a limited size, verified."""

import io
import json
import os
import pickle
import shutil
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from examples.make_checkpoint import write_weights
from tests.checkpoints import edit_json, read_tensors
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.conversion.weights import (
    LazyTensor,
    read_checkpoint,
    same_bits,
    split_shards,
    verify_archives,
    verify_shards,
    write_shards,
)
from transformers_delta_llava.errors import DeltaLlavaError


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


def test_shards_without_an_index(tmp_path):
    write_weights(tmp_path, PLAIN, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert read_checkpoint(tmp_path).tensors.keys() == PLAIN.keys()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(DeltaLlavaError, match="shards are missing"):
        read_checkpoint(tmp_path)


def test_safetensors_come_before_pickles(tmp_path):
    write_weights(tmp_path, PLAIN)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert read_checkpoint(tmp_path).tensors.keys() == PLAIN.keys()


@pytest.mark.parametrize("name", ["pytorch_model.pt", "model.pt", "consolidated.pt", "pytorch_model_fsdp.bin"])
@pytest.mark.parametrize("wrapper", [None, "module", "state_dict"])
@pytest.mark.parametrize("archive", [True, False])
def test_files_of_training_frameworks(tmp_path, name, wrapper, archive):
    """Also those older than PyTorch 1.6, which are no zip archives."""
    contents = {f"module.{key}": torch.nn.Parameter(tensor) for key, tensor in PLAIN.items()}
    contents = {wrapper: contents, "epoch": 3} if wrapper else contents
    torch.save(contents, tmp_path / name, _use_new_zipfile_serialization=archive)
    tensors = read_checkpoint(tmp_path).tensors
    assert tensors.keys() == PLAIN.keys()
    assert all(torch.equal(tensors[key].load(), tensor) for key, tensor in PLAIN.items())
    verify_archives([tmp_path / name])


def edit_index(folder, **weight_map):
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], **weight_map})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: [file.unlink() for file in folder.iterdir()], DeltaLlavaError, "has no weights"),
        (
            lambda folder: save_file({"a.weight": torch.ones(1)}, folder / "model-00002-of-00002.safetensors"),
            DeltaLlavaError,
            r"00002\.safetensors repeats .*a\.weight",
        ),
        (
            lambda folder: edit_index(folder, **{"z.weight": "model-00001-of-00002.safetensors"}),
            DeltaLlavaError,
            "index.json and the shards disagree about z.weight",
        ),
        (lambda folder: edit_index(folder, **{"a.weight": "gone.safetensors"}), OSError, r"gone\.safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), DeltaLlavaError, "index.json"),
        (
            lambda folder: os.truncate(folder / "model-00001-of-00002.safetensors", 300),
            DeltaLlavaError,
            "model-00001-of-00002.safetensors",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, damage, error, message):
    write_weights(tmp_path, PLAIN, shards=2)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a": torch.empty(0)}, "ZeRO-3.*: a;"),
        ({"a": torch.ones(1), "epoch": 3}, "epoch"),
        ([torch.ones(1)], "pytorch_model.bin"),
    ],
)
def test_pickles_that_are_refused(tmp_path, contents, message):
    torch.save(contents, tmp_path / "pytorch_model.bin")
    with pytest.raises(DeltaLlavaError, match=message):
        read_checkpoint(tmp_path)


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(contents, **options):
    stream = io.BytesIO()
    torch.save(contents, stream, **options)
    return stream.getvalue()


MALICIOUS = {
    "a call": lambda mark: saved({"a": Call(os.system, f"touch {mark}")}),
    "bare opcodes": lambda mark: b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
    "no archive": lambda mark: saved({"a": Call(os.system, f"touch {mark}")}, _use_new_zipfile_serialization=False),
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
    with pytest.raises(DeltaLlavaError, match=name):
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


def test_verification_notices_a_bit_in_the_source_that_pytorch_does_not(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(64, 64)}, file)
    verify_archives([file])
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert not torch.equal(torch.load(file)["a"], torch.ones(64, 64))
    with pytest.raises(DeltaLlavaError, match=r"pytorch_model\.bin is damaged"):
        verify_archives([file])


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
    with pytest.raises(DeltaLlavaError, match="b differs"):
        verify_shards(tensors, tmp_path)
    with pytest.raises(DeltaLlavaError, match="d differs"):
        verify_shards({"d": tensors["a"]}, tmp_path)


def test_zeros_of_different_sign_differ():
    assert torch.equal(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert same_bits(torch.ones(2, 3).t(), torch.ones(3, 2))
