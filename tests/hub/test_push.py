"""Publishing, with the real client over real HTTP. Faults on the way: tests/robustness/test_push_faults.py."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.checkpoints import contents, edit_json
from tests.hub_server import TOKEN, Faults, HubServer
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.hub import push as push_module
from transformers_delta_llava.hub import push_folder
from transformers_delta_llava.utils import files
from transformers_delta_llava.utils.errors import DeltaLlavaError


REPO = "org/delta-llava-tiny"
pytestmark = pytest.mark.usefixtures("hub_client")


@pytest.fixture(scope="module")
def folder(pristine, tmp_path_factory) -> Path:
    """A repo of several weight files. Only to be read."""
    output = tmp_path_factory.mktemp("publish") / "delta-llava-tiny"
    convert_checkpoint(pristine / "llava-tiny", output, max_shard_size="500KB")
    return output


@pytest.fixture
def unchecked(monkeypatch):
    """Pushes without the check that the folder loads, where a test pushes several times."""
    monkeypatch.setattr(push_module, "check_repo", lambda folder: None)


def push(folder, server, token=TOKEN, **options):
    return push_folder(folder, REPO, api=server.api(token), initial_backoff=0, **options)


def test_everything_arrives_in_one_commit(folder):
    messages = []
    with HubServer() as server:
        report = push(folder, server, on_message=messages.append)
        assert server.files(REPO) == contents(folder)
        assert report.files == {name: len(content) for name, content in contents(folder).items()}
        assert server.num_commits == 1
        assert report.url == f"{server.url}/{REPO}/commit/{server.repos[REPO].heads['main']}"
        assert not server.repos[REPO].private
        sent = server.uploads
        assert len(sent) > len(list(folder.glob("*.safetensors"))) > 5

        again = push(folder, server)
        assert (server.uploads, server.num_commits, again.url) == (sent, 1, report.url)
    assert messages == [f"README.md does not name {REPO}, so its examples may not run as they stand."]


def test_finished_files_are_not_sent_again(folder, unchecked, monkeypatch):
    """A push dies for good half way; the next one sends the rest."""
    monkeypatch.setattr(push_module, "ATTEMPTS", 2)

    class DieAfter(Faults):
        def draw(self, request):
            self.left -= request.startswith("PUT")
            return "500" if self.left < 0 else None

    with HubServer(DieAfter(5)) as server:
        with pytest.raises(DeltaLlavaError, match=r"is not complete on the Hub; push again .*500") as refused:
            push(folder, server)
        assert "Signature" not in str(refused.value)
        before = set(server.uploads)
        assert len(before) == 5
        assert not server.files(REPO), "half a repo was published"
        server.faults = None
        push(folder, server)
        assert server.files(REPO) == contents(folder)
        assert set(server.uploads.values()) == {1} and before < set(server.uploads)


def test_private_revision_and_pull_request(folder, unchecked):
    with HubServer() as server:
        push(folder, server, private=True, revision="v1")
        assert server.repos[REPO].private
        assert server.files(REPO, "v1") == contents(folder) and not server.files(REPO)
        report = push(folder, server, create_pr=True)
        assert report.url == f"{server.url}/{REPO}/discussions/1"
        assert server.files(REPO, "refs/pr/1") == contents(folder)
        assert push(folder, server, create_pr=True).url == report.url
        assert list(server.repos[REPO].titles) == [1]


def test_a_public_repo_is_refused_where_it_should_be_private(folder, unchecked):
    with HubServer() as server:
        server.api().create_repo(REPO)
        with pytest.raises(DeltaLlavaError, match="exists and is public"):
            push(folder, server, private=True)
        assert not server.uploads


def test_weights_of_an_earlier_model_are_deleted(folder, repo, unchecked):
    with HubServer() as server:
        push(folder, server)
        push(repo, server)  # the same model in one file
        assert server.files(REPO) == contents(repo)


@pytest.mark.parametrize("token", ["hf_wrong", False])
def test_a_token_that_the_hub_refuses(folder, unchecked, token):
    with HubServer() as server, pytest.raises(DeltaLlavaError, match="`hf auth login`") as refused:
        push(folder, server, token)
    assert "hf_" not in str(refused.value)
    assert set(server.requests.values()) == {1}, "asked again, with the same token"


def test_a_token_without_write_access(folder, unchecked):
    refused = pytest.raises(DeltaLlavaError, match="403: your token has no write access")
    with HubServer(Faults(1, rate=1, kinds=("403",))) as server, refused:
        push(folder, server)


def test_the_files_of_the_commit_are_compared(folder, unchecked):
    with HubServer() as server:
        server.ignored = {"tokenizer.json"}
        with pytest.raises(DeltaLlavaError, match="does not hold what was uploaded, in tokenizer.json"):
            push(folder, server)


def test_no_server(folder, unchecked, monkeypatch):
    monkeypatch.setattr(push_module, "ATTEMPTS", 2)
    with HubServer() as server:
        pass
    with pytest.raises(DeltaLlavaError, match="is not complete on the Hub"):
        push(folder, server)


def test_a_wrong_id(folder):
    with pytest.raises(DeltaLlavaError, match="tiny is not a Hub id of the form owner/name"):
        push_folder(folder, "tiny", dry_run=True)


def truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def drop_tensor(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    next(folder.glob("model-00001-*")).unlink()
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not f.startswith("model-00001-")}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "does not load"),
        (drop_tensor, "its weights have missing keys"),
        (
            lambda folder: edit_json(folder / "processor_config.json", num_visual_tokens=4),
            "writes 4 placeholders for an image, its model needs 16",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "does not load"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "projector_delta_llava.py").unlink(), "lacks projector_delta_llava.py"),
        (
            lambda folder: (folder / "modeling_delta_llava.py").write_text("import os"),
            "code that somebody changed .*: modeling_delta_llava",
        ),
        (lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"), "links, .*: LICENSE"),
        (
            lambda folder: (folder / "recipe.yaml").write_text(f"hub_token: hf_{34 * 'x'}"),
            "login tokens .*: recipe.yaml",
        ),
    ],
)
def test_a_folder_that_does_not_load_or_holds_a_secret_is_refused(folder, tmp_path, damage, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    damage(broken)
    with HubServer() as server:
        with pytest.raises(DeltaLlavaError, match=message) as refused:
            push(broken, server)
        assert not server.requests
    assert "\n" not in str(refused.value)


UNEXPECTED = [
    "id_rsa.pem",
    "credentials.json",
    "__pycache__/modeling.pyc",
    "wandb/run-1/output.log",
    "events.out.tfevents.1",
    "kernel.so",
    "scores.joblib",
    "features.npy",
    "x.PT",
    "optimizer.pt",
    "setup.py",
    "trainer_state.json",
    "train.jsonl",
    "photo.png",
    "images/photo.png",
    "\x1b[2J.txt",
    "sub/config.json",
]
HIDDEN = [".env", ".git/config", "sub/.env"]


@pytest.fixture
def crowded(folder, tmp_path, unchecked):
    copied = shutil.copytree(folder, tmp_path / "copied")
    for name in (*UNEXPECTED, *HIDDEN):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("private")
    (copied / "link").symlink_to("/etc/hostname")
    return copied


def test_only_the_files_of_a_model_repo_are_published(folder, crowded):
    messages = []
    report = push_folder(crowded, REPO, dry_run=True, on_message=messages.append)
    assert report.url == ""
    assert report.files == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert report.left_out == sorted({*UNEXPECTED, "link"})
    assert "images/, kernel.so, link, optimizer.pt" in messages[-1] and "\x1b" not in messages[-1]

    included = push_folder(crowded, REPO, dry_run=True, include=["images/*", "photo.png", "train.jsonl"])
    assert included.files.keys() - report.files.keys() == {"images/photo.png", "photo.png", "train.jsonl"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.PT", "pickles, which run code when loaded: x.PT"),
        ("*.joblib", "pickles"),
        ("gone*", r"`include=...`: gone\* matches no file in copied that can be published"),
        (".env", "matches no file"),
        ("setup.py", "code of others, which would run on loading: setup.py"),
        ("link", "links, which the Hub would get as files: link"),
    ],
)
def test_what_include_cannot_publish(crowded, pattern, message):
    with pytest.raises(DeltaLlavaError, match=message):
        push_folder(crowded, REPO, dry_run=True, include=[pattern])


def test_a_trained_folder(tmp_path):
    """As `delta-llava train` leaves it: saved by transformers, with the trainer's own files beside it."""
    model = DeltaLlavaForConditionalGeneration(tiny_config())
    model.save_pretrained(tmp_path)
    tiny_processor(model.config).save_pretrained(tmp_path)
    expected = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "training_args.bin").write_bytes(b"a pickle")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "optimizer.pt").write_bytes(b"a pickle")
    messages = []
    report = push_folder(tmp_path, REPO, dry_run=True, on_message=messages.append)
    assert report.files.keys() == expected
    assert messages[1].startswith(
        "Not published, because a model repo has no such files: checkpoint-5/, training_args"
    )


class UnexpectedHub(ThreadingHTTPServer):
    """Answers every request with one text."""

    def __init__(self, text: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_HEAD = answer

            def log_message(self, *arguments):
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.mark.parametrize(
    "answer", [b"", b"<html>", b"[]", b"{}", b"null", b"5", b'{"url": 5}', b'{"url": "x", "name": []}']
)
def test_unexpected_answers_to_a_push(repo, unchecked, monkeypatch, answer):
    monkeypatch.setattr(push_module, "ATTEMPTS", 2)
    with UnexpectedHub(answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        api = HfApi(endpoint=f"http://127.0.0.1:{server.server_address[1]}", token=TOKEN)
        try:
            with pytest.raises(DeltaLlavaError, match="org/delta-llava-tiny is not complete on the Hub") as refused:
                push_folder(repo, REPO, api=api, initial_backoff=0)
        finally:
            server.shutdown()
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [KeyError("siblings"), TypeError("x"), ValueError("\x1b[2J\ntwo"), RuntimeError()])
def test_unexpected_answers_to_a_download(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(files, "snapshot_download", fail)
    message = "The tower org/name is not a folder here, and cannot be downloaded"
    with pytest.raises(DeltaLlavaError, match=message) as refused:
        files.local_folder("org/name", "tower", ("*.json",))
    assert "\x1b" not in str(refused.value) and "\n" not in str(refused.value)
