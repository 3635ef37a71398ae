"""Images per second of the processor compared with LlavaProcessor's, and how long a repo takes to load compared with an in-tree LLaVA.

    python -m benchmarks.processing

Both processors hold the same tokenizer. With padding to a square, LLaVA's holds transformers' LlavaImageProcessor, which pads
itself; without, both hold the same CLIP image processor. Both models have the same tower and language model, random weights in
bfloat16, and are loaded through the Auto classes from files that the system has in memory.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava import image_processing_pil_llava as llava_images

from benchmarks.harness import arguments_of, prepare, print_table, side_by_side, write_results
from benchmarks.harness.models import build_pair
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaProcessor


SIDE = 336


def main() -> None:
    """Measure, print, write."""
    parser = arguments_of("Time the processor and loading.")
    parser.add_argument("--shape", default="0.5b", help="of the model to load: 0.5b, 7b, 13b, or tiny")
    parser.add_argument("--images", type=int, default=16, help="per call")
    parser.add_argument("--skip-loading", action="store_true")
    arguments = parser.parse_args()
    prepare(arguments)
    rows = [
        {
            "what": f"{what}, images/s",
            "LLaVA": arguments.images / times["LLaVA"],
            "ours": arguments.images / times["ours"],
        }
        | {"ours better by": times["LLaVA"] / times["ours"]}
        for what, times in processing(arguments).items()
    ]
    if not arguments.skip_loading:
        times = loading(arguments)
        rows.append(
            {"what": f"loading {arguments.shape}, s", **times, "ours better by": times["LLaVA"] / times["ours"]}
        )
    print_table("Processing and loading", rows)
    write_results("processing", arguments, rows=rows)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words of one vocabulary, and the image token."""
    words = {word: index for index, word in enumerate(["<unk>", "<pad>", "what", "is", "in", "this", "image", "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    fast.add_tokens(["<image>"], special_tokens=True)
    return fast


def processing(arguments) -> dict[str, dict[str, float]]:
    """Seconds per call of both processors, with and without padding."""
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    generator = torch.Generator().manual_seed(0)
    images = [
        Image.fromarray(torch.randint(0, 256, (480, 640, 3), generator=generator, dtype=torch.uint8).numpy())
        for _ in range(arguments.images)
    ]
    texts = ["<image> what is in this image ?"] * arguments.images
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    results = {}
    for what, pad in (("padded to a square", True), ("cropped", False)):
        ours = DeltaLlavaProcessor(CLIPImageProcessorPil(**size), make_tokenizer(), do_pad=pad, num_visual_tokens=576)
        image_processor = (
            llava_images.LlavaImageProcessorPil(do_pad=True, **size) if pad else CLIPImageProcessorPil(**size)
        )
        llava = LlavaProcessor(image_processor, make_tokenizer(), **options)
        calls = {
            name: partial(processor, images=images, text=texts, return_tensors="pt")
            for name, processor in (("LLaVA", llava), ("ours", ours))
        }
        assert torch.equal(calls["LLaVA"]()["input_ids"], calls["ours"]()["input_ids"])
        results[what] = side_by_side(calls, arguments)
    return results


def loading(arguments) -> dict[str, float]:
    """Seconds to load either model."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {"LLaVA": Path(folder) / "llava", "ours": Path(folder) / "ours"}
        ours, llava = build_pair(arguments.shape, "cpu", torch.bfloat16)
        ours.save_pretrained(paths["ours"])
        llava.save_pretrained(paths["LLaVA"])
        assert isinstance(ours.config, DeltaLlavaConfig)
        del ours, llava
        load = {
            name: partial(AutoModelForImageTextToText.from_pretrained, path, trust_remote_code=name == "ours")
            for name, path in paths.items()
        }
        return side_by_side(load, arguments)


if __name__ == "__main__":
    main()
