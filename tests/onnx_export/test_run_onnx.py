"""`run_onnx.py`: the same answers as PyTorch's, from a file that needs none of it."""

import ast
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, GenerationConfig, SiglipImageProcessorPil

from tests.conftest import ROOT
from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaProcessor
from transformers_delta_llava.analysis.inference import answer_ids, encode_question, load_repo
from transformers_delta_llava.evaluation import draw_test_questions
from transformers_delta_llava.onnx_export.export import SCRIPT
from transformers_delta_llava.onnx_export.run_onnx import OnnxModel, draw
from transformers_delta_llava.onnx_export.settings import write_settings
from transformers_delta_llava.onnx_export.verify import verify_export


PHOTO = ROOT / "examples" / "images" / "chelsea.jpg"


def test_the_same_tokens_as_pytorch(exported, easy_vqa_repo):
    model, processor = load_repo(str(easy_vqa_repo))
    graphs = OnnxModel(exported, threads=1)
    for question in draw_test_questions(30):
        with Image.open(question.image) as image:
            for number in (16, 1):
                inputs = encode_question(processor, image, question.text, number)
                assert inputs["input_ids"].tolist() == graphs.encode(question.text, number).tolist()
                assert np.array_equal(inputs["pixel_values"], graphs.preprocess(image))
                assert answer_ids(model, inputs, 8) == list(graphs.generate(question.text, image, number, 8))
    assert {row.max_difference < 1e-5 for row in verify_export(model, processor, exported, ["fp32"], [16, 1])} == {
        True
    }


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_fewer_bits_answer_nearly_as_well(dtype, quantised):
    graphs = OnnxModel(quantised, dtype, threads=1)
    questions = draw_test_questions(60)
    right = 0
    for question in questions:
        with Image.open(question.image) as image:
            right += "".join(graphs.answer(question.text, image, max_new_tokens=8)).strip() == question.answer
    assert right >= 58


def test_an_export_that_is_damaged_is_refused(exported, easy_vqa_repo, tmp_path):
    for name in ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json", "onnx"):
        (tmp_path / name).symlink_to(exported / name)
    weights = exported / "onnx" / "decoder_model_merged.onnx_data"
    (tmp_path / "onnx").unlink()
    (tmp_path / "onnx").mkdir()
    for path in (exported / "onnx").iterdir():
        (tmp_path / "onnx" / path.name).write_bytes(path.read_bytes())
    data = np.frombuffer(weights.read_bytes(), np.float32).copy()
    (tmp_path / "onnx" / weights.name).write_bytes((data * 1.01).tobytes())
    with pytest.raises(
        ValueError, match="The graphs in fp32 do not give what the model does with 16 visual tokens: logits differ"
    ):
        verify_export(*load_repo(str(easy_vqa_repo)), tmp_path, ["fp32"], [16])


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
        turned,
    ):
        expected = processor(images=image, text="<image>", return_tensors="np")["pixel_values"]
        assert np.array_equal(expected, graphs.preprocess(image))


def test_sampling(exported):
    graphs = OnnxModel(exported, threads=1)
    image = Image.new("RGB", (64, 64), "red")
    greedy = "".join(graphs.answer("what color is the shape?", image, max_new_tokens=4))
    one = "".join(graphs.answer("what color is the shape?", image, max_new_tokens=4, temperature=9.0, top_k=1))
    assert greedy == one
    hot = [
        list(graphs.generate("what?", image, max_new_tokens=6, temperature=9.0, top_k=0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]
    rng = np.random.default_rng(0)
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    drawn = [draw(logits, 1.0, 0, rng) for _ in range(1000)]
    assert np.allclose(np.bincount(drawn) / 1000, [0.1, 0.6, 0.3], atol=0.05)
    assert {draw(logits, 0.5, 0, rng) for _ in range(50)} == {1} and {
        draw(logits, 0.8, 0, rng) for _ in range(50)
    } == {1, 2}


def test_bad_input(exported):
    graphs = OnnxModel(exported)
    with pytest.raises(ValueError, match="num_visual_tokens=9: this export has 1, 16."):
        list(graphs.generate("what?", Image.new("RGB", (9, 9)), 9))
    with pytest.raises(ValueError, match="dtype='q4': this export has fp32."):
        OnnxModel(exported, "q4")


def test_the_script_stands_alone(exported):
    assert (exported / "run_onnx.py").read_bytes() == SCRIPT.read_bytes()
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 200
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
