"""`delta-llava app` and the Space that `delta-llava space` writes: asked through the Gradio client, and in a real browser."""

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.integration.engines import ROOT, Engine, free_port, needs
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.evaluation import answer_questions
from transformers_delta_llava.serving import write_space


pytestmark = needs("app")


# The environment does not have the package; the server gets it from here, as a Space would from its git URL.
SOURCE = str(ROOT / "src")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
# Where a new screenshot for the documentation is to go.
SCREENSHOT = os.environ.get("DELTA_LLAVA_SCREENSHOT")
LENGTH = 200


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine("app", tmp_path_factory.mktemp("app"))


def serve(engine: Engine, repo: Path, *options: object):
    port = free_port()
    command = ["-m", "transformers_delta_llava", "app", repo, "--port", port, *options]
    return engine.serve(command, port, health="/config", PYTHONPATH=SOURCE)


@pytest.fixture(scope="module")
def server(engine, repo):
    with serve(engine, repo) as running:
        yield running


@pytest.fixture(scope="module")
def long_answers(engine, repo, tmp_path_factory):
    """The page of a repo that has the same weights, and does not stop after one word."""
    folder = tmp_path_factory.mktemp("long_answers") / "easy-vqa"
    shutil.copytree(repo, folder)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "min_new_tokens": LENGTH}))
    with serve(engine, folder, "--num-visual-tokens", 64, "--max-new-tokens", LENGTH) as running:
        yield running


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A red circle in the lower right of a larger image than the model ever saw."""
    image = Image.new("RGB", (480, 480), (232, 236, 241))
    ImageDraw.Draw(image).ellipse((270, 270, 430, 430), (214, 38, 38))
    path = tmp_path_factory.mktemp("photo") / "circle.png"
    image.save(path)
    return path


@pytest.fixture(scope="module")
def no_photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "words.png"
    path.write_text("not an image")
    return path


def ask(engine, server, *requests: list, together: bool = False) -> list[dict]:
    flags = ["--together"] if together else []
    given = json.dumps([[*request, "none", ""] if len(request) == 3 else request for request in requests], default=str)
    arguments = ["page_client.py", server.url, engine.scratch / "downloads", *flags]
    return engine.run(*arguments, stdin=json.loads(given))["answers"]


def test_answers_are_those_of_our_own_evaluation(engine, server, repo, questions):
    model, processor = (
        DeltaLlavaForConditionalGeneration.from_pretrained(repo),
        DeltaLlavaProcessor.from_pretrained(repo),
    )
    budgets = [16, 4, 1, 64, 16, 4, 1, 64]
    expected = [answer_questions(model, processor, [q], budget)[0] for q, budget in zip(questions, budgets)]
    answers = ask(engine, server, *([q.image, q.text, budget] for q, budget in zip(questions, budgets)))
    assert [answer.get("text", answer) for answer in answers] == expected
    for budget, answer in zip(budgets, answers):
        assert answer["costs"].startswith(f"{budget} visual token") and answer["costs"].count(" ms") == 2, answer[
            "costs"
        ]


def test_visitors_at_the_same_time_do_not_mix(engine, long_answers, questions):
    requests = [[q.image, q.text, budget] for q, budget in zip(questions[:4], (64, 16, 4, 1))]
    alone = ask(engine, long_answers, *requests)
    together = ask(engine, long_answers, *requests, together=True)
    assert [answer["text"] for answer in together] == [answer["text"] for answer in alone]
    assert len({answer["text"] for answer in alone}) > 1


def test_streaming(engine, long_answers, questions):
    (answer,) = ask(engine, long_answers, [questions[0].image, questions[0].text, 16])
    assert len(answer["steps"]) > 10
    assert all(answer["text"].startswith(step.strip()) for step in answer["steps"])


def test_the_saliency_is_where_the_shape_is(engine, server, photo):
    wanted = [(16, "patches", "red"), (16, "visual tokens", ""), (1, "visual tokens", "")]
    answers = ask(engine, server, *([photo, "what color is the shape?", *more] for more in wanted))
    for cells, answer in zip((8, 4, 8), answers, strict=True):
        assert (answer["text"], answer["caption"]) == ("red", f"Saliency of “red”, in {cells} x {cells} cells")
    answer = answers[0]
    saliency = Image.open(answer["saliency"])
    assert saliency.format == "PNG"
    # The warmest place: the image itself has no yellow.
    red, green, blue = (np.asarray(saliency.convert("RGB"), float)[..., channel] for channel in range(3))
    row, column = np.unravel_index((red + green - 2 * blue).argmax(), red.shape)
    assert row > saliency.height / 2 and column > saliency.width / 2, (row, column)


def test_bad_questions_are_answered_with_a_sentence(engine, server, photo, no_photo):
    question = "what shape is in the image?"
    bad = {
        "There is no image: upload one first.": [None, question, 16],
        "This file cannot be read as an image.": [no_photo, question, 16],
        "There is no question.": [photo, " \n", 16],
        "num_visual_tokens=7: this model cannot give it; use one of 64, 16, 4, 1.": [photo, question, 7],
    }
    *refused, good = ask(engine, server, *bad.values(), [photo, question, 16])
    for words, answer in zip(bad, refused, strict=True):
        assert words in answer.get("error", answer), answer
    assert good["text"] == "circle"
    (answer,) = ask(engine, server, [photo, question, 16, "patches", "square"])
    assert answer["text"] == "circle" and answer["saliency"] is None


def test_files_that_nobody_uploaded_are_not_read(engine, server, photo):
    def answer_about(path: str) -> str:
        image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        data = [image, "what shape is in the image?", 16, "none", ""]
        status, text = server.post("/gradio_api/call/ask", json.dumps({"data": data}).encode())
        return server.get(f"/gradio_api/call/ask/{json.loads(text)['event_id']}") if status == 200 else text

    form = b'--part\r\nContent-Disposition: form-data; name="files"; filename="circle.png"\r\n\r\n%b\r\n--part--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=part"}
    upload = urllib.request.Request(f"{server.url}/gradio_api/upload", form % photo.read_bytes(), headers)
    with urllib.request.urlopen(upload, timeout=60) as response:
        (uploaded,) = json.load(response)
    assert "circle" in answer_about(uploaded)
    assert "circle" not in answer_about(str(photo))


def visit(engine, server, photo, no_photo, question: str) -> dict:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in the environment variable CHROMIUM")
    screenshot = engine.scratch / "page.png"
    return engine.run("page_visitor.py", CHROMIUM, server.url, photo, no_photo, question, screenshot, timeout=180)


def test_in_a_browser(engine, server, photo, no_photo):
    seen = visit(engine, server, photo, no_photo, "what color is the shape?")
    assert seen["title"] == "easy-vqa"
    no_image, bad_image, no_question = seen["errors_shown"]
    assert "There is no image: upload one first." in no_image
    assert "This file cannot be read as an image." in bad_image
    assert "There is no question." in no_question
    assert [answer["tokens"] for answer in seen["answers"]] == [16, 1, 64]
    for answer in seen["answers"]:
        assert answer["text"] == "red"
        assert answer["costs"].startswith(f"{answer['tokens']} visual token")
        assert answer["caption"] == "Saliency of “red”, in 8 x 8 cells"
    assert len({answer["map"] for answer in seen["answers"]}) == 3
    assert seen["elsewhere"] == [] and seen["errors"] == []
    if SCREENSHOT:
        shutil.copyfile(engine.scratch / "page.png", SCREENSHOT)


def test_the_answer_grows_in_a_browser(engine, long_answers, photo, no_photo):
    seen = visit(engine, long_answers, photo, no_photo, "what color is the shape?")
    assert [answer["tokens"] for answer in seen["answers"]] == [64, 4, 64]
    first = seen["answers"][0]
    partial = {text.strip() for text in first["seen"]} - {"", first["text"]}
    assert partial, "the answer came in one piece"
    assert all(first["text"].startswith(text) for text in partial)


def test_a_space(engine, repo, tmp_path, photo):
    folder = tmp_path / "space"
    write_space(folder, "org/easy-vqa", "https://example.org/repo.git", num_visual_tokens=4)
    port = free_port()
    settings = {"DELTA_LLAVA_MODEL": str(repo), "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": SOURCE}
    with engine.serve([folder / "app.py"], port, health="/config", **settings) as space:
        (answer,) = ask(engine, space, [photo, "what shape is in the image?", 4, "visual tokens", ""])
    assert answer["text"] == "circle"
    assert Image.open(answer["saliency"]).width > 0


def test_a_budget_that_the_model_does_not_have_is_refused_at_once(engine, repo):
    command = [engine.python, "-m", "transformers_delta_llava", "app", repo, "--num-visual-tokens", "7"]
    environment = engine.environment(PYTHONPATH=SOURCE)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    sentence = "num_visual_tokens=7: this model cannot give it; use one of 64, 16, 4, 1."
    assert result.stderr.splitlines()[-1] == f"delta-llava: {sentence}"
