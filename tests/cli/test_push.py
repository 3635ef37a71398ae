"""`delta-llava push` and `convert --push-to-hub`, against the tests' Hub."""

import pytest
from huggingface_hub import constants

from tests.hub_server import TOKEN, HubServer
from transformers_delta_llava import hub
from transformers_delta_llava.utils.errors import DeltaLlavaError


REPO = "org/delta-llava-tiny"
WRONG_TOKEN = "hf_" + "w" * 34


@pytest.fixture
def checkpoint(pristine):
    return pristine / "llava-tiny"


@pytest.fixture
def server(hub_client, tmp_path, monkeypatch):
    """A Hub, to which the environment has a login; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def test_a_checkpoint_becomes_a_repo_on_the_hub(call, server, checkpoint, tmp_path, monkeypatch):
    code, out, err = call("convert", checkpoint, "--push-to-hub", REPO, "--private")
    url = f"{server.url}/{REPO}/commit/{server.repos[REPO].heads['main']}"
    assert (code, out) == (0, f"delta-llava-tiny\n{url}\n")
    assert TOKEN not in out + err
    assert server.repos[REPO].private
    readme = server.files(REPO)["README.md"].decode()
    assert f'model="{REPO}"' in readme and "# delta-llava-tiny\n" in readme
    written = tmp_path / "delta-llava-tiny"
    assert {path.name: path.read_bytes() for path in written.iterdir()} == server.files(REPO)
    assert TOKEN.encode() not in b"".join(server.files(REPO).values())

    monkeypatch.setenv("HF_TOKEN", WRONG_TOKEN)
    code, out, err = call("push", written, "org/other")
    assert (code, out) == (2, "")
    assert "`hf auth login`" in err.splitlines()[-1]
    assert "Traceback" not in err and "hf_" not in err


def test_a_missing_login_is_reported_before_the_conversion(call, server, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRONG_TOKEN)
    refused = call("convert", checkpoint, "--push-to-hub", REPO)
    assert refused == (
        2, "", "delta-llava convert: The Hub needs a login for an upload: run `hf auth login`, or set HF_TOKEN.\n"
    )  # fmt: skip
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    code, out, err = call("convert", checkpoint, "--push-to-hub", REPO)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("delta-llava convert: The Hub cannot be asked whether you may upload; try again (")
    assert not any(tmp_path.iterdir())


def test_a_dry_run(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--push-to-hub", REPO, "--dry-run", "--create-pr", "--revision", "v1"]
    code, out, err = call("convert", checkpoint, "out", *options)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "out"
    assert [line.split()[1] for line in lines[1:]] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert f"a pull request against v1 of {REPO}; nothing was sent." in err
    (tmp_path / "out" / "notes.txt").touch()
    code, out, err = call("push", "out", "org/another", "--dry-run", "--private")
    assert (code, len(out.splitlines())) == (0, len(lines) - 1)
    assert "one commit to main of org/another (private, if it is new); nothing was sent." in err
    assert "README.md does not name org/another" in err
    assert "no such files: notes.txt;" in err

    (tmp_path / "out" / "tokenizer.json").unlink()
    code, out, err = call("push", "out", REPO, "--dry-run")
    assert (code, out) == (2, "")
    assert "out does not load: " in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--private"], "--private, --revision, --create-pr and --dry-run belong to --push-to-hub."),
        ([], "Name the folder to write the repo to, or publish it with --push-to-hub ORG/NAME."),
        (["--push-to-hub", "name"], "name is not a Hub id of the form owner/name."),
    ],
)
def test_wrong_options(call, checkpoint, arguments, message):
    assert call("convert", checkpoint, *arguments) == (2, "", f"delta-llava convert: {message}\n")


def test_a_push_that_fails_after_the_conversion_says_where_the_repo_is(call, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise DeltaLlavaError("The Hub is down.")

    monkeypatch.setattr(hub, "push_folder", fail)
    monkeypatch.chdir(tmp_path)
    code, out, err = call("convert", checkpoint, "--push-to-hub", REPO, "--dry-run")
    assert (code, out) == (2, "delta-llava-tiny\n")
    assert "The Hub is down; the converted repo is in delta-llava-tiny" in err
    assert f"`delta-llava push delta-llava-tiny {REPO}` publishes it." in err
