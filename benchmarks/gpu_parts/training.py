"""Steps of training at several numbers of visual tokens, beside LLaVA at every patch and Table 4 of the paper.

7B in stage 1 (the projector alone) and in stage 2 with LoRA on every linear map of the language model and the projector in full; and a
language model of Qwen2-1.5B's shape in stage 2, in full. Forward, backward and AdamW's update on random images and text; no data is
loaded. Each without gradient checkpointing, then with it.
"""

import time
from functools import partial
from typing import Any

import torch

from harness import timed
from harness.models import LLAVA, build_pair, make_inputs
from training_step import TABLE_4, make_optimizer, step

from .report import Report, peak_gigabytes


TEXT_TOKENS, BATCH = 128, 8
BUDGETS = [144, 36, 1]
QWEN2_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}


def training_step(report: Report) -> None:
    """Three kinds of training; the second way of each comes last."""
    report.note(text_tokens=TEXT_TOKENS, batch=2 if report.rehearse else BATCH, optimizer="AdamW")
    tiny = report.rehearse
    pair = build_pair("tiny" if tiny else "7b", report.device, torch.bfloat16)
    _compare(report, pair, "7B, stage 1", 1)
    if report.attempt("LoRA", partial(_add_lora, pair[0].model.language_model)) is not None:
        _compare(report, pair, "7B, stage 2, LoRA", 2)
    del pair
    if report.device == "cuda":
        torch.cuda.empty_cache()
    pair = build_pair(
        "tiny" if tiny else "0.5b", report.device, torch.bfloat16, **({} if tiny else {"text": QWEN2_1_5B})
    )
    _compare(report, pair, "1.5B, stage 2", 2)


def _add_lora(language_model: Any) -> Any:
    """LLaVA's own setting of LoRA, rank 128 on every linear map; one language model is both sides'."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=targets)
    return inject_adapter_in_model(config, language_model)


def _compare(report: Report, pair: tuple[Any, Any], kind: str, stage: int) -> None:
    for checkpointing in (False, True):
        _compare_steps(report, pair, kind, stage, checkpointing)


def _compare_steps(report: Report, pair: tuple[Any, Any], kind: str, stage: int, checkpointing: bool) -> None:
    ours, llava = pair
    for model in pair:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
    names: list[Any] = [LLAVA, *(BUDGETS[:1] if report.rehearse else BUDGETS)]
    reference: dict[str, Any] = {}

    def measure(name: Any) -> None:
        started = time.perf_counter()
        peak_gigabytes(report)
        model = llava if name == LLAVA else ours
        budget = ours.config.num_visual_tokens_for(1) if name == LLAVA else name
        batch = 2 if report.rehearse else BATCH
        inputs: dict[str, Any] = make_inputs(model, budget, TEXT_TOKENS, batch)
        image = inputs["input_ids"] == model.config.image_token_id
        inputs["labels"] = inputs["input_ids"].masked_fill(image, -100)
        if name != LLAVA:
            inputs["num_visual_tokens"] = budget
        optimizer = make_optimizer(model, "AdamW")
        call = partial(step, model, inputs, stage, optimizer)
        for _ in range(2):  # the first makes AdamW's moments
            once = timed(call, report.device)
        rounds = 1 if report.rehearse else min(20, max(3, round(1.5 / once)))
        seconds = sorted(timed(call, report.device) for _ in range(rounds))[rounds // 2]
        published = TABLE_4.get(name)
        row = {
            "kind": kind,
            "checkpointing": checkpointing,
            "visual tokens": name if isinstance(name, int) else f"{name} 576",
            "ms": 1000 * seconds,
            "images/s": batch / seconds,
            "of LLaVA's": seconds / reference["s"] if reference else 1.0 if name == LLAVA else None,
            "Table 4": published[stage - 1] / TABLE_4[LLAVA][stage - 1] if published else None,
            "peak GB": peak_gigabytes(report),
            "s taken": time.perf_counter() - started,
        }
        if name == LLAVA:
            reference["s"] = seconds
        report.add(**row)

    for name in names:
        what = f"{kind}, {'with' if checkpointing else 'without'} checkpointing, {name}"
        report.attempt(what, partial(measure, name), 6.0)
        for model in pair:
            model.zero_grad(set_to_none=True)
