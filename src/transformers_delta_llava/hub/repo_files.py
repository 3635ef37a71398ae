"""The files of a Hub repo beside its weights: written, checked, and brought up to date."""

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers.utils import logging

from .. import modeling, processing
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..modeling.configuration_delta_llava import CODE_VERSION
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError, describe_hub_error, explain_errors, format_names
from ..utils.files import (
    REPORT_FILE,
    check_repo_id,
    json_bytes,
    read_json,
    refuse_special_files,
    sha256_of,
    write_json,
)
from ..utils.templates import render_question
from ..utils.validation import check_sizes


# Every file that is copied, verbatim and flat, into each repo.
HUB_FILES = {
    file.name: file
    for package in (modeling, processing)
    for file in sorted(Path(str(package.__file__)).parent.glob("[!_]*.py"))
}
IMAGE_TOKEN = "<image>"
TEMPLATE_FILE = "chat_template.jinja"
# Of repos and checkpoints.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
)
# What else a model repo has. Logs, data, keys and whatever else lies in the folder stay there.
WEIGHTS = "model*.safetensors*"
# Beside graphs, to run them. Nothing loads it.
_ONNX_SCRIPT = "onnx/run_onnx.py"
PUBLISHED = (
    *("README.md", "LICENSE*", "NOTICE*", ".gitattributes", REPORT_FILE, "recipe.yaml"),
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("model*.safetensors", "model*.safetensors.index.json", "delta_config.json", "deltas.safetensors"),
    *(*TOKENIZER_FILES, "additional_chat_templates/*.jinja"),
    *("onnx/*.onnx", "onnx/*.onnx_data*", "onnx/*.json", "onnx/*.jinja", _ONNX_SCRIPT),
)
# Files that run code when they are loaded; safetensors hold the weights.
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
# What login tokens of the Hub look like, and the largest file that is searched for them.
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_MAX_TEXT_BYTES = 10 * 2**20
# {version: {file: sha256}} of code that was published before.
_RELEASED = Path(__file__).with_name("released_code.json")
_CODE_VERSION = re.compile(r'("code_version":\s*)"[^"]*"')


# Where the Hub's client keeps downloads.
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]")
# First parts of paths on the machine that trained a model, which look like owners on the Hub.
_FOLDER = re.compile(
    r"(.*[_-])?(cache|checkpoint|ckpt|data|exp|experiment|home|llm|local|mnt|model|out|output|pretrained|result|root|run|save"
    r"|saved|scratch|share|tmp|trained|user|weight|work|workspace)s?",
    re.IGNORECASE,
)


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a Hub id, `owner/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text  # names without an owner are ids to huggingface_hub


def public_name(model_id: str | Path) -> str:
    """A name that may be published: a Hub id, also of a path in the Hub's cache; of another path only its last part."""
    path = str(Path(model_id).resolve() if Path(model_id).exists() else model_id)
    if cached := _CACHED.search(path):
        return f"{cached[1]}/{cached[2]}"
    return path if is_repo_id(path) else Path(path).name


def hub_id_of(name: str | None, folder: Path) -> str | None:
    """The Hub id that the config in `folder` names, in a form that may be published.

    None where it is a path, or may be one of the machine that trained the checkpoint: a wrong Hub id would lead readers to
    somebody else's model.
    """
    if not name or any((place / name).exists() for place in (Path(), folder, folder.parent)):
        return None
    found = public_name(name)
    is_path = _FOLDER.fullmatch(found.partition("/")[0]) or found.rpartition("/")[2].startswith("checkpoint-")
    return found if is_repo_id(found) and not is_path else None


def write_config(config: DeltaLlavaConfig, folder: Path) -> None:
    """Write `config.json`; the auto_map in it comes from the config class."""
    config.architectures = [DeltaLlavaForConditionalGeneration.__name__]
    config.to_json_file(folder / "config.json")


def write_processor(config: DeltaLlavaConfig, image_processor: dict, do_pad: bool, folder: Path) -> None:
    """Write `processor_config.json`, from which AutoProcessor finds the processor's code."""
    name = DeltaLlavaProcessor.__name__
    settings = {
        "auto_map": {"AutoProcessor": f"processing_delta_llava.{name}"},
        "do_pad": do_pad,
        "image_processor": image_processor,
        "image_seq_length": config.num_visual_tokens,
        "image_token": IMAGE_TOKEN,
        "num_visual_tokens": config.num_visual_tokens,
        "processor_class": name,
        "visual_token_budgets": list(config.visual_token_budgets),
    }
    write_json(settings, folder / "processor_config.json")


def write_code(folder: Path) -> None:
    """Copy the modules of the model and the processor, verbatim and flat."""
    for name, file in HUB_FILES.items():
        (folder / name).write_bytes(file.read_bytes())


def describe_code() -> dict[str, Any]:
    """What `conversion.json` says about the code that is written with it."""
    return {"version": CODE_VERSION, "sha256": {name: sha256_of(file) for name, file in HUB_FILES.items()}}


@dataclass(frozen=True)
class RepoCode:
    """The code in a folder, compared with today's and with what was published.

    Attributes:
        version: of the code, as the folder says; None where it does not.
        missing: today's files that the folder lacks.
        outdated: files that are as they were published, and differ from today's.
        edited: files that were never published as they are.
        obsolete: published files that today's code does not have.
    """

    version: str | None
    missing: list[str]
    outdated: list[str]
    edited: list[str]
    obsolete: list[str]

    @property
    def is_current(self) -> bool:
        """Whether it is today's, to the byte."""
        return not (self.missing or self.outdated or self.edited or self.obsolete)


def read_code(folder: Path) -> RepoCode:
    """Compare the code of a repo folder with today's, and with what was published or is noted in its `conversion.json`.

    Raises:
        DeltaLlavaError: `config.json` or `conversion.json` cannot be read.
    """
    noted, current = _noted_code(folder), describe_code()["sha256"]
    versions = (noted.get("sha256", {}), *read_json(_RELEASED).values())
    published = {entry for version in versions for entry in version.items()}
    names = current.keys() | {name for name, _ in published}
    present = {
        path.name: sha256_of(path) for path in sorted(folder.glob("*.py")) if path.is_file() and path.name in names
    }
    differing = [name for name in present if present[name] != current.get(name)]
    known = [name for name in differing if (name, present[name]) in published]
    return RepoCode(
        version=noted.get("version") or read_json(folder / "config.json").get("code_version"),
        missing=[name for name in current if name not in present],
        outdated=[name for name in known if name in current],
        edited=[name for name in differing if name not in known],
        obsolete=[name for name in known if name not in current],
    )


def _noted_code(folder: Path) -> dict[str, Any]:
    """What the repo's `conversion.json` says about its code; empty where it says nothing."""
    path = folder / REPORT_FILE
    noted = read_json(path).get("code") if path.is_file() else None
    if noted is None:
        return {}
    digests = noted.get("sha256") if isinstance(noted, dict) else None
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise DeltaLlavaError(f"{REPORT_FILE} has a part `code` that this package did not write; delete that part.")
    return noted


@dataclass(frozen=True)
class CodeUpdate:
    """What `update_code` does, or would do, to a repo.

    Attributes:
        version: of the repo's code; None where it does not say, as repos before 0.1.0 do not.
        changed: files that are written, in the repo's order.
        deleted: files of older code that today's does not have.
        url: of the commit or pull request; None for a folder and for a dry run.
    """

    version: str | None
    changed: list[str]
    deleted: list[str]
    url: str | None = None


def update_code(
    repo: str | Path,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    force: bool = False,
    api: HfApi | None = None,
) -> CodeUpdate:
    """Give a repo today's Hub files. Weights, tokenizer and config values stay byte for byte.

    Besides the code, only the version of the code in `config.json`, and its hashes in `conversion.json`, follow where they
    are noted.

    Args:
        repo: folder, or Hub id of a repo that the login may write to.
        revision: branch of a Hub repo; by default `main`.
        create_pr: open a pull request instead of committing. Hub repos only.
        dry_run: change nothing.
        force: replace files that somebody changed by hand.
        api: the Hub to talk to; by default that of the environment.

    Raises:
        DeltaLlavaError: it is not a Delta-LLaVA repo, its code was changed by hand, or the Hub refuses.
    """
    repo_id, folder = str(repo), Path(repo)
    if folder.is_dir():
        if create_pr or revision:
            raise DeltaLlavaError(f"{repo} is a folder; a revision and a pull request need the Hub id of a repo.")
        update, contents = _plan_update(folder, repo_id, force)
        if not dry_run:
            _write_update(folder, contents, update.deleted)
        return update
    check_repo_id(repo_id, or_folder=True)
    api = api or HfApi()
    try:
        head = api.repo_info(repo_id, revision=revision).sha
        with tempfile.TemporaryDirectory() as temporary:
            patterns = ["*.py", "config.json", REPORT_FILE]
            api.snapshot_download(repo_id, revision=head, allow_patterns=patterns, local_dir=temporary)
            update, contents = _plan_update(Path(temporary), repo_id, force)
        if dry_run or not (update.changed or update.deleted):
            return update
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, update.deleted)],
            commit_message=f"Update the code to {CODE_VERSION}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    except DeltaLlavaError:
        raise
    except Exception as error:  # an unexpected answer may raise anything
        raise describe_hub_error(error, repo_id, f"{repo_id} was not updated; try again") from error
    return replace(update, url=commit.pr_url or commit.commit_url)


def _plan_update(folder: Path, name: str, force: bool) -> tuple[CodeUpdate, dict[str, bytes]]:
    """What has to be done, and the bytes of the files that are written."""
    if not (folder / "config.json").is_file() or read_json(folder / "config.json").get("model_type") != "delta_llava":
        raise DeltaLlavaError(
            f"{name} is not a Delta-LLaVA repo: its config.json does not say model_type delta_llava."
        )
    code = read_code(folder)
    if len(code.missing) == len(HUB_FILES):
        raise DeltaLlavaError(f"{name} carries no code of its own; update the repo that its auto_map names.")
    if code.edited and not force:
        raise DeltaLlavaError(
            f"{name} has code that was never published, in {format_names(code.edited)}: somebody changed it. Keep a copy, "
            "and update with `force=True` to replace it."
        )
    changed = sorted({*code.missing, *code.outdated, *code.edited} & HUB_FILES.keys())
    contents = {file: HUB_FILES[file].read_bytes() for file in changed}
    if contents or code.obsolete:
        contents |= _update_version(folder)
    return CodeUpdate(code.version, list(contents), code.obsolete), contents


def _update_version(folder: Path) -> dict[str, bytes]:
    """`config.json` and `conversion.json` with today's version of the code, where they note another."""
    config = (folder / "config.json").read_bytes().decode()
    updated = {"config.json": _CODE_VERSION.sub(rf'\g<1>"{CODE_VERSION}"', config).encode()}
    if _noted_code(folder):
        updated[REPORT_FILE] = json_bytes({**read_json(folder / REPORT_FILE), "code": describe_code()})
    return {name: content for name, content in updated.items() if content != (folder / name).read_bytes()}


def _write_update(folder: Path, contents: dict[str, bytes], deleted: Iterable[str]) -> None:
    """Replace file by file. After a crash between two of them every file is known, so another update continues."""
    with tempfile.TemporaryDirectory(prefix=".update.", dir=folder) as temporary:
        for name, content in contents.items():
            (Path(temporary) / name).write_bytes(content)
        for name in contents:
            os.replace(Path(temporary) / name, folder / name)
    for name in deleted:
        (folder / name).unlink()


def is_published(name: str) -> bool:
    """Whether a model repo has a file of this name."""
    return name in HUB_FILES or any(fnmatch(name, pattern) for pattern in PUBLISHED)


def repo_files(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """The files to publish, by their path in the repo, and the names of those that stay.

    Args:
        folder: the repo.
        include: shell patterns of files to publish beside those that a model repo has.

    Raises:
        DeltaLlavaError: `folder` does not exist, lacks this package's code, or has other code under its names; a pattern
            without a file, or with a pickle; a link among the files, or a login token in one.
    """
    if not folder.is_dir():
        raise DeltaLlavaError(f"{folder} is not a folder.")
    refuse_special_files(folder)
    files, left_out, matched = {}, [], set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not (path.is_file() or path.is_symlink()):
            continue
        if name not in PUBLISHED and any(part.startswith(".") for part in name.split("/")):
            continue  # `.git` and `.env` are not expected in a repo, so they are not reported either
        included = {pattern for pattern in include if fnmatch(name, pattern)}
        matched |= included
        if included or is_published(name):
            files[name] = path
        else:
            left_out.append(name)
    if unmatched := set(include) - matched:
        raise DeltaLlavaError(
            f"`include=...`: {format_names(unmatched)} matches no file in {folder.name} that can be published."
        )
    _refuse("links, which the Hub would get as files", (name for name, path in files.items() if path.is_symlink()))
    _refuse("pickles, which run code when loaded", (name for name in files if Path(name).suffix.lower() in PICKLES))
    _refuse(
        "code of others, which would run on loading",
        (n for n in files if n.endswith(".py") and n not in {*HUB_FILES, _ONNX_SCRIPT}),
    )
    code = read_code(folder)
    if code.missing:
        raise DeltaLlavaError(
            f"The folder lacks {format_names(code.missing)}, without which it does not load; convert or save the model again."
        )
    _refuse("older code of this package (update it first)", code.outdated)
    _refuse("code that somebody changed (save the model again, or update it with `force=True`)", code.edited)
    _refuse("login tokens of the Hub", (name for name, path in files.items() if _holds_token(path)))
    return files, left_out


def _refuse(what: str, names: Iterable[str]) -> None:
    if names := list(names):
        raise DeltaLlavaError(f"The folder holds {what}: {format_names(names, limit=5)}.")


def _holds_token(path: Path) -> bool:
    return path.stat().st_size <= _MAX_TEXT_BYTES and _TOKEN.search(path.read_bytes()) is not None


def check_repo(folder: Path, name: str | None = None) -> None:
    """Load `folder` as its users will, without reading the weights' values and without running code of the folder.

    The model is built on the meta device, so a repo of any size is checked in seconds: every weight must be there, in
    its shape, and no other; the processor must answer a chat about an image with the model's number of placeholders.

    Args:
        folder: the repo.
        name: what errors call it; by default the folder's name.

    Raises:
        DeltaLlavaError: one sentence on what does not load.
    """
    name = name or folder.name
    refuse_special_files(folder)
    with explain_errors(f"{name} does not load"):
        check_sizes(read_json(folder / "config.json"), f"config.json of {name}")
        config = DeltaLlavaConfig.from_pretrained(folder)
        _check_weights(folder, name)
        _check_processor(folder, name, config)


def _check_weights(folder: Path, name: str) -> None:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its report of missing weights is one table, ours one sentence
    logging.disable_progress_bar()
    try:
        _, info = DeltaLlavaForConditionalGeneration.from_pretrained(
            folder, device_map="meta", use_safetensors=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = format_names((key if isinstance(key, str) else key[0] for key in info[kind]), limit=5)
            raise DeltaLlavaError(f"{name} does not load: its weights have {kind.replace('_', ' ')} ({names}).")


def _check_processor(folder: Path, name: str, config: DeltaLlavaConfig) -> None:
    """Ask about an image, as every chat does."""
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    words_by_id: dict[int, str] = {}
    for word, token_id in processor.tokenizer.get_vocab().items():
        if (other := words_by_id.setdefault(token_id, word)) != word:
            raise DeltaLlavaError(
                f"{name} does not load: its tokenizer has {format_names((other, word))} under one id."
            )
    prompt = render_question(processor, f"The chat template of {name}")
    inputs = processor(images=Image.new("RGB", (40, 30)), text=prompt, return_tensors="pt")
    placeholders = int((inputs["input_ids"] == config.image_token_id).sum())
    if placeholders != config.num_visual_tokens:
        raise DeltaLlavaError(
            f"{name} does not load: its processor writes {placeholders} placeholders for an image, its model needs "
            f"{config.num_visual_tokens}."
        )
    if not inputs["pixel_values"].isfinite().all():
        raise DeltaLlavaError(f"{name} does not load: its image processor turns an image into NaN or Inf.")
