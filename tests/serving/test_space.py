"""The folder of a Space; tests/integration starts it."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import transformers_delta_llava
from transformers_delta_llava.cli.main import main
from transformers_delta_llava.serving import write_space
from transformers_delta_llava.serving.app import GRADIO, PYTHON


ROOT = Path(__file__).parents[2]
PACKAGE = Path(transformers_delta_llava.__file__).parent


def front_matter(folder: Path) -> dict:
    _, settings, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n")
    assert text.strip()
    return yaml.safe_load(settings)


def test_the_settings_of_the_space(tmp_path):
    write_space(tmp_path / "space", "org/delta-llava-7b", title='Say "wé": #1')
    settings = front_matter(tmp_path / "space")
    assert settings["title"] == 'Say "wé": #1'
    assert settings["sdk"] == "gradio"
    assert settings["models"] == ["org/delta-llava-7b"]
    assert settings["license"] == "apache-2.0"
    assert (tmp_path / "space" / settings["app_file"]).is_file()


def test_the_versions_are_those_that_the_tests_run_with(tmp_path):
    write_space(tmp_path / "space", "org/model")
    settings = front_matter(tmp_path / "space")
    tested = (ROOT / "tests" / "integration" / "environments" / "app.txt").read_text().splitlines()
    assert f"gradio=={settings['sdk_version']}" in tested and settings["sdk_version"] == GRADIO
    assert f"# python: {settings['python_version']}" in tested and settings["python_version"] == PYTHON


def test_the_app_loads_the_model_that_was_named(tmp_path):
    write_space(tmp_path / "space", "org/model", num_visual_tokens=4)
    code = (tmp_path / "space" / "app.py").read_text()
    assert {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)} >= {"org/model", 4}


def test_the_package_goes_with_it(tmp_path):
    write_space(tmp_path / "space", "org/model")
    copy = tmp_path / "space" / PACKAGE.name
    theirs = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    ours = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()}
    assert theirs == {path for path in ours if "__pycache__" not in path.parts}
    assert all((copy / path).read_bytes() == (PACKAGE / path).read_bytes() for path in theirs)
    assert (tmp_path / "space" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_requirements_are_the_packages_own(tmp_path):
    write_space(tmp_path / "space", "org/model")
    lines = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("transformers>=")]
    assert not [line for line in lines if "extra" in line or line.startswith(("gradio", "pytest"))]
    assert set(lines) <= set(metadata.requires("transformers-delta-llava") or [])


def test_a_folder_that_exists_is_replaced_only_if_it_is_a_space_of_ours(tmp_path):
    space, other = tmp_path / "space", tmp_path / "other"
    write_space(space, "org/model")
    with pytest.raises(ValueError, match="exists; pass `overwrite=True`"):
        write_space(space, "org/another")
    write_space(space, "org/another", overwrite=True)
    assert front_matter(space)["models"] == ["org/another"]
    other.mkdir()
    (other / "theirs").touch()
    with pytest.raises(ValueError, match=r"not written by this package \(no space.json in it\)"):
        write_space(other, "org/model", overwrite=True)
    with pytest.raises(ValueError, match="one folder or lie inside each other"):
        write_space(PACKAGE, "org/model", overwrite=True)


def test_the_command(tmp_path, monkeypatch, capsys):
    for model, code in (("folder", 2), ("org/model", 0)):
        monkeypatch.setattr(sys, "argv", ["delta-llava", "space", str(tmp_path / "space"), "--model", model])
        with pytest.raises(SystemExit) as caught:
            main()
        assert (caught.value.code or 0) == code
    output = capsys.readouterr()
    assert output.err == "delta-llava: folder is not a Hub id of the form owner/name.\n"
    assert output.out == f"{tmp_path / 'space'}\n"
