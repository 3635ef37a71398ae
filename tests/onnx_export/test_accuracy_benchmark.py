"""The benchmark of answers: it counts those that PyTorch gives too, and sees those that it does not."""

import json
import sys

import onnx_accuracy
from transformers_delta_llava.analysis.inference import load_repo
from transformers_delta_llava.evaluation import draw_test_questions


def test_it_counts_what_is_right_and_the_same(exported, easy_vqa_repo, tmp_path, monkeypatch):
    output = tmp_path / "accuracy.json"
    command = ["onnx_accuracy.py", easy_vqa_repo, exported, "--limit", "6", "--dtypes", "fp32", "--output", output]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*command, "--num-visual-tokens", 16, 0)])
    onnx_accuracy.main()
    report = json.loads(output.read_text())
    assert report["command"].startswith("python benchmarks/onnx_accuracy.py easy-vqa easy-vqa-onnx --limit 6")
    with_image, without = report["rows"]
    assert (with_image["num_visual_tokens"], with_image["same_answers"], with_image["right_percent"]) == (16, 6, 100)
    assert without["same_answers"] == 6 and without["right_percent"] < 100


def test_other_answers_do_not_count(exported, easy_vqa_repo):
    model, processor = load_repo(str(easy_vqa_repo))
    graphs, questions = onnx_accuracy.load_graphs(exported, "fp32"), draw_test_questions(2)
    prompts = [graphs.encode(question.text, 16)[0].tolist() for question in questions]
    answers = [list(graphs.generate(question.text, question.image, 16)) for question in questions]
    wrong = [[*answers[0], answers[0][-1]], [answers[1][0] + 1, *answers[1][1:]]]
    for given, same in ((answers, [True, True]), (wrong, [False, False])):
        assert list(onnx_accuracy.same_answers(model, processor, prompts, given, questions, 16, {})) == same
