"""The same question at every budget: the answers of `generate`, and medians of times."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_delta_llava.analysis import budgets, compare_budgets, explain, load_repo


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Two tiles by two, so that auto picks 4."""
    tiles = np.array([[0, 200], [200, 0]], np.uint8)
    return Image.fromarray(np.kron(tiles, np.ones((12, 12), np.uint8))).convert("RGB")


def test_every_budget_is_asked_and_answers_as_generate_does(tiny_model: Any, processor: Any, photo: Any) -> None:
    calls: list[None] = []
    comparison = compare_budgets(
        tiny_model, processor, photo, "what?", max_new_tokens=5, repeats=2, on_run=lambda: calls.append(None)
    )
    assert [run.num_visual_tokens for run in comparison.runs] == [144, 36, 16, 9, 4, 1]
    assert [run.num_visual_tokens for run in comparison.runs if run.chosen_by_auto] == [4]
    assert len(calls) == 3 * 6
    assert {run.num_visual_tokens: run.loss for run in comparison.runs} == processor.image_losses(photo)[0]
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for run in comparison.runs:
        inputs = processor(text=text, images=photo, num_visual_tokens=run.num_visual_tokens, return_tensors="pt")
        ids = tiny_model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert run.answer == processor.decode(ids, skip_special_tokens=True).strip()
        assert (run.prompt_tokens, run.answer_tokens) == (inputs["input_ids"].shape[1], 5)
        assert 0 < run.tower_ms < run.first_token_ms < run.total_ms
    assert (comparison.dtype, comparison.device, comparison.threads) == ("float32", "cpu", torch.get_num_threads())
    assert not tiny_model.model.multi_modal_projector._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budgets": [16, "auto", 16]}, [(16, False), (4, True)]),
        ({"budgets": ["auto", 4], "auto_max_loss": 1}, [(4, False), (1, True)]),
    ],
)
def test_budgets_can_be_chosen(tiny_model: Any, processor: Any, photo: Any, options: Any, expected: Any) -> None:
    comparison = compare_budgets(tiny_model, processor, photo, "what?", **options, max_new_tokens=1, repeats=1)
    assert [(run.num_visual_tokens, run.chosen_by_auto) for run in comparison.runs] == expected
    assert all(run.first_token_ms == run.total_ms for run in comparison.runs)
    assert comparison.auto_max_loss == options.get("auto_max_loss", processor.auto_max_loss)


def test_times_are_medians_without_the_warm_up(tiny_model: Any, processor: Any, photo: Any, monkeypatch: Any) -> None:
    lengths: list[int] = []

    def generate(_: Any, __: Any, max_new_tokens: int) -> Any:
        streamer = budgets.TimingStreamer(torch.device("cpu"))
        lengths.append(max_new_tokens)
        second = [1000, 3, 5, 4][len(lengths) - 1]
        streamer.start, streamer.tower_end = 1.0, 1.0 + second / 2
        streamer.marks, streamer.tokens = [1.0 + second, 101.0], [5, 6]
        return streamer

    monkeypatch.setattr(budgets, "_generate", generate)
    (row,) = compare_budgets(tiny_model, processor, photo, "what?", [4], max_new_tokens=9).runs
    assert (row.tower_ms, row.first_token_ms, row.total_ms) == (2000, 4000, 100_000)
    assert lengths == [2, 9, 9, 9]


def test_a_prompt_longer_than_the_models_positions_is_refused(tiny_repo: Any, photo: Image.Image) -> None:
    model, processor = load_repo(str(tiny_repo))
    model.config.text_config.max_position_embeddings = 200
    with pytest.raises(ValueError, match="too long: it has more than 200 tokens"):
        compare_budgets(model, processor, photo, "a" * 10**6)
    with pytest.raises(ValueError, match="and the model has 200 positions; shorten it, or use fewer visual tokens"):
        compare_budgets(model, processor, photo, "a" * 150, [144])
    with pytest.raises(ValueError, match="too long"):
        explain(model, processor, photo, "a" * 10**6)
