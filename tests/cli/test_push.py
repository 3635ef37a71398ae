"""`delta-llava push` and `convert --push-to-hub`, in processes of their own, against the tests' Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import transformers_delta_llava
from examples.make_checkpoint import write_checkpoint
from tests.hub_server import TOKEN, HubServer
from transformers_delta_llava.cli import push as push_command
from transformers_delta_llava.utils.errors import DeltaLlavaError


REPO = "org/delta-llava-tiny"
# The user's side: a fresh environment, which has this package only where a test puts it on the path.
LOAD = """
import json, sys
sys.modules["transformers_delta_llava"] = None  # an import of the package fails
from PIL import Image
from transformers import AutoModel, pipeline

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": Image.open("photo.png")}, {"type": "text", "text": "What is it?"}]
answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
print(json.dumps([type(model).__name__, type(model).__module__, answer[0]["generated_text"]]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "llava-tiny"
    write_checkpoint(folder)
    return folder


def run(server: HubServer, folder: Path, *command: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    """Run Python in `folder`, with a Hub and a cache of its own."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(transformers_delta_llava.__file__).parents[1]),
    }
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def delta_llava(server, folder, *arguments, **options):
    return run(server, folder, "-m", "transformers_delta_llava", *map(str, arguments), **options)


def test_from_a_checkpoint_to_a_pipeline_through_the_hub(checkpoint, tmp_path):
    with HubServer() as server:
        done = delta_llava(server, tmp_path, "convert", checkpoint, "--push-to-hub", REPO, "--private")
        assert done.returncode == 0, done.stderr
        url = f"{server.url}/{REPO}/commit/{server.repos[REPO].heads['main']}"
        assert done.stdout == f"delta-llava-tiny\n{url}\n"
        assert TOKEN not in done.stdout + done.stderr
        assert server.repos[REPO].private
        readme = server.files(REPO)["README.md"].decode()
        assert f'model="{REPO}"' in readme and "# delta-llava-tiny\n" in readme
        written = tmp_path / "delta-llava-tiny"
        assert {path.name: path.read_bytes() for path in written.iterdir()}.items() <= server.files(REPO).items()
        assert TOKEN.encode() not in b"".join(server.files(REPO).values())

        Image.new("RGB", (30, 20)).save(tmp_path / "photo.png")
        loaded = run(server, tmp_path, "-c", LOAD, REPO)
        assert loaded.returncode == 0, loaded.stderr
        name, module, answer = json.loads(loaded.stdout.splitlines()[-1])
        assert (name, module.split(".")[0]) == ("DeltaLlavaModel", "transformers_modules")
        assert isinstance(answer, str)
        assert any(request.startswith("GET") and "/model.safetensors" in request for request in server.requests)

        refused = delta_llava(server, tmp_path, "push", written, "org/other", token="hf_" + "w" * 34)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "`hf auth login`" in refused.stderr.splitlines()[-1]
        assert "Traceback" not in refused.stderr and "hf_" not in refused.stderr


def test_no_login_is_found_out_before_the_conversion(checkpoint, tmp_path):
    with HubServer() as server:
        done = delta_llava(server, tmp_path, "convert", checkpoint, "--push-to-hub", REPO, token="hf_" + "w" * 34)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "delta-llava: The Hub wants a login for an upload: run `hf auth login`, or set HF_TOKEN.\n"
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []
    done = delta_llava(server, tmp_path, "convert", checkpoint, "--push-to-hub", REPO)  # the server is gone by now
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("delta-llava: The Hub cannot be asked whether you may upload; try again (")
    assert len(done.stderr.splitlines()) == 1


def test_a_dry_run(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--push-to-hub", REPO, "--dry-run", "--create-pr", "--revision", "v1"]
    code, out, err = call("convert", checkpoint, "out", *options)
    assert (code or 0) == 0
    lines = out.splitlines()
    assert lines[0] == "out"
    assert [line.split()[1] for line in lines[1:]] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert f"a pull request against v1 of {REPO}; nothing was sent." in err
    code, out, err = call("push", "out", "org/another", "--dry-run", "--private")
    assert (code or 0, len(out.splitlines())) == (0, len(lines) - 1)
    assert "one commit to main of org/another (private, if it is new); nothing was sent." in err
    assert "README.md does not name org/another" in err

    (tmp_path / "out" / "tokenizer.json").unlink()
    code, out, err = call("push", "out", REPO, "--dry-run")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("delta-llava: out does not load: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--private"], "--private, --revision, --create-pr and --dry-run belong to --push-to-hub."),
        ([], "Name the folder to write the repo to, or publish it with --push-to-hub ORG/NAME."),
        (["--push-to-hub", "name"], "name is not a Hub id of the form owner/name."),
    ],
)
def test_wrong_options(call, checkpoint, arguments, message):
    assert call("convert", checkpoint, *arguments) == (2, "", f"delta-llava: {message}\n")


def test_a_push_that_fails_after_the_conversion_says_where_the_repo_is(call, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise DeltaLlavaError("The Hub is down.")

    monkeypatch.setattr(push_command, "push_folder", fail)
    monkeypatch.chdir(tmp_path)
    code, out, err = call("convert", checkpoint, "--push-to-hub", REPO, "--dry-run")
    assert (code, out) == (2, "delta-llava-tiny\n")
    assert "The Hub is down; the converted repo is in delta-llava-tiny" in err
    assert f"`delta-llava push delta-llava-tiny {REPO}` publishes it." in err
