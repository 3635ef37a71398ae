"""easy-VQA as training data: images, conversations in LLaVA's format, and a tokenizer made from the questions.

    pip install easy-vqa
    python -m examples.easy_vqa_data [OUTPUT] [--versions 8] [--questions-per-row 5] [--seed 0] [--swap-red-and-blue]

OUTPUT (`easy-vqa-data` by default) gets `captions.json` for stage 1, `train.json` for stage 2, `images/` and `tokenizer/`:
everything that `examples/recipes/easy-vqa-pretrain.yaml` and `easy-vqa.yaml` read. Only the training split is used, none of
it is held back.

Every image comes in several versions: as it is, and with its shape put elsewhere on the same ground, sometimes mirrored.
No answer depends on the place, and 4,000 places are few for a vision tower that starts from nothing. For each version
the questions on the image are shuffled and dealt into conversations, each question once. A caption, "a red circle", is
what the questions on an image and their answers say together; images for which they do not tell both have none.

With `--swap-red-and-blue` the images are as a camera gives them that has its channels the other way round, and the
answers what they were: the new task of `easy-vqa-deltas.yaml`.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageChops, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from examples.easy_vqa_questions import Question, load_questions
from transformers_delta_llava.processing.chat_templates import CONVERSATIONS


SHAPES = ("circle", "rectangle", "triangle")


def main() -> None:
    """Write the three parts."""
    parser = argparse.ArgumentParser(description="Write easy-VQA as training data in LLaVA's format.")
    parser.add_argument("output", type=Path, nargs="?", default=Path("easy-vqa-data"))
    parser.add_argument("--versions", type=int, default=8, help="of each image, the original among them")
    parser.add_argument("--questions-per-row", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--swap-red-and-blue", action="store_true", help="in all images")
    arguments = parser.parse_args()
    questions = load_questions("train")
    rows = write_rows(
        arguments.output,
        questions,
        arguments.versions,
        arguments.questions_per_row,
        random.Random(arguments.seed),
        swap_red_and_blue if arguments.swap_red_and_blue else None,
    )
    captioned = write_captions(arguments.output, questions, arguments.versions)
    size = write_tokenizer(arguments.output / "tokenizer", questions)
    images = len(list((arguments.output / "images").iterdir()))
    print(f"{arguments.output}: {rows} conversations, {captioned} captions, {images} images, {size} tokens")


def write_rows(
    output: Path,
    questions: list[Question],
    versions: int,
    per_row: int,
    rng: random.Random,
    change: Callable[[Image.Image], Image.Image] | None = None,
) -> int:
    """Write `train.json` and `images/`, each image changed by `change`; returns the number of rows."""
    by_image: dict[int, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image_id, []).append(question)
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for image_id, asked in sorted(by_image.items()):
        with Image.open(asked[0].image) as file:
            original = file.convert("RGB") if change is None else change(file.convert("RGB"))
        for version in range(versions):
            name = f"{image_id}-{version}.png"
            (original if version == 0 else move_shape(original, rng)).save(folder / name)
            shuffled = rng.sample(asked, len(asked))
            for start in range(0, len(shuffled), per_row):
                turns = conversation(shuffled[start : start + per_row])
                rows.append({"id": f"{image_id}-{version}-{start}", "image": name, "conversations": turns})
    (output / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return len(rows)


def write_captions(output: Path, questions: list[Question], versions: int) -> int:
    """Write `captions.json`; returns the number of rows."""
    rows = [
        {"id": f"{image_id}-{version}", "image": f"{image_id}-{version}.png", "conversations": turns}
        for image_id, caption in sorted(captions(questions).items())
        for version in range(versions)
        for turns in [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]]
    ]
    (output / "captions.json").write_text(json.dumps(rows), encoding="utf-8")
    return len(rows)


def captions(questions: list[Question]) -> dict[int, str]:
    """Colour and shape of each image, where the questions on it, and a yes to one, give both away."""
    answers = {question.answer for question in questions}
    known_colours = answers - {*SHAPES, "yes", "no"}
    colours, shapes = {}, {}
    for question in questions:
        words = question.text.rstrip("?").split()
        if question.answer == "no" or {"no", "not"} & set(words):
            continue
        for word in (*words, question.answer):  # what is the red shape? circle; is there a red shape? yes
            if word in SHAPES:
                shapes[question.image_id] = word
            elif word in known_colours:
                colours[question.image_id] = word
    return {image: f"a {colours[image]} {shapes[image]}" for image in colours.keys() & shapes.keys()}


def conversation(questions: list[Question]) -> list[dict[str, str]]:
    """Questions on one image as turns of LLaVA's format, the image before the first."""
    turns = []
    for index, question in enumerate(questions):
        text = question.text if index else f"<image>\n{question.text}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def move_shape(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with its shape, whole, somewhere else on its ground, and mirrored every second time."""
    corners = [image.getpixel((x, y)) for x in (0, image.width - 1) for y in (0, image.height - 1)]
    ground = Image.new("RGB", image.size, max(corners, key=corners.count))  # a shape covers one corner at most
    box = ImageChops.difference(image, ground).getbbox()
    if box is None:
        return image.copy()
    shape = image.crop(box)
    if rng.random() < 0.5:
        shape = ImageOps.mirror(shape)
    ground.paste(shape, (rng.randint(0, image.width - shape.width), rng.randint(0, image.height - shape.height)))
    return ground


def swap_red_and_blue(image: Image.Image) -> Image.Image:
    """An RGB image with these channels the other way round."""
    red, green, blue = image.split()
    return Image.merge("RGB", (blue, green, red))


def write_tokenizer(folder: Path, questions: list[Question]) -> int:
    """Write a byte-level BPE tokenizer with Llama's special tokens, trained on the prompts; returns its size."""
    system = CONVERSATIONS["vicuna_v1"].default_system + " "
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{system}USER: \n{q.text} ASSISTANT: {q.answer}" for q in questions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    return len(fast)


if __name__ == "__main__":
    main()
