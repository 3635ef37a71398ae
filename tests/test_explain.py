"""Saliency is where a model looks: models blinded but for one place, slopes taken by hand, and a trained model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import noise, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.explain import explain, saliency_map, token_gradients
from transformers_delta_llava.loading import answer_ids, encode_question, load_repo


NOISE = noise()
QUADRANTS = [(0, 1), (1, 0)]  # row and column of halves


def make(seed: int = 0, **overrides: Any) -> DeltaLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    return DeltaLlavaForConditionalGeneration(tiny_config(**overrides)).eval()


@pytest.fixture(scope="module")
def trained(easy_vqa_repo: Path) -> tuple[Any, Any]:
    return load_repo(easy_vqa_repo, "cpu")


def quadrant_mask(side: int, quadrant: tuple[int, int]) -> torch.Tensor:
    """(side, side) of zeros with ones in a quadrant."""
    mask = torch.zeros(side, side)
    row, column = (half * (side // 2) for half in quadrant)
    mask[row : row + side // 2, column : column + side // 2] = 1
    return mask


# Models that look at one quadrant.


def look_at(model: Any, processor: Any, image: Image.Image, quadrant: tuple[int, int], budget: int) -> None:
    """Make nothing mix places before the language model, and take from that all visual tokens outside a quadrant."""
    for layer in model.model.vision_tower.encoder.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.out_proj.bias)
    inputs = encode_question(processor, image, "what?", num_visual_tokens=budget)
    keep = torch.ones(inputs["input_ids"].shape[1])
    keep[inputs["input_ids"][0] == processor.image_token_id] = quadrant_mask(math.isqrt(budget), quadrant).flatten()

    def blind(_: Any, args: Any, kwargs: Any) -> Any:
        embeddings = kwargs["inputs_embeds"]
        if embeddings.shape[1] >= len(keep):  # the prompt, and what follows it, but no step of generation
            rest = torch.ones(embeddings.shape[1] - len(keep))
            kwargs["inputs_embeds"] = embeddings * torch.cat([keep, rest])[:, None]
        return args, kwargs

    model.model.language_model.register_forward_pre_hook(blind, with_kwargs=True)


@pytest.mark.parametrize("budget", [36, 4])
@pytest.mark.parametrize("quadrant", QUADRANTS, ids=str)
def test_a_model_that_looks_at_one_quadrant_gets_its_saliency_there(
    processor: Any, quadrant: tuple[int, int], budget: int
) -> None:
    model = make(seed=1, use_transformer_block=False)
    look_at(model, processor, NOISE, quadrant, budget)

    # It does so by the pixels: what changes elsewhere changes nothing.
    inside = quadrant_mask(24, quadrant).bool()
    inputs = encode_question(processor, NOISE, "what?", num_visual_tokens=budget)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        for place, changes in ((inside, True), (~inside, False)):
            pixels = torch.where(place, inputs["pixel_values"].flip(-1), inputs["pixel_values"])
            others = model(**{**inputs, "pixel_values": pixels}).logits[0, -1]
            assert bool((others - logits).abs().max() > 1e-6) == changes

    for on in ("visual_tokens", "patches"):
        shares = []
        for token in range(6):  # of a few tokens, as any one of them may have no positive saliency
            saliency = explain(model, processor, NOISE, "what?", budget, token, on, max_new_tokens=6).saliency
            assert saliency.shape == (12, 12) if on == "patches" else saliency.shape == (math.isqrt(budget),) * 2
            if saliency.any():
                shares.append((saliency * quadrant_mask(len(saliency), quadrant)).sum() / saliency.sum())
        assert shares and min(shares) > 0.999


@pytest.mark.parametrize("layout", ["released", "paper"])
@pytest.mark.parametrize("quadrant", QUADRANTS, ids=str)
def test_patches_show_where_a_single_token_comes_from(processor: Any, quadrant: tuple[int, int], layout: str) -> None:
    model = make(projector_layout=layout)
    mask = quadrant_mask(12, quadrant).flatten()[:, None]

    def blind(_: Any, args: Any) -> Any:
        features, levels, scale_factor = args
        return features * mask, [level * mask for level in levels], scale_factor

    model.model.multi_modal_projector.register_forward_pre_hook(blind)
    saliency = explain(model, processor, NOISE, "what?", 1, on="patches", max_new_tokens=1).saliency
    assert saliency.max() == 1 and (saliency[quadrant_mask(12, quadrant) == 0] == 0).all()
    assert explain(model, processor, NOISE, "what?", 1, max_new_tokens=1).saliency.shape == (1, 1)


# The numbers.


@pytest.mark.parametrize("budget", [144, 36, 1])
@pytest.mark.parametrize("layout", ["released", "paper"])
@pytest.mark.parametrize("on", ["visual_tokens", "patches"])
def test_gradients_are_the_slopes_of_the_logit(processor: Any, on: str, layout: str, budget: int) -> None:
    model = make(projector_layout=layout).double()
    for name, norm in list(model.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":  # which computes in float32, too coarse for differences
            exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
            model.set_submodule(name, exact)
    inputs = encode_question(processor, NOISE, "what?", num_visual_tokens=budget).to(torch.float64)
    answer = [7, 30, 5]
    activations, gradients = token_gradients(model, inputs, answer, on)
    change = torch.randn(activations.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    # The whole model, from the pixels, with a small change where the activations pass.
    projector, step = model.model.multi_modal_projector, 0.0
    seen = []

    def after(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output[0])
        return output + step * change

    def before(_: Any, args: Any) -> Any:
        features, levels, scale_factor = args
        states = torch.cat([features, *levels], dim=-1)
        seen.append(states[0])
        features, *levels = (states + step * change).chunk(1 + len(levels), dim=-1)
        return features, levels, scale_factor

    if on == "patches":
        projector.register_forward_pre_hook(before)
    else:
        projector.register_forward_hook(after)

    def logit(size: float) -> float:
        nonlocal step
        step = size
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]])], dim=1)
        with torch.no_grad():
            outputs = model(ids, inputs["pixel_values"], num_visual_tokens=budget)
        return float(outputs.logits[0, -1, answer[-1]])

    slope = (logit(1e-6) - logit(-1e-6)) / 2e-6
    logit(0.0)
    torch.testing.assert_close(activations, seen[-1], rtol=1e-9, atol=1e-12)
    assert float((gradients * change).sum()) == pytest.approx(slope, rel=1e-5)
    assert abs(slope) > 1e-6  # or the comparison would hold of a model that sees nothing
    assert gradients.any(dim=-1).all() or (budget == 144 and on == "patches")


def test_saliency_is_the_positive_part_of_the_products() -> None:
    activations = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0], [2.0, 2.0]])
    gradients = torch.tensor([[1.0, 1.0], [-1.0, 2.0], [9.0, 9.0], [2.0, 1.0]])
    assert saliency_map(activations, gradients).tolist() == [[0.5, 0], [0, 1]]  # 3, -5, 0, 6
    nothing = saliency_map(activations, -gradients * torch.tensor([[1.0], [-1.0], [1.0], [1.0]]))
    assert nothing.dtype == torch.float32 and nothing.tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="torch.float16"):
        saliency_map(activations.half(), gradients.half() * math.nan)


def test_the_answer_is_the_greedy_one(tiny_model: Any, processor: Any) -> None:
    for number, budget in ((36, 36), (4, 4), (None, 36), ("auto", 144)):
        inputs = encode_question(processor, NOISE, "what?", num_visual_tokens=number)
        expected = processor.decode(answer_ids(tiny_model, inputs, 5), skip_special_tokens=True).strip()
        explanation = explain(tiny_model, processor, NOISE, "what?", number, token=2, max_new_tokens=5)
        assert (explanation.answer, explanation.num_visual_tokens) == (expected, budget)
        assert explanation.token in expected


def test_an_answer_stops_where_it_ends_and_an_empty_one_is_refused(processor: Any) -> None:
    model = make()
    first = explain(model, processor, NOISE, "what?", token=0, max_new_tokens=4)
    inputs = encode_question(processor, NOISE, "what?")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    model.generation_config.eos_token_id = [98, next(index for index in ids if index != ids[0])]
    stopped = explain(model, processor, NOISE, "what?", token=0, max_new_tokens=4)
    assert stopped.answer == first.answer[: len(stopped.answer)] != first.answer
    assert torch.equal(stopped.saliency, first.saliency)
    model.generation_config.eos_token_id = ids[0]
    with pytest.raises(ValueError, match="token=0"):
        explain(model, processor, NOISE, "what?", max_new_tokens=4)


def test_a_word_is_explained_by_its_first_token(tiny_model: Any, processor: Any) -> None:
    first, word, *_ = explain(tiny_model, processor, NOISE, "what?", max_new_tokens=6).answer.split()
    by_word, by_position = (
        explain(tiny_model, processor, NOISE, "what?", token=token, max_new_tokens=6) for token in (word, 1)
    )
    assert by_word.token == word != first and torch.equal(by_word.saliency, by_position.saliency)


def test_command(call: Any, easy_vqa_repo: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    NOISE.save(tmp_path / "photo.png")
    output = tmp_path / "out.svg"
    arguments = (
        "explain",
        easy_vqa_repo,
        tmp_path / "photo.png",
        "--prompt",
        "what shape?",
        "--num-visual-tokens",
        16,
        1,
    )
    code, out, _ = call(*arguments, "--on", "patches", "--output", output, "--json")
    runs = json.loads(out)
    assert code == 0 and [run["num_visual_tokens"] for run in runs] == [16, 1]
    assert output.read_text().count("</svg>") == 1 and np.shape(runs[0]["saliency"]) == (8, 8)
    assert call(*arguments, "--token", "elephant")[0] == 2


# What is left behind.


@pytest.mark.parametrize(
    ("how", "on"),
    [
        ("frozen", "patches"),
        ("trained", "visual_tokens"),
        ("checkpointing", "patches"),
        ("no grad", "visual_tokens"),
        ("inference mode", "patches"),
        ("refused", "visual_tokens"),
    ],
)
def test_the_model_is_left_as_it_was(processor: Any, on: str, how: str) -> None:
    model = make()
    expected = explain(model, processor, NOISE, "what?", 9, 1, on, max_new_tokens=2)
    if how == "frozen":
        model.requires_grad_(False)
    else:
        model.model.vision_tower.requires_grad_(False)
    model.model.language_model.train(how in ("trained", "checkpointing"))
    model.model.multi_modal_projector.train(how in ("trained", "checkpointing"))
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    model.lm_head.weight.grad = kept = torch.ones_like(model.lm_head.weight)

    def state() -> list[Any]:
        hooks = [
            dict(m._forward_hooks) | dict(m._forward_pre_hooks) | dict(m._backward_hooks) for m in model.modules()
        ]
        modes = [module.training for module in model.modules()]
        return [hooks, modes, [(p.requires_grad, p._version, id(p.grad)) for p in model.parameters()]]

    before = state()
    if how == "refused":
        with pytest.raises(ValueError, match="token=9"):
            explain(model, processor, NOISE, "what?", 9, 9, on, max_new_tokens=2)
    else:
        with torch.inference_mode(how == "inference mode"), torch.set_grad_enabled(how != "no grad"):
            explanation = explain(model, processor, NOISE, "what?", 9, 1, on, max_new_tokens=2)
        assert torch.equal(explanation.saliency, expected.saliency) and explanation.answer == expected.answer
        assert not explanation.saliency.requires_grad and not explanation.saliency.is_inference()
    assert state() == before and (kept == 1).all()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]


@pytest.mark.parametrize("on", ["visual_tokens", "patches"])
def test_half_precision_gives_about_the_same_saliency(trained: Any, on: str) -> None:
    model, processor = trained
    image = Image.new("RGB", (64, 64), "lavender")
    image.paste(Image.new("RGB", (20, 20), "blue"), (8, 30))
    half = DeltaLlavaForConditionalGeneration(model.config).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    saliencys = [explain(m, processor, image, "what color is the shape?", 16, on=on) for m in (model, half)]
    assert saliencys[0].answer == saliencys[1].answer == "blue"
    full, rounded = (explanation.saliency.flatten() for explanation in saliencys)
    assert float(torch.nn.functional.cosine_similarity(full, rounded, dim=0)) > 0.9


# A model that was trained.


def test_the_saliency_of_the_trained_model_lies_on_the_shape(trained: Any) -> None:
    from examples.easy_vqa_questions import load_questions

    model, processor = trained
    by_image = {question.image: question for question in load_questions("test")}
    right = []
    for path, question in sorted(by_image.items())[::50]:
        image = Image.open(path).convert("RGB")
        pixels = np.asarray(image, int)
        shape = np.abs(pixels - pixels[[0, 0, -1, -1], [0, -1, 0, -1]].max(0)).sum(-1) > 30
        saliency = explain(model, processor, image, question.text, 16, on="patches").saliency.numpy()
        share = shape.reshape(len(saliency), -1, len(saliency), 64 // len(saliency)).mean((1, 3))
        right.append((saliency * share).sum() / share.sum() > (saliency * (1 - share)).sum() / (1 - share).sum())
    assert len(right) == 20 and sum(right) >= 17
