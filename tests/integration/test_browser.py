"""An export runs in Node and in Chromium by the stock package of transformers.js: the code of `examples/browser`."""

import json
import os
import shutil
import subprocess
from base64 import b64encode
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling

from examples.easy_vqa_questions import draw_test_questions
from tests.integration.engine_scripts.answer import encode
from tests.integration.engines import ROOT, SCRIPTS, Engine, free_port, needs
from tests.pages import filled, read_blocks
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.hub import push_folder
from transformers_delta_llava.onnx import export_onnx
from transformers_delta_llava.processing.processing_delta_llava import _to_square


pytestmark = needs("browser")

EXAMPLE = ROOT / "examples" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
# Where a new screenshot for the documentation is to go.
SCREENSHOT = os.environ.get("DELTA_LLAVA_SCREENSHOT")
BUDGETS = (16, 4, 1)
PHOTO = ROOT / "examples" / "images" / "chelsea.jpg"


@pytest.fixture(scope="module")
def model(repo, tmp_path_factory) -> Path:
    """The export, in a folder with all else that the page is made of."""
    folder = tmp_path_factory.mktemp("page")
    for path in EXAMPLE.iterdir():
        if path.name != "model":
            (folder / path.name).symlink_to(path)
    export_onnx(repo, folder / "model", num_visual_tokens=BUDGETS, dtypes=["fp32", "q8", "q4"])
    return folder / "model"


@pytest.fixture(scope="module")
def questions(repo) -> list[dict]:
    """97 questions of easy-VQA and three about a photo that is not square, with the ids of PyTorch's answers."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
    processor = DeltaLlavaProcessor.from_pretrained(repo)
    asked = [(str(question.image), question.text) for question in draw_test_questions(97)]
    asked += [(str(PHOTO), "what color is the shape?")] * len(BUDGETS)
    return [
        {
            "image": image,
            "question": text,
            "num_visual_tokens": BUDGETS[index % len(BUDGETS)],
            **expected(model, processor, image, text, BUDGETS[index % len(BUDGETS)]),
        }
        for index, (image, text) in enumerate(asked)
    ]


def expected(model, processor, image: str, text: str, num_visual_tokens: int) -> dict:
    content = [{"type": "image", "url": image}, {"type": "text", "text": text}]
    inputs = encode(processor, {"content": content, "num_visual_tokens": num_visual_tokens})
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return {"tokens": ids.tolist(), "text": processor.decode(ids, skip_special_tokens=True).strip()}


def in_node(script: Path, *arguments: object, stdin: str = "") -> str:
    """What a script prints."""
    node = shutil.which("node")
    if node is None or not (EXAMPLE / "node_modules").exists():
        pytest.skip("needs Node and npm (apt-get install nodejs npm), and `npm ci` in examples/browser")
    result = subprocess.run(
        [node, script, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=600, cwd=EXAMPLE
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("dtype", ["fp32", "q8", "q4"])
def test_node_answers_token_by_token_as_pytorch(model, questions, dtype):
    report = json.loads(in_node(EXAMPLE / "check_node.mjs", model, dtype, stdin=json.dumps(questions)))
    # Fewer bits may change an answer; in float32 none may change.
    least = {"fp32": 100, "q8": 99, "q4": 97}[dtype]
    assert report["asked"] == 100 and report["equal"] >= least, report["different"]


def test_code_of_the_page(model, questions):
    (block,) = read_blocks("onnx.md", "Node")
    question = next(q for q in questions if q["question"] == "what color is the shape?")
    code = filled(block.text, {"./easy-vqa-onnx": str(model), "photo.png": question["image"]})
    script = model.parent / "page.mjs"
    script.write_text(code, encoding="utf-8")
    assert in_node(script).split() == [question["text"]] * 2


def test_a_published_export_is_found(model, questions, tmp_path):
    """The files that `push` publishes, on a server with the Hub's addresses."""
    for name in push_folder(model, "org/easy-vqa-onnx", dry_run=True).files:
        target = tmp_path / "org" / "easy-vqa-onnx" / "resolve" / "main" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(model / name)
    (block,) = read_blocks("onnx.md", "Node")
    question = next(q for q in questions if q["question"] == "what color is the shape?")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    local = 'env.allowRemoteModels = false; // for a folder; "ORG/NAME" on the Hub needs no setting'
    remote = f'env.remoteHost = "http://127.0.0.1:{server.server_port}/"; env.cacheDir = "{tmp_path}/cache";'
    changes = {local: remote, "./easy-vqa-onnx": "org/easy-vqa-onnx", "photo.png": question["image"]}
    script = model.parent / "published.mjs"
    script.write_text(filled(block.text, changes), encoding="utf-8")
    assert in_node(script).split() == [question["text"]] * 2
    server.shutdown()


def test_images_become_the_same_bytes_as_in_the_processor():
    rng = np.random.default_rng(0)
    images = [Image.open(PHOTO).convert("RGB")]
    images += [
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for shape in ((7, 3, 3), (64, 64, 3), (333, 517, 3), (20, 2000, 3))
    ]
    mean = (0.48145466, 0.4578275, 0.40821073)
    cases, expected = [], []
    for image, size, resample in product(
        images, (64, 336), (Resampling.LANCZOS, Resampling.BILINEAR, Resampling.BICUBIC)
    ):
        rgb, color = b64encode(image.tobytes()).decode(), [int(channel * 255) for channel in mean]
        square = _to_square(image, tuple(color))
        expected.append(b64encode(square.resize((size, size), resample).tobytes()).decode())
        given = {"rgb": rgb, "width": image.width, "height": image.height, "color": color}
        cases.append({**given, "size": size, "resample": int(resample)})
    assert json.loads(in_node(SCRIPTS / "square_images.mjs", stdin=json.dumps(cases))) == expected


def test_a_version_of_the_model_is_used_once_all_of_it_is_here():
    """Files of two versions are never mixed; bytes that the manifest does not name are not used."""
    steps = json.loads(in_node(SCRIPTS / "model_files.mjs"))
    first, second = (["config.json " + number, "onnx/a.onnx " + number] for number in "12")
    # Of the second version a file is refused with 503, still that of the first, cut; then it is whole; then there is no
    # network; then the first is put back; then the server is empty.
    assert [step["texts"] for step in steps] == [first] * 4 + [second] * 2 + [first] * 2
    assert steps[0]["fetched"] == ["manifest.json", "config.json", "onnx/a.onnx"]
    assert steps[4]["fetched"] == ["manifest.json", "onnx/a.onnx"]
    assert [step["kept"] for step in steps] == [3, 4, 4, 4, 3, 3, 3, 3]


@pytest.fixture(scope="module")
def visit(model, questions, tmp_path_factory) -> dict:
    """20 questions asked in Chromium, and four of them once more without a network."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in the environment variable CHROMIUM")
    if not (EXAMPLE / "node_modules").exists():
        pytest.skip("needs npm (apt-get install npm), and `npm ci` in examples/browser")
    engine = Engine("browser", tmp_path_factory.mktemp("browser"))
    port = free_port()
    screenshot = Path(SCREENSHOT).resolve() if SCREENSHOT else engine.scratch / "page.png"
    asked = [{name: q[name] for name in ("image", "question", "num_visual_tokens")} for q in questions[:20]]
    server = ["-m", "http.server", port, "--bind", "127.0.0.1", "--directory", model.parent]
    with engine.serve(server, port, health="/index.html") as page:
        return engine.run(
            "ask_page.py", CHROMIUM, page.url, screenshot, engine.scratch, model.parent, stdin=asked, timeout=300
        )


def test_the_page_answers(visit, questions):
    assert visit["errors"] == []
    assert visit["online"].startswith("Ready, on WebAssembly.")
    for answer, question in zip(visit["answers"], questions[:20], strict=True):
        number = question["num_visual_tokens"]
        assert (answer["num_visual_tokens"], answer["text"]) == (number, question["text"])
        assert answer["spoken"] == f"{number} visual token" + "s" * (number > 1)
        assert answer["seen"][-1] == question["text"]
        tokens, text, vision, first_token, rest, count = answer["row"]
        assert (int(tokens), text, int(count)) == (number, question["text"], len(question["tokens"]))
        assert all(time.endswith(" ms") for time in (vision, first_token, rest))
    assert visit["fits"], "the page is wider than a phone"
    assert visit["bad_image"] == "ask_page.py cannot be read as an image."
    assert not visit["bad_image_shown"] and visit["loading"] == ""
    assert visit["swapped"] == "", "an answer about another image"
    assert visit["half_updated"]["text"] == questions[19]["text"]
    assert visit["no_export"] == "There is no export in nothing: see README.md."


def test_the_page_works_without_a_network(visit, questions):
    assert visit["isolated"]  # so WebAssembly has threads
    assert [answer["text"] for answer in visit["offline_answers"]] == [q["text"] for q in questions[16:20]]
    assert visit["hosts"] == ["127.0.0.1"]
