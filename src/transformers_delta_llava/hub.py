"""Repos on the Hub: their files and card, the check that they load, and pushing and updating them."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCardData, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.repocard import metadata_save
from huggingface_hub.utils import get_session, validate_repo_id
from jinja2 import Environment
from packaging.version import Version
from PIL import Image
from transformers.utils import logging

from . import modeling, processing
from .errors import (
    REPORT_FILE,
    DeltaLlavaError,
    format_names,
    json_text,
    one_line,
    read_json,
    read_optional_json,
    sha256_of,
    write_json,
)
from .loading import encode_question, load_config
from .modeling import PROJECTORS, DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from .modeling.configuration_delta_llava import CODE_VERSION
from .processing import DeltaLlavaProcessor


__all__ = ["CodeUpdate", "ModelCard", "PushReport", "check_repo", "push_folder", "update_code"]

# Every file that is copied, flat, into each repo.
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
WEIGHTS = "model*.safetensors*"
# Of an export to ONNX: its files with their hashes.
EXPORT_MANIFEST = "manifest.json"
# The only files that are published. Logs, data, keys and whatever else is in a folder stay there.
PUBLISHED = (
    *("README.md", "LICENSE*", "NOTICE*", ".gitattributes", REPORT_FILE),
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("model*.safetensors", "model*.safetensors.index.json", "deltas.safetensors"),
    *(*HUB_FILES, *TOKENIZER_FILES, "additional_chat_templates/*.jinja"),
    *("onnx/*.onnx", "onnx/*.onnx_data*", EXPORT_MANIFEST, "run_onnx.py"),
)
# A login token of the Hub, and the size of the largest file that is searched for one.
_TOKEN, _MAX_TEXT_BYTES = re.compile(rb"\bhf_[A-Za-z0-9]{30,}"), 10 * 2**20

# Names that may be published.

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
    a model of others.
    """
    if not name or any((place / name).exists() for place in (Path(), folder, folder.parent)):
        return None
    found = public_name(name)
    is_path = _FOLDER.fullmatch(found.partition("/")[0]) or found.rpartition("/")[2].startswith("checkpoint-")
    return found if is_repo_id(found) and not is_path else None


# Files.


def write_config(config: DeltaLlavaConfig, folder: Path) -> None:
    """Write `config.json`; the auto_map in it comes from the config class."""
    config.architectures = [DeltaLlavaForConditionalGeneration.__name__]
    config.to_json_file(folder / "config.json")


def write_processor(
    config: DeltaLlavaConfig, image_processor: dict[str, Any], options: dict[str, Any], folder: Path
) -> None:
    """Write `processor_config.json`, from which AutoProcessor finds the processor's code."""
    name = DeltaLlavaProcessor.__name__
    settings = {
        "auto_map": {"AutoProcessor": f"processing_delta_llava.{name}"},
        **options,
        "image_processor": image_processor,
        "image_seq_length": config.num_visual_tokens,
        "image_token": IMAGE_TOKEN,
        "num_visual_tokens": config.num_visual_tokens,
        "processor_class": name,
        "visual_token_budgets": list(config.visual_token_budgets),
    }
    write_json(settings, folder / "processor_config.json")


def write_code(folder: Path) -> None:
    """Copy the modules of the model and the processor, flat."""
    for name, file in HUB_FILES.items():
        (folder / name).write_bytes(_code(file))


def describe_code() -> dict[str, Any]:
    """What `conversion.json` says about the code that is written with it."""
    return {"version": CODE_VERSION, "sha256": {name: _sha256(file) for name, file in HUB_FILES.items()}}


def _code(file: Path) -> bytes:
    """The bytes of a module with the line ends of Unix: git on Windows may check it out with others."""
    return file.read_bytes().replace(b"\r\n", b"\n")


def _sha256(file: Path) -> str:
    return hashlib.sha256(_code(file)).hexdigest()


@dataclass(frozen=True)
class RepoCode:
    """The code in a folder, compared with today's and with what its `conversion.json` notes.

    Attributes:
        version: of the code, as the folder says; None where it does not.
        missing: today's files that the folder lacks.
        outdated: files that are as they were written, and differ from today's.
        edited: files that are neither today's nor as noted.
    """

    version: str | None
    missing: list[str]
    outdated: list[str]
    edited: list[str]


def read_code(folder: Path) -> RepoCode:
    """Compare the code of a repo folder with today's, and with what is noted in its `conversion.json`."""
    noted = read_optional_json(folder / REPORT_FILE).get("code", {})
    replacing = noted.get("replacing", ())  # stands there while an update replaces files
    present = {file.name: _sha256(file) for file in folder.glob("*_delta_llava.py")}
    today = describe_code()["sha256"]
    differing = sorted(name for name, digest in present.items() if digest != today.get(name))
    known = {name for name in differing if present[name] in (noted.get("sha256", {}).get(name), *replacing)}
    return RepoCode(
        version=noted.get("version") or read_optional_json(folder / "config.json").get("code_version"),
        missing=[name for name in today if name not in present],
        outdated=[name for name in differing if name in known],
        edited=[name for name in differing if name not in known],
    )


# The model card.

# Licences of the language models of checkpoints, as the Hub names them. The first known one is inherited:
# the language model holds nearly all of the weights.
LICENSES = {
    "ByteDance-Seed/Seed-OSS-36B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-7B-Instruct": "apache-2.0",
    "google/gemma-2b-it": "gemma",
    "lmsys/vicuna-13b-v1.5": "llama2",
    "lmsys/vicuna-7b-v1.5": "llama2",
    "microsoft/Phi-3-mini-4k-instruct": "mit",
    "mistralai/Mistral-7B-Instruct-v0.2": "apache-2.0",
}
TAGS = ["delta-llava", "vision-language-model", "visual-token-reduction", "custom_code"]


@dataclass(frozen=True)
class ModelCard:
    """Facts of the README of a repo; the words are in `model_card.md.jinja`.

    Attributes:
        name: the repo's Hub id or its folder's name, for the examples; the title is its last part.
        config: of the model.
        vision_tower: name of the tower.
        base_models: Hub ids of the models that it was trained from; may be empty.
        license: as the Hub names it; by default the language model's, where that is known.
        conversion: what a conversion changed: the dtype of a cast (or None), rows added to the vocabulary, tokens added.
            None where no checkpoint was converted.
        training: sentences on how it was trained.
    """

    name: str
    config: DeltaLlavaConfig
    vision_tower: str
    base_models: list[str]
    license: str | None = None
    conversion: tuple[str | None, int, list[str]] | None = None
    training: tuple[str, ...] = ()

    @property
    def license_or_inherited(self) -> str | None:
        """The licence that the card names."""
        return self.license or next((LICENSES[name] for name in self.base_models if name in LICENSES), None)

    def render(self) -> str:
        """The card as Markdown with its YAML header."""
        header = ModelCardData(
            base_model=self.base_models or None,
            library_name="transformers",
            license=self.license_or_inherited,
            pipeline_tag="image-text-to-text",
            tags=TAGS,
        )
        budgets = self.config.visual_token_budgets
        fewer = [tokens for tokens in budgets if tokens < self.config.num_visual_tokens]
        template = (Path(__file__).parent / "model_card.md.jinja").read_text(encoding="utf-8")
        environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        return environment.from_string(template).render(
            card=self,
            config=self.config,
            header=header,
            title=self.name.rpartition("/")[2],
            example_budget=fewer[0] if fewer else self.config.num_visual_tokens,
            parameters=count_parameters(self.config) if self.config.use_delta_projection else None,
        )


def count_parameters(config: DeltaLlavaConfig) -> tuple[int, int]:
    """Parameters of the projector's deltas, and of the whole projector; nothing is allocated."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in PROJECTORS[config.projector_layout](config).named_parameters()}
    deltas = sum(size for name, size in sizes.items() if name.endswith((".delta_u", ".delta_v")))
    return deltas, sum(sizes.values())


# Check and push.


def check_repo(folder: Path, name: str | None = None) -> None:
    """Load `folder` as its users will, without reading the weights' values and without running code of the folder.

    The model is built on the meta device, so a repo of any size is checked in seconds: every weight must be there, in
    its shape, and no other; the processor must answer a chat about an image with the model's number of placeholders.

    Args:
        folder: the repo.
        name: what errors call it; by default the folder's name.

    Raises:
        DeltaLlavaError: naming what does not load.
    """
    name = name or folder.name
    try:
        config = load_config(folder)
        with _quiet():
            _, info = DeltaLlavaForConditionalGeneration.from_pretrained(
                folder,
                device_map="meta",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are named below
                output_loading_info=True,
            )
        inputs = encode_question(
            DeltaLlavaProcessor.from_pretrained(folder), Image.new("RGB", (40, 30)), "What is it?"
        )
    except Exception as error:  # of many kinds, and some do not name the file
        raise DeltaLlavaError(f"{name} does not load: {one_line(error, 500)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = format_names(key if isinstance(key, str) else key[0] for key in info[kind])
            raise DeltaLlavaError(f"{name} does not load: its weights have {kind.replace('_', ' ')} ({names})")
    placeholders = int((inputs["input_ids"] == config.image_token_id).sum())
    needed = config.num_visual_tokens * len(inputs["pixel_values"])
    if placeholders != needed:
        raise DeltaLlavaError(
            f"{name} does not load: its processor writes {placeholders} placeholders for an image, its model needs {needed}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own table of missing weights, and without its bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class PushReport:
    """Result of `push_folder`.

    Attributes:
        repo_id: where the files are.
        url: of the commit or of the pull request; empty after a dry run.
        files: size in bytes of every file, by its path in the repo.
        left_out: files of the folder that a model repo does not have and `include` does not name.
        warnings: what the user should know.
    """

    repo_id: str
    url: str
    files: dict[str, int]
    left_out: list[str]
    warnings: list[str] = field(default_factory=list)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    include: Sequence[str] = (),
    license: str | None = None,
    base_models: Sequence[str] = (),
    api: HfApi | None = None,
) -> PushReport:
    """Publish a repo folder that loads, or an export to ONNX, in one commit.

    After a broken connection, call it again: files that arrived are not sent twice. Weights and code of the repo that
    the folder does not have are deleted in the same commit.

    Args:
        folder: the repo folder, as `convert_checkpoint` or the trainer wrote it.
        repo_id: `owner/name`; created if it does not exist.
        private: create it private. A repo that exists and is public is refused.
        revision: branch to commit to, created if it does not exist; by default `main`.
        create_pr: open a pull request with the commit.
        dry_run: check the folder and list what would be uploaded; nothing is sent.
        include: shell patterns of files to publish although a model repo does not have such (images, logs).
        license, base_models: written into the card of the folder first: the licence as the Hub names it, and Hub ids.
        api: the Hub to talk to; by default the one, and the login, of the environment.

    Raises:
        DeltaLlavaError: the folder does not load, or the repo is public and should be private.
        HfHubHTTPError: the Hub refuses.
    """
    folder, api = Path(folder).resolve(), api or HfApi()
    if not is_repo_id(repo_id):
        raise DeltaLlavaError(f"{repo_id} is not a Hub id of the form owner/name")
    if not dry_run:
        check_login(api)
    repo_files(folder, include)
    if (folder / EXPORT_MANIFEST).is_file():
        _check_export(folder)
    else:
        check_repo(folder)
    warnings = _complete_card(folder / "README.md", repo_id, license, base_models)
    files, left_out = repo_files(folder, include)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if left_out:
        # Of folders only the name: the trainer's checkpoints hold dozens of files each.
        names = {name if "/" not in name else f"{name.partition('/')[0]}/" for name in left_out}
        warnings.append(f"not published, since a model repo has no such files (see include): {format_names(names)}")
    if dry_run:
        return PushReport(repo_id, "", sizes, left_out, warnings)
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise DeltaLlavaError(f"{repo_id} exists and is public; make it private, or leave private=True out")
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(files),
        delete_patterns=[WEIGHTS, "*_delta_llava.py", "onnx/*"],  # of what is not uploaded
        commit_message=f"Upload {repo_id.partition('/')[2]}",
        revision=revision,
        create_pr=create_pr,
    )
    return PushReport(repo_id, commit.pr_url or commit.commit_url, sizes, left_out, warnings)


def _check_export(folder: Path) -> None:
    """The files of an export to ONNX are those that were written."""
    noted = {file["path"]: file["sha256"] for file in read_json(folder / EXPORT_MANIFEST)["files"]}
    changed = [name for name in noted if not (folder / name).is_file() or sha256_of(folder / name) != noted[name]]
    if changed:
        raise DeltaLlavaError(
            f"{folder.name} is not the export that was written: {format_names(changed)}; export again"
        )


def _complete_card(card: Path, repo_id: str, license: str | None, base_models: Sequence[str]) -> list[str]:
    """Write what is given into the header of a card; returns what it still lacks."""
    header = (metadata_load(card) if card.is_file() else None) or {}
    given = {"license": license, "base_model": list(base_models)}
    if any(given.values()):
        header |= {name: value for name, value in given.items() if value}
        metadata_save(card, header)
    warnings = [f"README.md names no {name}" for name in given if not header.get(name)]
    if not card.is_file() or repo_id not in card.read_text(encoding="utf-8"):
        warnings.append(f"README.md does not name {repo_id}, so its examples may not run as they stand")
    return warnings


def check_login(api: HfApi | None = None) -> None:
    """Refuse to begin a long job whose result could not be pushed.

    Raises:
        LocalTokenNotFoundError, HfHubHTTPError: there is no login, or an invalid one.
        DeltaLlavaError: the Hub cannot be reached.
    """
    api, session = api or HfApi(), get_session()
    timeout, session.timeout = session.timeout, 10  # by default it waits forever
    try:
        api.whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError):
        raise
    except Exception as error:  # of the HTTP client, which depends on huggingface_hub's version
        raise DeltaLlavaError(f"{api.endpoint} cannot be reached: {one_line(error, 300)}") from error
    finally:
        session.timeout = timeout


def is_published(name: str) -> bool:
    """Whether a model repo has a file of this name."""
    return any(fnmatch(name, pattern) for pattern in PUBLISHED)


def repo_files(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """The files to publish, by their path in the repo, and the names of those that stay.

    Args:
        folder: the repo.
        include: shell patterns of files to publish as well as those that a model repo has.

    Raises:
        DeltaLlavaError: `folder` lacks this package's code or has other code under its names, or a file holds a login token.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {
        name: path for name, path in paths.items() if is_published(name) or any(fnmatch(name, p) for p in include)
    }
    code = read_code(folder)
    if code.missing and EXPORT_MANIFEST not in paths:
        raise DeltaLlavaError(f"{folder.name} lacks {format_names(code.missing)}; convert or save the model again")
    if differing := [*code.outdated, *code.edited]:
        raise DeltaLlavaError(
            f"{folder.name} has code that is not today's: {format_names(differing)}; update it first"
        )
    small = (name for name, path in files.items() if path.stat().st_size <= _MAX_TEXT_BYTES)
    if secret := [name for name in small if _TOKEN.search(files[name].read_bytes())]:
        raise DeltaLlavaError(f"{folder.name} holds login tokens of the Hub: {format_names(secret)}")
    # `.git` and `.env` are not expected in a repo, so they are not reported either.
    hidden = {name for name in paths if any(part.startswith(".") for part in name.split("/"))}
    return files, sorted(paths.keys() - files.keys() - hidden)


# Update.

_CODE_VERSION = re.compile(r'("code_version":\s*)"[^"]*"')
_SCALE_FACTOR = re.compile(r'("scale_factor":\s*)\d+')


@dataclass(frozen=True)
class CodeUpdate:
    """What `update_code` does, or would do, to a repo.

    Attributes:
        version: of the repo's code; None where it does not say.
        changed: files that are written.
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
    num_visual_tokens: Sequence[int] = (),
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    force: bool = False,
    api: HfApi | None = None,
) -> CodeUpdate:
    """Give a repo today's Hub files, and other visual tokens. Weights and tokenizer stay byte for byte.

    The version of the code in `config.json`, and its hashes in `conversion.json`, follow where they are noted.

    Args:
        repo: folder, or Hub id of a repo that the login may write to.
        num_visual_tokens: the new default. Of several the first is the default, and the processor offers only these.
        revision: branch of a Hub repo; by default `main`.
        create_pr: open a pull request instead of committing. Hub repos only.
        dry_run: change nothing.
        force: replace files that were changed by hand, or that no `conversion.json` notes.
        api: the Hub to talk to; by default that of the environment.

    Raises:
        DeltaLlavaError: it is not a Delta-LLaVA repo, its code is newer than this package's, or was changed by hand.
        HfHubHTTPError: the Hub refuses.
    """
    if Path(repo).is_dir():
        update, settings = _plan_update(Path(repo), str(repo), num_visual_tokens, force)
        if not dry_run:
            _write_update(Path(repo), update, settings)
        return update
    api = api or HfApi()
    head = api.repo_info(str(repo), revision=revision).sha
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        patterns = ["*.py", "config.json", "processor_config.json", "README.md", REPORT_FILE]
        api.snapshot_download(str(repo), revision=head, allow_patterns=patterns, local_dir=folder)
        update, settings = _plan_update(folder, str(repo), num_visual_tokens, force)
        if dry_run or not (update.changed or update.deleted):
            return update
        _write_update(folder, update, settings)
        commit = api.create_commit(
            str(repo),
            [
                *(CommitOperationAdd(name, folder / name) for name in update.changed),
                *(CommitOperationDelete(name) for name in update.deleted),
            ],
            commit_message=f"Update the code to {CODE_VERSION}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    return replace(update, url=commit.pr_url or commit.commit_url)


def _plan_update(
    folder: Path, name: str, num_visual_tokens: Sequence[int], force: bool
) -> tuple[CodeUpdate, dict[str, str]]:
    """What has to be done, and the new text of settings and card."""
    config, noted = read_json(folder / "config.json"), read_optional_json(folder / REPORT_FILE)
    if config.get("model_type") != DeltaLlavaConfig.model_type:
        raise DeltaLlavaError(f"{name} is not a Delta-LLaVA repo: model_type={config.get('model_type')}")
    code = read_code(folder)
    if code.version is not None and Version(code.version) > Version(CODE_VERSION):
        raise DeltaLlavaError(f"{name} has code of version {code.version}; this package's is older ({CODE_VERSION})")
    if len(code.missing) == len(HUB_FILES):
        raise DeltaLlavaError(f"{name} has no code of its own; update the repo that its auto_map names")
    if code.edited and not force:
        raise DeltaLlavaError(
            f"{name} has code that was changed by hand, in {format_names(code.edited)}; keep a copy, and replace it with force=True"
        )
    differing = {*code.missing, *code.outdated, *code.edited}
    settings = _update_settings(folder, num_visual_tokens)
    changed = [*sorted(differing & HUB_FILES.keys()), *settings]
    changed += [REPORT_FILE] * (noted.get("code", describe_code()) != describe_code())
    return CodeUpdate(code.version, changed, sorted(differing - HUB_FILES.keys())), settings


def _update_settings(folder: Path, num_visual_tokens: Sequence[int]) -> dict[str, str]:
    """The files that state the version of the code or visual tokens, with new values, as far as they change."""
    names = ("config.json", "processor_config.json", "README.md")
    before = {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()}
    after = {**before, "config.json": _CODE_VERSION.sub(rf'\g<1>"{CODE_VERSION}"', before["config.json"])}
    if num_visual_tokens:
        config, default = load_config(folder), num_visual_tokens[0]
        factors = [config.scale_factor_for(number) for number in num_visual_tokens]
        budgets = sorted(num_visual_tokens, reverse=True) if len(factors) > 1 else list(config.visual_token_budgets)
        after["config.json"] = _SCALE_FACTOR.sub(rf"\g<1>{factors[0]}", after["config.json"])
        processor = {"image_seq_length": default, "num_visual_tokens": default, "visual_token_budgets": budgets}
        after["processor_config.json"] = json_text({**json.loads(before["processor_config.json"]), **processor})
        if "README.md" in before:
            after["README.md"] = _update_card(before["README.md"], config, default, budgets)
    return {name: text for name, text in after.items() if text != before[name]}


def _update_card(card: str, config: DeltaLlavaConfig, default: int, budgets: list[int]) -> str:
    """A card as `ModelCard.render` writes it, with other visual tokens."""
    example = next((number for number in budgets if number < default), default)
    marks = {default: "default"}
    rows = (f"| {number} | {config.scale_factor_for(number)} | {marks.get(number, '')} |\n" for number in budgets)
    card = re.sub(r"An image becomes \d+ visual tokens", f"An image becomes {default} visual tokens", card)
    card = re.sub(r"(?<=num_visual_tokens=)\d+", str(example), card)
    return re.sub(r"(?<=\n\|---:\|---:\|---\|\n)(\| \d+ \| \d+ \|.*\n)+", "".join(rows), card)


def _write_update(folder: Path, update: CodeUpdate, settings: dict[str, str]) -> None:
    """Replace file by file. What is noted meanwhile lets any later version finish an update that was killed."""
    report = read_optional_json(folder / REPORT_FILE)
    if noted := report.get("code"):
        replacing = sorted({*noted["sha256"].values(), *noted.get("replacing", ())})
        _replace(folder / REPORT_FILE, json_text({**report, "code": {**describe_code(), "replacing": replacing}}))
    for name in update.changed:
        if name in HUB_FILES:
            _replace(folder / name, _code(HUB_FILES[name]))
        elif name in settings:
            _replace(folder / name, settings[name])
    for name in update.deleted:
        (folder / name).unlink()
    if noted:
        _replace(folder / REPORT_FILE, json_text({**report, "code": describe_code()}))


def _replace(path: Path, content: bytes | str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(new, path)
