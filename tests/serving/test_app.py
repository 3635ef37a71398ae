"""What `delta-llava app` does before the page is up; tests/integration opens the page itself."""

import base64
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.serving.test_serve import run
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import serving
from transformers_delta_llava.analysis import Explanation
from transformers_delta_llava.serving import app
from transformers_delta_llava.serving.app import caption, choose_budgets, location, read_upload, sentence


def test_options(monkeypatch):
    calls = []
    monkeypatch.setattr(serving, "launch_app", lambda *arguments: calls.append(arguments))
    assert run(monkeypatch, "app", "org/model", "--port", "8001", "--num-visual-tokens", "4") == 0
    assert calls == [("org/model", "127.0.0.1", 8001, 4, "cpu", "float32", 256)]


def test_a_missing_gradio_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(monkeypatch, "app", "org/model") == 2
    assert capsys.readouterr().err == (
        "delta-llava: The page needs Gradio: pip install 'transformers-delta-llava[app]'.\n"
    )


def test_a_repo_that_is_none_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(app, "import_gradio", lambda: None)
    assert run(monkeypatch, "app", str(tmp_path)) == 2
    assert "is no model: it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "words"), [(ValueError("one\n two"), "one two"), (KeyError(), "KeyError")])
def test_what_the_page_says_of_an_error(error, words):
    assert sentence(error) == words


def test_what_a_heat_map_shows():
    heat = torch.eye(4)
    assert caption(Explanation(heat, "a red one", "red", 16)) == "Where “red” comes from, in 4 x 4 places"
    assert caption(Explanation(0 * heat, "a red one", "red", 16)) == "Nothing in the picture speaks for “red”"


def test_the_page_does_not_run_what_a_visitor_typed():
    assert sentence(ValueError("no <script>'x'</script>")) == "no &lt;script&gt;'x'&lt;/script&gt;"


def test_the_slider_goes_over_the_budgets():
    processor = tiny_processor(tiny_config())
    assert choose_budgets(processor, None) == ([1, 4, 9, 16, 36, 144], 36)
    assert choose_budgets(processor, 4) == ([1, 4, 9, 16, 36, 144], 4)
    with pytest.raises(ValueError, match="num_visual_tokens=7: this model cannot give it; use one of 1, 4, 9"):
        choose_budgets(processor, 7)
    processor.num_visual_tokens = "auto"
    assert choose_budgets(processor, None)[1] == 36
    processor.visual_token_budgets = (16, 4)
    assert choose_budgets(processor, None) == ([4, 16], 16)


def test_an_upload(tmp_path):
    file = tmp_path / "picture.png"
    Image.new("L", (3, 2)).save(file)
    inline = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    upload = SimpleNamespace(path=str(file), url="http://127.0.0.1:7860/gradio_api/file=picture.png")
    assert location(None) is None
    assert location(upload) == str(file)
    assert location(SimpleNamespace(path=None, url=inline)) == inline
    assert read_upload(str(file)).size == read_upload(inline).size == (3, 2)


@pytest.mark.parametrize(
    ("data", "words"), [(None, "no picture: upload one"), (b"text", "not a picture"), (b"", "not a")]
)
def test_an_upload_that_is_no_picture(data, words, tmp_path):
    file = tmp_path / "secret-name.png"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_upload(None if data is None else str(file))
    assert "secret-name" not in str(caught.value)
