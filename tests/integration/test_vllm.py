"""vLLM's Transformers modelling backend, offline and as a server, where the package is not installed."""

import json

import pytest
import torch
from PIL import Image
from transformers import pipeline

from tests.integration.engine_scripts.answer import NEW_TOKENS, answer, ask_pipeline
from tests.integration.engines import Engine, data_url, free_port, messages, needs
from tests.pages import commands_of, filled, read_blocks
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.generate import AnswerFile, generate, read_requests
from transformers_delta_llava.loading import load_repo


pytestmark = needs("vllm")


OFFLINE, SERVER, CLIENT = read_blocks("engines.md", "vLLM")
# What the page starts the server with; the repo's own default is 16.
ENGINE_BUDGET = 4
URL_ON_PAGE = "https://example.org/photo.jpg"
# One engine at a time in little memory; nothing is reported to anybody.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory) -> Engine:
    return Engine("vllm", tmp_path_factory.mktemp("vllm"))


def has_one_number(case: dict) -> bool:
    """Whether all images of a case get one number of visual tokens."""
    return not isinstance(case["num_visual_tokens"], list)


def offline(case: dict) -> dict:
    return {"messages": messages(case), "num_visual_tokens": case["num_visual_tokens"]}


def test_offline_answers_are_those_of_transformers(vllm, repo, cases, expected):
    cases, expected = zip(*(pair for pair in zip(cases, expected) if has_one_number(pair[0])))
    bad = offline({**cases[0], "num_visual_tokens": 7})

    report = vllm.run("vllm_offline.py", repo, stdin=[*map(offline, cases), bad], **ENVIRONMENT)

    assert report["alone"] == list(expected)
    usual = [answer for case, answer in zip(cases, expected) if case["num_visual_tokens"] is None]
    assert report["together"] == usual
    assert report["refused"].startswith("ValueError") and "num_visual_tokens=7" in report["refused"]
    assert report["after"] == expected[0]


def test_numbers_per_image_are_exact_without_a_cache_and_refused_with_it(vllm, repo, questions):
    """The same images in another order, twice in one request, and again: vLLM's cache does not know their places."""
    first, second = ({"type": "image", "url": question.image} for question in questions[:2])
    text = {"type": "text", "text": "is there a red shape?"}
    rows = [
        ([first, second], [16, 1]),
        ([second, first], [16, 1]),
        ([first, first], [16, 4]),
        ([first, second], [16, 1]),
    ]
    asked = [{"content": [*images, text], "num_visual_tokens": numbers} for images, numbers in rows]
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
    processor = DeltaLlavaProcessor.from_pretrained(repo)

    requests = [*map(offline, asked), offline({**asked[0], "num_visual_tokens": 7})]
    report = vllm.run("vllm_offline.py", repo, "--numbers-per-image", stdin=requests, **ENVIRONMENT)
    assert report["alone"] == [answer(model, processor, case) for case in asked]

    good = offline({**asked[0], "num_visual_tokens": 4})
    report = vllm.run("vllm_offline.py", repo, stdin=[good, offline(asked[0])], **ENVIRONMENT)
    assert "numbers_per_image" in report["refused"]


@torch.inference_mode()
def test_tiles_and_videos(vllm, repo, questions, tmp_path):
    """Tiles and numbers of visual tokens per request, two images, a video, and an image and a video in one request."""
    images = []
    for index, size in enumerate([(200, 130), (64, 190)]):
        images.append(str(tmp_path / f"{index}.png"))
        Image.open(questions[index].image).resize(size).save(images[-1])
    clip = [question.image for question in questions[2:5]]
    rows = [
        ("<image>", images[:1], [], {"max_tiles": 4}),
        ("<image>", images[:1], [], {"max_tiles": 6, "num_visual_tokens": 4}),
        ("<image>", images[:1], [], {"max_tiles": 3, "num_visual_tokens": 1}),
        ("<image><image>", images, [], {"max_tiles": 4, "num_visual_tokens": 1}),
        ("<video>", [], [clip], {}),
        ("<video>", [], [clip], {"num_visual_tokens": 1}),
        ("<image><video>", images[:1], [clip], {"num_visual_tokens": 4}),
        ("<image>", images[:1], [], {}),
        ("<image>", images[:1], [], {"max_tiles": 17}),
    ]
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
    processor = DeltaLlavaProcessor.from_pretrained(repo)
    requests, expected = [], []
    for placeholders, paths, clips, options in rows:
        prompt = f"{placeholders} is there a red shape?"
        requests.append({"prompt": prompt, "images": paths, "videos": clips, "options": options})
        if options.get("max_tiles") == 17:
            continue
        frames = [[Image.open(path).convert("RGB") for path in clip] for clip in clips]
        inputs = processor(
            text=prompt,
            images=[Image.open(path) for path in paths] or None,
            videos=frames or None,
            return_tensors="pt",
            **options,
        )
        output = model.generate(**inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
        ids = inputs["input_ids"][0].tolist()
        expected.append({"prompt": ids, "tokens": output[0, len(ids) :].tolist()})
    answers = vllm.run("vllm_views.py", repo, stdin=requests, **ENVIRONMENT)["answers"]
    for half in (answers[: len(rows)], answers[len(rows) :]):
        assert half[:-1] == expected
        assert "max_tiles=17" in half[-1]["error"]


@pytest.fixture(scope="module")
def server(vllm, repo):
    port = free_port()
    (words,) = commands_of(filled(SERVER.text, {"REPO": str(repo)}))
    assert words[:2] == ["vllm", "serve"] and json.dumps({"num_visual_tokens": ENGINE_BUDGET}) in words
    command = [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        *words[2:],
        "--host",
        "127.0.0.1",
        "--port",
        port,
    ]
    command += [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        512,
        "--max-num-seqs",
        16,
    ]  # small, on a CPU
    with vllm.serve(command, port, **ENVIRONMENT) as running:
        yield running


def request(case: dict, **more) -> dict:
    """The case for vLLM's server, which takes its own arguments in `extra_body`."""
    own = {"min_tokens": NEW_TOKENS, "return_token_ids": True, **more.pop("extra_body", {})}
    if case["num_visual_tokens"] is not None:
        own["mm_processor_kwargs"] = {"num_visual_tokens": case["num_visual_tokens"]}
    return {"messages": messages(case), "max_tokens": NEW_TOKENS, "extra_body": own, **more}


def chat(vllm, server, requests: list[dict], *flags: str) -> list[dict]:
    return vllm.run("chat.py", server.url, "delta-llava", *flags, stdin=requests)["answers"]


def at_engine_budget(case: dict) -> dict:
    """What a request without a budget means to a server that was started with one."""
    has_image = any(item["type"] == "image" for item in case["content"])
    return {**case, "num_visual_tokens": ENGINE_BUDGET if has_image else None}


@pytest.fixture(scope="module")
def asked(cases) -> list[dict]:
    return [case for case in cases if has_one_number(case)]


@pytest.fixture(scope="module")
def expected_of_server(repo, asked) -> list[dict]:
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
    processor = DeltaLlavaProcessor.from_pretrained(repo)
    cases = [at_engine_budget(case) if case["num_visual_tokens"] is None else case for case in asked]
    return [{name: answer(model, processor, case)[name] for name in ("text", "tokens")} for case in cases]


def test_server_answers_are_those_of_transformers(vllm, server, asked, expected_of_server):
    assert chat(vllm, server, [request(case) for case in asked]) == expected_of_server


def test_eight_requests_at_once_with_mixed_budgets(vllm, server, asked, expected_of_server):
    assert chat(vllm, server, [request(case) for case in asked[-8:]], "--together") == expected_of_server[-8:]


def test_streaming(vllm, server, asked, expected_of_server):
    (said,) = chat(vllm, server, [request(asked[0], stream=True)])
    assert said["text"] == expected_of_server[0]["text"]
    assert said["pieces"] > 1


def test_bad_budgets_are_refused_and_the_engine_lives_on(vllm, server, asked, expected_of_server):
    budgets = [7, 0, -1, "16", 16.5, True, [16, 4], []]
    bad = [request({**asked[0], "num_visual_tokens": budget}) for budget in budgets]
    *refused, good = chat(vllm, server, [*bad, request(asked[0])])
    for budget, answer_to_it in zip(budgets, refused, strict=True):
        assert answer_to_it.get("status") == 400, (budget, answer_to_it)
        assert "num_visual_tokens" in answer_to_it["error"]
    assert good == expected_of_server[0]


@pytest.fixture(scope="module")
def page_answers(repo, questions) -> dict[int, str]:
    """What transformers says to the question of the page about one of the images, by budget."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
    processor = DeltaLlavaProcessor.from_pretrained(repo)
    content = [{"type": "image", "url": questions[0].image}, {"type": "text", "text": "What is in this image?"}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    case = {"content": content}
    return {budget: ask_pipeline(pipe, {**case, "num_visual_tokens": budget}, 64) for budget in (ENGINE_BUDGET, 16)}


def test_offline_code_of_the_page(vllm, repo, questions, page_answers):
    small = "import functools, vllm\n"
    small += 'options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16}\n'
    small += "vllm.LLM = functools.partial(vllm.LLM, **options)"
    code = filled(OFFLINE.text, {"REPO": str(repo), URL_ON_PAGE: data_url(questions[0].image)})
    keep = "answers = [llm.chat(messages, greedy)[0].outputs[0].text, said.outputs[0].text]"
    report = vllm.run("run_code.py", stdin={"code": [small, code, keep], "show": ["answers"]}, **ENVIRONMENT)
    assert [text.strip() for text in report["shown"][0]] == list(page_answers.values())


def test_client_code_of_the_page(vllm, server, questions, page_answers):
    content = [{"type": "image_url", "image_url": {"url": data_url(questions[0].image)}}]
    content.append({"type": "text", "text": "What is in this image?"})
    before = f"messages = {[{'role': 'user', 'content': content}]!r}"
    code = filled(CLIENT.text, {"http://localhost:8000": server.url})
    report = vllm.run("run_code.py", stdin={"code": [before, code], "show": ["answer.choices[0].message.content"]})
    assert report["shown"][0].strip() == page_answers[16]


def test_one_file_through_generate_and_run_batch(vllm, repo, questions, tmp_path):
    """Rows in OpenAI's batch format, each with its number of visual tokens; the last cannot be answered."""
    lines = []
    for index, number in enumerate([16, 4, 1, None, 7]):
        options = {} if number is None else {"mm_processor_kwargs": {"num_visual_tokens": number}}
        content = [{"type": "image_url", "image_url": {"url": data_url(questions[index].image)}}]
        content.append({"type": "text", "text": questions[index].text})
        body = {"model": "m", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        row = {"custom_id": str(index), "method": "POST", "url": "/v1/chat/completions", "body": {**body, **options}}
        lines.append(json.dumps(row))
    rows, ours, theirs = (tmp_path / name for name in ("rows.jsonl", "ours.jsonl", "theirs.jsonl"))
    rows.write_text("\n".join(lines), encoding="utf-8")
    file = AnswerFile(ours, batch_format=True)
    for batch, _ in generate(*load_repo(repo, "cpu"), read_requests(str(rows))):
        file.append(batch)

    command = ["-m", "vllm.entrypoints.openai.run_batch", "-i", rows, "-o", theirs, "--model", repo]
    command += ["--served-model-name", "m", "--model-impl", "transformers", "--trust-remote-code"]
    command += ["--trust-request-mm-kwargs", "--dtype", "float32", "--enforce-eager"]
    vllm.run_python(*command, "--max-model-len", 512, "--max-num-seqs", 16, **ENVIRONMENT)

    texts = []
    for path in (ours, theirs):
        answers = {row["custom_id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        assert answers.keys() == set("01234") and answers["4"]["error"]
        texts.append([answers[i]["response"]["body"]["choices"][0]["message"]["content"].strip() for i in "0123"])
    assert texts[0] == texts[1]
