"""A conversion ends in a repo that loads and answers, or in no repo: it is checked as `push` does before it appears."""

import json
import os
import shutil

import pytest

from transformers_delta_llava.analysis.inference import load_repo
from transformers_delta_llava.conversion import convert, convert_checkpoint, export_checkpoint, inspect_model, sources
from transformers_delta_llava.hub.repo_files import check_repo, repo_files
from transformers_delta_llava.utils.errors import DeltaLlavaError


@pytest.fixture
def source(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "given")
    return tmp_path / "given" / "llava-tiny"


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def duplicate_id(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first] = vocabulary[second]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("../vision-tower/preprocessor_config.json", lambda values: values.update(image_mean=[0.5])),
        ("../vision-tower/preprocessor_config.json", lambda values: values.update(image_std=[0, 0, 0])),
        ("../vision-tower/preprocessor_config.json", lambda values: values.update(rescale_factor="x")),
        ("../vision-tower/preprocessor_config.json", lambda values: values.update(resample=99)),
        ("tokenizer_config.json", lambda values: values.update(split_special_tokens=True)),
        (
            "tokenizer.json",
            lambda values: values.update(
                truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 9}
            ),
        ),
        ("tokenizer.json", duplicate_id),
    ],
)
def test_a_source_whose_repo_would_not_load(source, tmp_path, file, change):
    (source / "../vision-tower/preprocessor_config.json").write_text("{}")
    edit(source / file, change)
    try:
        convert_checkpoint(source, tmp_path / "out", vision_tower=source.parent / "vision-tower")
    except DeltaLlavaError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["given"]
    else:
        pytest.fail(str(check_repo(tmp_path / "out")))


def test_a_template_whose_repo_would_not_load(source, tmp_path):
    (tmp_path / "x.jinja").write_text("no image here")
    with pytest.raises(ValueError, match="out does not load: .*(0 placeholders|image)"):
        convert_checkpoint(source, tmp_path / "out", chat_template=str(tmp_path / "x.jinja"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "x.jinja"]


def test_a_tokenizer_of_another_checkpoint(source, tmp_path):
    edit(source / "tokenizer.json", lambda values: values["model"]["vocab"].update(word=1_000_000))
    with pytest.raises(DeltaLlavaError, match=r"ids up to 1,000,000, but the checkpoint was trained with 320 rows"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: input should be less than"),
        ("config.json", {"num_hidden_layers": "4"}, "num_hidden_layers='4': input should be a valid integer"),
        ("config.json", {"hidden_size": 10**12}, "hidden_size=1000000000000: input should be less than"),
        ("../vision-tower/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ("../vision-tower/config.json", {"image_size": 10**9}, "image_size=1000000000"),
    ],
)
def test_sizes_are_read_before_anything_is_built(source, tmp_path, file, values, message):
    edit(source / file, lambda settings: settings.update(values))
    with pytest.raises(DeltaLlavaError, match=message):
        convert_checkpoint(source, tmp_path / "out", vision_tower=source.parent / "vision-tower")


def test_a_tokenizer_that_panics_or_cannot_be_written(source, tmp_path, monkeypatch):
    class Panic(BaseException):
        pass

    def fail(*arguments):
        raise Panic("No space left on device (os error 28)")

    monkeypatch.setattr(convert, "save_tokenizer", fail)
    with pytest.raises(DeltaLlavaError, match="The tokenizer cannot be written: No space left"):
        convert_checkpoint(source, tmp_path / "out")
    monkeypatch.setattr(sources, "add_tokens", fail)
    with pytest.raises(DeltaLlavaError, match="The tokenizer of llava-tiny cannot be used: No space left"):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given"]


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_a_pipe_among_the_files_of_a_repo(repo, tmp_path, name):
    copied = shutil.copytree(repo, tmp_path / "copied")
    (copied / name).unlink()
    os.mkfifo(copied / name)
    for read in (repo_files, check_repo, inspect_model, lambda folder: load_repo(str(folder))):
        with pytest.raises(DeltaLlavaError, match=f"{name} in copied is not a regular file"):
            read(copied)


def test_a_repo_with_impossible_sizes(repo, tmp_path):
    copied = shutil.copytree(repo, tmp_path / "copied")
    edit(copied / "config.json", lambda values: values["text_config"].update(num_hidden_layers=10**9))
    for read in (
        check_repo,
        lambda folder: load_repo(str(folder)),
        lambda folder: export_checkpoint(folder, tmp_path / "out"),
    ):
        with pytest.raises(
            DeltaLlavaError, match="text_config.num_hidden_layers=1000000000: input should be less than"
        ):
            read(copied)
