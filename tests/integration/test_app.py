"""`delta-llava app` as a file of its own, as a Space holds it: asked through the Gradio client, and in a real browser."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from examples.easy_vqa_questions import answer_questions
from tests.integration.engines import ROOT, Engine, free_port, needs
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


pytestmark = needs("app")


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine("app", tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def server(engine, repo):
    """The environment does not have the package: `app.py` needs gradio and transformers only."""
    app = shutil.copy(ROOT / "src" / "transformers_delta_llava" / "app.py", engine.scratch / "app.py")
    port = free_port()
    settings = {"DELTA_LLAVA_MODEL": str(repo), "GRADIO_SERVER_PORT": str(port)}
    with engine.serve([app], port, health="/config", **settings) as running:
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
    stdin = [[str(request[0]) if request[0] else None, *request[1:]] for request in requests]
    return engine.run("page_client.py", server.url, engine.scratch / "downloads", *flags, stdin=stdin)["answers"]


def test_answers_are_those_of_the_package(engine, server, repo, questions):
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo)
    processor = DeltaLlavaProcessor.from_pretrained(repo)
    budgets = [16, 4, 1, 64, 16, 4, 1, 64]
    expected = [answer_questions(model, processor, [q], budget)[0] for q, budget in zip(questions, budgets)]
    requests = [[q.image, q.text, budget] for q, budget in zip(questions, budgets)]
    for together in (False, True):
        answers = ask(engine, server, *requests, together=together)
        assert [answer.get("text", answer) for answer in answers] == expected
        assert [answer["costs"].split(" visual")[0] for answer in answers] == list(map(str, budgets))


def test_bad_questions_stop_nobody(engine, server, photo, no_photo):
    question = "what shape is in the image?"
    bad = [[None, question, 16], [no_photo, question, 16], [photo, " ", 16], [photo, question, 7]]
    *refused, good = ask(engine, server, *bad, [photo, question, 16])
    assert all("error" in answer for answer in refused) and "7" in refused[-1]["error"]
    assert good["text"] == "circle"


def test_in_a_browser(engine, server, photo, no_photo):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in the environment variable CHROMIUM")
    question = "what color is the shape?"
    seen = engine.run("page_visitor.py", CHROMIUM, server.url, photo, no_photo, question, timeout=180)
    assert seen["can_ask"] == {"without image": False, "no image": False, "image": True}
    assert [answer["tokens"] for answer in seen["answers"]] == [16, 1, 64]
    for answer in seen["answers"]:
        assert answer["text"] == "red" and answer["costs"].startswith(f"{answer['tokens']} visual token")
    assert seen["elsewhere"] == [] and seen["errors"] == []
