"""The golden cases as tensors: weights and inputs from the recipe, expected values from the files."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.reference import fixture_recipe


FOLDER = Path(__file__).parent
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
PREFIX: str = MANIFEST["name_prefix"]
SEED: int = MANIFEST["seed"]
CASES = tuple(MANIFEST["cases"])
TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 2e-2

QUERY_SIDE = (
    "query_interpolated",
    "ntb_stem",
    "ntb_after_attention",
    "ntb_concat",
    "query_after_ntb",
    "query_plus_pos",
    "q_projected",
    "attention_output",
)
KEY_SIDE = ("k_projected", "v_projected")


@cache
def weights() -> dict[str, Tensor]:
    """All 45 tensors under the authors' names without the prefix. Shared: do not write into them."""
    arrays = fixture_recipe.weights(MANIFEST["parameters"], SEED)
    return {name.removeprefix(PREFIX): torch.from_numpy(array) for name, array in arrays.items()}


@cache
def inputs(case: str) -> dict[str, Tensor]:
    """`x_single` and `x_multi` of a case. Shared: do not write into them."""
    entry = MANIFEST["cases"][case]
    factor = np.float32(entry["input_scale"])
    return {
        name: torch.from_numpy(fixture_recipe.draw(spec["label"], spec["shape"], SEED) * factor)
        for name, spec in entry["inputs"].items()
    }


@cache
def expected(case: str) -> dict[str, Tensor]:
    """The stored tensors of a case, among them `output`."""
    return load_file(FOLDER / MANIFEST["cases"][case]["file"])


def sha256(case: str) -> str:
    return hashlib.sha256((FOLDER / MANIFEST["cases"][case]["file"]).read_bytes()).hexdigest()


def stored_tokens(name: str, tensor: Tensor) -> Tensor:
    """The tokens of an intermediate of case `s2` that its golden keeps (all of them for `output`)."""
    golden = expected("s2")
    if name in QUERY_SIDE:
        return tensor[:, golden["query_token_index"]]
    if name in KEY_SIDE:
        return tensor[:, golden["kv_token_index"]]
    return tensor[golden["query_token_index"]] if name == "pos_embed" else tensor


def difference(actual: Tensor, golden: Tensor) -> float:
    """max|actual - golden| as a share of max|golden|; a shape mismatch is an error, never a broadcast."""
    assert actual.shape == golden.shape, f"{tuple(actual.shape)} against {tuple(golden.shape)}"
    golden = golden.double()
    return ((actual.detach().double() - golden).abs().max() / golden.abs().max()).item()
