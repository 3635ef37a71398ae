"""Models with deltas, other deltas for them, and what has to stay the same after an error."""

import json

import torch
from safetensors.torch import save_file

from tests.tiny import prompt, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


LAYOUTS = {
    "released": {},
    "paper": {"projector_layout": "paper"},
    "paper, one base": {"projector_layout": "paper", "delta_sharing": "all"},
}


def make(seed: int = 0, **overrides) -> DeltaLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    return DeltaLlavaForConditionalGeneration(tiny_config(**{"delta_rank": 4, **overrides})).eval()


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": prompt([36])[None], "pixel_values": pixels}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**inputs()).logits


def other_deltas(model, scale: float = 0.3, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Deltas unlike the model's own."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, tensor in model.delta_state_dict().items():
        shape = list(tensor.shape)
        if rank is not None:
            shape[-1 if name.endswith("delta_u") else -2] = rank
        found[name] = torch.randn(shape, generator=generator) * scale
    return found


def snapshot(model) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = {
        f"{name}/{key}": t.clone() for name in model.delta_names for key, t in model.delta_state_dict(name).items()
    }
    return state | held


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def is_delta(name: str) -> bool:
    return name.endswith((".delta_u", ".delta_v"))


def write_repo(model, folder, tensors=None, **config_changes) -> None:
    """A delta repo of `model` with other tensors or settings in it."""
    model.save_deltas(folder)
    if tensors is not None:
        save_file(tensors, folder / "deltas.safetensors")
    path = folder / "delta_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config_changes}))
