"""Every template renders the authors' prompts character by character, here and in JavaScript."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from filelock import FileLock
from transformers.utils.chat_template_utils import render_jinja_template

from transformers_delta_llava.processing import CHAT_TEMPLATES, load_chat_template
from transformers_delta_llava.processing.chat_templates import adapt_template


IMAGE = {"type": "image"}
GOLDEN = json.loads((Path(__file__).parents[1] / "reference" / "golden_prompts.json").read_text(encoding="utf-8"))


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
VICUNA_TAIL = "<image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
CHATML_TAIL = (
    "<|im_start|>user\n<image>\nWhat?<|im_end|><|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|>"
    "<|im_start|>assistant\n"
)
LLAMA_3_TAIL = (
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n"
    "What?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
# The chat "system" of `CHATS`, which no golden prompt has.
WITH_SYSTEM = {
    "vicuna_v1": "Be brief. USER: " + VICUNA_TAIL,
    "llama_2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Sure? [/INST]",
    "mistral_instruct": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s>[INST] Sure? [/INST]",
    "llama3": "<|begin_of_text|>" + LLAMA_3_TAIL,
    "hermes-4": LLAMA_3_TAIL,
    "chatml_direct": "<|im_start|>system\nBe brief.<|im_end|>" + CHATML_TAIL,
    "chatml": ("<|im_start|>system\nBe brief.<|im_end|>" + CHATML_TAIL).replace("<|im_end|>", "<|im_end|>\n"),
    "phi_3": "<|system|>\nBe brief.<|end|>\n<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\nA cat.<|end|>\n<|user|>\nSure?"
    "<|end|>\n<|assistant|>\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n<eos>"
    "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n",
    "plain": "<image>\nWhat?\nA cat.\nSure?\n",
}
WITH_SYSTEM["llava_llama_2"] = WITH_SYSTEM["llama_2"]
WITH_SYSTEM["hermes-2"] = WITH_SYSTEM["mpt"] = WITH_SYSTEM["chatml_direct"]
# A list and the string that it stands for.
SAME = [
    ([text("What is this? "), IMAGE], "<image>\nWhat is this?"),
    ([text("Compare"), IMAGE, text("these."), IMAGE], "<image>\n<image>\nCompare\nthese."),
    ([IMAGE], "<image>"),
    ([text("Look: <image> What?")], "Look: < image> What?"),  # in a list, images are items
    ([IMAGE, text("<<image>image><image>")], "<image>\n<< image>image>< image>"),
]


def golden_chats(golden: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The chat of a golden prompt, with strings and with lists as content."""
    roles = [("user", "assistant")[index % 2] for index in range(len(golden["turns"]))]
    strings = [{"role": role, "content": turn} for role, turn in zip(roles, golden["turns"])]
    lists = []
    for role, turn in zip(roles, golden["turns"]):
        words = turn.removeprefix("<image>\n")
        lists.append({"role": role, "content": [text(words), *([IMAGE] if words != turn else [])]})
    return [strings, lists]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{golden['template']}-{len(golden['turns'])}")
def test_the_prompt_is_the_authors(processor: Any, golden: dict[str, Any]) -> None:
    for chat in golden_chats(golden):
        prompt = processor.apply_chat_template(
            chat,
            chat_template=load_chat_template(golden["template"]),
            add_generation_prompt=golden["generation_prompt"],
        )
        assert prompt == golden["prompt"]


def test_a_qwen_prompt_has_newlines_between_turns(processor: Any) -> None:
    prompt = processor.apply_chat_template(
        [user(IMAGE, text("What?"))], chat_template=load_chat_template("chatml"), add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_every_golden_conversation_has_a_template() -> None:
    assert {golden["template"] for golden in GOLDEN} == set(CHAT_TEMPLATES) - {"chatml"}


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_message_takes_the_place_of_the_default_one(processor: Any, name: str) -> None:
    chat = [SYSTEM, user(IMAGE, text("What?")), assistant([text("A cat.")]), user("Sure?")]
    options = {"chat_template": load_chat_template(name), "add_generation_prompt": True}
    assert processor.apply_chat_template(chat, **options) == WITH_SYSTEM[name]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_images_come_first_in_their_turn_one_a_line(processor: Any, name: str) -> None:
    options = {"chat_template": load_chat_template(name), "add_generation_prompt": True}
    for items, string in SAME:
        assert processor.apply_chat_template([user(*items)], **options) == processor.apply_chat_template(
            [user(string)], **options
        )
        assert string in processor.apply_chat_template([user(*items)], **options)


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name != "plain"])
def test_an_empty_system_message_is_left_out(processor: Any, name: str) -> None:
    messages = [{"role": "system", "content": ""}, user("Hi")]
    prompt = processor.apply_chat_template(messages, chat_template=load_chat_template(name))
    assert prompt.count("Hi") == 1
    assert not any(word in prompt for word in ("system", "SYS", "Be", "You", "Answer", "curious", "conversation"))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("v1", "vicuna_v1"),
        ("llama_3", "llama3"),
        ("Llama-3", "llama3"),
        ("hermes_4", "hermes-4"),
        ("phi3", "phi_3"),
        ("mistral", "mistral_instruct"),
        ("mistral_direct", "chatml_direct"),
        ("qwen_1_5", "chatml"),
    ],
)
def test_other_names_of_a_template(name: str, other: str) -> None:
    assert load_chat_template(name) == load_chat_template(other)


def test_plain_trains_on_a_caption_without_the_question(processor: Any) -> None:
    template = load_chat_template("plain")
    messages = [SYSTEM, user(text("Describe it."), IMAGE, IMAGE), assistant(" A cat ")]
    assert processor.apply_chat_template(messages, chat_template=template) == "<image><image> A cat \n"
    # And asks for one as it was trained.
    options = {"chat_template": template, "add_generation_prompt": True}
    assert processor.apply_chat_template([user(IMAGE)], **options) == "<image>"


@pytest.fixture(scope="module")
def render_in_node() -> Callable[[list[dict[str, Any]]], list[str]]:
    """Renders chats with the Jinja of transformers.js, which is downloaded once."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no Node")
    folder = Path(__file__).parents[2] / ".cache" / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / "node_modules" / "@huggingface" / "jinja").is_dir():
            command = [npm, "install", "--prefix", str(folder), "@huggingface/jinja@0.5"]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("@huggingface/jinja cannot be downloaded")

    def render(cases: list[dict[str, Any]]) -> list[str]:
        script = Path(__file__).parent / "render_chats.cjs"
        environment = {**os.environ, "NODE_PATH": str(folder / "node_modules")}
        done = subprocess.run(
            [str(node), str(script)], input=json.dumps(cases), capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return render


def test_they_render_in_javascript_as_they_do_here(render_in_node: Any, processor: Any) -> None:
    cases, expected = [], []

    def add(template: str, chat: list[dict[str, Any]], prompt: str, generation_prompt: bool) -> None:
        context = {"messages": chat, "add_generation_prompt": generation_prompt, "bos_token": "<s>"}
        cases.append({"template": template, "context": context})
        expected.append(prompt)

    for golden in GOLDEN:
        for chat in golden_chats(golden):
            add(load_chat_template(golden["template"]), chat, golden["prompt"], golden["generation_prompt"])
    others = [load_chat_template("chatml"), load_chat_template("gemma", bos=True)]
    chats = (
        [SYSTEM, user(IMAGE, text("What?")), assistant("It\u2019s \\n.")],
        [user(IMAGE, IMAGE), assistant("A cat.")],
    )
    for template in [*others, load_chat_template("plain"), *OWN_TEMPLATES.values()]:
        for chat in chats:
            for open_turn in (False, True):
                prompt = processor.apply_chat_template(chat, chat_template=template, add_generation_prompt=open_turn)
                add(template, chat, prompt, open_turn)
    assert render_in_node(cases) == expected
    refused = [{"template": load_chat_template("llama3"), "context": {"messages": [assistant("Hi")]}}]
    assert render_in_node(refused)[0].startswith("error: Roles must alternate")


# The kinds of templates that tokenizers bring: ChatML with a system message of its own, Llama 3's, Qwen 3's with its empty
# thoughts, one in which later turns look different, and one that marks its answers itself.
CHATML_OWN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "
    "Tiny.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3_OWN = """{{- bos_token }}
{%- if custom is defined %}
    {%- set tools = custom %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{% set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
THINKING_OWN = """{%- set ns = namespace(last=messages | length - 1) %}
{%- macro opening(role) %}{{ '<|im_start|>' + role + '\n' }}{% endmacro %}
{%- for message in messages %}
    {{- opening(message.role) }}
    {%- if message.role == 'assistant' and loop.index0 == ns.last %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- message.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- opening('assistant') }}
{%- endif %}
"""
MARKED_OWN = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content + '<|end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ message.content + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OWN = {"chatml": CHATML_OWN, "llama 3": LLAMA_3_OWN, "thinking": THINKING_OWN, "marked": MARKED_OWN}
OWN_ENDS = {"chatml": "<|im_end|>", "llama 3": "<|eot_id|>", "thinking": "<|im_end|>", "marked": "<|end|>"}
OWN_TEMPLATES = {name: adapt_template(template, OWN_ENDS[name]) for name, template in OWN.items()}


@pytest.mark.parametrize("name", OWN)
def test_a_tokenizers_own_template_takes_images_and_says_the_same(processor: Any, name: str) -> None:
    turns = [user("Hi "), assistant(" Hello. "), user("Sure?"), assistant("Yes."), user("Bye")]
    for length in range(1, 6):
        for chat in (turns[:length], [SYSTEM, *turns[:length]]):
            for open_turn in (False, True):
                options = {"add_generation_prompt": open_turn}
                expected = processor.tokenizer.apply_chat_template(
                    chat, chat_template=OWN[name], tokenize=False, **options
                )
                assert processor.apply_chat_template(chat, chat_template=OWN_TEMPLATES[name], **options) == expected
    for items, string in SAME:
        prompts = [
            processor.apply_chat_template([user(*content)], chat_template=OWN_TEMPLATES[name])
            for content in ([string], items)
        ]
        assert prompts[0] == prompts[1] and string in prompts[0]


@pytest.mark.parametrize("name", OWN)
def test_a_tokenizers_own_template_marks_answers_with_their_end(processor: Any, name: str) -> None:
    chat = [user("Hi"), assistant(" Hello."), user("Sure?"), assistant("Yes.")]
    prompts, spans = render_jinja_template([chat], chat_template=OWN_TEMPLATES[name], bos_token="<s>")
    spans = render_jinja_template(
        [chat], chat_template=OWN_TEMPLATES[name], bos_token="<s>", return_assistant_tokens_mask=True
    )[1][0]
    first = "Hello." if name == "llama 3" else " Hello."
    assert [prompts[0][start:stop] for start, stop in spans] == [first + OWN_ENDS[name], "Yes." + OWN_ENDS[name]]


def test_an_answer_that_a_template_changes_is_not_marked_but_rendered(processor: Any) -> None:
    chat = [user("Hi"), assistant("<think>Hm.</think>Hello.")]
    options = {"chat_template": OWN_TEMPLATES["thinking"]}
    expected = processor.tokenizer.apply_chat_template(chat, chat_template=THINKING_OWN, tokenize=False)
    assert processor.apply_chat_template(chat, **options) == expected
    assert not render_jinja_template([chat], return_assistant_tokens_mask=True, **options)[1][0]


def test_adapting_twice_is_adapting_once() -> None:
    for template in (*OWN_TEMPLATES.values(), load_chat_template("vicuna_v1")):
        assert adapt_template(template, "<|end|>") == template


BAD_CHATS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "assistant first": ([assistant("Hi")], "Roles must alternate"),
    "user twice": ([user("<image>"), user("b")], "Roles must alternate"),
    "assistant twice": ([user("<image>"), assistant("b"), assistant("c")], "Roles must alternate"),
    "system later": ([user("<image>"), SYSTEM], "The system message must come first"),
    "system twice": ([SYSTEM, SYSTEM, user("<image>")], "The system message must come first"),
    "unknown role": ([{"role": "tool", "content": "4"}], "Unknown role: tool"),
    "unknown content": ([user({"type": "audio", "audio": "a.wav"})], "not: audio"),
    "image of the assistant": ([user("<image>"), assistant([IMAGE])], "not those of: assistant"),
    "image of the system": ([{"role": "system", "content": [IMAGE]}], "not those of: system"),
}


@pytest.mark.parametrize("name", ["vicuna_v1", "gemma", "plain"])
@pytest.mark.parametrize("case", BAD_CHATS)
def test_chats_that_no_format_has_are_refused(processor: Any, name: str, case: str) -> None:
    messages, message = BAD_CHATS[case]
    with pytest.raises(jinja2.TemplateError, match=message):
        processor.apply_chat_template(messages, chat_template=load_chat_template(name))


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
    with pytest.raises(ValueError, match=r"no chat template 'llama_4'.*vicuna_v1, llama_2, llava_llama_2, mistral"):
        load_chat_template("llama_4")


# BOS: no format writes it before the first turn; the tokenizer adds it where the model family wants it.


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["vicuna_v1", "llava_llama_2", "plain", "gemma"])
def test_exactly_one_bos_comes_first_however_the_chat_becomes_tokens(
    make_processor: Any, make_image: Any, name: str, bos: bool
) -> None:
    image = make_image()
    processor = make_processor(chat_template=load_chat_template(name, bos=bos))
    bos_id = processor.tokenizer.bos_token_id
    messages = [user({"type": "image", "image": image}, text("What?")), assistant("A cat.")]
    at_once = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    prompt = processor.apply_chat_template(messages)
    in_two_steps = processor(images=image, text=prompt)["input_ids"][0]
    assert prompt.startswith("<s>") is bos
    assert at_once == in_two_steps
    assert at_once[0] == bos_id
    assert at_once.count(bos_id) == 1
    as_given = processor(images=image, text=prompt, add_special_tokens=False)["input_ids"][0]
    assert as_given == (at_once if bos else at_once[1:])


def test_llama_2_has_one_bos_per_turn_as_the_format_says(make_processor: Any) -> None:
    processor = make_processor(chat_template=load_chat_template("llama_2"))
    ids = processor.apply_chat_template([user("Hello?")] + [assistant("Hi"), user("Bye")], tokenize=True)[0]
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.tokenizer.bos_token_id) == 2


def test_no_bos_where_the_tokenizer_adds_none(make_processor: Any, make_tokenizer: Any) -> None:
    processor = make_processor(tokenizer=make_tokenizer(add_bos=False), chat_template=load_chat_template("chatml"))
    ids = processor.apply_chat_template([user("Hello?")], tokenize=True)[0]
    assert processor.tokenizer.bos_token_id not in ids
    # What the user writes is the user's where the tokenizer adds nothing.
    assert processor(text="<s>hi")["input_ids"][0][0] == processor.tokenizer.bos_token_id


def test_the_tag_in_a_users_text_is_not_a_placeholder(processor: Any, make_image: Any) -> None:
    content = [{"type": "image", "image": make_image()}, text("What does <image> mean?")]
    options = {"chat_template": load_chat_template("vicuna_v1"), "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    assert inputs["input_ids"][0].count(processor.image_token_id) == 4
    with pytest.raises(ValueError, match="2 <image>.* 1 images"):
        processor(images=[make_image()], text=["<image> What does <image> mean?"])
