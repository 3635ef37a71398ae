"""`delta-llava serve`: transformers' own server, asked through the `openai` client."""

import json
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import pipeline

from tests.integration.api_requests import data_url, malformed_requests, messages
from tests.integration.engine_scripts.answer import NEW_TOKENS, answer, ask_pipeline
from tests.integration.engines import Engine, free_port, needs
from tests.pages import commands_of, filled, read_blocks
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


pytestmark = needs("serve")


SERVER, CLIENT = read_blocks("engines.md", "transformers serve")
PIXEL = "data:;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs="
WITH_IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}
# What the page starts the server with; the repo's own default is 16.
SERVER_BUDGET = 4
# `transformers serve` limits no number of images that fits the model's positions, and passes over settings that it does not know.
OWN_WAYS = {"many images": (200,), "option": (200,), "marker in text": (200,), "roles": (200,)}


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


def post(server, repo, **more) -> tuple[int, str]:
    body = {"model": str(repo), "max_tokens": 4, "messages": [{"role": "user", "content": "what shape?"}], **more}
    return server.post("/v1/chat/completions", json.dumps(body).encode())


def said(server, repo, **more) -> str:
    status, text = post(server, repo, **more)
    assert status == 200, text
    return json.loads(text)["choices"][0]["message"]["content"]


def test_what_other_servers_take(server, repo, questions):
    first, second = ({"role": role, "content": "what shape is"} for role in ("user", "user"))
    joined = [{"type": "text", "text": "what shape is"}, {"type": "text", "text": "in the image?"}]
    assert said(server, repo, messages=[first, {**second, "content": "in the image?"}]) == said(
        server, repo, messages=[{"role": "user", "content": joined}]
    )
    both = [{"role": role, "content": "Answer in one word."} for role in ("developer", "system")]
    answers = [said(server, repo, messages=[message, first]) for message in both]
    assert answers[0] == answers[1]
    whole = said(server, repo, max_tokens=12)
    stopped = said(server, repo, max_tokens=12, stop=[whole[:1]])
    assert whole.startswith(stopped) and len(stopped) <= len(whole)
    tokenizer = DeltaLlavaProcessor.from_pretrained(repo).tokenizer
    token = tokenizer.encode("red", add_special_tokens=False)[-1]
    assert said(server, repo, logit_bias={str(token): 100}, max_tokens=2) == tokenizer.decode([token, token])
    data = data_url(questions[0].image).partition(",")[2]
    urls = [f"data:image/png;base64,{data}", f"data:;base64,{data}", f"data:application/x-odd;base64,{data}", data]
    text = {"type": "text", "text": questions[0].text}
    parts = [[{"type": "image_url", "image_url": {"url": url}}, text] for url in urls]
    assert len({said(server, repo, messages=[{"role": "user", "content": content}]) for content in parts}) == 1
    assert said(server, repo, max_tokens=10**6)  # as far as there are positions


LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "shape " * 10**5}]}, "The prompt is too long"),
        ({"chat_template_kwargs": {"chat_template": LOOP}}, "chat_template is unknown"),
        ({"chat_template_kwargs": {"processor_kwargs": {"size": {"shortest_edge": 10**6}}}}, "size is unknown"),
        ({"chat_template_kwargs": {"processor_kwargs": {"padding": "max_length", "max_length": 10**9}}}, "unknown"),
        ({"chat_template_kwargs": {"padding": "max_length", "max_length": 10**9}}, "is unknown"),
        ({"chat_template_kwargs": {"do_pad": "perhaps"}, "messages": [WITH_IMAGE]}, "`do_pad` must be True or False"),
        ({"generation_config": json.dumps({"num_beams": 10**6})}, "num_beams=1000000"),
        ({"seed": 10**30}, "seed"),
    ],
)
def test_what_would_stop_the_server_is_refused_at_once(server, repo, more, message):
    start = time.monotonic()
    status, text = post(server, repo, **more)
    assert status == 400 and message in json.loads(text)["error"]["message"], text
    assert time.monotonic() - start < 20


def test_a_url_that_keeps_silent_or_is_the_servers_own_stops_nobody(server, repo):
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(2) as pool:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/a.png", f"{server.url}/v1/models"]
        images = [[{"type": "image_url", "image_url": {"url": url}}] for url in urls]
        waiting = [pool.submit(post, server, repo, messages=[{"role": "user", "content": image}]) for image in images]
        time.sleep(0.5)
        start = time.monotonic()
        assert said(server, repo)
        assert time.monotonic() - start < 9 and not waiting[0].done()
        for result, message in zip(waiting, ("timed out", "cannot identify an image")):
            status, text = result.result()
            assert status == 400 and message in text


def test_other_endpoints_are_measured_too(server, repo):
    long = "shape " * 10**5
    for path, name in (("completions", "prompt"), ("responses", "input")):
        status, text = server.post(f"/v1/{path}", json.dumps({"model": str(repo), name: long}).encode())
        assert status == 400 and "The prompt is too long" in text, (path, text[:500])
        status, text = server.post(f"/v1/{path}", json.dumps({"model": str(repo), name: "what shape?"}).encode())
        assert status == 200, (path, text[:500])


def test_a_budget_that_the_model_does_not_have_is_refused_at_once(engine, repo):
    command = [engine.python, "-m", "transformers_delta_llava", "serve", repo, "--num-visual-tokens", "7"]
    result = subprocess.run(command, env=engine.environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("delta-llava: num_visual_tokens=7:")


def test_client_code_of_the_page(engine, server, repo, questions):
    text = {"type": "text", "text": "What is in this image?"}
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
