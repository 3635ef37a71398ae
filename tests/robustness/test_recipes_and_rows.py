"""Recipes and rows with what does not belong there, at random: each ends well or in one sentence, within seconds.

Three seeds here; `FUZZ_CASES=1000 FUZZ_SEED=1 python -m pytest tests/robustness/test_recipes_and_rows.py` for more.
"""

import copy
import dataclasses
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainingArguments

from tests.training.tiny_run import make_processor, make_rows, recipe_content, write_data, write_model
from transformers_delta_llava.training import DataError, DataRecipe, load_recipe, train
from transformers_delta_llava.training.conversations import ConversationEncoder
from transformers_delta_llava.training.dataset import TrainingDataset, open_rows
from transformers_delta_llava.training.sampler import Request
from transformers_delta_llava.utils.errors import DeltaLlavaError


CASES = int(os.environ.get("FUZZ_CASES", "12"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 60  # on a busy machine; a hang is one for ever
VALUES: list[Any] = [None, True, False, 0, -1, 1, 3, 2**31, 2**63 - 1, -(2**63), 2**70, 0.5, -0.5, 1e308, float("inf")]
VALUES += [float("nan"), "", " ", "abc", "no", "2e-5", "1e400", "../../x", "a\0b", "\u202e", "x" * 5000, "/dev/zero"]
VALUES += [
    [],
    {},
    [[]],
    [None],
    ["abc"],
    {"a": {}},
    {"": 1},
    [0, -1],
    {1: 2},
    "${HOME}",
    "!!python/object:os.system",
    "naïve",
]
# They compile for minutes, fork without end, or need other processes.
LEFT_OUT = {"torch_compile", "torch_compile_backend", "torch_compile_mode", "local_rank", "output_dir", "max_steps"}
ARGUMENTS = [item.name for item in dataclasses.fields(TrainingArguments) if item.init and item.name not in LEFT_OUT]


@contextmanager
def limited() -> Iterator[None]:
    """A process-wide state as it was, and an end."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    environment = dict(os.environ)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        os.environ.clear()
        os.environ.update(environment)
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested lists and dictionaries."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def mutate(value: Any, rng: random.Random) -> Any:
    """`value` with something that does not belong there in one place, or without that place."""
    value = copy.deepcopy(value)
    place = rng.choice(places(value)[1:])
    owner = value
    for key in place[:-1]:
        owner = owner[key]
    kind = rng.random()
    if kind < 0.15:
        del owner[place[-1]]
    elif kind < 0.3 and isinstance(owner, dict):
        owner[rng.choice(["extra", "", "None", place[-1] + "s"])] = owner.pop(place[-1])
    else:
        owner[place[-1]] = rng.choice([*VALUES, owner[place[-1]], [owner[place[-1]]], {"a": owner[place[-1]]}])
    return value


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text and 0 < len(text) < 1200, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_model(folder / "model")
    write_data(folder / "data", 4)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + CASES))
def test_a_recipe_trains_or_says_why_not(
    folder: Path, tmp_path: Path, seed: int, logged_deprecations: list[str]
) -> None:
    rng = random.Random(f"recipe {seed}")
    content = recipe_content(folder, arguments={"output_dir": str(tmp_path / "out"), "max_steps": 1})
    if rng.random() < 0.5:
        content |= {"train": ["projector", "lora"], "lora": {"r": 2, "target_modules": ["q_proj"], "lora_alpha": 4}}
        content["lora"] |= {"lora_dropout": 0.0, "bias": "none", "modules_to_save": None, "projector_lr": 1e-3}
        content["projector_lr"] = content["lora"].pop("projector_lr")
    for _ in range(rng.randint(0, 1)):
        content["arguments"][rng.choice(ARGUMENTS)] = rng.choice(VALUES)
    content = mutate(content, rng)
    text = yaml.safe_dump(content, allow_unicode=rng.random() < 0.5).encode("utf-8", "replace")
    if rng.random() < 0.15:
        cut = rng.randrange(len(text))
        text = (
            text[:cut] + rng.choice([b"", b"\xff", b"\0", b"&a [*a]", b"{{", b"\t- ", b"!!binary x"]) + text[cut + 1 :]
        )
    (tmp_path / "recipe.yaml").write_bytes(text)
    with limited():
        try:
            train(load_recipe(tmp_path / "recipe.yaml"))
        except DeltaLlavaError as error:
            assert_one_sentence(error)
        except OSError as error:
            assert error.errno is not None
    logged_deprecations.clear()  # recipes may name old arguments


ROW_TEXTS = [
    "\ud800",
    "<image>",
    "<image><image>",
    "x" * 100_000,
    "\0",
    "<s></s><pad>",
    "\u202e",
    "{% for %}",
    "é" * 50,
]


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + CASES))
def test_a_row_is_encoded_or_named_with_its_reason(folder: Path, tmp_path: Path, seed: int) -> None:
    """Eight broken rows between two whole ones, which stay."""
    rng = random.Random(f"rows {seed}")
    whole = make_rows(4)
    suffix = rng.choice([".json", ".jsonl"])
    lines = [json.dumps(whole[0])]
    for _ in range(8):
        row = rng.choice(whole)
        if rng.random() < 0.3:
            row = {"images": [row["image"]] if "image" in row else [], "messages": messages_of(row)}
        row = mutate(row, rng)
        if rng.random() < 0.3:
            row["system"] = rng.choice([*ROW_TEXTS, *VALUES])
        text = json.dumps(row, default=str)
        if rng.random() < 0.4:
            text = text.replace("What is", json.dumps(rng.choice(ROW_TEXTS))[1:-1], 1)
        if rng.random() < 0.1:
            text = text.replace("{", '{"deep": ' + "[" * 5000 + "]" * 5000 + ", ", 1)
        if suffix == ".jsonl" and rng.random() < 0.1:  # in an array it would leave the others' borders open
            text = text[: rng.randrange(len(text))] + rng.choice('"{]\\')
        lines.append(text)
    lines.append(json.dumps(whole[1]))
    file = tmp_path / f"rows{suffix}"
    file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    recipe = DataRecipe(path=str(file), images=str(folder / "data"), cache=str(tmp_path / "cache"), on_error="skip")
    with limited():
        rows = open_rows(recipe)
        numbers = rows.index.entries["number"].tolist()
        assert numbers[0] == 0 and numbers[-1] == len(lines) - 1
        assert len(numbers) + len(rows.index.bad) == len(lines)
        for name, reason in rows.index.bad:
            assert name.isprintable() and reason and "\n" not in reason and len(reason) < 1200
        encoder = ConversationEncoder(make_processor(), 512)
        for on_error in ("fail", "skip"):
            dataset = TrainingDataset(rows, encoder, on_error, tmp_path / "skipped.jsonl")
            for row in range(len(rows)):
                encode(dataset, row)


def encode(dataset: TrainingDataset, row: int) -> None:
    try:
        assert (dataset[Request(row, 4)]["labels"] != -100).any()
    except DataError as error:
        assert_one_sentence(error)


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row as messages with content items."""
    messages = []
    for turn in row["conversations"]:
        images = [{"type": "image"}] * turn["value"].count("<image>")
        text = {"type": "text", "text": turn["value"].replace("<image>\n", "")}
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": [*images, text]})
    return messages
