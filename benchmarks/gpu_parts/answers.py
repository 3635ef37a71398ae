"""Answers of a whole model, in transformers' own LLaVA at every patch and in ours at every number of visual tokens.

Three ways, each on the same weights:

- `dynamic`: `generate` as everybody calls it, with a dynamic cache. At batch 1 it waits for Python more than for the GPU.
- `graph`: the same kernels, prefill and a step of decoding captured as CUDA graphs over a static cache.
- `compiled`: as `graph`, with MLPs, and the language model's norms and rotary positions, compiled by Inductor. Whole layers are not:
  each of the language model's knows its place in the cache and would be compiled for itself, 32 times; hooks break up the tower's.

Times are those until the logits of a token are there. A floor is what operations and weights allow at the measured rates (`roofline`).
Sides follow each other, LLaVA first and last: `drift` is the time of its last run over that of its first. At the end a profile says which
kernels a prefill and a step of decoding consist of.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, CompileConfig, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from harness.models import LLAVA, build_pair, make_inputs
from transformers_delta_llava.analysis import ModelProfile, paper_flops, profile_model, roofline
from transformers_delta_llava.modeling import CACHE_NAME

from .report import Report, captured, measured_rates, milliseconds, peak_gigabytes


# Prefill starts from an empty cache and without padding, so causality is all the mask it needs. While a graph is captured transformers
# cannot see that, and would build a mask that keeps flash attention away; for an attention that it does not know it builds none.
MASKLESS = "sdpa_without_mask"
AttentionInterface.register(MASKLESS, ALL_ATTENTION_FUNCTIONS["sdpa"])

TEXT_TOKENS = 68
# The most telling first: a cut costs the rest.
BUDGETS = [144, 1, 36, 576, 64, 16, 4]
SHORT, LONG = 30, 128  # new tokens; the paper's answers have about 30


class Side:
    """One of the models of a comparison at one number of visual tokens and one batch size."""

    def __init__(self, model: Any, budget: int, batch: int, is_ours: bool):
        self.model, self.budget, self.batch, self.is_ours = model, budget, batch, is_ours
        inputs = make_inputs(model, budget, TEXT_TOKENS, batch)
        del inputs["attention_mask"]  # no row is padded
        self.inputs: dict[str, Any] = inputs | ({"num_visual_tokens": budget} if is_ours else {})

    @property
    def language_model(self) -> Any:
        """Without its head."""
        return self.model.model.language_model

    def projector_call(self) -> Any:
        """The projector alone on features of random numbers."""
        config, projector = self.model.config, self.model.model.multi_modal_projector
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        shape = (self.batch, patches, vision.hidden_size)
        device, dtype = self.model.device, self.model.dtype
        features = torch.randn(shape, device=device, dtype=dtype)
        if not self.is_ours:
            return lambda: projector(features)
        levels = [torch.randn(shape, device=device, dtype=dtype) for _ in config.vision_feature_levels]
        scale_factor = config.scale_factor_for(self.budget)
        return lambda: projector(features, levels, scale_factor)


class Stamps(LogitsProcessor):
    """When each token's logits were there, in seconds after the start; changes nothing."""

    def __init__(self, device: str):
        self.device, self.marks = device, [self.mark(device)]

    @staticmethod
    def mark(device: str) -> Any:
        """A moment of the device's time."""
        if device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.marks.append(self.mark(self.device))
        return scores

    def seconds(self) -> list[float]:
        """One number per token."""
        first, *others = self.marks
        if self.device == "cpu":
            return [other - first for other in others]
        torch.cuda.synchronize()
        return [first.elapsed_time(other) / 1000 for other in others]


def generate(side: Side, new_tokens: int, device: str, **options: Any) -> tuple[list[float], torch.Tensor]:
    """Seconds until each token, and the tokens, by `generate`."""
    if device == "cuda":
        torch.cuda.synchronize()
    stamps = Stamps(device)
    output = side.model.generate(
        **side.inputs,
        attention_mask=torch.ones_like(side.inputs["input_ids"]),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([stamps]),
        **options,
    )
    return stamps.seconds(), output[:, side.inputs["input_ids"].shape[1] :]


class GraphAnswer:
    """Greedy tokens from two captured graphs: the prefill of pixels and prompt, and one step of decoding."""

    def __init__(self, side: Side, new_tokens: int, device: str):
        self.side, self.device, self.new_tokens = side, device, new_tokens
        ids = side.inputs["input_ids"]
        self.cache = StaticCache(config=side.model.config.text_config, max_cache_len=ids.shape[1] + new_tokens)
        self.token = torch.zeros_like(ids[:, :1])
        with attention(side.language_model, MASKLESS):
            self.prefill = captured(self._prefill, device)
        self.run_prefill()
        self.step = captured(self._step, device)

    def _prefill(self) -> None:
        """As both models do it, without their check of the number of placeholders, which waits for the device."""
        self.rewind()
        ids, others = self.side.inputs["input_ids"], {k: v for k, v in self.side.inputs.items() if k != "input_ids"}
        features = self.side.model.get_image_features(**others, return_dict=True).pooler_output
        embeds = self.side.language_model.get_input_embeddings()(ids)
        placeholders = (ids == self.side.model.config.image_token_id).unsqueeze(-1)
        self._read(embeds.masked_scatter(placeholders, torch.cat(list(features)).to(embeds.dtype)))

    def _step(self) -> None:
        self._read(self.side.language_model.get_input_embeddings()(self.token))

    def _read(self, embeds: torch.Tensor) -> None:
        outputs = self.side.language_model(inputs_embeds=embeds, **{CACHE_NAME: self.cache}, use_cache=True)
        self.token.copy_(self.side.model.lm_head(outputs.last_hidden_state[:, -1]).argmax(-1, keepdim=True))

    def rewind(self) -> None:
        """Let the cache start at its beginning; what comes after it is masked."""
        torch._foreach_zero_([layer.cumulative_length for layer in self.cache.layers])  # one kernel

    def seconds(self, new_tokens: int) -> list[float]:
        """Until each token."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        stamps = Stamps(self.device)
        self.run_prefill()
        stamps.marks.append(stamps.mark(self.device))
        for _ in range(new_tokens - 1):
            self.step()
            stamps.marks.append(stamps.mark(self.device))
        return stamps.seconds()

    def run_prefill(self) -> None:
        """Replay it; without graphs the attention has to be chosen again."""
        if self.device == "cuda":
            self.prefill()
        else:
            with attention(self.side.language_model, MASKLESS):
                self.prefill()

    def tokens(self, count: int) -> torch.Tensor:
        """The first of an answer, (batch, count)."""
        self.run_prefill()
        tokens = [self.token.clone()]
        for _ in range(count - 1):
            self.step()
            tokens.append(self.token.clone())
        return torch.cat(tokens, 1)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """With another attention implementation."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def compiled_pieces(model: Any, backend: str) -> Iterator[None]:
    """With MLPs, and the language model's norms and rotary positions, compiled once for all layers."""
    language_model = model.model.language_model
    llama = sys.modules[type(language_model).__module__]
    rotary = llama.apply_rotary_pos_emb
    pieces = [
        (piece, True)
        for layer in language_model.layers
        for piece in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
    ] + [(layer.mlp, False) for layer in model.model.vision_tower.encoder.layers]
    llama.apply_rotary_pos_emb = torch.compile(rotary, dynamic=True, backend=backend)
    for piece, dynamic in pieces:
        piece.forward = torch.compile(piece.forward, dynamic=dynamic, backend=backend)
    try:
        yield
    finally:
        llama.apply_rotary_pos_emb = rotary
        for piece, _ in pieces:
            del piece.forward


# ---------------------------------------------------------------------------- parts


@torch.no_grad()
def end_to_end(report: Report) -> None:
    """7B: batch 1, then 32, each in three ways."""
    plan = [(batch, way) for batch in (1, 32) for way in ("dynamic", "graph", "compiled")]
    _measure(report, "7b", [(1, "dynamic"), (1, "compiled"), (2, "graph")] if report.rehearse else plan)


@torch.no_grad()
def end_to_end_13b(report: Report) -> None:
    """13B at batch 1."""
    _measure(report, "13b", [(1, "graph")] if report.rehearse else [(1, "dynamic"), (1, "graph")], [144, 1, 36])


@torch.no_grad()
def generate_compiled(report: Report) -> None:
    """7B at batch 1: `generate` with a static cache, whose step of decoding transformers compiles as a whole."""
    pair = build_pair(shape_of(report, "7b"), report.device, torch.bfloat16)
    compile_config = CompileConfig(backend="eager") if report.rehearse else None
    if report.rehearse:
        CompileConfig._compile_all_devices = True  # transformers' switch for tests on a CPU
    new_tokens = SHORT if report.rehearse else LONG
    options = {"cache_implementation": "static", "compile_config": compile_config}

    def measure(name: Any) -> None:
        side = make_side(pair, name, 1)
        start = time.perf_counter()
        for _ in range(2):  # graphs are recorded in the second call
            generate(side, new_tokens, report.device, **options)
        warm = time.perf_counter() - start
        runs = [generate(side, new_tokens, report.device, **options)[0] for _ in range(3)]
        row = row_name(name) | {"batch": 1, "way": "generate, compiled", "s of warm-up": warm} | answer_times(runs, 1)
        report.add(**row)

    for name in (144, LLAVA):
        report.attempt(f"generate, compiled, {name}", partial(measure, name), 25.0)


def _measure(report: Report, size: str, plan: list[tuple[int, str]], budgets: list[int] | None = None) -> None:
    ours, llava = pair = build_pair(shape_of(report, size), report.device, torch.bfloat16)
    rates = measured_rates(report)
    report.note(rates=rates, text_tokens=TEXT_TOKENS)
    numbers = [b for b in (budgets or BUDGETS) if b in ours.config.visual_token_budgets]
    if report.rehearse:
        numbers = numbers[:2]
    profiles: dict[Any, ModelProfile] = {LLAVA: llava_profile(ours, LONG)}
    profiles |= {profile.budgets[0].num_visual_tokens: profile for profile in our_profiles(ours.config, numbers)}
    backend = "eager" if report.rehearse else "inductor"
    for batch, way in plan:
        few = batch > 1 or way == "compiled"
        names: list[Any] = [LLAVA, *(numbers[:4] if few else numbers), LLAVA]
        with compiled_pieces(ours, backend) if way == "compiled" else nullcontext():
            _compare(report, pair, names, batch, way, profiles, rates)
    if size == "7b":  # last, as a profiler may slow down what follows
        for name in (LLAVA, numbers[0]):
            report.attempt(f"profile, {name}", partial(_profile, report, make_side(pair, name, 1)), 6.0)


def _compare(
    report: Report,
    pair: tuple[Any, Any],
    names: list[Any],
    batch: int,
    way: str,
    profiles: dict[Any, ModelProfile],
    rates: dict[str, float],
) -> None:
    reference: dict[str, Any] = {}

    def measure(name: Any, last: bool) -> None:
        started = time.perf_counter()
        peak_gigabytes(report)
        side = make_side(pair, name, batch)
        row = row_name(name) | {"batch": batch, "way": way}
        row |= _generated(report, side) if way == "dynamic" else graphed(report, side, way)
        if last:
            if reference:
                report.note(**{f"drift, {way}, batch {batch}": row["first token, ms"] / reference["first token, ms"]})
            return
        if name == LLAVA:
            reference.update(row)
        if reference:
            row["of LLaVA's"] = row["first token, ms"] / reference["first token, ms"]
            row["gain"] = row[f"tokens/s, {SHORT}"] / reference[f"tokens/s, {SHORT}"] - 1
        row |= floors(row, profiles[name], rates, batch)
        report.add(**row, **{"peak GB": peak_gigabytes(report), "s taken": time.perf_counter() - started})

    for position, name in enumerate(names):
        last = position == len(names) - 1
        report.attempt(f"{way}, batch {batch}, {name}", partial(measure, name, last), 6.0)


def floors(row: dict[str, Any], model: ModelProfile, rates: dict[str, float], batch: int = 1) -> dict[str, float]:
    """The least times that the rates allow, and how far the row's times are above them."""
    (floor,) = roofline(model, **rates, batch_size=batch)
    first, token = 1000 * floor.first_token, 1000 * (floor.per_token or 0.0)
    return {
        "floor, ms": first,
        "times the floor": row["first token, ms"] / first,
        "floor per token, ms": token,
        "times the floor per token": row["per token, ms"] / token,
    }


def _profile(report: Report, side: Side, most: int = 10) -> None:
    """The kernels that take longest in one prefill and in one step, with their share of all kernels' time."""
    answer = GraphAnswer(side, 8, report.device)
    on_gpu = report.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    rows = report.content.get("profile", [])
    tokens = side.budget if side.is_ours else f"{LLAVA} {side.budget}"
    answer.run_prefill()
    for phase, run, implementation in (("step", answer._step, "sdpa"), ("prefill", answer._prefill, MASKLESS)):
        with attention(side.language_model, implementation), profile(activities=activities) as profiler:
            run()
            if on_gpu:
                torch.cuda.synchronize()
        kernels = [
            (event.key, event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000)
            for event in profiler.key_averages()
            if (event.device_type == DeviceType.CUDA) == on_gpu
        ]
        total = ("all", sum(calls for _, calls, _ in kernels), sum(ms for *_, ms in kernels))
        longest = sorted(kernels, key=lambda kernel: -kernel[2])[:most]
        common = {"visual tokens": tokens, "phase": phase}
        rows += [
            common | {"kernel": key[:90], "calls": calls, "ms": ms, "share": ms / total[2]}
            for key, calls, ms in (*longest, total)
        ]
    report.note(profile=rows)


def _generated(report: Report, side: Side) -> dict[str, Any]:
    long = side.batch == 1 and side.budget in (1, 144, 576)
    new_tokens = LONG if long and not report.rehearse else SHORT
    generate(side, 2, report.device)
    runs = [generate(side, SHORT if index else new_tokens, report.device)[0] for index in range(3)]
    projector = milliseconds({"": side.projector_call()}, report.device)[""]
    return answer_times(runs, side.batch) | {"projector, ms": projector, "projector's share": projector / _first(runs)}


def graphed(report: Report, side: Side, way: str) -> dict[str, Any]:
    new_tokens = SHORT if report.rehearse else LONG
    answer = GraphAnswer(side, new_tokens, report.device)
    firsts = [answer.seconds(1) for _ in range(3 if report.rehearse else 10)]
    runs = [answer.seconds(new_tokens) for _ in range(2)]
    projector = milliseconds({"": captured(side.projector_call(), report.device)}, report.device)[""]
    row = answer_times([*runs, *firsts], side.batch)
    row |= {"projector, ms": projector, "projector's share": projector / _first([*runs, *firsts])}
    if way == "graph" and side.batch == 1:  # the same answer? In bfloat16 two kernels may disagree about a tie.
        count = 8
        same = answer.tokens(count) == generate(side, count, report.device)[1]
        row["tokens as generate's"] = f"{int(same.sum())} of {same.numel()}"
    return row


def answer_times(runs: list[list[float]], batch: int) -> dict[str, Any]:
    """Of the first token, of those after it, and tokens per second of answers of two lengths, from runs of any length."""
    times: dict[str, Any] = {"first token, ms": _first(runs)}
    longer = [run for run in runs if len(run) > 1]
    times["per token, ms"] = 1000 * statistics.median((run[-1] - run[0]) / (len(run) - 1) for run in longer)
    for length in (SHORT, LONG):
        long_enough = [run[length - 1] for run in runs if len(run) >= length]
        times[f"tokens/s, {length}"] = batch * length / statistics.median(long_enough) if long_enough else None
    return times


def _first(runs: list[list[float]]) -> float:
    return 1000 * statistics.median(run[0] for run in runs)


def make_side(pair: tuple[Any, Any], name: Any, batch: int) -> Side:
    ours, llava = pair
    if name == LLAVA:
        return Side(llava, ours.config.num_visual_tokens_for(1), batch, False)
    return Side(ours, name, batch, True)


def row_name(name: Any) -> dict[str, Any]:
    return {"visual tokens": name if isinstance(name, int) else f"{name} 576"}


def shape_of(report: Report, size: str) -> str:
    return "tiny" if report.rehearse else size


# ---------------------------------------------------------------------------- floors


def our_profiles(config: Any, budgets: list[int]) -> list[ModelProfile]:
    """One per number of tokens."""
    whole = profile_model(config, TEXT_TOKENS, LONG, budgets=budgets)
    return [replace(whole, budgets=[budget]) for budget in whole.budgets]


def llava_profile(ours: Any, new_tokens: int) -> ModelProfile:
    """LLaVA runs the whole tower and an MLP of two layers on every patch; its language model is ours at as many tokens."""
    config = ours.config
    most = config.num_visual_tokens_for(1)
    whole = profile_model(config, TEXT_TOKENS, new_tokens, budgets=[most])
    (budget,) = whole.budgets
    shared = paper_flops(config, most, TEXT_TOKENS, new_tokens)  # exact for a whole CLIP and LLaVA's MLP
    width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    tower = sum(parameter.numel() for parameter in ours.model.vision_tower.parameters())
    flops = budget.exact_flops | {part: shared[part] for part in ("tower", "projector")}
    weights = budget.weight_bytes | {"tower": 2 * tower, "projector": 2 * (width * hidden + hidden * hidden)}
    return replace(whole, budgets=[replace(budget, exact_flops=flops, weight_bytes=weights)])
