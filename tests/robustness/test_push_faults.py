"""Pushes through injected faults: every file arrives, in one commit, and none is sent twice in vain.

The Hub is the one of the tests, the client is huggingface_hub's own, over HTTP. `RUN_SLOW=1` runs 30 seeds.
"""

import time
from collections import Counter
from pathlib import Path

import pytest
from transformers.testing_utils import slow

from tests.hub_server import FAULTS, Faults, HubServer
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.hub import push, push_folder


REPO = "org/delta-llava-tiny"
pytestmark = pytest.mark.usefixtures("hub_client")


@pytest.fixture(scope="module")
def folder(pristine, tmp_path_factory):
    """A repo of several weight files. Only to be read."""
    output = tmp_path_factory.mktemp("faults") / "delta-llava-tiny"
    convert_checkpoint(pristine / "llava-tiny", output, max_shard_size="1MB")
    return output


@pytest.fixture(autouse=True)
def only_the_transfer(monkeypatch):
    """That the folder loads is checked elsewhere."""
    monkeypatch.setattr(push, "check_repo", lambda folder: None)


def push_through(faults: Faults, folder: Path, stall: float = 0.6, **options) -> HubServer:
    with HubServer(faults, stall) as server:
        push_folder(folder, REPO, api=server.api(), initial_backoff=0, timeout=0.3, **options)
        revision = "refs/pr/1" if options.get("create_pr") else "main"
        assert server.files(REPO, revision) == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert server.num_commits == 1
        # A "lost" upload was carried out and not answered, so the client has to ask again.
        lost = Counter(request for request, kind in faults.done if kind == "lost")
        assert all(count <= 1 + lost[request] for request, count in server.uploads.items())
        assert faults.left == 0, "fewer faults than asked for"
    return server


def test_twenty_faults_of_every_kind(folder):
    faults = Faults(20, seed=2)
    push_through(faults, folder)
    assert {kind for _, kind in faults.done} == set(FAULTS)


@slow
@pytest.mark.parametrize("seed", range(30))
def test_twenty_faults_of_many_seeds(folder, seed):
    push_through(Faults(20, seed), folder)


@pytest.mark.parametrize("kind", FAULTS)
def test_one_kind_of_fault(folder, kind):
    push_through(Faults(6, seed=1, kinds=(kind,)), folder)


def test_twenty_faults_in_a_row(folder):
    """Wherever they fall: here all before anything is done."""
    push_through(Faults(20, rate=1, kinds=("500", "cut", "lost")), folder)


def test_a_silent_server_counts_as_a_broken_connection(folder):
    start = time.monotonic()
    push_through(Faults(1, rate=1, kinds=("stall",)), folder, stall=60)
    assert time.monotonic() - start < 30


class LoseCommit(Faults):
    """Carries out the first commit, and loses the answer."""

    def draw(self, request):
        if "/commit/" not in request or not self.left:
            return None
        self.left -= 1
        self.done.append((request, "lost"))
        return "lost"


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_is_lost_is_not_repeated(folder, create_pr):
    messages = []
    server = push_through(LoseCommit(1), folder, create_pr=create_pr, on_message=messages.append)
    assert len(server.repos[REPO].titles) == create_pr
    assert [message for message in messages if "; attempt 2 of 24 begins in 0 s." in message]
