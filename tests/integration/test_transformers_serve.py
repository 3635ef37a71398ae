"""`transformers serve REPO --trust-remote-code` where this package is not installed, asked through the `openai` client."""

import json

import pytest

from tests.integration.engine_scripts.answer import NEW_TOKENS, answer
from tests.integration.engines import Engine, data_url, free_port, messages, needs
from tests.pages import commands_of, filled, read_blocks
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


pytestmark = needs("serve")


SERVER, CLIENT = read_blocks("engines.md", "transformers serve")


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine("serve", tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(engine, repo):
    port = free_port()
    install, words = commands_of(filled(SERVER.text, {"REPO": str(repo), "8000": str(port)}))
    assert install[0] == "pip" and words[:2] == ["transformers", "serve"]
    start = ["-c", "import sys; from transformers.cli.transformers import main; sys.exit(main())"]
    with engine.serve([*start, *words[1:], "--device", "cpu", "--dtype", "float32"], port) as running:
        yield running


def request(case: dict, **more) -> dict:
    """The case for this server, which takes generation's settings as JSON and the processor's with the template's."""
    settings = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    own: dict = {"generation_config": json.dumps(settings)}
    if case["num_visual_tokens"] is not None:
        own["chat_template_kwargs"] = {"processor_kwargs": {"num_visual_tokens": case["num_visual_tokens"]}}
    return {"messages": messages(case), "extra_body": own, **more}


def chat(engine, server, repo, requests: list[dict], *flags: str) -> list[dict]:
    return engine.run("chat.py", server.url, repo, *flags, stdin=requests)["answers"]


@pytest.fixture(scope="module")
def expected_texts(expected) -> list[str]:
    return [answer["text"] for answer in expected]


def test_answers_are_those_of_transformers(engine, server, repo, cases, expected_texts):
    answers = chat(engine, server, repo, [request(case) for case in cases])
    assert [said.get("text", said) for said in answers] == expected_texts


def test_streaming(engine, server, repo, cases, expected_texts):
    (said,) = chat(engine, server, repo, [request(cases[0], stream=True)])
    assert said["text"] == expected_texts[0]
    assert said["pieces"] > 1


def test_a_bad_budget_stops_nobody(engine, server, repo, cases, expected_texts):
    refused, good = chat(engine, server, repo, [request({**cases[0], "num_visual_tokens": 7}), request(cases[0])])
    assert refused.get("status", 0) >= 400 and good["text"] == expected_texts[0]


def test_client_code_of_the_page(engine, server, repo, questions):
    text = {"type": "text", "text": "What is in this image?"}
    content = [{"type": "image_url", "image_url": {"url": data_url(questions[0].image)}}, text]
    before = f"messages = {[{'role': 'user', 'content': content}]!r}"
    code = filled(CLIENT.text, {"REPO": str(repo), "http://localhost:8000": server.url})
    report = engine.run("run_code.py", stdin={"code": [before, code], "show": ["answer.choices[0].message.content"]})
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
    case = {"content": [{"type": "image", "url": questions[0].image}, text], "num_visual_tokens": 4}
    expected = answer(model, DeltaLlavaProcessor.from_pretrained(repo), case)["text"]
    shown = report["shown"][0].strip()
    assert shown and expected.strip().startswith(shown)
