"""The comparison of auto with fixed numbers of visual tokens at equal cost."""

import json

from PIL import Image

from benchmarks.auto_budget_on_smol import at_equal_cost, measure
from tests.training.tiny_run import make_processor


def test_a_draw_at_equal_cost_lies_between_its_two_numbers():
    scores = {64: 80.0, 16: 60.0, 4: 20.0}
    assert [at_equal_cost(mean, scores) for mean in (4, 10, 16, 40, 64)] == [20, 40, 60, 70, 80]


def test_auto_takes_the_answer_of_the_number_that_it_picks(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "plain.png")
    row = {"task": "naming", "image": "plain.png", "question": "What?", "answer": "red"}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    processor = make_processor()
    monkeypatch.setattr("benchmarks.auto_budget_on_smol.TRAINED_AT", (4, 1))
    results = [{"asked": "majority"}, {"asked": "4 visual tokens", "answers": ["blue"]}]
    results.append({"asked": "1 visual tokens", "answers": ["Red."]})
    for limit in measure(processor, tmp_path, results):
        task = limit["tasks"]["naming"]
        assert (task["mean_visual_tokens"], task["auto"]["accuracy"], task["equal cost"]) == (1, 100, 100)
