"""Export a repo of ours to ONNX: graphs, weights, and what Python without torch, Node and browsers need beside them."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..analysis.inference import load_config, load_repo
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError
from ..utils.files import EXPORTED_FROM, REPORT_FILE, atomic_folder, check_output, local_folder, write_json


# File names' ends, as transformers.js has them.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}
GRAPHS = "onnx"
SCRIPT = Path(__file__).with_name("run_onnx.py")
# By `model_type`, what transformers.js calls a language model with this cache.
LANGUAGE_MODELS = {
    **{name: name for name in ("llama", "mistral", "gemma", "phi3", "qwen2", "qwen3")},
    "seed_oss": "llama",
}
_FILES = ("*.json", "*.jinja", "*.safetensors*", "tokenizer.model", "merges.txt", "*.py")
# What decides about pixel values.
IMAGE_SETTINGS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor") + (
    *("do_normalize", "image_mean", "image_std"),
)
_QUESTION = "What is it?"


@dataclass(frozen=True)
class OnnxReport:
    """Result of `export_onnx`.

    Attributes:
        output: the folder.
        dtypes: precisions.
        num_visual_tokens: numbers of visual tokens, the default first.
        bytes_by_dtype: size of the graphs and weights of each precision.
    """

    output: Path
    dtypes: list[str]
    num_visual_tokens: list[int]
    bytes_by_dtype: dict[str, int]


def export_onnx(
    repo: str | Path,
    output: str | Path,
    *,
    num_visual_tokens: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("fp32",),
    merge_deltas: bool = False,
    overwrite: bool = False,
    on_message: Callable[[str], None] | None = None,
) -> OnnxReport:
    """Write a repo as ONNX graphs in the layout of transformers.js, with all that is needed to run them.

    Args:
        repo: folder or Hub id of a Delta-LLaVA repo.
        output: folder to write; the folder of `repo` itself adds a folder `onnx` to it.
        num_visual_tokens: of an image, a graph of the vision encoder for each; by default all that the repo has. The repo's
            own default is that of the export where it is among them, else the first.
        dtypes: fp32, fp16, q8, q4; the first is the default of the export.
        merge_deltas: fold the projector's deltas into its weights.
        overwrite: replace an earlier export.
        on_message: called with a sentence before each step.

    Raises:
        DeltaLlavaError: one sentence on why there is no output.
        ImportError: the extra `onnx` is not installed.
        OSError: reading or writing failed.
    """
    say = on_message or (lambda sentence: None)
    _check_installed()
    dtypes = list(dict.fromkeys(dtypes))
    for dtype in dtypes:
        if dtype not in SUFFIXES:
            raise DeltaLlavaError(f"dtype={dtype!r}: use {', '.join(SUFFIXES)}.")
    folder = local_folder(str(repo), "repo", _FILES)
    target, graphs = _target(folder, Path(output), overwrite)
    config = load_config(str(folder))
    if config.text_config.model_type not in LANGUAGE_MODELS:
        raise DeltaLlavaError(
            f"The language model of {folder.name} is of type {config.text_config.model_type}, which cannot be exported to "
            f"ONNX; those of type {', '.join(LANGUAGE_MODELS)} can."
        )
    numbers = _budgets(config, num_visual_tokens)
    with atomic_folder(target, overwrite) as tmp_dir:
        (tmp_dir / graphs).mkdir(exist_ok=True)
        chunks: dict[str, int] = {}
        for precision, group in _by_precision(dtypes).items():
            model, processor = load_repo(str(folder), dtype=precision)
            if merge_deltas and config.use_delta_projection:
                model.merge_deltas()
            chunks |= _write_graphs(model, numbers, group, tmp_dir / graphs, say)
        _write_settings(model, processor, numbers, dtypes, chunks, tmp_dir)
        write_json(_report(folder, dtypes, numbers, merge_deltas), tmp_dir / REPORT_FILE)
        shutil.copyfile(SCRIPT, tmp_dir / SCRIPT.name)
        sizes = {dtype: _size(tmp_dir / graphs, SUFFIXES[dtype]) for dtype in dtypes}
    return OnnxReport(target, dtypes, numbers, sizes)


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"There is no {missing[0]}; install the extra: pip install 'transformers-delta-llava[onnx]'."
        )


def _target(folder: Path, output: Path, overwrite: bool) -> tuple[Path, str]:
    """The folder that is written, and where in it the graphs go."""
    if output.exists() and output.resolve() == folder.resolve():
        return folder / GRAPHS, "."
    check_output(output, [folder], overwrite)
    return output, GRAPHS


def _budgets(config: DeltaLlavaConfig, numbers: Sequence[int] | None) -> list[int]:
    """The numbers of visual tokens, the default first."""
    numbers = list(dict.fromkeys(numbers or config.visual_token_budgets))
    for number in numbers:
        config.scale_factor_for(number)  # raises
    return sorted(numbers, key=lambda number: number != config.num_visual_tokens)


def _by_precision(dtypes: Iterable[str]) -> dict[str, list[str]]:
    """The dtypes by the precision of the model that is traced for them."""
    groups: dict[str, list[str]] = {}
    for dtype in dtypes:
        groups.setdefault("float16" if dtype == "fp16" else "float32", []).append(dtype)
    return groups


def encoder_name(number: int, default: int) -> str:
    """The graph that gives `number` visual tokens."""
    return "vision_encoder" if number == default else f"vision_encoder_{number}"


def _write_graphs(
    model: DeltaLlavaForConditionalGeneration,
    numbers: list[int],
    dtypes: list[str],
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, int]:
    """The graphs of `dtypes`; returns how many files of weights each has, as transformers.js wants to know."""
    from .graphs import trace_decoder, trace_embed_tokens, trace_vision_encoder
    from .quantize import quantize_blocks, store_half
    from .weights import WeightFiles

    # The last to be written are the traced graphs themselves: writing empties them.
    quantized = {"q8": 8, "q4": 4}
    order = sorted(dtypes, key=lambda dtype: dtype not in quantized)
    chunks: dict[str, int] = {}

    def write(name: str, traced: Any, files: dict[str, WeightFiles], shrink: Callable[[Any, str], Any]) -> None:
        for dtype in order:
            graph = shrink(traced, dtype) if dtype in quantized else traced
            files[dtype].save(graph, f"{name}{SUFFIXES[dtype]}.onnx")
            chunks[f"{name}{SUFFIXES[dtype]}.onnx"] = len(files[dtype].files)

    def weights(name: str) -> dict[str, WeightFiles]:
        return {dtype: WeightFiles(folder, f"{name}{SUFFIXES[dtype]}.onnx") for dtype in order}

    shared = weights("vision_encoder")
    for number in numbers:
        say(f"tracing the vision encoder with {number} visual tokens")
        traced = trace_vision_encoder(model, number)
        write(encoder_name(number, numbers[0]), traced, shared, lambda graph, dtype: store_half(graph))
    for name, trace in (("embed_tokens", trace_embed_tokens), ("decoder_model_merged", trace_decoder)):
        say(f"tracing {name}")
        write(name, trace(model), weights(name), lambda graph, dtype: quantize_blocks(graph, quantized[dtype]))
    return {name: number for name, number in chunks.items() if number and not _is_other_encoder(name)}


def _is_other_encoder(name: str) -> bool:
    """Whether a graph uses the weights in another one's files, which transformers.js does not find by itself."""
    return name.startswith("vision_encoder_") and name.split("_")[2].split(".")[0].isdecimal()


def _write_settings(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    numbers: list[int],
    dtypes: list[str],
    chunks: dict[str, int],
    folder: Path,
) -> None:
    """`config.json` and the files of processor and tokenizer, in the words of LLaVA."""
    config, side = model.config, model.config.vision_config.image_size
    patch_sizes = {str(number): patch_size(side, number) for number in numbers}
    processor.tokenizer.save_pretrained(folder)
    _write_tokenizer(processor, folder)
    generation = model.generation_config or GenerationConfig()
    generation.save_pretrained(folder)
    text = {**config.text_config.to_dict(), "model_type": LANGUAGE_MODELS[config.text_config.model_type]}
    text["head_dim"] = (
        getattr(config.text_config, "head_dim", None) or text["hidden_size"] // text["num_attention_heads"]
    )
    settings = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": config.image_token_id,
        "image_seq_length": numbers[0],
        "model_type": "llava",
        "text_config": text,
        "vision_config": config.vision_config.to_dict(),
        "transformers.js_config": {"dtype": dtypes[0], "use_external_data_format": chunks},
        "onnx_export": {
            "do_pad": processor.do_pad,
            "dtypes": dtypes,
            "image_token": processor.image_token,
            "num_visual_tokens": numbers[0],
            "patch_sizes": patch_sizes,
            "prompts": {"image": _split_prompt(processor, True), "text": _split_prompt(processor, False)},
            "vision_encoders": {str(number): encoder_name(number, numbers[0]) for number in numbers},
        },
    }
    write_json(json.loads(json.dumps(settings, default=str)), folder / "config.json")
    images = json.loads(processor.image_processor.to_json_string())
    images = {name: images[name] for name in IMAGE_SETTINGS if images.get(name) is not None}
    kind = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    names = {"image_processor_type": kind, "processor_class": "LlavaProcessor"}
    write_json({"do_center_crop": False, **images, **names}, folder / "preprocessor_config.json")
    words = {
        "image_token": processor.image_token,
        "num_additional_image_tokens": 0,
        "processor_class": "LlavaProcessor",
    }
    write_json({**words, "patch_size": patch_sizes[str(numbers[0])]}, folder / "processor_config.json")


def patch_size(image_size: int, num_visual_tokens: int) -> int | float:
    """The size of a patch with which LLaVA's processor counts `num_visual_tokens` placeholders."""
    side = round(num_visual_tokens**0.5)
    whole = image_size // side
    return whole if image_size // whole == side else image_size / (side + 0.5)


def _split_prompt(processor: DeltaLlavaProcessor, with_image: bool) -> list[str]:
    """What stands before and after the question in a first turn."""
    content = [{"type": "image"}] * with_image + [{"type": "text", "text": _QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, question, after = prompt.rpartition(_QUESTION)
    if not question:
        raise DeltaLlavaError("The repo's chat template does not write the question, so there is no prompt to export.")
    return [before, after]


def _write_tokenizer(processor: DeltaLlavaProcessor, folder: Path) -> None:
    """The tokenizer for prompts that the template has written, special tokens and all; the template also where transformers.js
    looks for it."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if (
        isinstance(tokenizer.get("post_processor"), dict)
        and tokenizer["post_processor"].get("type") == "TemplateProcessing"
    ):
        tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = processor.chat_template
    if isinstance(template, dict):
        template = template["default"]
    write_json({**settings, "chat_template": template}, folder / "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _report(folder: Path, dtypes: list[str], numbers: list[int], merged: bool) -> dict[str, Any]:
    """Marks the folder as one that may be overwritten, and says what it was written with."""
    versions = {
        name: metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript", "torch", "transformers")
    }
    return {
        EXPORTED_FROM: folder.name,
        "deltas_merged": merged,
        "dtypes": dtypes,
        "num_visual_tokens": numbers,
        "versions": versions,
    }


def _size(folder: Path, suffix: str) -> int:
    """Bytes of the graphs and weights of one precision."""
    others = tuple(f"{end}.onnx" for end in SUFFIXES.values() if end and end != suffix)
    return sum(
        path.stat().st_size
        for path in folder.glob("*.onnx*")
        if (stem := path.name.partition(".onnx")[0] + ".onnx").endswith(f"{suffix}.onnx")
        and not (suffix == "" and stem.endswith(others))
    )
