"""Each kind of checkpoint, converted: a pipeline and training give the language model the token ids of the authors' code."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerBase, pipeline

from examples.make_checkpoint import write_checkpoint
from tests.checkpoints import SHALLOW
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.conversion import convert_checkpoint, inspect_model
from transformers_delta_llava.training.data import IGNORED, ConversationEncoder


GOLDEN = json.loads((Path(__file__).parents[1] / "reference" / "golden_prompts.json").read_text(encoding="utf-8"))
IMAGE = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB")
HERMES_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
LLAMA_3 = "<|start_header_id|>assistant<|end_header_id|>\n\n"
CHATML = "<|im_start|>assistant\n"


class Case(NamedTuple):
    """A kind of checkpoint and of tokenizer; `opening` and `end` enclose the text that is trained on."""

    model_type: str
    base: str
    tokenizer: str
    template: str
    opening: str
    end: str
    eos: set[str]


VICUNA = Case("llava_llama", "lmsys/vicuna-7b-v1.5", "vicuna", "vicuna_v1", "ASSISTANT:", "</s>", {"</s>"})
MISTRAL = Case("llava_mistral", "/models/base", "mistral", "mistral_instruct", "[/INST]", " </s>", {"</s>"})
HERMES_4 = Case(
    "llava_seed_oss", "NousResearch/Hermes-4.3-36B", "hermes4", "tokenizer", LLAMA_3, "<|eot_id|>", {"<|eot_id|>"}
)
CASES = {
    "vicuna, not legacy": VICUNA,
    "llama 2": VICUNA._replace(
        base="meta-llama/Llama-2-7b-chat-hf", template="llava_llama_2", opening="[/INST]", end=" </s>"
    ),
    "llama 3": HERMES_4._replace(
        model_type="llava_llama",
        base="meta-llama/Meta-Llama-3-8B",
        tokenizer="llama3",
        template="llama3",
        eos={"<|end_of_text|>", "<|eot_id|>"},
    ),
    "chatml on sentencepiece": MISTRAL._replace(
        base="teknium/OpenHermes-2.5-Mistral-7B",
        tokenizer="openhermes",
        template="hermes-2",
        opening=CHATML,
        end="<|im_end|>",
        eos={"</s>", "<|im_end|>"},
    ),
    "mistral": MISTRAL,
    "gemma": Case(
        *("llava_gemma", "google/gemma-2b-it", "gemma", "gemma", "<start_of_turn>model\n", "<end_of_turn>\n<eos>"),
        eos={"<eos>", "<end_of_turn>"},
    ),
    "phi 3": Case(
        *("llava_Phi3", "microsoft/Phi-3-mini-4k-instruct", "phi3", "phi_3", "<|assistant|>\n", "<|end|>"),
        eos={"<|endoftext|>", "<|end|>"},
    ),
    "seed oss": HERMES_4,
    "qwen 2": Case(
        *("llava_qwen2", "Qwen/Qwen2-7B", "qwen_base", "chatml", CHATML, "<|im_end|>"),
        eos={"<|endoftext|>", "<|im_end|>"},
    ),
}


def write_tiny_checkpoint(folder: Path, case: Case) -> PreTrainedTokenizerBase:
    """A checkpoint with a shallow tower and its tokenizer; returns the tokenizer that the authors' code encodes with."""
    # The sizes of tiny models have a head_dim, which not every config knows.
    unknown = {"head_dim": None} if case.model_type in ("llava_Phi3", "llava_qwen2") else {}
    write_checkpoint(
        folder,
        model_type=case.model_type,
        tower_sizes=SHALLOW["tower_sizes"],
        config={**SHALLOW["config"], "_name_or_path": case.base, **unknown},
        tokenizer=case.tokenizer,
    )
    name = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    return getattr(transformers, name).from_pretrained(folder)


def encode_as_the_authors(tokenizer: PreTrainedTokenizerBase, text: str, image_ids: list[int]) -> list[int]:
    """Token ids of a prompt: BOS once, if the tokenizer adds it, and the pieces between images encoded separately."""
    bos = tokenizer.bos_token_id
    ids = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
    for index, piece in enumerate(text.split("<image>")):
        ids += image_ids * (index > 0) + tokenizer.encode(piece, add_special_tokens=False)
    return ids[1:] if ids[:2] == [bos, bos] else ids


def golden_prompt(template: str, turns: list[str], generation_prompt: bool) -> str:
    """The golden prompt of these turns; for templates that have none the text, spelled out."""
    if template == "tokenizer":
        text = "<|begin_of_text|>" + "".join(
            HERMES_TURN.format(("user", "assistant")[index % 2], turn) for index, turn in enumerate(turns)
        )
        return text + (LLAMA_3 if generation_prompt else "")
    name = {"chatml": "chatml_direct"}.get(template, template)
    golden = [
        g for g in GOLDEN if (g["template"], g["turns"], g["generation_prompt"]) == (name, turns, generation_prompt)
    ]
    text = golden[0]["prompt"]
    if template == "chatml":  # with a newline behind each turn, and Qwen's system message
        text = text.replace("<|im_end|>", "<|im_end|>\n").replace(
            "Answer the questions.", "You are a helpful assistant."
        )
    return text


def chat_of(turns: list[str]) -> list[dict[str, Any]]:
    """The chat of these turns, with an image in the first."""
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": turns[0].removeprefix("<image>\n")}]
    later = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)][1:]
    return [{"role": "user", "content": content}, *later]


@pytest.mark.parametrize("name", CASES)
def test_token_ids_and_labels_are_those_of_the_authors_code(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    case = CASES[name]
    reference = write_tiny_checkpoint(tmp_path / "checkpoint", case)
    report = convert_checkpoint(tmp_path / "checkpoint", tmp_path / "repo")
    assert (report.chat_template.name, report.warnings) == (case.template, []), report.warnings

    processor = DeltaLlavaProcessor.from_pretrained(tmp_path / "repo")
    model = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "repo")
    tokenizer = processor.tokenizer
    eos = model.generation_config.eos_token_id
    assert set(tokenizer.convert_ids_to_tokens(eos if isinstance(eos, list) else [eos])) == case.eos
    images = [tokenizer.convert_tokens_to_ids("<image>")] * model.config.num_visual_tokens

    turns = ["<image>\nWhat is it?", "A cat.", "What colour?"]
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    pipe(text=chat_of(turns), max_new_tokens=1, return_full_text=False)
    prompt = golden_prompt(case.template, turns, generation_prompt=True)
    assert seen[0][0].tolist() == encode_as_the_authors(reference, prompt, images)

    # Trained on: from where the model begins to write to the end of its turn.
    turns = ["<image>\nHow many?", "Two.", "Sure?", "Yes."]
    sample = ConversationEncoder(processor, 2048)(chat_of(turns), model.config.num_visual_tokens)
    text = golden_prompt(case.template, turns, generation_prompt=False)
    ids = encode_as_the_authors(reference, text, images)
    labels, end = [IGNORED] * len(ids), 0
    for answer in turns[1::2]:
        start = text.index(case.opening, text.index(answer, end) - len(case.opening) - 1) + len(case.opening)
        end = text.index(case.end, start) + len(case.end)
        span = slice(*(len(encode_as_the_authors(reference, text[:border], images)) for border in (start, end)))
        labels[span] = ids[span]
    assert sample["input_ids"].tolist() == ids
    assert sample["labels"].tolist() == labels


def test_inspect_shows_the_same_prompt_before_and_after(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "checkpoint", CASES["seed oss"])
    convert_checkpoint(tmp_path / "checkpoint", tmp_path / "repo")
    before, after = inspect_model(tmp_path / "checkpoint"), inspect_model(tmp_path / "repo")
    assert before.problems == after.problems == []
    assert before.chat_template == after.chat_template
    assert before.chat_template.name == "tokenizer"
    question = HERMES_TURN.format("user", "<image>\nWhat is in this image?")
    assert before.first_prompt == after.first_prompt == f"<|begin_of_text|>{question}{LLAMA_3}"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("caption", ["A cat.", "1 cat.", "\u00e9t\u00e9"])
def test_a_caption_is_trained_on_from_its_word_mark_on(make_caption_encoder: Any, legacy: bool, caption: str) -> None:
    reference, encoder, images = make_caption_encoder(legacy)
    sample = encoder(chat_of(["<image>\nDescribe it.", caption]), len(images))
    expected = encode_as_the_authors(reference, f"<image>{caption}\n", images)
    assert sample["input_ids"].tolist() == expected
    assert sample["labels"].tolist() == [IGNORED] * (1 + len(images)) + expected[1 + len(images) :]


@pytest.fixture(scope="module")
def make_caption_encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("sentencepiece")
    encoders: dict[bool, Any] = {}

    def make(legacy: bool) -> Any:
        if legacy not in encoders:
            folder = tmp_path_factory.mktemp("captions")
            case = CASES["mistral" if legacy else "vicuna, not legacy"]
            reference = write_tiny_checkpoint(folder / "checkpoint", case)
            convert_checkpoint(folder / "checkpoint", folder / "repo", chat_template="plain")
            processor = DeltaLlavaProcessor.from_pretrained(folder / "repo")
            images = [processor.image_token_id] * processor.num_visual_tokens
            encoders[legacy] = (reference, ConversationEncoder(processor, 2048), images)
        return encoders[legacy]

    return make
