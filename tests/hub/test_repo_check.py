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
