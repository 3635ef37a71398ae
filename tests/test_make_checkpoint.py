"""The recipe writes what the released code writes."""

import torch

from examples.make_checkpoint import draw, projector_shapes
from tests.reference.goldens import MANIFEST


def test_projector_has_the_released_names_and_shapes() -> None:
    released = {entry["name"]: tuple(entry["shape"]) for entry in MANIFEST["parameters"]}
    written = projector_shapes(width=1024, hidden_size=64)
    assert {f"model.mm_projector.{name}": shape for name, shape in written.items()} == released


def test_values_depend_on_name_shape_and_seed_alone() -> None:
    shapes = {"a.weight": (4, 4), "b.norm.weight": (4,), "b.norm.bias": (4,)}
    first, again = draw(shapes, seed=0), draw(dict(reversed(shapes.items())), seed=0)
    assert all(torch.equal(first[name], again[name]) for name in shapes)
    assert not torch.equal(first["a.weight"], draw(shapes, seed=1)["a.weight"])
