"""`update_code` replaces old code in a repo, and changes nothing else."""

import hashlib
import json
import shutil

import pytest

from tests.checkpoints import contents, edit_json
from tests.hub_server import TOKEN, HubServer
from tests.test_layout import HUB_FILES
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, __version__
from transformers_delta_llava.conversion import inspect_model
from transformers_delta_llava.hub import push_folder, repo_files, update_code
from transformers_delta_llava.modeling.configuration_delta_llava import CODE_VERSION
from transformers_delta_llava.utils.errors import DeltaLlavaError


REPO = "org/delta-llava-tiny"
OLD = b"# older code\n"


@pytest.fixture
def versioned(repo, tmp_path):
    """A repo whose projector is older, as its `conversion.json` and `config.json` say."""
    folder = shutil.copytree(repo, tmp_path / "versioned")
    (folder / "projector_delta_llava.py").write_bytes(OLD)
    code = json.loads((folder / "conversion.json").read_text())["code"]
    code["version"], code["sha256"]["projector_delta_llava.py"] = "0.0.9", hashlib.sha256(OLD).hexdigest()
    edit_json(folder / "conversion.json", code=code)
    path = folder / "config.json"
    path.write_text(path.read_text().replace(f'"code_version": "{CODE_VERSION}"', '"code_version": "0.0.9"'))
    return folder


@pytest.fixture
def unversioned(repo, tmp_path, monkeypatch):
    """A repo from before code had a version: known by hashes alone, with a file that today's code does not have."""
    folder = shutil.copytree(repo, tmp_path / "unversioned")
    edit_json(folder / "conversion.json", code=None)
    edit_json(folder / "config.json", code_version=None)
    digest = hashlib.sha256(OLD).hexdigest()
    for name in ("projector_delta_llava.py", "former_delta_llava.py"):
        (folder / name).write_bytes(OLD)
    released = tmp_path / "released.json"
    released.write_text(json.dumps({"0": {"projector_delta_llava.py": digest, "former_delta_llava.py": digest}}))
    monkeypatch.setattr(repo_files, "_RELEASED", released)
    return folder


def test_versions_of_package_and_code_agree():
    assert __version__ == CODE_VERSION
    assert list(repo_files.HUB_FILES.values()) == HUB_FILES


def test_older_code_is_replaced_and_its_version_noted(versioned, repo):
    (versioned / "notes.py").write_text("# a user's own\n")
    before = contents(versioned)
    planned = update_code(versioned, dry_run=True)
    assert contents(versioned) == before
    assert update_code(versioned) == planned
    assert planned.version == "0.0.9"
    assert planned.changed == ["projector_delta_llava.py", "config.json", "conversion.json"]
    assert contents(versioned) == {**contents(repo), "notes.py": b"# a user's own\n"}
    assert update_code(versioned) == repo_files.CodeUpdate(CODE_VERSION, [], [])


def test_of_an_unversioned_repo_only_code_changes(unversioned, repo):
    before = contents(unversioned)
    update = update_code(unversioned)
    assert update == repo_files.CodeUpdate(None, ["projector_delta_llava.py"], ["former_delta_llava.py"])
    after = contents(unversioned)
    assert {name for name in before if before[name] != after.get(name)} == {*update.changed, *update.deleted}
    assert after["projector_delta_llava.py"] == contents(repo)["projector_delta_llava.py"]


def test_code_that_was_edited_needs_force(versioned, repo):
    (versioned / "modeling_delta_llava.py").write_text("# by hand\n")
    before = contents(versioned)
    with pytest.raises(DeltaLlavaError, match=r"never published, in modeling_delta_llava\.py: somebody changed it"):
        update_code(versioned)
    assert contents(versioned) == before
    update_code(versioned, force=True)
    assert contents(versioned) == contents(repo)


def test_an_interrupted_update_continues(versioned, repo):
    shutil.copy(repo / "projector_delta_llava.py", versioned)  # as after a crash before the notes followed
    (versioned / "deltas_delta_llava.py").unlink()
    update_code(versioned)
    assert contents(versioned) == contents(repo)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_json(folder / "config.json", model_type="llava"), "is not a Delta-LLaVA repo"),
        (lambda folder: (folder / "config.json").unlink(), "is not a Delta-LLaVA repo"),
        (lambda folder: [path.unlink() for path in folder.glob("*.py")], "carries no code of its own"),
        (lambda folder: edit_json(folder / "conversion.json", code=[1]), "conversion.json has a part `code`"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    ],
)
def test_folders_that_are_refused(versioned, damage, message):
    damage(versioned)
    before = contents(versioned)
    with pytest.raises(DeltaLlavaError, match=message):
        update_code(versioned)
    assert contents(versioned) == before


def test_folders_have_no_revisions(versioned):
    for options in ({"create_pr": True}, {"revision": "main"}):
        with pytest.raises(DeltaLlavaError, match="is a folder; a revision and a pull request need the Hub id"):
            update_code(versioned, **options)


def test_inspect_reports_the_version_and_older_code(versioned, repo):
    assert inspect_model(repo).code_version == CODE_VERSION
    inspection = inspect_model(versioned)
    assert inspection.code_version == "0.0.9"
    assert inspection.problems == ["projector_delta_llava.py is older code; update the repo"]


def test_a_saved_model_notes_the_version_of_its_code(tmp_path):
    config = DeltaLlavaConfig.from_dict({**tiny_config().to_dict(), "code_version": "0.0.9"})
    DeltaLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_processor(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["code_version"] == CODE_VERSION
    assert update_code(tmp_path) == repo_files.CodeUpdate(CODE_VERSION, [], [])


@pytest.mark.parametrize("create_pr", [False, True])
@pytest.mark.usefixtures("hub_client")
def test_on_the_hub_in_one_commit(repo, unversioned, create_pr):
    with HubServer() as server:
        api = server.api()
        push_folder(repo, REPO, api=api)
        before = contents(unversioned)
        server.repos[REPO].commit("main", before)

        assert update_code(REPO, api=api, create_pr=create_pr, dry_run=True).url is None
        assert server.files(REPO) == before
        update = update_code(REPO, api=api, create_pr=create_pr)

        after = server.files(REPO, "refs/pr/1" if create_pr else "main")
        changed = {name for name in before if before[name] != after.get(name)}
        assert changed == {"projector_delta_llava.py", "former_delta_llava.py"} == {*update.changed, *update.deleted}
        assert after["projector_delta_llava.py"] == contents(repo)["projector_delta_llava.py"]
        assert ("/discussions/1" if create_pr else "/commit/") in update.url
        assert not any("safetensors" in request for request in server.requests if request.startswith("GET"))
        if not create_pr:
            assert update_code(REPO, api=api).changed == []
        with pytest.raises(DeltaLlavaError, match="org/none was not updated; try again"):
            update_code("org/none", api=api)
        with pytest.raises(DeltaLlavaError, match="needs a login for org/delta-llava-tiny"):
            update_code(REPO, api=server.api(TOKEN + "x"))
