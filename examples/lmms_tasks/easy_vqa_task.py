"""easy-VQA for lmms-eval, which loads this file by its path: it imports nothing of the package around it."""

from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image


class EasyVqa(ConfigurableMessagesTask):
    """A task like any other, except that its questions come from an installed package and not from the Hub."""

    def __init__(self, config: dict) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: Any = None) -> None:
        """Fill the data set from the package `easy-vqa`."""
        import easy_vqa

        images = easy_vqa.get_test_image_paths()
        rows = zip(*easy_vqa.get_test_questions())
        docs = [{"question": text, "answer": answer, "image_path": images[image]} for text, answer, image in rows]
        self.dataset = DatasetDict({"test": Dataset.from_list(docs)})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: dict) -> list[Image.Image]:
    """The image that a question is about."""
    with Image.open(doc["image_path"]) as image:
        return [image.convert("RGB")]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1 for the very answer, 0 for anything else."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}
