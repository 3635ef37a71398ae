"""`run_onnx.py`: the same answers as PyTorch's, from a file that needs none of it."""

import ast
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, GenerationConfig, SiglipImageProcessorPil

from examples.easy_vqa_questions import draw_test_questions
from tests.conftest import ROOT
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaProcessor
from transformers_delta_llava.loading import answer_ids, encode_question, load_repo
from transformers_delta_llava.onnx.export import SCRIPT
from transformers_delta_llava.onnx.run_onnx import OnnxModel
from transformers_delta_llava.onnx.settings import write_settings


PHOTO = ROOT / "examples" / "images" / "chelsea.jpg"


def test_the_same_tokens_as_pytorch(exported, easy_vqa_repo):
    model, processor = load_repo(easy_vqa_repo, "cpu")
    graphs = OnnxModel(exported, threads=1)
    for question in draw_test_questions(30):
        with Image.open(question.image) as image:
            for number in (16, 1):
                inputs = encode_question(processor, image, question.text, num_visual_tokens=number)
                assert inputs["input_ids"].tolist() == graphs.encode(question.text, number).tolist()
                assert np.array_equal(inputs["pixel_values"], graphs.preprocess(image))
                assert answer_ids(model, inputs, 8) == list(graphs.generate(question.text, image, number, 8))
                with torch.no_grad():
                    expected = model(**inputs, logits_to_keep=1).logits[0, -1].numpy()
                logits, _ = graphs.forward(inputs["input_ids"].numpy(), graphs.encode_image(image, number))
                assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_fewer_bits_answer_nearly_as_well(dtype, quantised):
    graphs = OnnxModel(quantised, dtype, threads=1)
    questions = draw_test_questions(60)
    right = 0
    for question in questions:
        with Image.open(question.image) as image:
            right += "".join(graphs.answer(question.text, image, max_new_tokens=8)).strip() == question.answer
    assert right >= 58


PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    "siglip": SiglipImageProcessorPil(size={"height": 24, "width": 24}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}),
}


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_the_processors_to_the_bit(kind, do_pad, tmp_path):
    config = tiny_config()
    tokenizer = tiny_processor(config).tokenizer
    template = "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' else '<image>' }}{% endfor %}{% endfor %}"
    processor = DeltaLlavaProcessor(
        PROCESSORS[kind], tokenizer, template, config.num_visual_tokens, config.visual_token_budgets, do_pad
    )
    write_settings(tmp_path, config, processor, GenerationConfig(), [36, 4], ["fp32"], {})
    graphs = OnnxModel(tmp_path)
    photo = Image.open(PHOTO)
    turned = photo.copy()
    turned.getexif()[274] = 6  # a camera held upright
    for image in (
        photo,
        photo.crop((0, 0, 31, 200)),
        photo.convert("L"),
        photo.convert("RGBA"),
        photo.convert("P"),
        Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 200),
        Image.fromarray(np.asarray(photo.convert("L")).astype(np.float32) / 3),
        turned,
    ):
        expected = processor(images=image, text="<image>", return_tensors="np")["pixel_values"]
        assert np.array_equal(expected, graphs.preprocess(image))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0, "min_new_tokens": 6},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 8},
        {"bad_words_ids": [[31], [40, 41]], "min_new_tokens": 3},
        {"suppress_tokens": [31, 32, 33]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generation_settings_are_those_of_transformers(settings, exported, easy_vqa_repo):
    model, processor = load_repo(easy_vqa_repo, "cpu")
    question = draw_test_questions(1)[0]
    with Image.open(question.image) as image:
        inputs = encode_question(processor, image, question.text, num_visual_tokens=1)
        plain = answer_ids(model, inputs, 8)
        if "bad_words_ids" in settings:
            settings = {**settings, "bad_words_ids": [[plain[0]], *settings["bad_words_ids"]]}
        graphs = OnnxModel(exported, threads=1)
        graphs.generation |= settings
        model.generation_config.update(**settings)
        expected = answer_ids(model, inputs, 8)
        assert list(graphs.generate(question.text, image, 1, 8)) == expected
    assert expected != plain or "suppress_tokens" in settings


def test_it_runs_from_a_snapshot_of_links(exported, tmp_path):
    """As the Hub's cache keeps files: every file is a link to one with another name."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot" / "onnx").mkdir(parents=True)
    for number, path in enumerate(path for path in exported.rglob("*") if path.is_file()):
        blob = tmp_path / "blobs" / str(number)
        blob.write_bytes(path.read_bytes())
        (tmp_path / "snapshot" / path.relative_to(exported)).symlink_to(blob)
    question = draw_test_questions(1)[0]
    command = [sys.executable, tmp_path / "snapshot" / "run_onnx.py", question.text, question.image]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == question.answer


def test_bad_input(exported):
    graphs = OnnxModel(exported)
    with pytest.raises(ValueError, match="num_visual_tokens=9"):
        list(graphs.generate("what?", Image.new("RGB", (9, 9)), 9))
    with pytest.raises(ValueError, match="dtype='q4'"):
        OnnxModel(exported, "q4")


def test_the_script_stands_alone(exported):
    assert (exported / "run_onnx.py").read_bytes() == SCRIPT.read_bytes()
    source = SCRIPT.read_text()
    tree = ast.parse(source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {
        "PIL",
        "numpy",
        "onnxruntime",
        "tokenizers",
    }
    question = draw_test_questions(1)[0]
    command = [sys.executable, exported / "run_onnx.py", question.text, question.image, "--num-visual-tokens", "1"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == question.answer
    failed = subprocess.run([*command[:3], "no-such.png"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("run_onnx.py: ") and failed.stderr.count("\n") == 1
