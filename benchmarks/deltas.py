"""Deltas at the size of the released projector (7B): swapping, merging, storing and training them, compared with the whole projector.

    python -m benchmarks.deltas [--swaps 100] [--steps 5] [--images 4]

Prints each figure with its target, and writes JSON. On random numbers: nothing measured here depends on their values.
Full and delta-only training take turns, step by step, on one projector.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.harness import arguments_of, prepare, print_table, write_results
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaModel
from transformers_delta_llava.modeling import PROJECTORS


def main() -> None:
    """Measure, print, write."""
    parser = arguments_of("Measure deltas at the size of the released projector.")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5, help="of each kind of training")
    parser.add_argument("--images", type=int, default=4, help="per step of training")
    arguments = parser.parse_args()
    prepare(arguments)
    model = build_projector()
    with tempfile.TemporaryDirectory() as folder:
        results = measure_sets(model, Path(folder), arguments.swaps)
    results |= measure_merge(model) | measure_training(model, arguments.steps, arguments.images)
    print_table("Deltas of the released projector at 7B", table_of(results))
    write_results("deltas", arguments, results=results)


def build_projector() -> DeltaLlavaModel:
    """A model with the released projector at 7B in memory, and nothing else."""
    config = DeltaLlavaConfig()
    text = {**config.text_config.to_dict(), "vocab_size": 32064, "num_hidden_layers": 1}
    config = DeltaLlavaConfig(text_config=text)
    with torch.device("meta"):
        model = DeltaLlavaModel(config)
    model.multi_modal_projector = PROJECTORS[config.projector_layout](config)
    return model.eval()


def delta_parameters(model: DeltaLlavaModel) -> Iterator[torch.nn.Parameter]:
    """`delta_u` and `delta_v` of every projection."""
    for name, parameter in model.multi_modal_projector.named_parameters():
        if name.endswith((".delta_u", ".delta_v")):
            yield parameter


def bases(model: DeltaLlavaModel) -> dict[str, torch.Tensor]:
    """Copies of all parameters of the projector that are not deltas."""
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
    model.add_deltas("drawn", activate=False)
    for tensor in model.delta_state_dict("drawn").values():
        tensor.normal_()
    model.save_deltas(folder / "second", "drawn", dtype=torch.bfloat16)
    loading = seconds(lambda: model.load_deltas(folder / "second"))
    times = [seconds(lambda name=name: model.set_deltas(name)) for name in ("default", "second") * (swaps // 2)]
    return {
        "numbers": sum(tensor.numel() for tensor in deltas.values()),
        "repo_bytes_bfloat16": sum(file.stat().st_size for file in (folder / "first").iterdir()),
        "load_ms": loading * 1e3,
        "swap_ms_median": statistics.median(times) * 1e3,
        "swap_ms_max": max(times) * 1e3,
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
    """Milliseconds of forward, backward and optimizer, and bytes of gradients and moments, of both kinds of training."""
    projector = model.multi_modal_projector
    parameters, deltas = list(projector.parameters()), list(delta_parameters(model))
    optimizers = {"full": torch.optim.AdamW(parameters, lr=1e-4), "deltas": torch.optim.AdamW(deltas, lr=1e-4)}
    features = random_features(model, images)
    times: dict[str, list[float]] = {}
    results: dict[str, float] = {}
    for turn in range(steps + 1):  # the first of each kind warms up
        for kind, optimizer in optimizers.items():
            if kind == "full":
                projector.requires_grad_(True)
            else:
                model.set_deltas_trainable()
            loss: list[torch.Tensor] = []
            forward = seconds(lambda loss=loss: loss.append(projector(features[0], features).square().mean()))
            parts = {"forward": forward, "backward": seconds(loss[0].backward), "step": seconds(optimizer.step)}
            for name, value in parts.items() if turn else ():
                times.setdefault(f"{kind}_{name}_ms", []).append(value * 1e3)
            moments = (t for state in optimizer.state.values() for t in state.values() if t.dim())
            gradients = (p.grad for p in parameters if p.grad is not None)
            num_bytes = sum(t.numel() * t.element_size() for t in (*moments, *gradients))
            results[f"{kind}_gradient_and_optimizer_bytes"] = num_bytes
            projector.zero_grad(set_to_none=True)
    results |= {name: statistics.median(values) for name, values in times.items()}
    results["trained_share"] = sum(p.numel() for p in deltas) / sum(p.numel() for p in parameters)
    results["backward_speedup"] = results["full_backward_ms"] / results["deltas_backward_ms"]
    full, alone = (results[f"{kind}_gradient_and_optimizer_bytes"] for kind in optimizers)
    return results | {"memory_ratio": full / alone}


def seconds(call: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table_of(r: dict) -> list[dict[str, str]]:
    """The rows of the table: figure, result, target."""
    rows = [
        ("numbers", f"{r['numbers']:,}", "196,608"),
        ("repo in bfloat16", f"{r['repo_bytes_bfloat16'] / 1e6:.2f} MB", "at most 1.0 MB"),
        ("load from disk", f"{r['load_ms']:.0f} ms", ""),
        ("swap, median (longest)", f"{r['swap_ms_median']:.2f} ({r['swap_ms_max']:.2f}) ms", "below 50 ms"),
        ("base after the swaps", "same bits" if r["base_same_bits_after_swaps"] else "changed", "same bits"),
        ("merge, unmerge", f"{r['merge_ms']:.0f} ms, {r['unmerge_ms']:.2f} ms", ""),
        ("after unmerging", "same bits" if r["same_bits_after_unmerge"] else "changed", "same bits"),
        *(
            (f"training {name}: full, deltas", f"{r[f'full_{name}_ms']:.0f} ms, {r[f'deltas_{name}_ms']:.1f} ms", "")
            for name in ("forward", "backward", "step")
        ),
        ("backward: full / deltas", f"{r['backward_speedup']:.2f}", "at least 1.5"),
        ("memory of gradients and moments: full / deltas", f"{r['memory_ratio']:.0f}", "at least 3"),
        ("share of the projector that is trained", f"{r['trained_share']:.2%}", "below 2 %"),
    ]
    return [{"figure": name, "result": result, "target": target} for name, result, target in rows]


if __name__ == "__main__":
    main()
