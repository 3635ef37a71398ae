"""What lmms-eval wrote becomes a card's `model-index`."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from transformers_delta_llava.cli.main import main
from transformers_delta_llava.evaluation.lmms.results import add_results, read_results


# The shape of what lmms-eval 0.7.3 writes, with fewer keys.
REPORT = {
    "results": {
        "pope": {
            "alias": "pope",
            "pope_f1_score,none": 0.857,
            "pope_f1_score_stderr,none": "N/A",
            "pope_accuracy,none": 0.86,
            "pope_accuracy_stderr_clt,none": 0.01,
        },
        "gqa": {"alias": "gqa", "exact_match,none": 0.61, "submission,none": None},
    },
    "configs": {
        "pope": {"dataset_path": "lmms-lab/POPE", "test_split": "test"},
        "gqa": {"dataset_path": "lmms-lab/GQA", "dataset_name": "testdev", "test_split": "testdev"},
    },
    "n-samples": {"pope": {"original": 9000, "effective": 9000}, "gqa": {"original": 12578, "effective": 100}},
    "config": {"model_args": "pretrained=org/model,num_visual_tokens=36"},
    "lmms_eval_version": "0.7.3",
}


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "README.md").write_text("---\nlicense: mit\ntags:\n- x\n---\n# A model\n\nText.\n")
    (tmp_path / "results.json").write_text(json.dumps(REPORT))
    return tmp_path / "repo"


def index(repo: Path) -> dict:
    results = ModelCard.load(repo / "README.md").data.eval_results or []
    return {(result.dataset_name, result.metric_name): result.metric_value for result in results}


def test_the_command_adds_every_number_once(repo, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["delta-llava", "evaluate", "add-to-card", str(repo), str(repo.parent / "results.json")]
    )
    for _ in range(2):  # again: replaced, not doubled
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        assert index(repo) == {
            ("pope", "pope_f1_score at 36 visual tokens"): 0.857,
            ("pope", "pope_accuracy at 36 visual tokens"): 0.86,
            ("gqa (first 100 questions)", "exact_match at 36 visual tokens"): 0.61,
        }
    assert "pope: pope_f1_score at 36 visual tokens = 0.857" in capsys.readouterr().out
    card = ModelCard.load(repo / "README.md")
    assert card.data.license == "mit" and card.data.tags == ["x"] and "# A model\n\nText." in card.text
    assert "model-index" in (repo / "README.md").read_text()


def test_other_results_stay(repo):
    add_results(repo / "README.md", read_results(repo.parent / "results.json"))
    other = {**REPORT, "config": {"model_args": "pretrained=org/model,num_visual_tokens=144"}}
    (repo.parent / "other.json").write_text(json.dumps(other))
    add_results(repo / "README.md", read_results(repo.parent / "other.json"))
    assert len(index(repo)) == 6


@pytest.mark.parametrize("content", ["{}", "[]", '{"results": {}, "configs": {}}'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="x.json"):
        read_results(tmp_path / "x.json")
