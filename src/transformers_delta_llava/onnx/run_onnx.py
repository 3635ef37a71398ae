"""Ask a Delta-LLaVA about an image: onnxruntime, no PyTorch and no transformers.

    pip install onnxruntime tokenizers pillow numpy
    python run_onnx.py "What is in this image?" photo.jpg --num-visual-tokens 4
    python run_onnx.py "Who wrote Hamlet?"

It is part of the model's folder. From Python: `OnnxModel(folder).answer(question, Image.open("photo.jpg"))`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


HERE = Path(__file__).absolute().parent  # in the Hub's cache files are links
Cache = dict[str, onnxruntime.OrtValue]
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}


class OnnxModel:
    """The graphs of one precision, loaded as they are needed, and what is around them.

    Args:
        folder: of the exported model.
        dtype: fp32, fp16, q8 or q4; by default the one that the export names first.
        threads: of onnxruntime; by default all cores.
    """

    def __init__(self, folder: str | Path = HERE, dtype: str | None = None, threads: int = 0):
        self.folder = Path(folder)
        names = ("config.json", "preprocessor_config.json", "generation_config.json")
        self.config, self.image, self.generation = map(self._read, names)
        self.export = self.config["onnx_export"]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        dtype = dtype or self.export["dtypes"][0]
        if dtype not in self.export["dtypes"]:
            raise ValueError(f"dtype={dtype!r}: this export has {', '.join(self.export['dtypes'])}.")
        self.suffix, self.threads = SUFFIXES[dtype], threads
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def _read(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def session(self, name: str) -> onnxruntime.InferenceSession:
        """The graph `name`, such as `decoder_model_merged`."""
        if name not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            path = self.folder / "onnx" / f"{name}{self.suffix}.onnx"
            self.sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self.sessions[name]

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Pixel values (1, 3, height, width), float32: padded to a square of the mean colour, resized, normalised."""
        image, options = ImageOps.exif_transpose(image), self.image
        image = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        mean, std = options["image_mean"], np.array(options["image_std"], np.float32)
        if self.export["do_pad"]:
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if options["do_resize"]:
            size, (width, height) = options["size"], image.size
            if edge := size.get("shortest_edge"):
                short, long = edge, int(edge * max(width, height) / min(width, height))
                size = dict(zip(("width", "height"), (short, long) if width <= height else (long, short)))
            image = image.resize((size["width"], size["height"]), options["resample"])
        if options["do_center_crop"]:
            width, height = options["crop_size"]["width"], options["crop_size"]["height"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image).astype(np.float64) * (options["rescale_factor"] if options["do_rescale"] else 1)
        pixels = pixels.astype(np.float32)
        if options["do_normalize"]:
            pixels = (pixels - np.array(mean, np.float32)) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

    def encode(self, question: str, num_visual_tokens: int = 0) -> np.ndarray:
        """Ids (1, sequence) of the prompt, with placeholders for the visual tokens of an image, if there is one."""
        before, after = self.export["prompts"]["image" if num_visual_tokens else "text"]
        image_token = self.export["image_token"]
        question = question.replace(image_token, image_token.replace("<", "< ", 1)).strip()
        text = before.replace(image_token, image_token * num_visual_tokens) + question + after
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) > (limit := self.export["max_prompt_tokens"] or len(ids)):
            raise ValueError(f"the prompt has {len(ids)} tokens, and the model {limit} positions: shorten it.")
        return np.array([ids])

    def encode_image(self, image: Image.Image, num_visual_tokens: int) -> np.ndarray:
        """The visual tokens (number, hidden size) of an image."""
        encoders = self.export["vision_encoders"]
        if (number := str(num_visual_tokens)) not in encoders:
            raise ValueError(f"num_visual_tokens={number}: this export has {', '.join(encoders)}.")
        return self.session(encoders[number]).run(None, {"pixel_values": self.preprocess(image)})[0][0]

    def forward(
        self, ids: np.ndarray, visual: np.ndarray | None = None, cache: Cache | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Logits (vocabulary,) after `ids` (1, sequence), whose image tokens show `visual`, and the cache to go on with."""
        decoder, cache = self.session("decoder_model_merged"), cache or self._empty_cache()
        past = next(iter(cache.values())).shape()[2]
        length = past + ids.shape[1]
        embeds = self.session("embed_tokens").run(None, {"input_ids": ids})[0]
        if visual is not None:
            embeds[ids == self.config["image_token_index"]] = visual
        feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64)}
        feeds["position_ids"] = np.arange(past, length)[None]
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        names = [output.name for output in decoder.get_outputs()]
        logits, *present = decoder.run_with_ort_values(names, {**values, **cache})
        return logits.numpy()[0, -1], dict(zip(cache, present))

    def generate(
        self,
        question: str,
        image: Image.Image | None = None,
        num_visual_tokens: int | None = None,
        max_new_tokens: int = 256,
    ) -> Iterator[int]:
        """Ids of the greedy answer, one by one."""
        visual, number, cache = None, 0, None
        if image is not None:
            number = num_visual_tokens or self.export["num_visual_tokens"]
            visual = self.encode_image(image, number)
        ids = self.encode(question, number)
        seen, length = ids[0].tolist(), ids.shape[1]
        ends = np.atleast_1d(self.generation.get("eos_token_id") or []).astype(int).tolist()
        for _ in range(max_new_tokens):
            logits, cache = self.forward(ids, visual, cache)
            self._apply_settings(logits, seen, length, ends)
            token = int(logits.argmax())
            if token in ends:
                return
            yield token
            seen.append(token)
            ids, visual = np.array([[token]]), None

    def _apply_settings(self, logits: np.ndarray, seen: list[int], length: int, ends: list[int]) -> None:
        """Change `logits` after the ids `seen`, the first `length` of the prompt, as generation_config.json asks."""
        settings = self.generation
        if (penalty := settings.get("repetition_penalty") or 1.0) != 1.0:
            past = np.unique(seen)
            logits[past] = np.where(logits[past] < 0, logits[past] * penalty, logits[past] / penalty)
        banned = list(settings.get("suppress_tokens") or [])
        if len(seen) - length < (settings.get("min_new_tokens") or 0) or len(seen) < (settings.get("min_length") or 0):
            banned += ends
        size = settings.get("no_repeat_ngram_size") or 0
        grams = [seen[i : i + size] for i in range(len(seen) - size + 1)] if size else []
        for *before, last in [*grams, *(settings.get("bad_words_ids") or [])]:
            if seen[len(seen) - len(before) :] == before:
                banned.append(last)
        logits[banned] = -np.inf

    def answer(self, question: str, image: Image.Image | None = None, **options: Any) -> Iterator[str]:
        """The answer, piece by piece; the options are those of `generate`."""
        ids, text, done = [], "", 0
        for token in self.generate(question, image, **options):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # half a character: the next token completes it
                yield text[done:]
                done = len(text)
        yield text[done:]

    def _empty_cache(self) -> Cache:
        inputs = [entry for entry in self.session("decoder_model_merged").get_inputs() if "past_key" in entry.name]
        dtype = np.float16 if inputs[0].type == "tensor(float16)" else np.float32
        empty = np.zeros((1, inputs[0].shape[1], 0, inputs[0].shape[3]), dtype)
        return {entry.name: onnxruntime.OrtValue.ortvalue_from_numpy(empty) for entry in inputs}


def main() -> None:
    """Print an answer as it comes."""
    parser = argparse.ArgumentParser(description="Ask a Delta-LLaVA about an image, with onnxruntime.")
    parser.add_argument("question")
    parser.add_argument("image", nargs="?", help="a file; without one the question is about nothing but itself")
    parser.add_argument("--num-visual-tokens", type=int, help="how many tokens show the image")
    parser.add_argument("--dtype", choices=SUFFIXES)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = vars(parser.parse_args())
    question, path, dtype = (options.pop(name) for name in ("question", "image", "dtype"))
    try:
        for piece in OnnxModel(dtype=dtype).answer(question, Image.open(path) if path else None, **options):
            print(piece, end="", flush=True)
        print()
    except (OSError, ValueError) as error:
        parser.exit(2, f"run_onnx.py: {error}\n")


if __name__ == "__main__":
    main()
