"""Answers in pieces: the whole of `generate`, with times, whatever happens in the thread."""

import functools
import threading

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.serving.conversation import Conversation, Said, duration


QUESTION = "what?"
PICTURE = Image.linear_gradient("L").convert("RGB")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model() -> DeltaLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config()).eval()


@pytest.fixture
def conversation(model) -> Conversation:
    return Conversation(model, tiny_processor(model.config), NEW_TOKENS)


def generated(conversation: Conversation, budget: int | None) -> str:
    options = {} if budget is None else {"num_visual_tokens": budget}
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": QUESTION}]
    inputs = conversation.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", **options},
    )
    output = conversation.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return conversation.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("budget", [None, 144, 1])
def test_the_answer_grows_to_what_generate_says(conversation, budget):
    said = list(conversation.ask(PICTURE, f" {QUESTION}\n", budget))
    assert said[-1].text == generated(conversation, budget) != ""
    assert len(said) > 3
    assert all(said[-1].text.startswith(earlier.text.strip()) for earlier in said)
    assert {earlier.visual_tokens for earlier in said} == {budget or 36}
    assert said[-1].answer_tokens == NEW_TOKENS
    assert 0 < said[0].first_token <= said[0].so_far <= said[-1].so_far
    assert {earlier.first_token for earlier in said} == {said[0].first_token}


def test_what_is_wrong_with_a_question_is_raised_to_who_asked(conversation):
    with pytest.raises(ValueError, match="no question"):
        next(conversation.ask(PICTURE, "  "))
    with pytest.raises(ValueError, match="num_visual_tokens=7: this model cannot give it"):
        next(conversation.ask(PICTURE, QUESTION, 7))
    with pytest.raises(ValueError, match="The prompt is too long: it has more than 2,048 tokens"):
        next(conversation.ask(PICTURE, "what? " * 10**5))
    assert list(conversation.ask(PICTURE, "what is <image>?"))[-1].visual_tokens == 36


def test_an_error_of_the_model_is_raised_after_what_was_said(conversation, monkeypatch):
    forward, calls = conversation.model.forward, []

    @functools.wraps(forward)
    def fails_in_the_end(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(conversation.model, "forward", fails_in_the_end)
    said = []
    with pytest.raises(RuntimeError, match="out of memory"):
        said += conversation.ask(PICTURE, QUESTION)
    assert said and said[-1].answer_tokens < NEW_TOKENS
    monkeypatch.undo()
    assert list(conversation.ask(PICTURE, QUESTION))[-1].text == generated(conversation, None)


def test_generation_stops_when_nobody_listens(model):
    conversation = Conversation(model, tiny_processor(model.config), 3000)
    before = set(threading.enumerate())
    answer = conversation.ask(PICTURE, QUESTION)
    next(answer)
    (worker,) = set(threading.enumerate()) - before
    answer.close()
    worker.join(20)  # 3,000 tokens would take longer
    assert not worker.is_alive()


def test_visitors_do_not_mix(conversation):
    expected = {budget: generated(conversation, budget) for budget in (144, 36, 16, 9, 4, 1)}
    answers = {budget: conversation.ask(PICTURE, QUESTION, budget) for budget in expected}
    said = {budget: [next(answer)] for budget, answer in answers.items()}  # all are under way before one ends
    for budget, answer in answers.items():
        said[budget] += answer
    assert {budget: parts[-1].text for budget, parts in said.items()} == expected


@pytest.mark.parametrize(
    ("budget", "on", "side"),
    [(None, "patches", 12), (None, "visual_tokens", 6), (4, "visual_tokens", 2), (1, "visual_tokens", 12)],
)
def test_heat_lies_where_it_is_asked_for_and_never_on_a_single_token(conversation, budget, on, side):
    explanation = conversation.explain(PICTURE, QUESTION, budget, on=on)
    assert explanation.heat.shape == (side, side)
    assert explanation.num_visual_tokens == (budget or 36)
    assert generated(conversation, budget).startswith(explanation.token)


def test_heat_of_a_word(conversation):
    word = generated(conversation, None).split()[3]
    assert conversation.explain(PICTURE, QUESTION, word=f" {word} ").token == word
    with pytest.raises(ValueError, match="does not have it"):
        conversation.explain(PICTURE, QUESTION, word="nowhere")


def test_what_the_page_says_below_an_answer():
    assert str(Said("", 16, 0, None, 0.0)) == "16 visual tokens"
    assert str(Said("a", 1, 1, 0.0312, 0.0312)) == "1 visual token · first token after 31 ms · 1 token in 31 ms"
    assert duration(0.9994) == "999 ms"
    assert duration(1.25) == "1.2 s"
