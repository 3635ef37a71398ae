"""The files of a Hub repo beside its weights: written, checked, and brought up to date."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from PIL import Image
from transformers.utils import logging

from .. import modeling, processing
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..modeling.configuration_delta_llava import CODE_VERSION
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError, explain_errors, format_names
from ..utils.files import REPORT_FILE, is_repo_id, json_bytes, read_json, refuse_special_files, write_json
from ..utils.prompts import render_question
from ..utils.validation import check_sizes
from .retries import explain
from .tokenizer import IMAGE_TOKEN


MODEL_CLASS = "DeltaLlavaForConditionalGeneration"
PROCESSOR_CLASS = "DeltaLlavaProcessor"


def write_config(config: DeltaLlavaConfig, folder: Path) -> None:
    """Write `config.json`; the auto_map in it comes from the config class."""
    config.architectures = [MODEL_CLASS]
    config.to_json_file(folder / "config.json")


def write_processor(config: DeltaLlavaConfig, image_processor: dict, do_pad: bool, folder: Path) -> None:
    """Write `processor_config.json`, from which AutoProcessor finds the processor's code."""
    settings = {
        "auto_map": {"AutoProcessor": f"processing_delta_llava.{PROCESSOR_CLASS}"},
        "do_pad": do_pad,
        "image_processor": image_processor,
        "image_seq_length": config.num_visual_tokens,
        "image_token": IMAGE_TOKEN,
        "num_visual_tokens": config.num_visual_tokens,
        "processor_class": PROCESSOR_CLASS,
        "visual_token_budgets": list(config.visual_token_budgets),
    }
    write_json(settings, folder / "processor_config.json")


# Every file that is copied, verbatim and flat, into each repo.
HUB_FILES = {
    file.name: file
    for package in (modeling, processing)
    for file in sorted(Path(str(package.__file__)).parent.glob("[!_]*.py"))
}
# {version: {file: sha256}} of code that was published before.
_RELEASED = Path(__file__).with_name("released_code.json")
_STAMP = re.compile(r'("code_version":\s*)"[^"]*"')


@dataclass(frozen=True)
class CodeUpdate:
    """What `update` does, or would do, to a repo.

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


@dataclass(frozen=True)
class RepoCode:
    """The code in a folder, compared with today's and with what was published.

    Attributes:
        version: of the code, as the folder says; None where it does not.
        missing: today's files that the folder lacks.
        outdated: files that are as they were published, and differ from today's.
        edited: files that nobody published.
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


def write_code(folder: Path) -> None:
    """Copy the modules of the model and the processor, verbatim and flat."""
    for name, file in HUB_FILES.items():
        (folder / name).write_bytes(file.read_bytes())


def describe_code() -> dict[str, Any]:
    """What `conversion.json` says about the code that is written with it."""
    return {"version": CODE_VERSION, "sha256": {name: _sha256(file) for name, file in HUB_FILES.items()}}


def read_code(folder: Path) -> RepoCode:
    """Compare the code of a repo folder with today's, and with what was published or is noted in its `conversion.json`.

    Raises:
        DeltaLlavaError: `config.json` or `conversion.json` cannot be read.
    """
    known: dict[str, set[str]] = {}
    noted = _noted_code(folder)
    for files in (noted.get("sha256", {}), *read_json(_RELEASED).values()):
        for name, digest in files.items():
            known.setdefault(name, set()).add(digest)
    present = {path.name: _sha256(path) for path in sorted(folder.glob("*.py")) if path.is_file()}
    current = {name: _sha256(file) for name, file in HUB_FILES.items()}
    ours = {name: digest for name, digest in present.items() if name in current or name in known}
    differing = [name for name, digest in ours.items() if digest != current.get(name)]
    published = [name for name in differing if ours[name] in known.get(name, ())]
    return RepoCode(
        version=noted.get("version") or read_json(folder / "config.json").get("code_version"),
        missing=[name for name in current if name not in present],
        outdated=[name for name in published if name in current],
        edited=[name for name in differing if name not in published],
        obsolete=[name for name in published if name not in current],
    )


def update_code(
    spec: str | Path,
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
        spec: folder, or Hub id of a repo that the login may write to.
        revision: branch of a Hub repo; by default `main`.
        create_pr: open a pull request instead of committing. Hub repos only.
        dry_run: change nothing.
        force: replace files that somebody changed by hand.
        api: the Hub to talk to; by default that of the environment.

    Raises:
        DeltaLlavaError: it is not a Delta-LLaVA repo, its code was changed by hand, or the Hub refuses.
    """
    if Path(spec).is_dir():
        if create_pr or revision:
            raise DeltaLlavaError(f"{spec} is a folder; a revision and a pull request need the Hub id of a repo.")
        folder = Path(spec)
        update, contents = _plan(folder, str(spec), force)
        if not dry_run:
            _write(folder, contents, update.deleted)
        return update
    if not is_repo_id(str(spec)):
        raise DeltaLlavaError(f"{spec} is not a folder, and not a Hub id (owner/name) either.")
    return _update_hub_repo(str(spec), revision, create_pr, dry_run, force, api or HfApi())


def _update_hub_repo(
    repo_id: str, revision: str | None, create_pr: bool, dry_run: bool, force: bool, api: HfApi
) -> CodeUpdate:
    try:
        head = api.repo_info(repo_id, revision=revision).sha
        with tempfile.TemporaryDirectory() as temporary:
            patterns = ["*.py", "config.json", REPORT_FILE]
            folder = api.snapshot_download(repo_id, revision=head, allow_patterns=patterns, local_dir=temporary)
            update, contents = _plan(Path(folder), repo_id, force)
        if dry_run or not (update.changed or update.deleted):
            return update
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(
            repo_id,
            [*operations, *map(CommitOperationDelete, update.deleted)],
            commit_message=f"Update the code to {CODE_VERSION}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    except DeltaLlavaError:
        raise
    except Exception as error:  # an odd answer may raise anything
        raise explain(error, repo_id, f"{repo_id} was not updated; try again") from error
    return CodeUpdate(update.version, update.changed, update.deleted, commit.pr_url or commit.commit_url)


def _plan(folder: Path, name: str, force: bool) -> tuple[CodeUpdate, dict[str, bytes]]:
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
            "and update with force to replace it."
        )
    edited = [file for file in code.edited if file in HUB_FILES]
    contents = {file: HUB_FILES[file].read_bytes() for file in sorted([*code.missing, *code.outdated, *edited])}
    if contents or code.obsolete:
        contents |= _stamped(folder)
    return CodeUpdate(code.version, list(contents), code.obsolete), contents


def _stamped(folder: Path) -> dict[str, bytes]:
    """`config.json` and `conversion.json` with today's version of the code, where they note one and it is another."""
    config = (folder / "config.json").read_bytes()
    stamped = {"config.json": _STAMP.sub(rf'\g<1>"{CODE_VERSION}"', config.decode()).encode()}
    if _noted_code(folder):
        stamped[REPORT_FILE] = json_bytes({**read_json(folder / REPORT_FILE), "code": describe_code()})
    return {name: content for name, content in stamped.items() if content != (folder / name).read_bytes()}


def _write(folder: Path, contents: dict[str, bytes], deleted: Iterable[str]) -> None:
    """Replace file by file. After a crash between two of them every file is known, so another update goes on."""
    with tempfile.TemporaryDirectory(prefix=".update.", dir=folder) as temporary:
        for name, content in contents.items():
            (Path(temporary) / name).write_bytes(content)
        for name in contents:
            os.replace(Path(temporary) / name, folder / name)
    for name in deleted:
        (folder / name).unlink()


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


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# What a model repo has, beside this package's code. Logs, data, keys and whatever else lies in the folder stay there.
PUBLISHED = (
    *("README.md", "LICENSE*", "NOTICE*", ".gitattributes"),
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("model*.safetensors", "model*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("conversion.json", "recipe.yaml", "delta_config.json", "deltas.safetensors"),
)
# Files that run code when they are loaded; safetensors hold the weights.
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
# What login tokens of the Hub look like.
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT = 10 * 2**20


def repo_files(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """The files to publish, by their path in the repo, and the names of those that stay.

    Args:
        folder: the repo.
        include: shell patterns of files to publish beside those that a model repo has.

    Raises:
        DeltaLlavaError: `folder` is none, lacks this package's code, or has other code under its names; a pattern without
            a file, or with a pickle; a link among the files, or a login token in one.
    """
    if not folder.is_dir():
        raise DeltaLlavaError(f"{folder} is not a folder.")
    files, left_out, matched = {}, [], set()
    refuse_special_files(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() and not path.is_symlink():
            continue
        if any(part.startswith(".") for part in name.parts) and str(name) not in PUBLISHED:
            continue  # nobody looks for `.git` and `.env` in a repo
        asked = {pattern for pattern in include if fnmatch(name.as_posix(), pattern)}
        matched |= asked
        if asked or name.as_posix() in HUB_FILES or any(fnmatch(name.as_posix(), pattern) for pattern in PUBLISHED):
            files[name.as_posix()] = path
        else:
            left_out.append(name.as_posix())
    if unmatched := set(include) - matched:
        raise DeltaLlavaError(
            f"--include {format_names(unmatched)} matches no file in {folder.name} that can be published."
        )
    _refuse("links, which the Hub would get as files", (name for name, path in files.items() if path.is_symlink()))
    _refuse("pickles, which nobody should load", (name for name in files if Path(name).suffix.lower() in PICKLES))
    _check_code(folder)
    _refuse("login tokens of the Hub", (name for name, path in files.items() if _holds_token(path)))
    return files, left_out


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


def _check_code(folder: Path) -> None:
    code = read_code(folder)
    if code.missing:
        raise DeltaLlavaError(
            f"The folder lacks {format_names(code.missing)}, without which it does not load; convert or save the model again."
        )
    _refuse("older code of this package (update it first)", code.outdated)
    _refuse("code that somebody changed (save the model again, or update it with force)", code.edited)


def _holds_token(path: Path) -> bool:
    return path.stat().st_size <= _LARGEST_TEXT and _TOKEN.search(path.read_bytes()) is not None


def _check_weights(folder: Path, name: str) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is one table, ours one sentence
    bars = logging.is_progress_bar_enabled()
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
            names = format_names((name if isinstance(name, str) else name[0] for name in info[kind]), limit=5)
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
    found = int((inputs["input_ids"] == config.image_token_id).sum())
    if found != config.num_visual_tokens:
        raise DeltaLlavaError(
            f"{name} does not load: its processor writes {found} placeholders for an image, its model wants "
            f"{config.num_visual_tokens}."
        )
    if not inputs["pixel_values"].isfinite().all():
        raise DeltaLlavaError(f"{name} does not load: its image processor turns an image into NaN or Inf.")


def _refuse(what: str, names: object) -> None:
    found = [str(name) for name in names]  # type: ignore[attr-defined]
    if found:
        raise DeltaLlavaError(f"The folder holds {what}: {format_names(found, limit=5)}.")
