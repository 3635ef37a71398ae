"""Delta-LLaVA as a model of lmms-eval: `lmms_eval --model delta_llava --model_args pretrained=REPO,num_visual_tokens=36`."""

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm import tqdm

from ...modeling import DeltaLlavaForConditionalGeneration
from ...processing import DeltaLlavaProcessor
from ...utils.prompts import check_prompt, max_prompt_tokens
from ...utils.templates import render_question
from ...utils.validation import check_config


# For tasks without generation settings.
MAX_NEW_TOKENS = 128
# Generation settings that a task may bring; others are meant for particular models.
SETTINGS = ("max_new_tokens", "num_beams", "temperature", "top_k", "top_p")


class DeltaLlavaLmms(lmms):
    """
    Answers lmms-eval's requests greedily unless a task asks for more, in batches padded on the left.

    Args:
        pretrained: folder or Hub id of a Delta-LLaVA; its code is this package's.
        num_visual_tokens: visual tokens per image; by default the model's.
        device: by default a GPU if there is one. With `accelerate launch` each process has its own.
        dtype: float32, bfloat16, float16 or, by default, that of the weights.
        batch_size: requests at a time.
        attn_implementation: sdpa, eager, flash_attention_2; by default what transformers chooses.
        max_batch_size: accepted because lmms-eval passes it; not used.

    Raises:
        ValueError: a budget that the model does not have; later, a prompt longer than the model's positions.
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
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            self.device = self.accelerator.device
        else:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        check_config(pretrained)
        model = DeltaLlavaForConditionalGeneration.from_pretrained(pretrained, dtype=dtype, **options)
        if num_visual_tokens is not None:
            model.config.scale_factor_for(num_visual_tokens)
        self.model = model.to(self.device).eval()
        self.processor = DeltaLlavaProcessor.from_pretrained(pretrained)
        render_question(self.processor, f"The chat template of {pretrained}")
        self.tokenizer = self.processor.tokenizer
        self.num_visual_tokens = num_visual_tokens
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
        conversations = []
        for _, doc_to_messages, _, doc_id, task, split in batch:
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            conversations.append(messages.to_hf_messages())
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
        if self.num_visual_tokens is not None:
            options["num_visual_tokens"] = self.num_visual_tokens
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
        ).to(self.device, self.model.dtype)
        check_prompt(inputs["input_ids"].shape[1], max_prompt_tokens(self.model.config))
        settings = batch[0][2]
        stops = _stop_strings(settings.get("until"))
        output = self.model.generate(**inputs, **_generation_settings(settings))
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [_cut(text, stops).strip() for text in texts]
        for (context, _, original, *_), answer in zip(batch, answers):
            self.cache_hook.add_partial("generate_until", (context, original), answer)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: the tasks of the paper all generate.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("delta_llava answers tasks that generate; this one wants log-likelihoods.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused, as above.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("delta_llava answers tasks of one round.")


def _generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as `generate` takes them: greedy where the temperature is 0 or not given."""
    chosen = {"max_new_tokens": MAX_NEW_TOKENS}
    chosen |= {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    if chosen.get("temperature", 0) > 0:
        return {**chosen, "do_sample": True}
    for name in ("temperature", "top_k", "top_p"):
        chosen.pop(name, None)
    return {**chosen, "do_sample": False}


def _stop_strings(until: Any) -> list[str]:
    return [until] if isinstance(until, str) else [text for text in until or [] if text]


def _cut(text: str, stops: list[str]) -> str:
    """`text` before the first of `stops`."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
