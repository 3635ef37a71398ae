"""Repos: what is published and what is refused, updates of their code, their card."""

import hashlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file, save_file

from tests.checkpoints import contents, edit_json
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import (
    DeltaLlavaConfig,
    DeltaLlavaForConditionalGeneration,
    DeltaLlavaProcessor,
    __version__,
    hub,
)
from transformers_delta_llava.conversion import convert_checkpoint, inspect_model
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.hub import HUB_FILES, CodeUpdate, ModelCard, push_folder, update_code
from transformers_delta_llava.loading import load_config
from transformers_delta_llava.modeling.configuration_delta_llava import CODE_VERSION


REPO = "org/delta-llava-tiny"
CARD = Path(__file__).parents[1] / "model_cards" / "delta-llava-7b-144.md"


class FakeHub(HfApi):
    """Keeps one repo's files in memory, by revision, and notes what it was asked."""

    def __init__(self, files=None, private=None):
        super().__init__(endpoint="https://hub.test", token="hf_test")
        self.files, self.private, self.calls = {"main": files or {}}, private, []

    def whoami(self):
        self.calls.append("whoami")

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append("create_repo")
        self.private = bool(private) if self.private is None else self.private

    def repo_info(self, repo_id, revision=None):
        return SimpleNamespace(private=self.private, sha="head")

    def create_branch(self, repo_id, branch, exist_ok):
        self.files[branch] = dict(self.files["main"])

    def snapshot_download(self, repo_id, revision, allow_patterns, local_dir):
        for name, content in self.files["main"].items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).write_bytes(content)

    def upload_folder(self, *, folder_path, allow_patterns, delete_patterns, revision, create_pr, **_):
        paths = {file.relative_to(folder_path).as_posix(): file for file in folder_path.rglob("*") if file.is_file()}
        new = {n: f.read_bytes() for n, f in paths.items() if any(fnmatch(n, pattern) for pattern in allow_patterns)}
        kept = {n: c for n, c in self.files["main"].items() if not any(fnmatch(n, p) for p in delete_patterns)}
        return self._commit({**kept, **new}, revision, create_pr)

    def create_commit(self, repo_id, operations, commit_message, revision, create_pr, parent_commit):
        tree = dict(self.files["main"])
        for operation in operations:
            if hasattr(operation, "path_or_fileobj"):
                tree[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
            else:
                del tree[operation.path_in_repo]
        return self._commit(tree, revision, create_pr)

    def _commit(self, tree, revision, create_pr):
        self.calls.append("commit")
        self.files["pr" if create_pr else revision or "main"] = tree
        return SimpleNamespace(pr_url="pull request" if create_pr else None, commit_url="commit")


@pytest.fixture(scope="module")
def folder(pristine, tmp_path_factory) -> Path:
    """A repo of several weight files. Only to be read."""
    output = tmp_path_factory.mktemp("publish") / "delta-llava-tiny"
    convert_checkpoint(pristine / "llava-tiny", output, max_shard_size="500KB")
    return output


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


# Push.


def test_push_replaces_an_earlier_model_in_one_commit(folder, repo):
    api = FakeHub({**contents(repo), "former_delta_llava.py": b"", "photo.png": b"theirs"})
    report = push_folder(folder, REPO, api=api)
    assert api.files["main"] == {**contents(folder), "photo.png": b"theirs"}
    assert api.calls == ["whoami", "create_repo", "commit"] and report.url == "commit" and not api.private
    assert report.files == {name: len(content) for name, content in contents(folder).items()}
    assert any(REPO in warning for warning in report.warnings)  # README.md has another name in its examples


def test_private_revision_and_pull_request(folder):
    api = FakeHub()
    push_folder(folder, REPO, api=api, private=True, revision="v1")
    assert api.private and api.files == {"main": {}, "v1": contents(folder)}
    assert push_folder(folder, REPO, api=api, create_pr=True).url == "pull request"
    assert api.files["pr"] == contents(folder) and not api.files["main"]
    with pytest.raises(DeltaLlavaError, match="public"):
        push_folder(folder, REPO, api=(public := FakeHub(private=False)), private=True)
    assert "commit" not in public.calls


def test_the_login_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(LocalTokenNotFoundError, match="hf auth login"):
        push_folder(tmp_path / "none", REPO)
    with pytest.raises(DeltaLlavaError, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        push_folder(tmp_path / "none", REPO, api=HfApi(endpoint="http://127.0.0.1:1", token="hf_x"))
    with pytest.raises(DeltaLlavaError, match="owner/name"):
        push_folder(tmp_path, "tiny")


def truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def drop_shard(folder):
    next(folder.glob("model-00001-*")).unlink()
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map={n: f for n, f in weight_map.items() if not f.startswith("model-00001-")})


def reshape(folder, name):
    """Give a weight another shape."""
    file = next(f for f in folder.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "does not load"),
        (drop_shard, "missing keys"),
        (lambda folder: edit_json(folder / "processor_config.json", num_visual_tokens=4), "4 placeholders.* 16"),
        (lambda folder: reshape(folder, "lm_head.weight"), r"does not load.*lm_head\.weight"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "does not load"),
        (lambda folder: (folder / "chat_template.jinja").write_text("no image"), "does not load"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json"),
        (lambda folder: (folder / "projector_delta_llava.py").unlink(), "lacks projector_delta_llava"),
        (lambda folder: (folder / "modeling_delta_llava.py").write_text("import os"), "modeling_delta_llava"),
        (lambda folder: (folder / "LICENSE").write_text(f"hf_{34 * 'x'}"), "login tokens.*LICENSE"),
    ],
)
def test_a_folder_that_does_not_load_or_holds_a_secret_is_not_published(copied, damage, message):
    damage(copied)
    api = FakeHub()
    with pytest.raises(DeltaLlavaError, match=message):
        push_folder(copied, REPO, api=api)
    assert api.calls == ["whoami"]


def test_only_the_files_of_a_model_repo_are_published(folder, copied):
    visible = ["id_rsa.pem", "optimizer.pt", "setup.py", "recipe.yaml", "photo.png", "images/a.png", "sub/config.json"]
    for name in (*visible, ".env", ".git/config", "sub/.env"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("private")
    report = push_folder(copied, REPO, dry_run=True)
    assert report.files == {path.name: path.stat().st_size for path in folder.iterdir()} and report.url == ""
    assert report.left_out == sorted(visible) and "images/, optimizer.pt" in report.warnings[-1]
    included = push_folder(copied, REPO, dry_run=True, include=["images/*", "photo.png"])
    assert included.files.keys() - report.files.keys() == {"images/a.png", "photo.png"}


def test_licence_and_base_model_of_the_card(copied):
    readme = copied / "README.md"
    report = push_folder(copied, REPO, dry_run=True)
    assert [name for name in ("license", "base_model") if any(name in warning for warning in report.warnings)] == [
        "license",
        "base_model",
    ]
    body = readme.read_text().split("---\n", 2)[2]
    api = FakeHub()
    report = push_folder(copied, REPO, api=api, license="mit", base_models=["org/base"])
    assert not any("license" in warning or "base_model" in warning for warning in report.warnings)
    header, published = api.files["main"]["README.md"].decode().split("---\n", 2)[1:]
    assert {"license": "mit", "base_model": ["org/base"]}.items() <= yaml.safe_load(header).items()
    assert published == body == readme.read_text().split("---\n", 2)[2]


def test_a_folder_that_transformers_saved_is_a_repo(tmp_path):
    model = DeltaLlavaForConditionalGeneration(tiny_config())
    model.save_pretrained(tmp_path)
    tiny_processor(model.config).save_pretrained(tmp_path)
    assert push_folder(tmp_path, REPO, dry_run=True).files.keys() == {path.name for path in tmp_path.iterdir()}


def test_a_conversion_whose_repo_would_not_load_writes_nothing(pristine, tmp_path):
    (tmp_path / "x.jinja").write_text("no image here")
    with pytest.raises(DeltaLlavaError, match="out does not load"):
        convert_checkpoint(pristine / "llava-tiny", tmp_path / "out", chat_template=str(tmp_path / "x.jinja"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.jinja"]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"),
        (f"/data/hub/models--lmsys--vicuna-7b-v1.5/snapshots/{40 * 'a'}", "lmsys/vicuna-7b-v1.5"),
        ("checkpoints/vicuna-7b", None),
        ("./checkpoints/vicuna-7b", None),
        ("pretrained_models/vicuna-7b", None),
        ("llava-tiny/checkpoint-5000", None),
        ("someone/checkpoint-5000", None),
        ("vicuna-7b", None),
        ("a/b/c", None),
    ],
)
def test_only_a_hub_id_is_published_as_base_model(name, published, tmp_path):
    (tmp_path / "llava-tiny" / "checkpoint-5000").mkdir(parents=True)
    assert hub.hub_id_of(name, tmp_path) == published


def test_names_to_publish_hold_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("local/tower").mkdir(parents=True)
    tower = "openai/clip-vit-large-patch14-336"
    cached = tmp_path / f"models--{tower.replace('/', '--')}" / "snapshots" / (40 * "a")
    cached.mkdir(parents=True)
    names = {tower: tower, "local/tower": "tower", "../tower/": "tower", cached: tower}
    assert {name: hub.public_name(name) for name in names} == names


# Update.

OLD = b"# older code\n"


@pytest.fixture
def older(repo, tmp_path):
    """A repo with an older projector and a file that today's code does not have, as `conversion.json` and `config.json` say."""
    folder = shutil.copytree(repo, tmp_path / "older")
    code = json.loads((folder / "conversion.json").read_text())["code"]
    for name in ("projector_delta_llava.py", "former_delta_llava.py"):
        (folder / name).write_bytes(OLD)
        code["sha256"][name] = hashlib.sha256(OLD).hexdigest()
    edit_json(folder / "conversion.json", code={**code, "version": "0.0.9"})
    edit_json(folder / "config.json", code_version="0.0.9")
    return folder


CHANGED = ["projector_delta_llava.py", "config.json", "conversion.json"]


def test_older_code_is_replaced_and_its_version_noted(older, repo):
    (older / "notes.py").write_text("# a user's own\n")
    assert inspect_model(older).code_version == "0.0.9"
    assert "projector_delta_llava.py" in " ".join(inspect_model(older).problems)
    before = contents(older)
    planned = update_code(older, dry_run=True)
    assert contents(older) == before
    assert update_code(older) == planned == CodeUpdate("0.0.9", CHANGED, ["former_delta_llava.py"])
    assert contents(older) == {**contents(repo), "notes.py": b"# a user's own\n"}
    assert update_code(older) == CodeUpdate(CODE_VERSION, [], [])
    assert CODE_VERSION == __version__ == inspect_model(older).code_version


def test_other_visual_tokens(repo, tmp_path):
    folder = shutil.copytree(repo, tmp_path / "repo")
    before = contents(folder)
    files = ["config.json", "processor_config.json", "README.md"]
    assert update_code(folder, num_visual_tokens=[4], dry_run=True).changed == files and contents(folder) == before
    for numbers, budgets in (([4], [64, 16, 4, 1]), ([1, 4], [4, 1])):
        update_code(folder, num_visual_tokens=numbers)
        assert load_config(folder).num_visual_tokens == numbers[0]
        processor = DeltaLlavaProcessor.from_pretrained(folder)
        assert (processor.num_visual_tokens, processor.visual_token_budgets) == (numbers[0], budgets)
        inspection = inspect_model(folder)
        assert (inspection.num_visual_tokens, inspection.visual_token_budgets) == (numbers[0], tuple(budgets))
        assert not inspection.problems
        hub.check_repo(folder)
        rows = [line.strip("| ").split(" | ") for line in (folder / "README.md").read_text().splitlines()]
        rows = [row for row in rows if row[0].isdigit()]
        assert [int(row[0]) for row in rows] == budgets
        assert [row[0] for row in rows if row[-1] == "default"] == [str(numbers[0])]
    unchanged = before.keys() - set(files)
    assert {name: contents(folder)[name] for name in unchanged} == {name: before[name] for name in unchanged}
    with pytest.raises(ValueError, match="num_visual_tokens=5.*64, 16, 4, 1"):
        update_code(folder, num_visual_tokens=[5])
    update_code(folder, num_visual_tokens=[16])
    assert contents(folder) == before
    edit_json(folder / "processor_config.json", num_visual_tokens=4)
    assert "16" in " ".join(inspect_model(folder).problems)


def test_an_update_on_the_hub_is_one_commit(older, repo):
    for create_pr in (False, True):
        api = FakeHub(contents(older))
        assert update_code(REPO, api=api, create_pr=create_pr, dry_run=True).url is None
        update = update_code(REPO, api=api, create_pr=create_pr)
        assert (update.changed, api.calls) == (CHANGED, ["commit"])
        assert update.url == ("pull request" if create_pr else "commit")
        assert api.files["pr" if create_pr else "main"] == contents(repo)


def test_a_killed_update_is_finished_by_a_later_version(older, repo, monkeypatch):
    class Killed(BaseException):
        pass

    def kill_at(path, content):
        if path.name == "projector_delta_llava.py":
            raise Killed
        replace(path, content)

    (older / "processing_delta_llava.py").write_bytes(OLD)  # comes before the projector
    noted = json.loads((older / "conversion.json").read_text())["code"]
    noted["sha256"]["processing_delta_llava.py"] = hashlib.sha256(OLD).hexdigest()
    edit_json(older / "conversion.json", code=noted)
    replace = hub._replace
    (between := older.parent / "between.py").write_bytes(b"# of a version between\n")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(hub, "_replace", kill_at)
        patch.setitem(hub.HUB_FILES, "processing_delta_llava.py", between)
        update_code(older)
    assert (older / "processing_delta_llava.py").read_bytes() == between.read_bytes()
    update_code(older)
    assert contents(older) == contents(repo)


def test_code_that_was_edited_needs_force(older, repo):
    (older / "modeling_delta_llava.py").write_text("# by hand\n")
    before = contents(older)
    with pytest.raises(DeltaLlavaError, match=r"modeling_delta_llava\.py.*force"):
        update_code(older)
    assert contents(older) == before
    update_code(older, force=True)
    assert contents(older) == contents(repo)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_json(folder / "config.json", model_type="llava"), "model_type=llava"),
        (lambda folder: [path.unlink() for path in folder.glob("*.py")], "auto_map"),
        (lambda folder: edit_json(folder / "conversion.json", code={"version": "9.0", "sha256": {}}), r"9\.0"),
    ],
)
def test_folders_whose_code_is_not_replaced(older, damage, message):
    damage(older)
    before = contents(older)
    with pytest.raises(DeltaLlavaError, match=message):
        update_code(older, force=True)
    assert contents(older) == before


def test_line_ends_of_windows_are_no_change(older, repo, tmp_path, monkeypatch):
    windows = shutil.copytree(repo, tmp_path / "windows")
    for file in windows.glob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert update_code(windows) == CodeUpdate(CODE_VERSION, [], [])
    assert not inspect_model(windows).problems
    push_folder(windows, REPO, dry_run=True)
    # A package that was installed from a clone with such line ends.
    monkeypatch.setattr(hub, "HUB_FILES", {name: windows / name for name in HUB_FILES})
    update_code(older)
    assert contents(older) == contents(repo)


# The card.


def card(**changes):
    facts = {
        "name": "delta-llava-7b-144",
        "config": DeltaLlavaConfig(),
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "base_models": ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"],
        "conversion": (None, 64, ["<image>", "<pad>"]),
    }
    return ModelCard(**{**facts, **changes}).render()


def test_the_example_card_is_what_conversion_writes():
    assert CARD.read_text(encoding="utf-8") == card()


def test_the_card_states_the_facts_of_the_config():
    text = card(name="org/tiny", conversion=("bfloat16", 64, ["<image>", "<pad>"]))
    start, header, body = text.split("---\n", 2)
    assert start == "" and yaml.safe_load(header) == {
        "library_name": "transformers",
        "license": "llama2",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"],
        "tags": ["delta-llava", "vision-language-model", "visual-token-reduction", "custom_code"],
    }
    assert body.lstrip().startswith("# tiny\n") and text.count('"org/tiny"') == 3
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    budgets = [(576, 1), (144, 2), (64, 3), (36, 4), (16, 6), (9, 8), (4, 12), (1, 24)]
    assert [(int(row[0]), int(row[1])) for row in rows] == budgets
    assert [row[0] for row in rows if row[-1] == "default"] == ["144"]
    # At rank 16: the query's (1024 + 1024) x 16, and twice (4 x 1024 + 1024) x 16 for keys and values.
    for fact in ("196,608 of the projector's 42,503,680", "rank 16", "bfloat16", "64 more rows", "`<image>`, `<pad>`"):
        assert fact in text


def test_no_base_model_and_no_licence_is_made_up():
    def header(text):
        return yaml.safe_load(text.split("---\n")[1])

    assert not {"base_model", "license"} & header(card(base_models=[])).keys()
    assert "license" not in header(card(base_models=["someone/llama"]))
    assert header(card(license="mit"))["license"] == "mit"
    plain = card(config=DeltaLlavaConfig(use_delta_projection=False), conversion=None, training=("One epoch.",))
    assert "## Deltas" not in plain and "converted" not in plain.partition("## Use")[0] and "- One epoch." in plain
