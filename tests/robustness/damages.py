"""Ways in which a file or a folder can be wrong, each drawn from a random generator."""

import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


Damage = Callable[[random.Random, Path], str]
# Folders beside a source that belong to it.
BESIDE = ("vision-tower", "base")


def weight_files(source: Path) -> list[Path]:
    """The weight files of a source, and of the base model beside it."""
    folders = [folder for folder in (source, source.parent / "base") if folder.is_dir()]
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))


def json_files(source: Path) -> list[Path]:
    """The JSON files of a source, and of the tower and the base model beside it."""
    return sorted(path for folder in (source, *BESIDE) for path in (source.parent / folder).glob("*.json"))


def load(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file."""
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def save(tensors: dict, file: Path) -> None:
    """Write tensors in the form that the file's name says."""
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        torch.save(tensors, file)


def flip_bytes(rng: random.Random, source: Path) -> str:
    """Flip bits anywhere, or where the headers are."""
    file = rng.choice(weight_files(source))
    data = bytearray(file.read_bytes())
    ends = rng.random() < 0.6
    offsets = []
    for _ in range(rng.choice((1, 1, 4, 64))):
        offset = rng.randrange(min(4096, len(data))) if ends else rng.randrange(len(data))
        offset = len(data) - 1 - offset if ends and rng.random() < 0.5 else offset
        data[offset] ^= 1 << rng.randrange(8)
        offsets.append(offset)
    file.write_bytes(data)
    return f"bits flipped in {file.name} at {offsets[:4]}"


def truncate(rng: random.Random, source: Path) -> str:
    """Cut a file short, or lengthen it."""
    file = rng.choice([*weight_files(source), *json_files(source)])
    size = file.stat().st_size
    keep = rng.choice((0, rng.randrange(size), size - 1, size + 17))
    os.truncate(file, keep)
    return f"{file.name} of {size} bytes cut to {keep}"


def edit_tensor(rng: random.Random, source: Path) -> str:
    """Rename, drop, double, reshape, cast or spoil one tensor."""
    file = rng.choice(weight_files(source))
    tensors = load(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(("rename", "drop", "double", "reshape", "cast", "nan", "empty", "grow", "not a tensor", "value"))
    if kind == "rename":
        tensors[rng.choice((name + "x", name.replace("model.", ""), "", name.upper(), "../x"))] = tensors.pop(name)
    elif kind == "drop":
        del tensors[name]
    elif kind == "double":
        tensors[rng.choice(sorted(tensors))] = tensor.clone()
    elif kind == "reshape":
        tensors[name] = tensor.reshape(rng.choice(((-1,), (1, *tensor.shape), (*tensor.shape, 1))))
    elif kind == "cast":
        tensors[name] = tensor.to(
            rng.choice((torch.float16, torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn))
        )
    elif kind in ("nan", "value"):
        tensors[name] = tensor.clone()
        value = 7.0 if kind == "value" else rng.choice((float("nan"), float("inf"), float("-inf")))
        tensors[name].view(-1)[rng.randrange(tensor.numel())] = value
    elif kind == "empty":
        tensors[name] = torch.empty(0, dtype=tensor.dtype)
    elif kind == "grow":
        tensors[name] = torch.cat([tensor, tensor[:1]])
    elif file.suffix == ".bin":
        tensors[name] = rng.choice((3, "text", [tensor], {"a": tensor}, None))
    save(tensors, file)
    return f"{kind} {name} in {file.name}"


VALUES = (
    *(None, 0, -1, 1, 2, 3, 7, 10**9, 10**12, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False),
    *(
        "",
        "x",
        "2",
        "2e-5",
        "../..",
        "auto",
        "\x00",
        "\x1b[2J",
        "\ud800",
        "(a|aa)+b",
        "x" * 5000,
        "float32",
        "bfloat16",
    ),
    *([], [1], ["x"], [[]], [None], list(range(1000)), {}, {"a": 1}, {"x": 10**400}, {"(a|aa)+b": 1}),
)


def edit_json(rng: random.Random, source: Path) -> str:
    """Put another value into a JSON file at any depth, or take one out."""
    configs = [path for path in json_files(source) if path.name.endswith("config.json")]
    file = rng.choice(rng.choice((configs, configs, json_files(source))))
    content = json.loads(file.read_text())
    inner, path = content, []
    while True:
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        key = rng.choice(keys)
        path.append(str(key))
        if not isinstance(inner[key], (dict, list)) or not inner[key] or rng.random() < 0.3:
            break
        inner = inner[key]
    if rng.random() < 0.15:
        del inner[key]
        what = "without"
    else:
        inner[key] = value = rng.choice(VALUES)
        what = f"{ascii(value)[:30]} for"
    file.write_text(json.dumps(content))
    return f"{file.name} {what} {'.'.join(path)}"


def break_json(rng: random.Random, source: Path) -> str:
    """Flip bytes of a JSON file, or nest it without end."""
    file = rng.choice(json_files(source))
    data = bytearray(file.read_bytes())
    if rng.random() < 0.2:
        data = bytearray(rng.choice((b"", b"null", b"[]", b"5", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000)))
    else:
        for _ in range(rng.choice((1, 1, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)
    return f"{file.name} broken"


def repack(rng: random.Random, source: Path) -> str:
    """Write a zip archive anew, compressed, with an entry twice, or with one cut short."""
    archives = [file for file in weight_files(source) if file.suffix == ".bin"]
    if not archives:
        return flip_bytes(rng, source)
    file, kind = rng.choice(archives), rng.choice(("compressed", "twice", "short", "as it was"))
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    chosen = rng.choice([name for name, _ in entries])
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in entries:
            if kind == "short" and name == chosen:
                content = content[: len(content) // 2]
            method = zipfile.ZIP_DEFLATED if kind == "compressed" and name == chosen else zipfile.ZIP_STORED
            archive.writestr(name, content, method)
            if kind == "twice" and name == chosen:
                archive.writestr(name, b"x" * len(content), zipfile.ZIP_STORED)
    return f"{file.name} repacked, {chosen} {kind}"


def break_files(rng: random.Random, source: Path) -> str:
    """Delete a file, or put a folder, a loop of links or a link elsewhere in its place."""
    file = rng.choice([*weight_files(source), *json_files(source)])
    file.unlink()
    kind = rng.choice(("deleted", "a folder", "a loop", "a dead link", "/dev/zero", "a pipe"))
    if kind == "a folder":
        file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(file)
    elif kind != "deleted":
        file.symlink_to({"a loop": file.name, "a dead link": "nowhere", "/dev/zero": "/dev/zero"}[kind])
    return f"{file.name}: {kind}"


def edit_index(rng: random.Random, source: Path) -> str:
    """Point an index elsewhere."""
    indices = list(source.glob("*.index.json"))
    if not indices:
        return edit_json(rng, source)
    content = json.loads(indices[0].read_text())
    name = rng.choice(sorted(content["weight_map"]))
    target = rng.choice(
        ("../x", "/etc/passwd", "", ".", "..", 5, None, "gone", "config.json", "a/b", "x\x00y", "x" * 5000)
    )
    content["weight_map"][name] = target
    indices[0].write_text(json.dumps(content))
    return f"{indices[0].name}: {name} in {str(target)[:40]!r}"


DAMAGES: tuple[Damage, ...] = (
    *(flip_bytes, truncate, edit_tensor, edit_tensor, repack, edit_json, edit_json, edit_json, edit_json),
    *(break_json, break_files, edit_index),
)
