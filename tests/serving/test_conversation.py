"""Answers in pieces: the whole of `generate`, with times, whatever happens in the thread."""

import functools
import threading

import pytest
from PIL import Image

from tests.tiny import tiny_processor
from transformers_delta_llava.serving.conversation import Conversation, StreamedAnswer, format_seconds


QUESTION = "what?"
IMAGE = Image.linear_gradient("L").convert("RGB")
NEW_TOKENS = 12


@pytest.fixture
def conversation(tiny_model) -> Conversation:
    return Conversation(tiny_model, tiny_processor(tiny_model.config), NEW_TOKENS)


def generated(conversation: Conversation, budget: int | None) -> str:
    options = {} if budget is None else {"num_visual_tokens": budget}
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": QUESTION}]
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
def test_the_answer_grows_to_that_of_generate(conversation, budget):
    answers = list(conversation.ask(IMAGE, f" {QUESTION}\n", budget))
    assert answers[-1].text == generated(conversation, budget) != ""
    assert len(answers) > 3
    assert all(answers[-1].text.startswith(earlier.text.strip()) for earlier in answers)
    assert {earlier.num_visual_tokens for earlier in answers} == {budget or 36}
    assert answers[-1].answer_tokens == NEW_TOKENS
    assert 0 < answers[0].first_token_s <= answers[0].total_s <= answers[-1].total_s
    assert {earlier.first_token_s for earlier in answers} == {answers[0].first_token_s}


def test_a_bad_question_raises_in_the_thread_that_asked(conversation):
    with pytest.raises(ValueError, match="no question"):
        next(conversation.ask(IMAGE, "  "))
    with pytest.raises(ValueError, match="num_visual_tokens=7: this model cannot give it"):
        next(conversation.ask(IMAGE, QUESTION, 7))
    with pytest.raises(ValueError, match="The prompt is too long: it has more than 2,048 tokens"):
        next(conversation.ask(IMAGE, "what? " * 10**5))
    assert list(conversation.ask(IMAGE, "what is <image>?"))[-1].num_visual_tokens == 36


def test_an_error_of_the_model_is_raised_after_the_partial_answer(conversation, monkeypatch):
    forward, calls = conversation.model.forward, []

    @functools.wraps(forward)
    def fails_in_the_end(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(conversation.model, "forward", fails_in_the_end)
    answers = []
    with pytest.raises(RuntimeError, match="out of memory"):
        answers += conversation.ask(IMAGE, QUESTION)
    assert answers and answers[-1].answer_tokens < NEW_TOKENS
    monkeypatch.undo()
    assert list(conversation.ask(IMAGE, QUESTION))[-1].text == generated(conversation, None)


def test_generation_stops_when_the_iterator_is_closed(tiny_model):
    conversation = Conversation(tiny_model, tiny_processor(tiny_model.config), 3000)
    before = set(threading.enumerate())
    answer = conversation.ask(IMAGE, QUESTION)
    next(answer)
    (worker,) = set(threading.enumerate()) - before
    answer.close()
    worker.join(20)  # 3,000 tokens would take longer
    assert not worker.is_alive()


def test_visitors_do_not_mix(conversation):
    expected = {budget: generated(conversation, budget) for budget in (144, 36, 1)}
    iterators = {budget: conversation.ask(IMAGE, QUESTION, budget) for budget in expected}
    answers = {budget: [next(iterator)] for budget, iterator in iterators.items()}  # all are under way before one ends
    for budget, iterator in iterators.items():
        answers[budget] += iterator
    assert {budget: parts[-1].text for budget, parts in answers.items()} == expected


@pytest.mark.parametrize(
    ("budget", "on", "side"),
    [(None, "patches", 12), (None, "visual_tokens", 6), (4, "visual_tokens", 2), (1, "visual_tokens", 12)],
)
def test_saliency_is_at_the_chosen_positions_and_never_on_a_single_token(conversation, budget, on, side):
    explanation = conversation.explain(IMAGE, QUESTION, budget, on=on)
    assert explanation.saliency.shape == (side, side)
    assert explanation.num_visual_tokens == (budget or 36)
    assert generated(conversation, budget).startswith(explanation.token)


def test_saliency_of_a_word(conversation):
    word = generated(conversation, None).split()[3]
    assert conversation.explain(IMAGE, QUESTION, word=f" {word} ").token == word
    with pytest.raises(ValueError, match="does not have it"):
        conversation.explain(IMAGE, QUESTION, word="nowhere")


def test_costs_in_one_line():
    assert str(StreamedAnswer("", 16, 0, None, 0.0)) == "16 visual tokens"
    assert (
        str(StreamedAnswer("a", 1, 1, 0.0312, 0.0312)) == "1 visual token · first token after 31 ms · 1 token in 31 ms"
    )
    assert format_seconds(0.9994) == "999 ms"
    assert format_seconds(1.25) == "1.2 s"
