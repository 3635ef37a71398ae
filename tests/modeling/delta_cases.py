"""Models with deltas, other deltas for them, and what has to stay the same after an error."""

import torch

from tests.tiny import prompt, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.modeling.deltas_delta_llava import DELTA_WEIGHTS, read_deltas, write_deltas


LAYOUTS = ("released", "paper")


def make(seed: int = 0, **overrides) -> DeltaLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    return DeltaLlavaForConditionalGeneration(tiny_config(**{"delta_rank": 4, **overrides})).eval()


def inputs() -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return {"input_ids": prompt([36])[None], "pixel_values": pixels}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    batch = inputs()
    dtype = next(p.dtype for name, p in model.named_parameters() if "patch_embedding" in name)
    return model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"].to(dtype)).logits


def other_deltas(model, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Deltas unlike the model's own."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, tensor in model.delta_state_dict().items():
        shape = list(tensor.shape)
        if rank is not None:
            shape[-1 if name.endswith("delta_u") else -2] = rank
        found[name] = torch.randn(shape, generator=generator) * 0.3
    return found


def write(model, folder, tensors, **metadata) -> None:
    """Deltas for `model` with these tensors, and other metadata where given."""
    model.save_deltas(folder)
    own = read_deltas(folder)[1] | metadata
    (folder / DELTA_WEIGHTS).unlink()
    write_deltas(folder, tensors, own["projector_layout"], own["base_sha256"], own.get("base_model"))


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
