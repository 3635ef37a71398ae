"""Export a repo to ONNX: graphs and weights, and the files with which Python without torch, Node and browsers run them."""

import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import REPORT_FILE, DeltaLlavaError, check_output, output_folder, sha256_of, write_json
from ..hub import EXPORT_MANIFEST
from ..loading import load_config, load_repo, local_folder
from ..modeling import DeltaLlavaForConditionalGeneration


# Endings of file names, as transformers.js has them.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}
BITS = {"q8": 8, "q4": 4}
SCRIPT = Path(__file__).with_name("run_onnx.py")
FILES = ("*.json", "*.jinja", "*.safetensors*", "README.md", "tokenizer.model", "merges.txt")


def export_onnx(
    repo: str | Path,
    output: str | Path,
    *,
    num_visual_tokens: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("fp32",),
    merge_deltas: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """
    Write a repo as ONNX graphs in the layout of transformers.js, with everything that is needed to run them.

    Args:
        repo: folder or Hub id of a Delta-LLaVA repo.
        output: folder to write.
        num_visual_tokens: per image, with one graph of the vision encoder for each; by default all that the repo has. The
            repo's default is that of the export where it is among them, else the first.
        dtypes: fp32, fp16, q8, q4; the first is the default of the export.
        merge_deltas: fold the projector's deltas into its weights.
        overwrite: replace an earlier export.
        revision: of a Hub repo.
        progress: called with the number of graphs that are traced, and of all.

    Returns:
        The output folder.

    Raises:
        DeltaLlavaError: the language model cannot be exported, a weight is NaN or Inf, or the output may not be written.
        ValueError: a number of visual tokens is not supported.
        ImportError: the extra `onnx` is not installed.
    """
    from .settings import check_language_model, write_card, write_settings

    output, dtypes = Path(output), list(dict.fromkeys(dtypes))
    if unknown := set(dtypes) - SUFFIXES.keys():
        raise DeltaLlavaError(f"dtype={unknown.pop()!r} is not supported; choose from {', '.join(SUFFIXES)}")
    check_output(output, overwrite)
    folder = local_folder(repo, FILES, revision)
    config = load_config(folder)
    check_language_model(config.text_config)
    numbers = list(dict.fromkeys(num_visual_tokens or config.visual_token_budgets))
    numbers.sort(key=lambda number: (config.scale_factor_for(number), number != config.num_visual_tokens)[1])
    with output_folder(output, overwrite) as new:
        weight_files: dict[str, int] = {}
        half, others = ["fp16"] * ("fp16" in dtypes), [dtype for dtype in dtypes if dtype != "fp16"]
        graphs = count(1)
        total = (len(numbers) + 2) * (bool(half) + bool(others))
        for precision, group in (("float16", half), ("float32", others)):
            if group:
                model, processor = load_repo(folder, "cpu", precision)
                if processor.max_tiles != 1:
                    raise DeltaLlavaError(f"max_tiles={processor.max_tiles}: an export shows one view of an image")
                if merge_deltas and config.use_delta_projection:
                    model.merge_deltas()
                weight_files |= _write_graphs(
                    model, numbers, group, new / "onnx", lambda: progress(next(graphs), total)
                )
        write_settings(new, config, processor, model.generation_config, numbers, dtypes, weight_files)
        shutil.copyfile(SCRIPT, new / SCRIPT.name)
        versions = {name: metadata.version(name) for name in ("onnx", "onnxscript", "torch", "transformers")}
        report = {"deltas_merged": merge_deltas, "dtypes": dtypes, "num_visual_tokens": numbers, "versions": versions}
        write_json(report, new / REPORT_FILE)
        write_card(new, output.name, folder, numbers, dtypes)
        _write_manifest(new, dtypes)
    return output


def _write_manifest(folder: Path, dtypes: list[str]) -> None:
    """The files but the card, with hashes and dtypes, so that a browser can tell when it has all of one version."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"):
        name = path.name.partition(".onnx")[0]
        dtype = next((d for d in dtypes if SUFFIXES[d] and name.endswith(SUFFIXES[d])), "fp32")
        graph = dtype if path.parent.name == "onnx" else None
        entry = {"path": path.relative_to(folder).as_posix(), "sha256": sha256_of(path), "bytes": path.stat().st_size}
        files.append({**entry, "dtype": graph})
    write_json({"dtype": dtypes[0], "files": files}, folder / EXPORT_MANIFEST)


def _write_graphs(
    model: DeltaLlavaForConditionalGeneration,
    numbers: list[int],
    dtypes: list[str],
    folder: Path,
    on_graph: Callable[[], None],
) -> dict[str, int]:
    """Write the graphs of `dtypes`; returns how many files of weights each has, which transformers.js has to know."""
    from .files import WeightFiles, quantize_blocks, store_half
    from .graphs import trace_decoder, trace_embed_tokens, trace_vision_encoder
    from .settings import encoder_name

    folder.mkdir(exist_ok=True)
    weight_files: dict[str, int] = {}

    def write(graph: str, traced: Any, weights: dict[str, WeightFiles]) -> None:
        # Writing moves a graph's weights to the file, so the quantised copies come first.
        for dtype in sorted(dtypes, key=lambda dtype: dtype not in BITS):
            model = traced
            if dtype in BITS and graph == "decoder_model_merged" or dtype == "q4" and graph == "embed_tokens":
                model = quantize_blocks(traced, BITS[dtype])
            elif dtype in BITS:
                model = store_half(traced)
            file_name = f"{graph}{SUFFIXES[dtype]}.onnx"
            weights[dtype].save(model, file_name)
            if file_name == weights[dtype].name:  # other encoders use this one's files
                weight_files[file_name] = len(weights[dtype].files)
        on_graph()

    def new_files(graph: str) -> dict[str, WeightFiles]:
        return {dtype: WeightFiles(folder, f"{graph}{SUFFIXES[dtype]}.onnx") for dtype in dtypes}

    encoders = new_files("vision_encoder")
    for number in numbers:
        write(encoder_name(number, numbers[0]), trace_vision_encoder(model, number), encoders)
    for graph, trace in (("embed_tokens", trace_embed_tokens), ("decoder_model_merged", trace_decoder)):
        write(graph, trace(model), new_files(graph))
    return weight_files
