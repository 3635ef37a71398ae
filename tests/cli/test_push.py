"""`delta-llava push`, `convert --push-to-hub` and `update`."""

import json

import pytest

from tests.checkpoints import contents
from tests.test_hub import REPO, FakeHub, copied, folder, older  # noqa: F401
from transformers_delta_llava import hub


@pytest.fixture
def api(monkeypatch, tmp_path):
    """A Hub to which the environment has a login; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    api = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    return api


def test_a_checkpoint_becomes_a_repo_on_the_hub(call, api, pristine, tmp_path):
    code, out, _ = call("convert", pristine / "llava-tiny", "--push-to-hub", REPO, "--private")
    assert (code, out) == (0, "delta-llava-tiny\ncommit\n") and api.private
    assert contents(tmp_path / "delta-llava-tiny") == api.files["main"]
    readme = api.files["main"]["README.md"].decode()
    assert f'model="{REPO}"' in readme and "# delta-llava-tiny\n" in readme


def test_a_missing_login_is_reported_before_the_conversion(call, api, pristine, tmp_path, monkeypatch):
    def refuse():
        raise OSError("no login")

    monkeypatch.setattr(api, "whoami", refuse)
    code, out, err = call("convert", pristine / "llava-tiny", "--push-to-hub", REPO)
    assert (code, out) == (2, "") and "no login" in err and not any(tmp_path.iterdir())


def test_a_push_that_fails_after_the_conversion_names_the_repo(call, api, pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "upload_folder", lambda **_: 1 / 0)
    code, out, err = call("convert", pristine / "llava-tiny", "--push-to-hub", REPO)
    assert code and out == "delta-llava-tiny\n" and f"delta-llava push delta-llava-tiny {REPO}" in err


def test_a_dry_run(call, api, copied, tmp_path):  # noqa: F811
    (copied / "notes.txt").touch()
    code, out, err = call("push", copied, REPO, "--dry-run", "--create-pr", "--revision", "v1")
    assert code == 0 and not api.calls
    assert [line.split()[1] for line in out.splitlines()] == sorted(contents(copied).keys() - {"notes.txt"})
    assert "a pull request against v1" in err and "notes.txt" in err
    (copied / "tokenizer.json").unlink()
    code, out, err = call("push", copied, REPO, "--dry-run")
    assert (code, out) == (2, "") and "does not load" in err


@pytest.mark.parametrize(("arguments", "message"), [
    (["out", "--private"], "--push-to-hub"),
    ([], "--push-to-hub"),
    (["--push-to-hub", "name"], "owner/name"),
])  # fmt: skip
def test_wrong_options(call, pristine, arguments, message):
    code, out, err = call("convert", pristine / "llava-tiny", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_update_prints_the_files_that_change(call, older):  # noqa: F811
    changed = "projector_delta_llava.py\nconfig.json\nconversion.json\nformer_delta_llava.py (deleted)\n"
    assert call("update", older, "--dry-run")[:2] == (0, changed)
    assert json.loads((older / "config.json").read_text())["code_version"] == "0.0.9"
    assert call("update", older)[:2] == (0, changed)
    assert call("update", older)[:2] == (0, "")
    (older / "modeling_delta_llava.py").write_text("# by hand\n")
    code, out, err = call("update", older)
    assert (code, out) == (2, "") and "force" in err
    assert call("update", older, "--force")[:2] == (0, "modeling_delta_llava.py\n")
