"""`generate` with images: when the language model sees them, and which row each belongs to."""

from typing import Any

import torch
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling


# Arguments of `forward` with images.
IMAGE_INPUTS = ("pixel_values", "num_visual_tokens", "mm_encoder_outputs")


class DeltaLlavaGenerationMixin(GenerationMixin):
    """`generate` of [`DeltaLlavaForConditionalGeneration`]."""

    model: Any

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Of a conversation that goes on from its cache, all images may be given again.

        Those in the cache are left out before the prompt is cut in chunks: transformers hands images to placeholders in order.
        """
        ids, embeds, mask = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        prompt = ids if embeds is None else embeds
        cached = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        if prompt is not None and 0 < cached < prompt.shape[1] and (mask is None or mask.shape[1] == prompt.shape[1]):
            images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
            kwargs |= self._drop_cached_images(images, ids, embeds, cached)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):  # the images are in the cache by now
            shown = images.get("pixel_values") is not None or (images.get("mm_encoder_outputs") or {}).get("image")
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            is_prompt = next_sequence_length is None and input_ids.shape[1] > 1
            if shown and cache is not None and (is_prompt or cache.get_seq_length() == 0):
                raise ValueError(
                    "prefill_chunk_size: this version of transformers drops the images of a prompt that it reads in "
                    "chunks; leave prefill_chunk_size out, or use transformers 5.24 or newer."
                )
            return inputs
        return {**inputs, **images}

    def _drop_cached_images(
        self,
        images: dict[str, Any],
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        cached: int,
    ) -> dict[str, Any]:
        """The images whose placeholders are not among the first `cached` tokens, which the cache holds."""
        encoded: Any = (images.get("mm_encoder_outputs") or {}).get("image")
        pixel_values: Any = images.get("pixel_values")
        if encoded is None and pixel_values is None:
            return images
        if encoded is not None:
            numbers = [len(tokens) for tokens in encoded.pooler_output]
        else:
            numbers = self.model.num_visual_tokens_per_image(len(pixel_values), images.get("num_visual_tokens"))
        mask = self.model.get_placeholder_mask(input_ids, inputs_embeds)
        if mask.sum() != sum(numbers):  # such as new images alone
            return images
        kept: list[int] = []
        new = mask[:, cached:].sum(-1).tolist()
        for row, count in zip(_images_per_row(mask.sum(-1).tolist(), numbers), new):
            while count > 0 and row:
                image = row.pop()
                count -= numbers[image]
                kept.append(image)
        kept.sort()
        if not kept:
            return {}
        if encoded is None:
            return {"pixel_values": pixel_values[kept], "num_visual_tokens": [numbers[image] for image in kept]}
        features = BaseModelOutputWithPooling(pooler_output=[encoded.pooler_output[image] for image in kept])
        return {"mm_encoder_outputs": {**images["mm_encoder_outputs"], "image": features}}

    def heal_tokens(self, input_ids: torch.LongTensor, tokenizer: Any = None) -> torch.LongTensor:
        """As in transformers, which encodes the prompt's text again: here all tokens but the last stay, images among them."""
        placeholders = self.model.get_placeholder_mask(input_ids)
        if tokenizer is None or not placeholders.any():
            return super().heal_tokens(input_ids, tokenizer)
        input_ids = input_ids.clone()
        for row, mask in zip(input_ids, placeholders):
            text = row[int(mask.nonzero().max()) + 1 :] if mask.any() else row
            healed = super().heal_tokens(text[None], tokenizer)[0]
            # The text alone may be split into other tokens; then its last one does not replace this one.
            if len(healed) > 1 and len(text) > 1 and healed[-2] == text[-2]:
                row[-1] = healed[-1]
        return input_ids

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        # Images are flattened over rows. Beams need each row's images as a group (A B A B); repeating image by image
        # (A A B B) would give a row the wrong image. Each is encoded once, and its visual tokens are repeated. Newer
        # transformers encode images before this, and pass `mm_encoder_outputs`.
        pixel_values = model_kwargs.get("pixel_values")
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        if expand_size == 1 or (pixel_values is None and "image" not in encoded):
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        outputs = encoded.get("image") or self.get_image_features(
            pixel_values, model_kwargs.get("num_visual_tokens"), return_dict=True
        )
        features = outputs.pooler_output
        placeholders = self.model.get_placeholder_mask(input_ids, model_kwargs.get("inputs_embeds")).sum(-1)
        rows = _images_per_row(placeholders.tolist(), [len(tokens) for tokens in features])
        repeated = [features[image] for row in rows for image in row * expand_size]
        for name in IMAGE_INPUTS:
            model_kwargs.pop(name, None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        image_outputs = BaseModelOutputWithPooling(pooler_output=repeated)
        return input_ids, {**model_kwargs, "mm_encoder_outputs": {**encoded, "image": image_outputs}}


def _images_per_row(placeholders: list[int], numbers: list[int]) -> list[list[int]]:
    """Which images each row shows, from the number of placeholders per row and of visual tokens per image."""
    rows: list[list[int]] = []
    image = 0
    for count in placeholders:
        row: list[int] = []
        while count > 0 and image < len(numbers):
            count -= numbers[image]
            row.append(image)
            image += 1
        rows.append(row)
    return rows
