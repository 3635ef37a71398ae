"""Publishing, with the real client over real HTTP."""

import hashlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.hub_faults import FAULTS, Faults
from tests.hub_server import TOKEN, HubServer
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.hub import push_folder, retries
from transformers_delta_llava.utils import files
from transformers_delta_llava.utils.errors import DeltaLlavaError


REPO = "org/delta-llava-tiny"
pytestmark = pytest.mark.usefixtures("hub_client")


@pytest.fixture(scope="module")
def folder(pristine, tmp_path_factory) -> Path:
    """A repo of several weight files. Only to be read."""
    output = tmp_path_factory.mktemp("publish") / "delta-llava-tiny"
    convert_checkpoint(pristine / "llava-tiny", output, max_shard_size="1MB")
    return output


def push(folder, server, repo_id=REPO, **options):
    api = HfApi(endpoint=server.url, token=options.pop("token", TOKEN))
    return push_folder(folder, repo_id, api=api, first_wait=0, **options)


def hashes(files):
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != ".gitattributes"}


def local(folder):
    return hashes({path.name: path.read_bytes() for path in folder.iterdir()})


def uploads(server):
    return {request: count for request, count in server.requests.items() if request.startswith("PUT")}


def commits(server):
    return sum(count for request, count in server.requests.items() if "/commit/" in request)


@pytest.mark.parametrize("chunk_size", [None, 200_000], ids=["whole files", "parts"])
def test_everything_arrives_in_one_commit(folder, chunk_size):
    with HubServer(chunk_size=chunk_size) as server:
        report = push(folder, server)
        assert hashes(server.files(REPO)) == local(folder)
        assert set(report.files) == {path.name for path in folder.iterdir()}
        assert (commits(server), report.retries) == (1, 0)
        assert report.url == f"{server.url}/{REPO}/commit/{server.repos[REPO].heads['main']}"
        assert not server.repos[REPO].private
        sent = uploads(server)
        assert len(sent) > len(list(folder.glob("*.safetensors"))) > 5

        again = push(folder, server)
        assert uploads(server) == sent
        assert commits(server) == 1
        assert again.url == report.url


@pytest.mark.parametrize("kind", FAULTS)
def test_one_kind_of_fault(folder, kind):
    with HubServer(Faults(6, seed=1, kinds=(kind,)), stall=0.6) as server:
        push(folder, server, silence=0.3)
        assert len(server.faults.done) == 6
        assert hashes(server.files(REPO)) == local(folder)


def test_a_silent_server_counts_as_a_broken_connection(folder):
    with HubServer(Faults(1, rate=1, kinds=("stall",)), stall=60) as server:
        start = time.monotonic()
        push(folder, server, silence=0.3)
        assert time.monotonic() - start < 30
        assert len(server.faults.done) == 1


def test_an_answer_to_the_commit_that_gets_lost(folder):
    """It is there already, and must not be there twice."""

    class LoseCommit(Faults):
        def draw(self, request):
            if "/commit/" not in request or not self.left:
                return None
            self.left -= 1
            return "lost"

    for create_pr in (False, True):
        said = []
        with HubServer(LoseCommit(1)) as server:
            report = push(folder, server, create_pr=create_pr, talk=said.append)
            assert commits(server) == 1
            assert report.retries == 1
            assert hashes(server.files(REPO, "refs/pr/1" if create_pr else "main")) == local(folder)
            assert any(sentence.startswith("Committing: attempt 1 of") for sentence in said)


def test_finished_files_are_not_sent_again(folder):
    """A push dies for good half way; the next one sends the rest."""

    class DieAfter(Faults):
        def draw(self, request):
            self.left -= request.startswith("PUT")
            return "500" if self.left < 0 else None

    with HubServer(DieAfter(5)) as server:
        with pytest.raises(DeltaLlavaError, match=r"is not complete on the Hub; push again .*500") as refused:
            push(folder, server)
        assert "Signature" not in str(refused.value)
        before = set(uploads(server))
        assert len(before) == 5
        assert set(server.files(REPO)) == {".gitattributes"}, "half a repo was published"
        server.faults = None
        push(folder, server)
        assert hashes(server.files(REPO)) == local(folder)
        assert set(uploads(server).values()) == {1}
        assert before < set(uploads(server))


def test_private_revision_and_pull_request(folder):
    with HubServer() as server:
        push(folder, server, private=True, revision="v1")
        assert server.repos[REPO].private
        assert hashes(server.files(REPO, "v1")) == local(folder)
        assert set(server.files(REPO)) == {".gitattributes"}
        report = push(folder, server, create_pr=True)
        assert report.url == f"{server.url}/{REPO}/discussions/1"
        assert hashes(server.files(REPO, "refs/pr/1")) == local(folder)
        assert push(folder, server, create_pr=True).url == report.url
        assert list(server.repos[REPO].titles) == [1]


def test_private_never_ends_public(folder):
    with HubServer() as server:
        HfApi(endpoint=server.url, token=TOKEN).create_repo(REPO)
        with pytest.raises(DeltaLlavaError, match="exists and is public"):
            push(folder, server, private=True)
        assert not uploads(server)


def test_weights_of_an_earlier_model_go(folder, repo):
    with HubServer() as server:
        push(folder, server)
        push(repo, server)  # the same model in one file
        assert hashes(server.files(REPO)) == local(repo)


def test_a_dry_run_sends_nothing(folder):
    with HubServer() as server:
        report = push(folder, server, dry_run=True)
        assert not server.requests
    assert (report.url, report.retries) == ("", 0)
    assert report.files == {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.parametrize("token", ["hf_wrong", False])
def test_a_token_that_will_not_do(folder, token):
    with HubServer() as server, pytest.raises(DeltaLlavaError, match="`hf auth login`") as refused:
        push(folder, server, token=token)
    assert "hf_" not in str(refused.value)
    assert set(server.requests.values()) == {1}, "asked again, with the same token"


def test_what_arrived_is_compared(folder):
    with HubServer() as server:
        server.ignored = {"tokenizer.json"}
        with pytest.raises(DeltaLlavaError, match="does not hold what was uploaded, in tokenizer.json"):
            push(folder, server)


def test_no_server(folder):
    with HubServer() as server:
        pass
    with pytest.raises(DeltaLlavaError, match="is not complete on the Hub"):
        push(folder, server)


def truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def drop_tensor(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    next(folder.glob("model-00001-*")).unlink()
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not f.startswith("model-00001-")}
    path.write_text(json.dumps(index))


def fewer_placeholders(folder):
    path = folder / "processor_config.json"
    settings = {**json.loads(path.read_text()), "num_visual_tokens": 4}
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "does not load"),
        (drop_tensor, "its weights have missing keys"),
        (fewer_placeholders, "writes 4 placeholders for an image, its model wants 16"),
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
def test_what_does_not_load_is_refused(folder, tmp_path, damage, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    damage(broken)
    with HubServer() as server:
        with pytest.raises(DeltaLlavaError, match=message) as refused:
            push(broken, server)
        assert not server.requests
    assert "\n" not in str(refused.value)


STRANGERS = (
    *("id_rsa.pem", "credentials.json", "__pycache__/modeling.pyc", "wandb/run-1/output.log", "events.out.tfevents.1"),
    *(
        "kernel.so",
        "scores.joblib",
        "features.npy",
        "x.PT",
        "optimizer.pt",
        "setup.py",
        "trainer_state.json",
        "train.jsonl",
    ),
    *("photo.png", "images/photo.png", "\x1b[2J.txt", ".env", ".git/config", "sub/config.json", "sub/.env"),
)


@pytest.fixture
def crowded(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    for name in STRANGERS:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("private")
    (copied / "link").symlink_to("/etc/hostname")
    return copied


def test_only_what_a_model_repo_has_is_published(folder, crowded):
    said = []
    report = push_folder(crowded, REPO, dry_run=True, talk=said.append)
    assert report.files.keys() == {path.name for path in folder.iterdir()}
    assert report.left_out == sorted({*STRANGERS, "link"} - {".env", ".git/config", "sub/.env"})
    assert "images/, kernel.so, link, optimizer.pt" in said[-1] and "\x1b" not in said[-1]


def test_include_publishes_what_it_names(folder, crowded):
    report = push_folder(crowded, REPO, dry_run=True, include=["images/*", "photo.png", "train.jsonl"])
    expected = {path.name for path in folder.iterdir()} | {"images/photo.png", "photo.png", "train.jsonl"}
    assert report.files.keys() == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.PT", "pickles, which nobody should load: x.PT"),
        ("*.joblib", "pickles"),
        ("gone*", r"--include gone\* matches no file in copied that can be published"),
        (".env", "matches no file"),
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
    said = []
    with HubServer() as server:
        push(tmp_path, server, talk=said.append)
        assert server.files(REPO).keys() - {".gitattributes"} == expected
    assert said == [
        f"README.md does not name {REPO}, so its examples may not run as they stand.",
        "Left out, because a model repo has no such files: checkpoint-5/, training_args.bin; --include publishes them, too.",
    ]


def test_twenty_faults_of_every_kind(folder):
    """A slice of benchmarks/push_through_faults.py."""
    with HubServer(Faults(20, seed=2), stall=0.6) as server:
        report = push(folder, server, silence=0.3)
        assert len(server.faults.done) == 20
        assert {kind for _, kind in server.faults.done} == set(FAULTS)
        assert hashes(server.files(REPO)) == local(folder)
        assert commits(server) == 1
        assert report.files.keys() == local(folder).keys()


def test_twenty_faults_in_a_row(folder):
    """Wherever they fall: here all before anything is done."""
    with HubServer(Faults(20, rate=1, kinds=("500", "cut", "lost"))) as server:
        assert push(folder, server).retries == 20
        assert hashes(server.files(REPO)) == local(folder)


def test_a_wrong_id(folder):
    with pytest.raises(DeltaLlavaError, match="tiny is not a Hub id of the form owner/name"):
        push_folder(folder, "tiny", dry_run=True)


class OddHub(ThreadingHTTPServer):
    """Answers every request with one text."""

    def __init__(self, answer: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_HEAD = answer

            def log_message(self, *arguments):
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.mark.parametrize(
    "answer", [b"", b"<html>", b"[]", b"{}", b"null", b"5", b'{"url": 5}', b'{"url": "x", "name": []}']
)
def test_odd_answers_of_a_hub(folder, monkeypatch, answer):
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    with OddHub(answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        api = HfApi(endpoint=f"http://127.0.0.1:{server.server_address[1]}", token=TOKEN)
        try:
            with pytest.raises(DeltaLlavaError, match="org/delta-llava-tiny is not complete on the Hub") as refused:
                push_folder(folder, REPO, api=api, first_wait=0)
        finally:
            server.shutdown()
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [KeyError("siblings"), TypeError("x"), ValueError("\x1b[2J\ntwo"), RuntimeError()])
def test_odd_answers_to_a_download(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(files, "snapshot_download", fail)
    with pytest.raises(
        DeltaLlavaError, match="The tower org/name is not a folder here, and could not be had"
    ) as refused:
        files.local_folder("org/name", "tower", ("*.json",))
    assert "\x1b" not in str(refused.value) and "\n" not in str(refused.value)
