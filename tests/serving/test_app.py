"""The demo app before its page is up, and the folder of a Space; tests/integration opens both."""

import ast
import base64
import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import serving
from transformers_delta_llava.analysis import Explanation
from transformers_delta_llava.serving import app, write_space
from transformers_delta_llava.serving.app import (
    GRADIO,
    PYTHON,
    caption,
    choose_budgets,
    describe_error,
    read_upload,
    upload_location,
)


ROOT = Path(__file__).parents[2]
URL = "https://example.org/org/transformers-delta-llava.git"


def test_options(call, monkeypatch):
    calls = []
    monkeypatch.setattr(serving, "launch_app", lambda *arguments: calls.append(arguments))
    assert call("app", "org/model", "--port", "8001", "--num-visual-tokens", "4")[0] == 0
    assert calls == [("org/model", "127.0.0.1", 8001, 4, "cpu", "float32", 256)]


def test_a_missing_gradio_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = "The app needs Gradio: pip install 'transformers-delta-llava[app]'."
    assert call("app", "org/model") == (2, "", f"delta-llava: {message}\n")


def test_a_folder_that_is_not_a_repo_is_named(call, monkeypatch, tmp_path):
    monkeypatch.setattr(app, "import_gradio", lambda: None)
    code, _, err = call("app", tmp_path)
    assert code == 2 and "is not a model: it has no config.json" in err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one\n two"), "one two"),
        (KeyError(), "KeyError"),
        (ValueError("no <script>'x'</script>"), "no &lt;script&gt;'x'&lt;/script&gt;"),
    ],
)
def test_errors_are_shown_in_one_line_and_not_run(error, text):
    assert describe_error(error) == text


def test_captions():
    saliency = torch.eye(4)
    assert caption(Explanation(saliency, "a red one", "red", 16)) == "Saliency of “red”, in 4 x 4 cells"
    none = caption(Explanation(0 * saliency, "a red one", "red", 16))
    assert none == "No part of the image raises the score of “red”"


def test_the_slider_goes_over_the_budgets():
    processor = tiny_processor(tiny_config())
    assert choose_budgets(processor, None) == ([1, 4, 9, 16, 36, 144], 36)
    assert choose_budgets(processor, 4) == ([1, 4, 9, 16, 36, 144], 4)
    with pytest.raises(ValueError, match="num_visual_tokens=7: this model cannot give it; use one of 144, 36"):
        choose_budgets(processor, 7)
    processor.num_visual_tokens = "auto"
    assert choose_budgets(processor, None)[1] == 36
    processor.visual_token_budgets = (16, 4)
    assert choose_budgets(processor, None) == ([4, 16], 16)


def test_an_upload(tmp_path):
    file = tmp_path / "image.png"
    Image.new("L", (3, 2)).save(file)
    inline = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    upload = SimpleNamespace(path=str(file), url="http://127.0.0.1:7860/gradio_api/file=image.png")
    assert upload_location(None) is None
    assert upload_location(upload) == str(file)
    assert upload_location(SimpleNamespace(path=None, url=inline)) == inline
    assert read_upload(str(file)).size == read_upload(inline).size == (3, 2)


@pytest.mark.parametrize(
    ("data", "message"), [(None, "no image: upload one"), (b"text", "cannot be read"), (b"", "cannot be read")]
)
def test_a_bad_upload_is_refused_without_its_path(data, message, tmp_path):
    file = tmp_path / "secret-name.png"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_upload(None if data is None else str(file))
    assert "secret-name" not in str(caught.value)


# The folder of a Space.


def test_a_space(tmp_path):
    folder = tmp_path / "space"
    write_space(folder, "org/delta-llava-7b", f"{URL}@main", title='Say "wé": #1', num_visual_tokens=4)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "requirements.txt", "space.json"]
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n")
    settings = yaml.safe_load(header)
    assert (settings["title"], settings["models"]) == ('Say "wé": #1', ["org/delta-llava-7b"]) and text.strip()
    assert (settings["sdk"], settings["app_file"], settings["license"]) == ("gradio", "app.py", "apache-2.0")
    tested = (ROOT / "tests" / "integration" / "environments" / "app.txt").read_text().splitlines()
    assert f"gradio=={settings['sdk_version']}" in tested and settings["sdk_version"] == GRADIO
    assert f"# python: {settings['python_version']}" in tested and settings["python_version"] == PYTHON
    code = ast.parse((folder / "app.py").read_text())
    assert {node.value for node in ast.walk(code) if isinstance(node, ast.Constant)} >= {"org/delta-llava-7b", 4}
    requirement = Requirement((folder / "requirements.txt").read_text().strip())
    assert (requirement.name, requirement.extras) == ("transformers-delta-llava", {"app"})
    assert requirement.url == f"git+{URL}@main"


def test_a_space_installs_what_is_installed_here(tmp_path, monkeypatch):
    origin = {"url": URL, "vcs_info": {"vcs": "git", "commit_id": "abc123"}}
    distribution = SimpleNamespace(version="1", read_text={"direct_url.json": json.dumps(origin)}.get)
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)
    write_space(tmp_path / "space", "org/model")
    requirement = (tmp_path / "space" / "requirements.txt").read_text()
    assert requirement == f"transformers-delta-llava[app] @ git+{URL}@abc123\n"


def test_only_a_space_of_ours_is_replaced(tmp_path):
    space, other = tmp_path / "space", tmp_path / "other"
    write_space(space, "org/model", URL)
    with pytest.raises(ValueError, match="exists; pass `overwrite=True`"):
        write_space(space, "org/another", URL)
    write_space(space, "org/another", URL, overwrite=True)
    assert "org/another" in (space / "README.md").read_text()
    other.mkdir()
    (other / "theirs").touch()
    with pytest.raises(ValueError, match=r"not written by this package \(no space.json in it\)"):
        write_space(other, "org/model", URL, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "folder", "--package-url", URL], "folder is not a Hub id"),
        (["--model", "org/model"], "install it from: name one with --package-url."),
        (["--model", "org/model", "--package-url", "git@host:repo"], "package_url='git@host:repo' is not a git URL"),
        (["--model", "org/model", "--package-url", f"{URL} ; x"], "is not a git URL of the form https://HOST/PATH"),
        (["--model", "org/model", "--package-url", URL], ""),
    ],
)
def test_the_command(call, tmp_path, options, message):
    code, out, err = call("space", tmp_path / "space", *options)
    if not message:
        assert (code, out, err) == (0, f"{tmp_path / 'space'}\n", "")
    else:
        assert (code, out) == (2, "") and err.startswith("delta-llava: ") and message in err
        assert err.count("\n") == 1 and not (tmp_path / "space").exists()
