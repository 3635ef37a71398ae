"""Whether the GPU computes what it should: golden numbers, the CPU's results, right answers. Each check is a row with its bound."""

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness import model_config
from harness.models import build, make_inputs
from tests.modeling.projector_cases import golden_projector
from tests.reference import goldens
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.analysis import load_repo
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.evaluation import answer_questions, draw_test_questions, score_answers
from transformers_delta_llava.modeling.delta_repo_delta_llava import dtype_name

from .report import Report


# Largest difference as a share of the largest number expected. float32 without TF32; with it as PyTorch has it by default.
BOUNDS = {"float32": 1e-5, "float32, PyTorch's defaults": 2e-3, "bfloat16": 2e-2, "float16": 1e-2}
WHOLE_MODEL = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
BATCH, TEXT_TOKENS = 2, 20
EASY_VQA = Path(__file__).parents[2] / "examples" / "easy-vqa"


def correctness(report: Report) -> None:
    """All checks, the golden numbers first."""
    # The small ones first, then those that compile or read files.
    _golden(report)
    model = _small_model(report)
    budgets = (144, 1) if report.rehearse else model.config.visual_token_budgets
    inputs = {budget: make_inputs(model, budget, TEXT_TOKENS, BATCH) for budget in budgets}
    with torch.no_grad():
        expected = {budget: model(**x, num_visual_tokens=budget).logits for budget, x in inputs.items()}
        _every_budget(report, model, inputs, expected)
        _easy_vqa(report)
        _autocast(report, model, inputs, expected)
        _attention(report, model, inputs, expected)
        _device_map(report, model, inputs, expected)
        _compiled(report, model, inputs, expected)


def check(report: Report, name: str, measure: Callable[[], float], bound: float, seconds: float = 2.0) -> None:
    """One row: what `measure` returns must be at most `bound`."""

    def run() -> None:
        start = time.perf_counter()
        value = measure()
        row = {"check": name, "value": value, "at most": bound, "ok": value <= bound}
        report.add(**row, **{"s taken": time.perf_counter() - start})

    report.attempt(name, run, seconds)


def _precise(enabled: bool) -> None:
    """Whether float32 is multiplied as float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = not enabled


def _golden(report: Report) -> None:
    projector = golden_projector().to(report.device)

    @torch.no_grad()
    def difference(case: str, dtype: torch.dtype) -> float:
        x = {name: tensor.to(report.device, dtype) for name, tensor in goldens.inputs(case).items()}
        levels = x["x_multi"].split(x["x_single"].shape[-1], dim=-1)
        output = projector(x["x_single"], levels, goldens.MANIFEST["cases"][case]["scale_factor"])
        return goldens.difference(output.cpu(), goldens.expected(case)["output"])

    dtypes = {
        "float32": torch.float32,
        "float32, PyTorch's defaults": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if report.rehearse:
        del dtypes["float16"]  # seconds on a CPU
    for name, dtype in dtypes.items():
        _precise(name == "float32")
        projector.to(dtype)
        for case in goldens.CASES[:1] if report.rehearse else goldens.CASES:
            check(report, f"golden numbers, {case}, {name}", partial(difference, case, dtype), BOUNDS[name])
        if dtype != torch.float32:
            projector.load_state_dict(golden_projector().state_dict())
    _precise(True)


def _small_model(report: Report) -> DeltaLlavaForConditionalGeneration:
    """On the CPU in float32: the widths of a real tower and language model, and few layers."""
    if report.rehearse:
        config = model_config("tiny")
    else:
        text = {"num_hidden_layers": 4, "vocab_size": 8192, "tie_word_embeddings": False, "layer_types": None}
        levels = {"vision_feature_levels": [2, 3, 4, 5], "vision": {"num_hidden_layers": 6}}
        config = model_config("0.5b", text=text, image_token_id=8191, **levels)
    return build(lambda: DeltaLlavaForConditionalGeneration(config), "cpu", torch.float32)


def _difference(model: Any, inputs: dict[str, Any], budget: int, expected: torch.Tensor, **options: Any) -> float:
    device = next(model.parameters()).device
    x = {name: tensor.to(device) for name, tensor in inputs.items()}
    x["pixel_values"] = x["pixel_values"].to(model.dtype)
    return goldens.difference(model(**x, num_visual_tokens=budget, **options).logits.float().cpu(), expected)


def _every_budget(report: Report, model: Any, inputs: Any, expected: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = dtype_name(dtype)
        moved = _copy(model, report.device, dtype)
        for budget in inputs:
            measure = partial(_difference, moved, inputs[budget], budget, expected[budget])
            check(report, f"whole model beside the CPU, {budget} tokens, {name}", measure, WHOLE_MODEL[name])


def _copy(model: Any, device: str, dtype: torch.dtype) -> Any:
    """Another model of the same weights."""
    copy = build(lambda: DeltaLlavaForConditionalGeneration(model.config), device, dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def _autocast(report: Report, model: Any, inputs: Any, expected: Any) -> None:
    moved, budget = _copy(model, report.device, torch.float32), 144
    for dtype in (torch.bfloat16, torch.float16):
        name = dtype_name(dtype)

        def measure(dtype: torch.dtype = dtype) -> float:
            with torch.autocast(report.device, dtype):
                return _difference(moved, inputs[budget], budget, expected[budget])

        check(report, f"autocast, {name}", measure, WHOLE_MODEL[name])


def _attention(report: Report, model: Any, inputs: Any, expected: Any) -> None:
    moved, budget = _copy(model, report.device, torch.bfloat16), 144
    backends = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    if report.device == "cuda":
        backends |= {"memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    cases = {f"sdpa, {name}": ("sdpa", sdpa_kernel(backend)) for name, backend in backends.items()}
    cases |= {"eager": ("eager", nullcontext()), "flex_attention": ("flex_attention", nullcontext())}
    for name, (implementation, context) in cases.items():

        def measure(implementation: str = implementation, context: Any = context) -> float:
            moved.set_attn_implementation(implementation)
            # In a rehearsal nothing is translated to C++, which takes a minute.
            with torch.compiler.set_stance("force_eager" if report.rehearse else "default"), context:
                return _difference(moved, inputs[budget], budget, expected[budget])

        check(report, f"attention, {name}", measure, WHOLE_MODEL["bfloat16"], 25.0 if "flex" in name else 2.0)
    moved.set_attn_implementation("sdpa")


def _compiled(report: Report, model: Any, inputs: Any, expected: Any) -> None:
    moved = _copy(model, report.device, torch.bfloat16)
    compiled = torch.compile(moved, fullgraph=True, backend="eager" if report.rehearse else "inductor")
    for budget in (144,) if report.rehearse else (144, 1):
        x = {name: tensor.to(report.device) for name, tensor in inputs[budget].items()}
        x["pixel_values"] = x["pixel_values"].to(moved.dtype)

        def measure(x: dict[str, Any] = x, budget: int = budget) -> float:
            logits = compiled(**x, num_visual_tokens=budget, use_cache=False).logits
            return goldens.difference(logits.float().cpu(), expected[budget])

        check(report, f"compiled whole, {budget} tokens", measure, WHOLE_MODEL["bfloat16"], 20.0)


def _device_map(report: Report, model: Any, inputs: Any, expected: Any) -> None:
    device: Any = 0 if report.device == "cuda" else "cpu"
    vision, language = ("model.vision_tower", "model.multi_modal_projector"), ("model.language_model", "lm_head")
    with tempfile.TemporaryDirectory() as folder:
        report.attempt("saving the small model", partial(model.save_pretrained, folder))
        for name, on_gpu in (("tower and projector", vision), ("language model", language)):
            placed = {part: device if part in on_gpu else "cpu" for part in (*vision, *language)}

            def measure(placed: dict[str, Any] = placed) -> float:
                loaded = DeltaLlavaForConditionalGeneration.from_pretrained(
                    folder, device_map=placed, dtype=torch.float32
                ).eval()
                return goldens.difference(
                    loaded(**inputs[144], num_visual_tokens=144).logits.float().cpu(), expected[144]
                )

            check(report, f"device_map, {name} on the GPU", measure, WHOLE_MODEL["float32"], 10.0)


def _easy_vqa(report: Report) -> None:
    """500 test questions, 8 in a rehearsal; the value is the share of wrong answers."""

    def measure(budget: int) -> float:
        answers = answer_questions(model, processor, questions, budget, batch_size=128)
        scores = score_answers([question.answer for question in questions], answers)
        return 1 - scores["overall"].correct / scores["overall"].total

    with tempfile.TemporaryDirectory() as folder:

        def load() -> Any:
            repo = Path(folder) / "easy-vqa"
            convert_checkpoint(EASY_VQA, repo, vision_tower=str(EASY_VQA / "vision-tower"))
            return *load_repo(str(repo), report.device, "bfloat16"), draw_test_questions(8 if report.rehearse else 500)

        loaded = report.attempt("easy-VQA", load, 10.0)
        if loaded is None:
            return
        model, processor, questions = loaded
        for budget in (16, 1):
            name = f"easy-VQA, wrong of {len(questions)}, bfloat16, {budget} tokens"
            check(report, name, partial(measure, budget), 0.01, 5.0)
