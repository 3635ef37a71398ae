"""What lmms-eval wrote becomes a card's `model-index`."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

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


def test_the_command_adds_every_number_once(call, repo):
    for _ in range(2):  # again: replaced, not doubled
        code, out, _ = call("evaluate", "add-to-card", repo, repo.parent / "results.json")
        assert code == 0 and "pope: pope_f1_score at 36 visual tokens = 0.857" in out
        assert index(repo) == {
            ("pope", "pope_f1_score at 36 visual tokens"): 0.857,
            ("pope", "pope_accuracy at 36 visual tokens"): 0.86,
            ("gqa (first 100 questions)", "exact_match at 36 visual tokens"): 0.61,
        }
    card = ModelCard.load(repo / "README.md")
    assert card.data.license == "mit" and card.data.tags == ["x"] and "# A model\n\nText." in card.text
    assert "model-index" in (repo / "README.md").read_text()


def test_other_results_stay(repo):
    add_results(repo / "README.md", read_results(repo.parent / "results.json"))
    other = {**REPORT, "config": {"model_args": "pretrained=org/model,num_visual_tokens=144"}}
    (repo.parent / "other.json").write_text(json.dumps(other))
    add_results(repo / "README.md", read_results(repo.parent / "other.json"))
    assert len(index(repo)) == 6


def written(repo: Path, *reports: dict) -> list[dict]:
    """The entries of the card's `model-index` after these reports, one after the other, with a load and save between them."""
    for report in reports:
        (repo.parent / "results.json").write_text(json.dumps(report))
        add_results(repo / "README.md", read_results(repo.parent / "results.json"))
        ModelCard.load(repo / "README.md").save(repo / "README.md")
    return yaml.safe_load((repo / "README.md").read_text().split("---")[1])["model-index"][0]["results"]


def names(entries: list[dict]) -> dict[tuple[str, str], float]:
    return {(entry["dataset"]["name"], m["name"]): m["value"] for entry in entries for m in entry["metrics"]}


@pytest.mark.parametrize("partial_first", [True, False])
def test_a_part_never_becomes_the_whole(repo, partial_first):
    whole = {**REPORT, "n-samples": {"gqa": {"original": 12578, "effective": 12578}}}
    entries = written(repo, *([REPORT, whole] if partial_first else [whole, REPORT]))
    at = "exact_match at 36 visual tokens"
    assert {("gqa", at), ("gqa (first 100 questions)", at)} < names(entries).keys()
    splits = {entry["dataset"]["name"]: entry["dataset"]["split"] for entry in entries}
    assert splits == {"pope": "test", "gqa": "testdev", "gqa (first 100 questions)": "testdev[:100]"}


def test_tasks_on_one_data_set_keep_their_names(repo):
    data = {"dataset_path": "lmms-lab/POPE", "dataset_name": "Full", "test_split": "test"}
    tasks = {
        name: {"accuracy,none": value} for name, value in (("pope_adv", 0.1), ("pope_pop", 0.2), ("pope_random", 0.3))
    }
    report = {"results": tasks, "configs": dict.fromkeys(tasks, data)}
    expected = {("pope_adv", "accuracy"): 0.1, ("pope_pop", "accuracy"): 0.2, ("pope_random", "accuracy"): 0.3}
    assert names(written(repo, report, report)) == expected


def test_nan_is_never_written(repo, caplog):
    report = {"results": {"t": {"a,none": float("nan"), "b,none": float("-inf"), "c,none": 1}}, "configs": {}}
    assert names(written(repo, report)) == {("t", "c"): 1}
    assert "t: a is nan, and is left out" in caplog.text
    (repo.parent / "results.json").write_text('{"results": {"t": {"a,none": NaN}}, "configs": {}}')
    with pytest.raises(ValueError, match="results.json holds no number"):
        read_results(repo.parent / "results.json")


@pytest.mark.parametrize("header", ["license: [", "- a", "model-index: 3"])
def test_a_card_whose_header_cannot_be_read_stays_as_it_is(repo, header):
    card = f"---\n{header}\n---\nText"
    (repo / "README.md").write_text(card)
    with pytest.raises(ValueError, match="README.md"):
        add_results(repo / "README.md", read_results(repo.parent / "results.json"))
    assert (repo / "README.md").read_text() == card
    assert [path.name for path in repo.iterdir()] == ["README.md"]


BAD_REPORTS = ["{}", "[]", '{"results": {}, "configs": {}}', "", "{", '{"results": [], "configs": {}}']
BAD_REPORTS += ['{"results": {"a": 1}, "configs": {}}', '{"results": {"a": {"b": 1}}, "configs": {"a": 3}}']
BAD_REPORTS += ['{"results": {"a": {"b": 1}}, "configs": {}, "n-samples": {"a": {"effective": "x"}}}', "[" * 10**5]


@pytest.mark.parametrize("content", BAD_REPORTS)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="x.json"):
        read_results(tmp_path / "x.json")
