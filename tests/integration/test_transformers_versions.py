"""One folder, written once, in every supported transformers, where the package is not installed."""

import json

import pytest

from tests.integration.engines import Engine, needs


# The ends of the span, and the releases between them at which file formats or attention changed.
VERSIONS = ("5.10.4", "5.17.0", "5.19.0", "5.23.0", "5.24.0")


@pytest.mark.parametrize(
    "version", [pytest.param(version, marks=needs(f"transformers-{version}")) for version in VERSIONS]
)
def test_every_version_answers_alike(version, repo, cases, expected, questions, tmp_path):
    engine = Engine(f"transformers-{version}", tmp_path)
    before = {path.name: path.read_bytes() for path in repo.iterdir()}
    (tmp_path / "cases.json").write_text(json.dumps(cases))

    report = engine.run("answer.py", repo, tmp_path / "cases.json", tmp_path / "saved")

    assert report["transformers"] == version
    assert report["package_importable"] is False
    assert report["answers"] == expected  # prompts, token by token, and texts
    assert report["reloaded"] == expected
    assert report["pipeline"][: len(questions)] == [question.answer for question in questions]
    assert {path.name: path.read_bytes() for path in repo.iterdir()} == before
