"""Export a repo to ONNX: graphs, weights, and what Python without torch, Node and browsers need beside them."""

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..analysis.inference import load_config, load_repo
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..utils.errors import DeltaLlavaError
from ..utils.files import (
    EXPORTED_FROM,
    REPORT_FILE,
    atomic_folder,
    check_output,
    local_folder,
    public_name,
    write_json,
)


# The ends of file names, as transformers.js has them.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}
# Of quantised weights; and of all weights of a precision, on the average.
BITS = {"q8": 8, "q4": 4}
_BYTES = {"fp32": 4.0, "fp16": 2.0, "q8": 1.5, "q4": 1.0}
# The folder of the graphs in a repo of their own, and of all files in the repo that was exported.
GRAPHS = "onnx"
SCRIPT = Path(__file__).with_name("run_onnx.py")
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_FILES = ("*.json", "*.jinja", "*.safetensors*", "README.md", "tokenizer.model", "merges.txt")
Say = Callable[[str], None]


@dataclass(frozen=True)
class OnnxReport:
    """Result of `export_onnx`.

    Attributes:
        output: the folder.
        num_visual_tokens: for which there is a graph, the default first.
        bytes_by_dtype: size of the graphs and weights of each precision.
        compared: with PyTorch, if asked for.
    """

    output: Path
    num_visual_tokens: list[int]
    bytes_by_dtype: dict[str, int]
    compared: list[Any]


def export_onnx(
    repo: str | Path,
    output: str | Path,
    *,
    num_visual_tokens: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("fp32",),
    merge_deltas: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    on_message: Say | None = None,
) -> OnnxReport:
    """Write a repo as ONNX graphs in the layout of transformers.js, with all that is needed to run them.

    Args:
        repo: folder or Hub id of a Delta-LLaVA repo.
        output: folder to write; the folder of `repo` itself adds a folder `onnx` to it.
        num_visual_tokens: of an image, with a graph of the vision encoder for each; by default all that the repo has. The
            repo's own default is that of the export where it is among them, else the first.
        dtypes: fp32, fp16, q8, q4; the first is the default of the export.
        merge_deltas: fold the projector's deltas into its weights.
        verify: compare the export with the model in PyTorch before it is published.
        overwrite: replace an earlier export.
        on_message: called with a sentence before each step.

    Raises:
        DeltaLlavaError: one sentence on why there is no output.
        ImportError: the extra `onnx` is not installed.
        OSError: reading or writing failed.
    """
    say = on_message or (lambda sentence: None)
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"An export needs {missing[0]}, which is not installed: pip install 'transformers-delta-llava[onnx]'."
        )
    from .settings import LANGUAGE_MODELS, encoder_name, write_card, write_settings
    from .verify import verify_export

    dtypes = list(dict.fromkeys(dtypes))
    if unknown := [dtype for dtype in dtypes if dtype not in SUFFIXES]:
        raise DeltaLlavaError(f"dtype={unknown[0]!r}: use {', '.join(SUFFIXES)}.")
    folder, output = local_folder(str(repo), "repo", _FILES), Path(output)
    inside = output.exists() and output.resolve() == folder.resolve()
    output = folder / GRAPHS if inside else output
    check_output(output, [] if inside else [folder], overwrite)
    config = load_config(str(folder))
    text = config.text_config
    if text.model_type not in LANGUAGE_MODELS:
        raise DeltaLlavaError(
            f"The language model of {folder.name} is of type {text.model_type}, which cannot be exported to ONNX; those of type "
            f"{', '.join(LANGUAGE_MODELS)} can."
        )
    rope_type = (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in ("dynamic", "longrope"):
        raise DeltaLlavaError(
            f"The language model of {folder.name} has rope_type={rope_type!r}: its position embeddings change with the length of "
            "the prompt, which a graph cannot do, so it cannot be exported to ONNX."
        )
    numbers = _numbers(config, num_visual_tokens)
    report = {
        EXPORTED_FROM: public_name(str(repo)),
        "deltas_merged": merge_deltas,
        "dtypes": dtypes,
        "num_visual_tokens": numbers,
        "versions": {name: metadata.version(name) for name in (*_PACKAGES, "torch", "transformers")},
    }
    with atomic_folder(output, overwrite) as tmp_dir:
        graphs = tmp_dir if inside else tmp_dir / GRAPHS
        graphs.mkdir(exist_ok=True)
        weight_files: dict[str, int] = {}
        unwritten = dtypes
        by_precision = {"float16": [d for d in dtypes if d == "fp16"], "float32": [d for d in dtypes if d != "fp16"]}
        for precision, group in by_precision.items():
            if group:
                model, processor = load_repo(str(folder), dtype=precision)
                _check_space(tmp_dir, model, unwritten)
                if merge_deltas and config.use_delta_projection:
                    model.merge_deltas()
                weight_files |= _write_graphs(model, numbers, group, graphs, say)
                unwritten = [dtype for dtype in unwritten if dtype not in group]
        generation = model.generation_config or GenerationConfig()
        write_settings(tmp_dir, config, processor, generation, numbers, dtypes, weight_files)
        shutil.copyfile(SCRIPT, tmp_dir / SCRIPT.name)
        write_json(report, tmp_dir / REPORT_FILE)
        compared = []
        if verify:
            say("comparing with PyTorch")
            whole = model if by_precision["float32"] else load_repo(str(folder))[0]
            compared = verify_export(whole, processor, tmp_dir, dtypes, numbers)
        encoders = [encoder_name(number, numbers[0]) for number in numbers]
        sizes = {dtype: bytes_on_disk(graphs, encoders, dtype) for dtype in dtypes}
        if not inside:
            write_card(tmp_dir, output.name, folder, report, sizes, compared)
    return OnnxReport(output, numbers, sizes, compared)


def _numbers(config: DeltaLlavaConfig, numbers: Sequence[int] | None) -> list[int]:
    """The numbers of visual tokens, the default first."""
    numbers = list(dict.fromkeys(numbers or config.visual_token_budgets))
    for number in numbers:
        config.scale_factor_for(number)  # raises
    return sorted(numbers, key=lambda number: number != config.num_visual_tokens)


def _check_space(folder: Path, model: DeltaLlavaForConditionalGeneration, dtypes: list[str]) -> None:
    """Refuse an export that the disk has no room for, before minutes of tracing."""
    tied = model.get_input_embeddings().weight is model.lm_head.weight
    weights = sum(weight.numel() for weight in model.parameters()) + (model.lm_head.weight.numel() if tied else 0)
    needed, free = weights * sum(_BYTES[dtype] for dtype in dtypes), shutil.disk_usage(folder).free
    if needed > free:
        raise DeltaLlavaError(
            f"The export takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on the output's disk; make room, "
            "or export fewer dtypes."
        )


def _write_graphs(
    model: DeltaLlavaForConditionalGeneration, numbers: list[int], dtypes: list[str], folder: Path, say: Say
) -> dict[str, int]:
    """The graphs of `dtypes`; returns how many files of weights each has that transformers.js has to know."""
    from .graphs import trace_decoder, trace_embed_tokens, trace_vision_encoder
    from .quantize import quantize_blocks, store_half
    from .settings import encoder_name
    from .weights import WeightFiles

    weight_files: dict[str, int] = {}

    def write(graph: str, traced: Any, weights: dict[str, WeightFiles]) -> None:
        # Writing moves a graph's weights to the file, so the quantised copies come first.
        for dtype in sorted(dtypes, key=lambda dtype: dtype not in BITS):
            model = traced
            if dtype == "q4" and graph == "embed_tokens" or dtype in BITS and graph == "decoder_model_merged":
                model = quantize_blocks(traced, BITS[dtype])
            elif dtype in BITS:
                model = store_half(traced)
            file_name = f"{graph}{SUFFIXES[dtype]}.onnx"
            weights[dtype].save(model, file_name)
            if file_name == weights[dtype].name:  # other encoders use this one's files
                weight_files[file_name] = len(weights[dtype].files)

    def new_files(graph: str) -> dict[str, WeightFiles]:
        return {dtype: WeightFiles(folder, f"{graph}{SUFFIXES[dtype]}.onnx") for dtype in dtypes}

    shared = new_files("vision_encoder")
    for number in numbers:
        say(f"tracing the vision encoder with {number} visual tokens")
        write(encoder_name(number, numbers[0]), trace_vision_encoder(model, number), shared)
    for graph, trace in (("embed_tokens", trace_embed_tokens), ("decoder_model_merged", trace_decoder)):
        say(f"tracing {graph}")
        write(graph, trace(model), new_files(graph))
    return weight_files


def bytes_on_disk(folder: Path, encoders: Iterable[str], dtype: str) -> int:
    """Bytes of the graphs of one precision and of their weights; `encoders` are the vision encoders that there are."""
    graphs = (*encoders, "embed_tokens", "decoder_model_merged")
    return sum(path.stat().st_size for name in graphs for path in folder.glob(f"{name}{SUFFIXES[dtype]}.onnx*"))
