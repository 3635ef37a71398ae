"""Every template renders what LLaVA's conversation format of that name produces. The expected prompts are literal."""

from typing import Any

import jinja2
import pytest

from transformers_delta_llava.processing import CHAT_TEMPLATES, load_chat_template


IMAGE = {"type": "image"}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
LLAMA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
# Name, messages, add_generation_prompt.
CHATS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "text": ([user("Hello?")], True),
    "one turn": ([user(IMAGE, text("What?"))], True),
    "answered": ([user(IMAGE, text("What?")), assistant("A cat.")], False),
    "two turns": ([user(IMAGE, text("What?")), assistant([text("A cat.")]), user("Sure?")], True),
    "system": ([SYSTEM, user(IMAGE, text("What?")), assistant("A cat."), user("Sure?")], True),
    "image last": ([user(text("What is this? "), IMAGE)], True),
    "two images": ([user(text("Compare"), IMAGE, text("these."), IMAGE)], True),
    "image in a string": ([user("Look: <image> What?")], True),
    "only an image": ([user(IMAGE)], True),
}
EXPECTED = {
    "vicuna_v1": {
        "text": VICUNA + " USER: Hello? ASSISTANT:",
        "one turn": VICUNA + " USER: <image>\nWhat? ASSISTANT:",
        "answered": VICUNA + " USER: <image>\nWhat? ASSISTANT: A cat.</s>",
        "two turns": VICUNA + " USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
        "system": "Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
        "image last": VICUNA + " USER: <image>\nWhat is this? ASSISTANT:",
        "two images": VICUNA + " USER: <image>\n<image>\nCompare\nthese. ASSISTANT:",
        "image in a string": VICUNA + " USER: Look: <image> What? ASSISTANT:",
        "only an image": VICUNA + " USER: <image> ASSISTANT:",
    },
    "plain": {
        "one turn": "<image>",
        "answered": "<image>A cat.\n",
        "image last": "<image>",
        "two images": "<image><image>",
        "image in a string": "<image>",
        "only an image": "<image>",
    },
    "chatml": {
        "text": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "one turn": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?"
        "<|im_end|>\n<|im_start|>assistant\n",
        "answered": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?"
        "<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n",
        "two turns": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?"
        "<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
        "image last": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is "
        "this?<|im_end|>\n<|im_start|>assistant\n",
        "two images": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n<image>\n"
        "Compare\nthese.<|im_end|>\n<|im_start|>assistant\n",
        "image in a string": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nLook: "
        "<image> What?<|im_end|>\n<|im_start|>assistant\n",
        "only an image": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
        "<|im_end|>\n<|im_start|>assistant\n",
    },
    "llama_2": {
        "text": "[INST] <<SYS>>\n" + LLAMA + "\n<</SYS>>\n\nHello? [/INST]",
        "one turn": "[INST] <<SYS>>\n" + LLAMA + "\n<</SYS>>\n\n<image>\nWhat? [/INST]",
        "answered": "[INST] <<SYS>>\n" + LLAMA + "\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s>",
        "two turns": "[INST] <<SYS>>\n" + LLAMA + "\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Sure? "
        "[/INST]",
        "system": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Sure? [/INST]",
        "image last": "[INST] <<SYS>>\n" + LLAMA + "\n<</SYS>>\n\n<image>\nWhat is this? [/INST]",
        "two images": "[INST] <<SYS>>\n" + LLAMA + "\n<</SYS>>\n\n<image>\n<image>\nCompare\nthese. [/INST]",
        "image in a string": "[INST] <<SYS>>\n" + LLAMA + "\n<</SYS>>\n\nLook: <image> What? [/INST]",
        "only an image": "[INST] <<SYS>>\n" + LLAMA + "\n<</SYS>>\n\n<image> [/INST]",
    },
    "phi_3": {
        "text": "<|user|>\nHello?<|end|>\n<|assistant|>\n",
        "one turn": "<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\n",
        "answered": "<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\nA cat.<|end|>\n",
        "two turns": "<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\nA cat.<|end|>\n<|user|>\nSure?<|end|>\n"
        "<|assistant|>\n",
        "system": "<|system|>\nBe brief.<|end|>\n<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\nA cat.<|end|>\n"
        "<|user|>\nSure?<|end|>\n<|assistant|>\n",
        "image last": "<|user|>\n<image>\nWhat is this?<|end|>\n<|assistant|>\n",
        "two images": "<|user|>\n<image>\n<image>\nCompare\nthese.<|end|>\n<|assistant|>\n",
        "image in a string": "<|user|>\nLook: <image> What?<|end|>\n<|assistant|>\n",
        "only an image": "<|user|>\n<image><|end|>\n<|assistant|>\n",
    },
    "gemma": {
        "text": "<start_of_turn>user\nHello?<end_of_turn>\n<start_of_turn>model\n",
        "one turn": "<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\n",
        "answered": "<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n<eos>",
        "two turns": "<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n<eos>"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n",
        "system": "<start_of_turn>user\nBe brief.\n\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\nA cat."
        "<end_of_turn>\n<eos><start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n",
        "image last": "<start_of_turn>user\n<image>\nWhat is this?<end_of_turn>\n<start_of_turn>model\n",
        "two images": "<start_of_turn>user\n<image>\n<image>\nCompare\nthese.<end_of_turn>\n<start_of_turn>model\n",
        "image in a string": "<start_of_turn>user\nLook: <image> What?<end_of_turn>\n<start_of_turn>model\n",
        "only an image": "<start_of_turn>user\n<image><end_of_turn>\n<start_of_turn>model\n",
    },
    "hermes": {
        "text": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHello?<|im_end|>"
        "<|im_start|>assistant\n",
        "one turn": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\n",
        "answered": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|>",
        "two turns": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
        "image last": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is this?"
        "<|im_end|><|im_start|>assistant\n",
        "two images": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n<image>\nCompare\n"
        "these.<|im_end|><|im_start|>assistant\n",
        "image in a string": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nLook: <image> What?"
        "<|im_end|><|im_start|>assistant\n",
        "only an image": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image><|im_end|>"
        "<|im_start|>assistant\n",
    },
}
CASES = [(name, chat) for name in EXPECTED for chat in EXPECTED[name]]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_the_prompt_is_llavas(processor: Any, name: str, chat: str) -> None:
    messages, add_generation_prompt = CHATS[chat]
    prompt = processor.apply_chat_template(
        messages, chat_template=load_chat_template(name), add_generation_prompt=add_generation_prompt
    )
    assert prompt == EXPECTED[name][chat]


def test_all_templates_are_tested_and_the_plain_format_alone_lacks_chats() -> None:
    assert set(EXPECTED) == set(CHAT_TEMPLATES)
    assert {name for name in EXPECTED if set(EXPECTED[name]) != set(CHATS)} == {"plain"}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_string_and_a_list_of_one_text_are_the_same(processor: Any, name: str) -> None:
    question = "<image>\nWhat is it?"
    prompts = [
        processor.apply_chat_template([user(content), assistant(answer)], chat_template=load_chat_template(name))
        for content, answer in [(question, "It is."), (text(question), [text("It is.")])]
    ]
    assert prompts[0] == prompts[1]
    assert "It is." in prompts[0]


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml", "llama_2", "phi_3", "gemma", "hermes"])
def test_an_empty_system_message_is_no_system_message(processor: Any, name: str) -> None:
    messages = [{"role": "system", "content": ""}, user("Hi")]
    prompt = processor.apply_chat_template(messages, chat_template=load_chat_template(name))
    first = {"vicuna_v1": "USER: Hi ", "llama_2": "[INST] Hi [/INST]"}
    assert prompt.startswith(first.get(name, "<"))
    assert not any(word in prompt for word in ("system", "SYS", "Be", "You", "Answer", "curious"))


def test_plain_leaves_out_the_system_message_and_the_users_words(processor: Any) -> None:
    messages = [SYSTEM, user(text("Describe it."), IMAGE), assistant(" A cat ")]
    assert processor.apply_chat_template(messages, chat_template=load_chat_template("plain")) == "<image> A cat \n"


BAD_CHATS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "assistant first": ([assistant("Hi")], "Roles must alternate"),
    "user twice": ([user("<image>"), user("b")], "Roles must alternate"),
    "assistant twice": ([user("<image>"), assistant("b"), assistant("c")], "Roles must alternate"),
    "system later": ([user("<image>"), SYSTEM], "The system message must come first"),
    "system twice": ([SYSTEM, SYSTEM, user("<image>")], "The system message must come first"),
    "unknown role": ([{"role": "tool", "content": "4"}], "Unknown role: tool"),
    "unknown content": ([user({"type": "audio", "audio": "a.wav"})], "not: audio"),
    "bare string in a list": ([user({"type": "image"}, "What?")], r"not: What\?"),
    "image of the assistant": ([user("<image>"), assistant([IMAGE])], "not those of: assistant"),
    "image of the system": ([{"role": "system", "content": [IMAGE]}], "not those of: system"),
    "no content": ([{"role": "user"}], "must be a string or a list"),
    "content of a wrong type": ([{"role": "user", "content": {"type": "text", "text": "a"}}], "must be a string or"),
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("case", BAD_CHATS)
def test_chats_that_no_format_has_are_refused(processor: Any, name: str, case: str) -> None:
    messages, message = BAD_CHATS[case]
    with pytest.raises(ValueError, match=f"^The chat template refuses the conversation: .*{message}"):
        processor.apply_chat_template(messages, chat_template=load_chat_template(name))


@pytest.mark.parametrize("messages", [[user("no image")], [user("<image>"), assistant("a"), user("<image>")]])
def test_plain_refuses_what_is_no_pair_of_image_and_caption(processor: Any, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="one user message with an image"):
        processor.apply_chat_template(messages, chat_template=load_chat_template("plain"))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_engines_see_from_the_syntax_tree_that_content_may_be_a_list(name: str) -> None:
    # vLLM looks for a loop over `message.content` inside a loop over `messages`; else it hands over flat strings.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = load_chat_template(name)
    tree = _compile_jinja_template(template).environment.parse(template)
    outer = [loop for loop in tree.find_all(jinja2.nodes.For) if getattr(loop.iter, "name", None) == "messages"]
    inner = [loop.iter for found in outer for loop in found.find_all(jinja2.nodes.For) if loop is not found]
    assert any(isinstance(i, jinja2.nodes.Getattr) and (i.node.name, i.attr) == ("message", "content") for i in inner)


def test_an_unknown_template_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no chat template 'llama_4'.*vicuna_v1, plain, chatml, llama_2, phi_3"):
        load_chat_template("llama_4")


# BOS: no format writes it before the first turn; the tokenizer adds it where the model family wants it.


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "plain", "gemma"])
def test_exactly_one_bos_comes_first_however_the_chat_becomes_tokens(
    make_processor: Any, make_picture: Any, name: str, bos: bool
) -> None:
    picture = make_picture()
    processor = make_processor(chat_template=load_chat_template(name, bos=bos))
    bos_id = processor.tokenizer.bos_token_id
    messages = [user({"type": "image", "image": picture}, text("What?")), assistant("A cat.")]
    at_once = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    prompt = processor.apply_chat_template(messages)
    in_two_steps = processor(images=picture, text=prompt)["input_ids"][0]
    assert prompt.startswith("<s>") is bos
    assert at_once == in_two_steps
    assert at_once[0] == bos_id
    assert at_once.count(bos_id) == 1
    as_given = processor(images=picture, text=prompt, add_special_tokens=False)["input_ids"][0]
    assert as_given == (at_once if bos else at_once[1:])


def test_llama_2_has_one_bos_per_turn_as_the_format_says(make_processor: Any) -> None:
    processor = make_processor(chat_template=load_chat_template("llama_2"))
    ids = processor.apply_chat_template(CHATS["text"][0] + [assistant("Hi"), user("Bye")], tokenize=True)[0]
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.tokenizer.bos_token_id) == 2


def test_no_bos_where_the_tokenizer_adds_none(make_processor: Any, make_tokenizer: Any) -> None:
    processor = make_processor(tokenizer=make_tokenizer(add_bos=False), chat_template=load_chat_template("chatml"))
    ids = processor.apply_chat_template(CHATS["text"][0], tokenize=True)[0]
    assert processor.tokenizer.bos_token_id not in ids
    # What the user writes is the user's where the tokenizer adds nothing.
    assert processor(text="<s>hi")["input_ids"][0][0] == processor.tokenizer.bos_token_id
