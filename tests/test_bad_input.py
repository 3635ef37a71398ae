"""Input that makes no sense is a ValueError that says why, from the processor and through the pipeline, before the model is asked."""

from pathlib import Path

import pytest
from PIL import Image
from transformers import pipeline

from tests.integration.engine_scripts.bad_input import refusals
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


COUNTS = "The number of <image> tokens in the prompts should be the same as the number of images: the text holds"
MESSAGES = {
    "unknown budget": "num_visual_tokens=7: this model cannot give it; use one of 64, 16, 4, 1.",
    "no image": "Image 0 cannot be used: cannot identify image file",
    "unreachable": "Image 0 cannot be used: ",
    "roles out of order": "The chat template refuses the conversation: Roles must alternate user, assistant",
    "unknown role": "The chat template refuses the conversation: Unknown role: wizard",
    "image without a place": f"{COUNTS} 0, but 1 images came with it.",
    "place without an image": f"{COUNTS} 1, but 0 images came with it.",
    "too many images": f"{COUNTS} 1, but 3 images came with it.",
}


@pytest.fixture(scope="module")
def refused(easy_vqa_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What was said to every fault."""
    image = tmp_path_factory.mktemp("bad") / "image.png"
    Image.new("RGB", (20, 30)).save(image)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(easy_vqa_repo).eval()
    processor = DeltaLlavaProcessor.from_pretrained(easy_vqa_repo)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    return refusals(processor, pipe, str(image))


@pytest.mark.parametrize("fault", MESSAGES)
def test_the_error_says_what_is_wrong(fault: str, refused: dict[str, dict[str, str]]) -> None:
    assert set(refused) == set(MESSAGES)
    for asked, said in refused[fault].items():
        assert said.startswith(f"ValueError: {MESSAGES[fault]}"), asked
