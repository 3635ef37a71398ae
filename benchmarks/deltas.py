"""Deltas at the size of the released projector (7B): swapping, merging, storing and training them, beside the whole.

    python benchmarks/deltas.py [--swaps 100] [--steps 5] [--images 4] [--threads N] [--output FILE]

Prints a table, with what was asked for beside what was found, and writes JSON. On the CPU, in float32, on random numbers:
nothing measured here depends on their values. Full and delta-only training take turns, step by step, on one projector.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaModel, DeltaLlavaProjector, __version__


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure deltas at the size of the released projector.")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5, help="of training, of either kind")
    parser.add_argument("--images", type=int, default=4, help="per step of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "deltas.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = released_size()
    with tempfile.TemporaryDirectory() as folder:
        results = measure_sets(model, Path(folder), arguments.swaps)
    results |= measure_merge(model) | measure_training(model, arguments.steps, arguments.images)
    show(results)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    versions = {
        "transformers_delta_llava": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    versions["transformers"] = transformers.__version__
    report = {"benchmark": "deltas", "settings": settings, "versions": versions, "results": results}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def released_size() -> DeltaLlavaModel:
    """A model with the released projector at 7B in memory, and nothing else."""
    config = DeltaLlavaConfig()
    config = DeltaLlavaConfig(
        text_config={**config.text_config.to_dict(), "vocab_size": 32064, "num_hidden_layers": 1}
    )
    with torch.device("meta"):
        model = DeltaLlavaModel(config)
    model.multi_modal_projector = DeltaLlavaProjector(config)
    return model.eval()


def bases(model: DeltaLlavaModel) -> dict[str, torch.Tensor]:
    """Copies of all parameters of the projector that are no deltas."""
    parameters = model.multi_modal_projector.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if not name.endswith((".delta_u", ".delta_v"))}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of parameters agree in every bit."""
    return all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


def random_features(model: DeltaLlavaModel, images: int) -> list[torch.Tensor]:
    """Hidden states (images, patches, width) as the tower gives them, one per level."""
    config = model.config
    shape = (images, config.grid_size**2, config.vision_config.hidden_size)
    return [torch.randn(shape) for _ in config.vision_feature_levels]


def measure_sets(model: DeltaLlavaModel, folder: Path, swaps: int) -> dict[str, float | bool]:
    """Save two sets, load one, swap."""
    before = bases(model)
    deltas = model.delta_state_dict()
    model.save_deltas(folder / "first", dtype=torch.bfloat16)
    model.load_delta_state_dict({name: torch.randn_like(tensor) for name, tensor in deltas.items()})
    model.save_deltas(folder / "second", dtype=torch.bfloat16)
    loading = seconds(lambda: model.load_deltas(folder / "second"))
    times = [seconds(lambda name=name: model.set_deltas(name)) for name in ("default", "second") * (swaps // 2)]
    return {
        "numbers": sum(tensor.numel() for tensor in deltas.values()),
        "repo_bytes_bfloat16": sum(file.stat().st_size for file in (folder / "first").iterdir()),
        "load_ms": loading * 1e3,
        "swap_ms_median": statistics.median(times) * 1e3,
        "swap_ms_most": max(times) * 1e3,
        "base_same_bits_after_swaps": same_bits(before, bases(model)),
    }


def measure_merge(model: DeltaLlavaModel) -> dict[str, float | bool]:
    """Merge and unmerge; both the parameters and the output come back."""
    before = {name: p.detach().clone() for name, p in model.multi_modal_projector.named_parameters()}
    features = random_features(model, 1)
    with torch.no_grad():
        plain = model.multi_modal_projector(features[0], features)
        merging = seconds(model.merge_deltas)
        merged = model.multi_modal_projector(features[0], features)
        unmerging = seconds(model.unmerge_deltas)
        again = model.multi_modal_projector(features[0], features)
    after = {name: p.detach() for name, p in model.multi_modal_projector.named_parameters()}
    return {
        "merge_ms": merging * 1e3,
        "unmerge_ms": unmerging * 1e3,
        "merged_relative_error": float((merged - plain).norm() / plain.norm()),
        "same_bits_after_unmerge": same_bits(before, after) and torch.equal(plain, again),
    }


def measure_training(model: DeltaLlavaModel, steps: int, images: int) -> dict[str, float]:
    """Time of the backward pass and of the optimizer, bytes of gradients and moments, of either kind of training."""
    projector = model.multi_modal_projector
    parameters = list(projector.parameters())
    deltas = list(model.delta_parameters())
    optimizers = {"full": torch.optim.AdamW(parameters, lr=1e-4), "deltas": torch.optim.AdamW(deltas, lr=1e-4)}
    features = random_features(model, images)
    times: dict[str, dict[str, list[float]]] = {
        kind: {"forward": [], "backward": [], "step": []} for kind in optimizers
    }
    memory: dict[str, int] = {}
    for turn in range(steps + 1):  # the first of each kind warms up
        for kind, optimizer in optimizers.items():
            if kind == "full":
                projector.requires_grad_(True)
            else:
                model.set_deltas_trainable()
            found: list[torch.Tensor] = []
            forward = seconds(lambda found=found: found.append(projector(features[0], features).square().mean()))
            backward = seconds(found[0].backward)
            step = seconds(optimizer.step)
            if turn:
                for name, value in (("forward", forward), ("backward", backward), ("step", step)):
                    times[kind][name].append(value)
            moments = (t for state in optimizer.state.values() for t in state.values() if t.dim())
            gradients = (p.grad for p in parameters if p.grad is not None)
            memory[kind] = sum(t.numel() * t.element_size() for t in (*moments, *gradients))
            projector.zero_grad(set_to_none=True)
    middle = {kind: {n: statistics.median(values) for n, values in parts.items()} for kind, parts in times.items()}
    results = {f"{kind}_{name}_ms": value * 1e3 for kind, parts in middle.items() for name, value in parts.items()}
    results |= {f"{kind}_gradient_and_optimizer_bytes": value for kind, value in memory.items()}
    results["trained_share"] = sum(p.numel() for p in deltas) / sum(p.numel() for p in parameters)
    results["backward_speedup"] = middle["full"]["backward"] / middle["deltas"]["backward"]
    results["memory_ratio"] = memory["full"] / memory["deltas"]
    return results


def seconds(call: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def show(results: dict) -> None:
    """The table."""
    table = Table("", "found", "asked for", title="Deltas of the released projector at 7B")
    r = results
    table.add_row("numbers", f"{r['numbers']:,}", "196,608")
    table.add_row("repo in bfloat16", f"{r['repo_bytes_bfloat16'] / 1e6:.2f} MB", "at most 1.0 MB")
    table.add_row("load from disk", f"{r['load_ms']:.0f} ms", "")
    table.add_row("swap, median (longest)", f"{r['swap_ms_median']:.2f} ({r['swap_ms_most']:.2f}) ms", "below 50 ms")
    table.add_row("base after the swaps", "same bits" if r["base_same_bits_after_swaps"] else "changed", "same bits")
    table.add_row("merge, unmerge", f"{r['merge_ms']:.0f} ms, {r['unmerge_ms']:.2f} ms", "")
    table.add_row("after unmerging", "same bits" if r["same_bits_after_unmerge"] else "changed", "same bits")
    for name in ("forward", "backward", "step"):
        cells = f"{r[f'full_{name}_ms']:.0f} ms, {r[f'deltas_{name}_ms']:.1f} ms"
        table.add_row(f"training {name}: full, deltas", cells, "")
    table.add_row("backward: full / deltas", f"{r['backward_speedup']:.2f}", "at least 1.5")
    sizes = [f"{r[f'{kind}_gradient_and_optimizer_bytes'] / 1e6:.1f} MB" for kind in ("full", "deltas")]
    table.add_row("gradients and moments: full, deltas", ", ".join(sizes), "")
    table.add_row("memory: full / deltas", f"{r['memory_ratio']:.0f}", "at least 3")
    table.add_row("share of the projector that is trained", f"{r['trained_share']:.2%}", "below 2 %")
    Console().print(table)


if __name__ == "__main__":
    main()
