"""Delta-LLaVA as a model of lmms-eval: `lmms_eval --model delta_llava --model_args pretrained=REPO,num_visual_tokens=36`."""

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm import tqdm

from .modeling import DeltaLlavaForConditionalGeneration
from .processing import DeltaLlavaProcessor


def manifest() -> ModelManifest:
    """What lmms-eval finds through the entry point `lmms_eval.models`."""
    return ModelManifest("delta_llava", chat_class_path=f"{__name__}.DeltaLlavaLmms")


class DeltaLlavaLmms(lmms):
    """
    Answers lmms-eval's requests greedily unless a task sets a temperature, in batches padded on the left.

    Args:
        pretrained: folder or Hub id of a Delta-LLaVA repo.
        num_visual_tokens: per image; the repo's default by default.
        device: an accelerator where there is one by default. With `accelerate launch` each process has its own.
        dtype: float32, bfloat16, float16 or, by default, that of the weights.
        batch_size: requests at a time.
        attn_implementation: sdpa, eager, flash_attention_2; transformers chooses by default.
        max_tiles, num_frames: of images and videos; the processor's defaults by default.
        max_batch_size: passed by lmms-eval; not used.

    Raises:
        ValueError: `num_visual_tokens` is not supported.
    """

    is_simple = False  # it wants conversations, not a text and a list of images

    def __init__(
        self,
        pretrained: str,
        num_visual_tokens: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        model = DeltaLlavaForConditionalGeneration.from_pretrained(
            pretrained, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model = model.to(self.device).eval()
        self.processor = DeltaLlavaProcessor.from_pretrained(pretrained)
        self.tokenizer = self.processor.tokenizer
        self.options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
        if num_visual_tokens is not None:
            model.config.scale_factor_for(num_visual_tokens)  # raises
            self.options["num_visual_tokens"] = num_visual_tokens
        views = {"max_tiles": max_tiles, "num_frames": num_frames}
        self.options |= {name: value for name, value in views.items() if value is not None}
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to `requests`, in their order."""
        # Only requests with the same settings can share a batch; of those, neighbours in length waste the least padding.
        collator = Collator(
            [request.args for request in requests],
            lambda arguments: (-len(arguments[0]), arguments[0]),
            group_fn=lambda arguments: arguments[2],
            grouping=True,
        )
        answers: list[str] = []
        with tqdm(total=len(requests), desc="delta_llava", disable=self.rank != 0) as bar:
            for batch in collator.get_batched(n=self.batch_size):
                answers += self._answer(list(batch))
                bar.update(len(batch))
        return collator.get_original(answers)

    @torch.inference_mode()
    def _answer(self, batch: list[tuple]) -> list[str]:
        conversations = [
            ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
            for _, doc_to_messages, _, doc_id, task, split in batch
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs=dict(self.options),  # transformers writes into it
        ).to(self.device, self.model.dtype)
        settings = batch[0][2]
        output = self.model.generate(**inputs, **_generation_settings(settings))
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        until = settings.get("until") or []
        answers = []
        for (context, _, original, *_), text in zip(batch, texts):
            for stop in [until] if isinstance(until, str) else filter(None, until):
                text = text.split(stop)[0]
            answers.append(text.strip())
            self.cache_hook.add_partial("generate_until", (context, original), answers[-1])
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: the tasks of the paper all generate."""
        raise NotImplementedError("delta_llava supports tasks that generate, not log-likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("delta_llava supports tasks of one round")


def _generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a task that `generate` takes: greedy where the temperature is 0 or not given."""
    sampling = (settings.get("temperature") or 0) > 0
    names = ("max_new_tokens", "num_beams", *(("temperature", "top_k", "top_p") if sampling else ()))
    chosen = {name: settings[name] for name in names if settings.get(name) is not None}
    return {"max_new_tokens": 128, **chosen, "do_sample": sampling}
