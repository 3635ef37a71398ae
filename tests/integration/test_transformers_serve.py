"""`delta-llava serve`: transformers' own server, asked through the `openai` client."""

import json
import subprocess
from pathlib import Path

import pytest
from transformers import pipeline

from tests.integration.engine_scripts.answer import NEW_TOKENS, answer, ask_pipeline
from tests.integration.engines import Engine, free_port, needs
from tests.integration.malformed import malformed_requests
from tests.integration.requests import data_url, messages
from tests.pages import commands_of, filled, read_blocks
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


pytestmark = needs("serve")


SERVER, CLIENT = read_blocks("engines.md", "transformers serve")
# What the page starts the server with; the repo's own default is 16.
SERVER_BUDGET = 4
# `transformers serve` limits neither pictures nor text, passes over content and settings of kinds that it does not know, and
# decodes films before the model is asked.
OWN_WAYS = {"many pictures": (200,), "long text": (200,), "content": (200,), "option": (200,), "video": (500,)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine("serve", tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(engine, repo):
    port = free_port()
    install, words = commands_of(filled(SERVER.text, {"REPO": str(repo), "8000": str(port)}))
    assert install[0] == "pip" and words[:2] == ["delta-llava", "serve"] and str(SERVER_BUDGET) in words
    command = ["-m", "transformers_delta_llava", *words[1:], "--device", "cpu", "--dtype", "float32"]
    with engine.serve(command, port) as running:
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
def expected_texts(repo, cases) -> list[str]:
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
    processor = DeltaLlavaProcessor.from_pretrained(repo)
    budgets = [SERVER_BUDGET if case["num_visual_tokens"] is None else case["num_visual_tokens"] for case in cases]
    asked = [{**case, "num_visual_tokens": budget} for case, budget in zip(cases, budgets)]
    asked[-1] = cases[-1]  # text alone
    return [answer(model, processor, case)["text"] for case in asked]


def test_answers_are_those_of_transformers(engine, server, repo, cases, expected_texts):
    answers = chat(engine, server, repo, [request(case) for case in cases])
    assert [said.get("text", said) for said in answers] == expected_texts


def test_eight_requests_at_once(engine, server, repo, cases, expected_texts):
    answers = chat(engine, server, repo, [request(case) for case in cases[-8:]], "--together")
    assert [said.get("text", said) for said in answers] == expected_texts[-8:]


def test_streaming(engine, server, repo, cases, expected_texts):
    (said,) = chat(engine, server, repo, [request(cases[0], stream=True)])
    assert said["text"] == expected_texts[0]
    assert said["pieces"] > 1


def test_bad_budgets_are_refused(engine, server, repo, cases, expected_texts):
    budgets = [7, 0, "16", 16.5, [16, 4]]
    bad = [request({**cases[0], "num_visual_tokens": budget}) for budget in budgets]
    *refused, good = chat(engine, server, repo, [*bad, request(cases[0])])
    for budget, said in zip(budgets, refused, strict=True):
        assert said.get("status") == 400 and "num_visual_tokens" in said["error"], (budget, said)
    assert good["text"] == expected_texts[0]


def test_200_malformed_requests(engine, server, repo, questions, cases, expected_texts):
    good = {"model": str(repo), "messages": messages(cases[0]), "max_tokens": 4}
    answered = []
    for fault, body in malformed_requests(good, Path(questions[0].image).read_bytes(), 200):
        status, text = server.post("/v1/chat/completions", body)
        if not 400 <= status < 500 and status not in OWN_WAYS.get(fault, ()):
            answered.append(f"{fault}: {status} {text[:100]} to ...{body[-100:]!r}")
    assert not answered, "\n".join(answered)
    assert server.is_alive
    assert chat(engine, server, repo, [request(cases[0])])[0]["text"] == expected_texts[0]


def test_a_budget_that_the_model_does_not_have_is_refused_at_once(engine, repo):
    command = [engine.python, "-m", "transformers_delta_llava", "serve", repo, "--num-visual-tokens", "7"]
    result = subprocess.run(command, env=engine.environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("delta-llava: num_visual_tokens=7:")


def test_client_code_of_the_page(engine, server, repo, questions):
    text = {"type": "text", "text": "What is in this picture?"}
    content = [{"type": "image_url", "image_url": {"url": data_url(questions[0].image)}}, text]
    before = f"from openai import OpenAI\nmessages = {[{'role': 'user', 'content': content}]!r}\n"
    before += f'client = OpenAI(base_url="{server.url}/v1", api_key="none")'
    code = filled(CLIENT.text, {"REPO": str(repo)}).replace("print(", "pieces.append(").replace(', end=""', "")
    report = engine.run("run_code.py", stdin={"code": [before, "pieces = []", code], "show": ["''.join(pieces)"]})
    pipe = pipeline(
        "image-text-to-text",
        model=DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval(),
        processor=DeltaLlavaProcessor.from_pretrained(repo),
    )
    content = [{"type": "image", "url": questions[0].image}, text]
    assert report["shown"][0].strip() == ask_pipeline(pipe, {"content": content, "num_visual_tokens": 16})
