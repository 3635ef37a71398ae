"""Damaged sources: each gives the right result or is refused in one sentence; no traceback, crash or hang.

Targets: checkpoints and LoRA runs that are converted; repos that are inspected, exported, checked for a push and asked for
their deltas; delta repos that are applied, truncated, loaded and described.

The right result is computed apart from the package: the damaged files are read with torch and safetensors, merged by the
formula of LoRA, renamed by the rules, and compared with the output bit by bit; `inspect` must find nothing wrong in it.

A few seeds here; `FUZZ_CASES=1000 FUZZ_SEED=100 python -m pytest tests/robustness/test_damaged_sources.py` for more, and
`FUZZ_CASES=1 FUZZ_SEED=N` runs one case again.
"""

import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.make_checkpoint import write_checkpoint
from tests.checkpoints import SHALLOW
from tests.robustness.children import hashes, outcome
from tests.robustness.damages import DAMAGES, load, save, weight_files
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import (
    convert_checkpoint,
    convert_state_dict,
    export_checkpoint,
    inspect_model,
)
from transformers_delta_llava.conversion.weights import same_bits
from transformers_delta_llava.deltas import apply_deltas, delta_stats, extract_deltas, truncate_deltas
from transformers_delta_llava.hub import push_folder


CASES = int(os.environ.get("FUZZ_CASES", "0"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "0"))
FORMS = (("safetensors", 1), ("safetensors", 2), ("bin", 1), ("bin", 2))
GROWN = ("model.language_model.embed_tokens.weight", "lm_head.weight")
LONGEST_SENTENCE = 2500  # twenty names of tensors, twice
PREFIX = "base_model.model."
# Files that checkpoints and towers often bring.
SETTINGS: dict[str, dict] = {
    "source/generation_config.json": {
        "do_sample": True,
        "temperature": 0.7,
        "eos_token_id": [2],
        "max_new_tokens": 64,
    },
    "source/special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    "source/added_tokens.json": {"<extra>": 300},
    "vision-tower/preprocessor_config.json": {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}
Operation = Callable[[Path, Path], object]


@dataclass(frozen=True)
class Target:
    """What is damaged, and what is then done with it.

    Attributes:
        prepare: writes whole sources into a folder, each in a folder of its own with all that belongs to it.
        operations: called one by one with the damaged source and a folder to write.
        cases: how many are tried by default.
        check: what is wrong with the output of the first operation, given the damaged source.
    """

    prepare: Callable[[Path], None]
    operations: tuple[Operation, ...]
    cases: int
    check: Callable[[Path, Path], list[str]] = lambda source, output: []


def write_checkpoints(folder: Path) -> None:
    """A full checkpoint in every form."""
    for form, shards in FORMS:
        source = folder / f"{form}-{shards}" / "source"
        write_checkpoint(source, form=form, shards=shards, **SHALLOW)
        for name, values in SETTINGS.items():
            (source.parent / name).write_text(json.dumps(values))


def write_lora_runs(folder: Path) -> None:
    """A LoRA run as the authors' trainer leaves it, beside its base model."""
    for form in ("safetensors", "bin"):
        run = folder / form
        tensors = write_checkpoint(run / "base", form=form, **SHALLOW)
        shutil.copytree(run / "base", run / "source", ignore=shutil.ignore_patterns("*.bin", "*.safetensors"))
        generator = torch.Generator().manual_seed(0)
        factors = {}
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            out, width = tensors[f"{name}.weight"].shape
            factors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(4, width, generator=generator)
            factors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
        torch.save(factors, run / "source" / "adapter_model.bin")
        trained = {n: tensor + 1 for n, tensor in tensors.items() if n.startswith("model.mm_projector.")}
        torch.save(trained, run / "source" / "non_lora_trainables.bin")
        config = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "alpha_pattern": {"down_proj": 16},
            "use_rslora": False,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "bias": "none",
            "lora_dropout": 0.05,
            "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": None,
            "use_dora": False,
        }
        (run / "source" / "adapter_config.json").write_text(json.dumps(config))


def write_repos(folder: Path) -> None:
    """Converted repos."""
    write_checkpoint(folder / "given" / "source", **SHALLOW)
    for size in ("2GB", "1MB"):
        convert_checkpoint(folder / "given" / "source", folder / size / "source", max_shard_size=size)
    shutil.rmtree(folder / "given")


def write_delta_repos(folder: Path) -> None:
    """A delta repo beside the model it belongs to."""
    write_repos(folder)
    shutil.rmtree(folder / "1MB")
    (folder / "2GB" / "source").rename(folder / "2GB" / "model")
    extract_deltas(folder / "2GB" / "model", folder / "2GB" / "source")


def convert(source: Path, output: Path) -> None:
    """Convert a checkpoint, or a LoRA run where a base lies beside it."""
    base = source.parent / "base"
    convert_checkpoint(source, output / "out", **({"base_model": base} if base.is_dir() else {}))


def check_conversion(source: Path, output: Path) -> list[str]:
    """What is wrong with the repo that a damaged checkpoint or LoRA run became."""
    given: dict[str, torch.Tensor] = {}
    base = source.parent / "base"
    if base.is_dir():
        for file in weight_files(source):
            if file.parent == base:
                given |= load(file)
        beside = source / "non_lora_trainables.bin"
        if beside.is_file():  # all of the projector is from there; without it, from a base that has one
            given = {name: t for name, t in given.items() if not name.startswith("model.mm_projector.")} | load(beside)
        _merge(given, load(source / "adapter_model.bin"), json.loads((source / "adapter_config.json").read_text()))
    else:
        for file in weight_files(source):
            given |= load(file)
    expected = convert_state_dict(given)
    found: dict[str, torch.Tensor] = {}
    for file in (output / "out").glob("*.safetensors"):
        found |= load_file(file)
    wrong = [f"only one side has {name}" for name in expected.keys() ^ found.keys()]
    for name in expected.keys() & found.keys():
        value = found[name][: len(expected[name])] if name in GROWN else found[name]
        if not same_bits(value, expected[name]):
            wrong.append(f"{name} differs")
    return wrong + inspect_model(output / "out").problems


def _merge(base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], config: dict) -> None:
    """W + B A alpha / r, for the two matrices of `write_lora_runs`."""
    adapter = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.items()}
    for name in {n.partition(".lora_")[0] for n in adapter if ".lora_" in n}:
        a, b = adapter.pop(f"{name}.lora_A.weight"), adapter.pop(f"{name}.lora_B.weight")
        patterns = config.get("alpha_pattern") or {}
        alpha = next((value for key, value in patterns.items() if name.endswith(f".{key}")), config["lora_alpha"])
        scaling = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        update = b.float() @ a.float() * scaling
        total = base[f"{name}.weight"].clone()
        total += update.T if config.get("fan_in_fan_out") else update
        base[f"{name}.weight"] = total
    base |= adapter


def apply(source: Path, output: Path) -> None:
    """Put deltas into the model beside them."""
    apply_deltas(source.parent / "model", output / "out", source)


def check_applied(source: Path, output: Path) -> list[str]:
    """What is wrong with a model that damaged deltas were put into."""
    expected = load_file(source / "deltas.safetensors")
    found = load_file(output / "out" / "model.safetensors")
    names = {name: f"model.multi_modal_projector.{name.rpartition('multi_modal_projector.')[2]}" for name in expected}
    wrong = [f"{n} differs" for n in expected if not same_bits(found[names[n]], expected[n].to(found[names[n]].dtype))]
    return wrong + inspect_model(output / "out").problems


def load_into_model(source: Path, output: Path) -> None:
    """As users load deltas."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(source.parent / "model")
    model.load_deltas(str(source), name="damaged")


TARGETS = {
    "checkpoint": Target(write_checkpoints, (convert,), 16, check_conversion),
    "lora": Target(write_lora_runs, (convert,), 8, check_conversion),
    "repo": Target(
        write_repos,
        (
            lambda source, output: inspect_model(source),
            lambda source, output: export_checkpoint(source, output / "export"),
            lambda source, output: push_folder(source, "org/name", dry_run=True),
            lambda source, output: delta_stats(source),
            lambda source, output: extract_deltas(source, output / "deltas"),
        ),
        5,
    ),
    "deltas": Target(
        write_delta_repos,
        (
            apply,
            lambda source, output: delta_stats(source, source.parent / "model"),
            lambda source, output: truncate_deltas(source, output / "less", rank=1),
            load_into_model,
        ),
        6,
        check_applied,
    ),
}


def use(target: Target, sources: Path, case: Path, seed: int, timeout: float = 60) -> tuple[list[str], list[str]]:
    """Damage one of the `sources` and use it in the folder `case`; returns how each operation ended, and what is wrong."""
    rng = random.Random(seed)
    shutil.copytree(rng.choice(sorted(sources.iterdir())), case)
    source = case / "source"
    name_tower(source, case / "vision-tower")
    damage = rng.choice(DAMAGES)
    what = f"{seed}: {damage(rng, source)}"
    before = _hashes(source)
    verdicts, problems = [], []
    for i, operation in enumerate(target.operations):
        output = case / f"output-{i}"
        output.mkdir()
        problem, verdict = judge(lambda: operation(source, output) and None, output, timeout)  # noqa: B023
        verdicts.append(verdict)
        if verdict == "used" and i == 0:
            checked = outcome(lambda: target.check(source, output), timeout)  # noqa: B023
            if checked.get("value") != []:
                problem = f"wrong result: {checked.get('value') or checked}"
        if problem:
            problems.append(f"{what}, operation {i}: {problem}")
    if before != _hashes(source):
        problems.append(f"{what}: the source was changed")
    return verdicts, problems


def judge(work: Callable[[], object], output: Path, timeout: float) -> tuple[str | None, str]:
    """Run one operation in a child; returns what is wrong with how it ended, and how that was."""
    result = outcome(work, timeout)
    if "value" in result:
        return None, "used"
    if not result.get("handled") or not 0 < len(result["text"]) <= LONGEST_SENTENCE:
        return result.get("traceback") or str(result), "failed"
    if any(output.iterdir()):
        return "refused, but left an output", "refused"
    return None, "refused"


def name_tower(source: Path, tower: Path) -> None:
    """Let a checkpoint's config name the tower beside it."""
    path = source / "config.json"
    if tower.is_dir() and path.is_file():
        path.write_text(json.dumps({**json.loads(path.read_text()), "mm_vision_tower": str(tower)}))


def _hashes(source: Path) -> dict[str, str]:
    special = [path for path in source.iterdir() if path.is_symlink() or not (path.is_file() or path.is_dir())]
    return {path.name: os.readlink(path) if path.is_symlink() else "" for path in special} or hashes(source)


@pytest.fixture(scope="module")
def prepared(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the good sources of a target; after a conversion in this process, so that children import nothing."""
    folders: dict[str, Path] = {}

    def prepare(target: str) -> Path:
        if target not in folders:
            folders[target] = tmp_path_factory.mktemp(target)
            TARGETS[target].prepare(folders[target])
        return folders[target]

    return prepare


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_sources(prepared: Callable[[str], Path], tmp_path: Path, target: str) -> None:
    verdicts: Counter[str] = Counter()
    failures = []
    for seed in range(FIRST_SEED, FIRST_SEED + (CASES or TARGETS[target].cases)):
        ends, problems = use(TARGETS[target], prepared(target), tmp_path / "case", seed)
        verdicts.update(ends)
        failures += problems
        shutil.rmtree(tmp_path / "case")
    assert failures == []
    assert CASES or verdicts["refused"] > 1


def crash(source: Path, output: Path) -> None:
    raise KeyError("a bug")


def refuse_too_late(source: Path, output: Path) -> None:
    (output / "out").mkdir()
    raise ValueError("refused too late")


def hang(source: Path, output: Path) -> None:
    while True:
        pass


def convert_something_else(source: Path, output: Path) -> None:
    file = weight_files(source)[0]
    tensors = load(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save(tensors, source.parent / file.name)
    good = file.read_bytes()
    file.write_bytes((source.parent / file.name).read_bytes())
    convert(source, output)
    file.write_bytes(good)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (crash, "KeyError"),
        (refuse_too_late, "left an output"),
        (hang, "hung"),
        (convert_something_else, "wrong result.* differs"),
    ],
)
def test_failures_are_noticed(
    prepared: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: Operation,
    message: str,
) -> None:
    monkeypatch.setitem(globals(), "DAMAGES", (lambda rng, source: "undamaged",))
    target = replace(TARGETS["checkpoint"], operations=(operation,))
    _, (problem,) = use(target, prepared("checkpoint"), tmp_path / "case", 0, 1 if operation is hang else 60)
    assert re.search(message, problem, re.DOTALL)
