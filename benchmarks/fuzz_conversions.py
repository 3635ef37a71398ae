"""Damaged sources: each converts to the right thing or is refused in one sentence; no traceback, crash or hang.

    python benchmarks/fuzz_conversions.py [--cases 1000] [--seed 0] [--json FILE]

What is right is worked out apart from the conversion: the damaged files are read with torch and safetensors, renamed by
the key map, and compared with the output bit by bit; and the output must stand up to `inspect`. A case is its seed and
number: `--only N` runs one, with its traceback. Exits with code 1 where a case fails.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.children import hashes, outcome
from examples.make_checkpoint import write_checkpoint
from transformers_delta_llava.conversion import convert_checkpoint, convert_state_dict, inspect_model
from transformers_delta_llava.conversion.shard_writer import same_bits


FORMS = (("safetensors", 1), ("safetensors", 2), ("bin", 1), ("bin", 2))
GROWN = ("model.language_model.embed_tokens.weight", "lm_head.weight")
LONGEST_SENTENCE = 2500  # twenty names of tensors, twice
Damage = Callable[[random.Random, Path], str]


def weight_files(source: Path) -> list[Path]:
    """The weight files of a source."""
    return sorted(path for path in source.iterdir() if path.suffix in (".bin", ".safetensors"))


def json_files(source: Path) -> list[Path]:
    """The JSON files of a source and of the tower beside it."""
    return sorted([*source.glob("*.json"), *(source.parent / "vision-tower").glob("*.json")])


def load(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file."""
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def save(tensors: dict, file: Path) -> None:
    """Write tensors in the form that the file's name says."""
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        torch.save(tensors, file)


def flip_bytes(chance: random.Random, source: Path) -> str:
    """Flip bits anywhere, or where the headers are."""
    file = chance.choice(weight_files(source))
    data = bytearray(file.read_bytes())
    ends = chance.random() < 0.6
    places = []
    for _ in range(chance.choice((1, 1, 4, 64))):
        place = chance.randrange(min(4096, len(data))) if ends else chance.randrange(len(data))
        place = len(data) - 1 - place if ends and chance.random() < 0.5 else place
        data[place] ^= 1 << chance.randrange(8)
        places.append(place)
    file.write_bytes(data)
    return f"bits flipped in {file.name} at {places[:4]}"


def truncate(chance: random.Random, source: Path) -> str:
    """Cut a file short, or lengthen it."""
    file = chance.choice([*weight_files(source), *json_files(source)])
    size = file.stat().st_size
    keep = chance.choice((0, chance.randrange(size), size - 1, size + 17))
    os.truncate(file, keep)
    return f"{file.name} of {size} bytes cut to {keep}"


def edit_tensor(chance: random.Random, source: Path) -> str:
    """Rename, drop, double, reshape, cast or spoil one tensor."""
    file = chance.choice(weight_files(source))
    tensors = load(file)
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    kind = chance.choice(
        ("rename", "drop", "double", "reshape", "cast", "nan", "empty", "grow", "not a tensor", "value")
    )
    if kind == "rename":
        tensors[chance.choice((name + "x", name.replace("model.", ""), "", name.upper(), "../x"))] = tensors.pop(name)
    elif kind == "drop":
        del tensors[name]
    elif kind == "double":
        tensors[chance.choice(sorted(tensors))] = tensor.clone()
    elif kind == "reshape":
        tensors[name] = tensor.reshape(chance.choice(((-1,), (1, *tensor.shape), (*tensor.shape, 1))))
    elif kind == "cast":
        tensors[name] = tensor.to(
            chance.choice((torch.float16, torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn))
        )
    elif kind in ("nan", "value"):
        tensors[name] = tensor.clone()
        value = 7.0 if kind == "value" else chance.choice((float("nan"), float("inf"), float("-inf")))
        tensors[name].view(-1)[chance.randrange(tensor.numel())] = value
    elif kind == "empty":
        tensors[name] = torch.empty(0, dtype=tensor.dtype)
    elif kind == "grow":
        tensors[name] = torch.cat([tensor, tensor[:1]])
    elif file.suffix == ".bin":
        tensors[name] = chance.choice((3, "text", [tensor], {"a": tensor}, None))
    save(tensors, file)
    return f"{kind} {name} in {file.name}"


def edit_json(chance: random.Random, source: Path) -> str:
    """Put another value into a JSON file, or take one out."""
    file = chance.choice([source / "config.json", *json_files(source)])
    content = json.loads(file.read_text())
    key = chance.choice(sorted(content))
    values = (None, 0, -1, 1, 2, 3, 7, 10**12, 0.5, True, False, "", "x", "../..", [], [1], {}, {"a": 1}, [[]], "\x00")
    if chance.random() < 0.15:
        del content[key]
        what = "without"
    else:
        content[key] = value = chance.choice(values)
        what = f"{value!r} for"
    file.write_text(json.dumps(content))
    return f"{file.name} {what} {key}"


def break_json(chance: random.Random, source: Path) -> str:
    """Flip bytes of a JSON file, or nest it without end."""
    file = chance.choice(json_files(source))
    data = bytearray(file.read_bytes())
    if chance.random() < 0.2:
        data = bytearray(chance.choice((b"", b"null", b"[]", b"5", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000)))
    else:
        for _ in range(chance.choice((1, 1, 8))):
            data[chance.randrange(len(data))] = chance.randrange(256)
    file.write_bytes(data)
    return f"{file.name} broken"


def break_files(chance: random.Random, source: Path) -> str:
    """Delete a file, or put a folder, a loop of links or a link elsewhere in its place."""
    file = chance.choice([*weight_files(source), *json_files(source)])
    file.unlink()
    kind = chance.choice(("deleted", "a folder", "a loop", "a dead link", "/dev/zero"))
    if kind == "a folder":
        file.mkdir()
    elif kind != "deleted":
        file.symlink_to({"a loop": file.name, "a dead link": "nowhere", "/dev/zero": "/dev/zero"}[kind])
    return f"{file.name}: {kind}"


def edit_index(chance: random.Random, source: Path) -> str:
    """Point an index elsewhere."""
    indices = list(source.glob("*.index.json"))
    if not indices:
        return edit_json(chance, source)
    content = json.loads(indices[0].read_text())
    name = chance.choice(sorted(content["weight_map"]))
    place = chance.choice(
        ("../x", "/etc/passwd", "", ".", "..", 5, None, "gone", "config.json", "a/b", "x\x00y", "x" * 5000)
    )
    content["weight_map"][name] = place
    indices[0].write_text(json.dumps(content))
    return f"{indices[0].name}: {name} in {str(place)[:40]!r}"


DAMAGES: tuple[Damage, ...] = (
    *(flip_bytes, truncate, edit_tensor, edit_tensor, edit_json, edit_json, break_json, break_files, edit_index),
)


def check(source: Path, output: Path) -> list[str]:
    """What is wrong with the output of a damaged source; nothing where it is the right thing."""
    given: dict[str, torch.Tensor] = {}
    for file in weight_files(source):
        contents = load(file)
        given |= contents
    expected = convert_state_dict(given)
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(output):
        found |= load_file(file)
    wrong = [f"only one side has {name}" for name in expected.keys() ^ found.keys()]
    for name in expected.keys() & found.keys():
        value = found[name][: len(expected[name])] if name in GROWN else found[name]
        if not same_bits(value, expected[name]):
            wrong.append(f"{name} differs")
    return wrong + inspect_model(output).problems


def run(cases: int, seed: int, folder: Path, only: int | None = None, timeout: float = 60) -> dict:
    """Damage, convert and check; returns counts by kind of damage, and a list of failures."""
    for form, shards in FORMS:
        write_checkpoint(folder / f"{form}-{shards}" / "source", form=form, shards=shards)
    counts: Counter[str] = Counter()
    failures = []
    for number in range(cases) if only is None else [only]:
        chance = random.Random(f"{seed}:{number}")
        form, shards = chance.choice(FORMS)
        place = folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / f"{form}-{shards}", place)
        source, output = place / "source", place / "out"
        _name_tower(source, place / "vision-tower")
        damage = chance.choice(DAMAGES)
        what = f"{number}: {damage(chance, source)}"
        before = _hashes(source)

        def work(source: Path = source, output: Path = output) -> None:
            convert_checkpoint(source, output)

        result = outcome(work, timeout)
        problem = None
        if "value" in result:
            verdict = outcome(lambda: check(source, output), timeout)  # noqa: B023
            counts[f"{damage.__name__}: converted"] += 1
            if verdict.get("value") != []:
                problem = f"converted to the wrong thing: {verdict.get('value') or verdict}"
        elif result.get("handled") and 0 < len(result["text"]) <= LONGEST_SENTENCE:
            counts[f"{damage.__name__}: refused"] += 1
            if output.exists() or list(place.glob(".out*")):
                problem = "refused, but left an output"
        else:
            problem = result.get("traceback") if only is not None else f"{str(result)[:300]}"
        if before != _hashes(source):
            problem = f"the source was changed; {problem}"
        if problem:
            failures.append(f"{what}: {problem}")
        elif only is not None:
            print(what, result)
    return {"seed": seed, "cases": cases, **dict(sorted(counts.items())), "failures": failures}


def _name_tower(source: Path, tower: Path) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_vision_tower": str(tower)}))


def _hashes(source: Path) -> dict[str, str]:
    links = [path for path in source.iterdir() if path.is_symlink()]
    return {path.name: os.readlink(path) for path in links} if links else hashes(source)


def main() -> None:
    """Run, print, exit."""
    parser = argparse.ArgumentParser(description="Convert damaged sources.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, with its traceback")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.cases, arguments.seed, Path(folder), arguments.only)
    for name, value in result.items():
        if name != "failures":
            print(f"{name:>26}: {value}")
    print(f"{'failures':>26}: {len(result['failures'])}")
    print("\n".join(result["failures"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
