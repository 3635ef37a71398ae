# Copyright 2026 The transformers-delta-llava authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License.
# You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS"
# BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Delta-LLaVA: a vision tower, the delta projector and a language model, as transformers models."""

import math
from dataclasses import dataclass, fields
from itertools import groupby, islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_delta_llava import SELECT_STRATEGIES, DeltaLlavaConfig
from .deltas_delta_llava import DeltaMixin, DeltaProjection
from .projector_delta_llava import PROJECTORS, PositionEmbedding2D, ProjectedWindowAttention
from .vision_tower_delta_llava import find_tower_calls, rename_saved_tower, run_vision_tower


# transformers 5.24 renamed `past_key_values` to `cache`, as an argument and as a field of outputs.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
# Arguments of `forward` and of `get_{modality}_features`: pixels, numbers of visual tokens, and what belongs together.
MODALITIES = {
    "image": ("pixel_values", "num_visual_tokens", "image_grid_thw"),
    "video": ("pixel_values_videos", "num_visual_tokens_videos", "video_grid_thw"),
}
VISUAL_INPUTS = (*MODALITIES["image"], *MODALITIES["video"], "mm_encoder_outputs")

# How many visual tokens each image gets: one number for all, one per image, or None for the config's default.
VisualTokens: TypeAlias = int | list[int] | torch.Tensor | None


class PatchFeatures(NamedTuple):
    """What a vision tower says about images, before the number of visual tokens is chosen.

    stream: (images, N, C), the single-level stream that makes the queries: of the patches only, in the projector's dtype.
    levels: one (images, N, C) per entry of `config.vision_feature_levels`, for keys and values.
    outputs: the tower's output.
    """

    stream: torch.Tensor
    levels: list[torch.Tensor]
    outputs: BaseModelOutputWithPooling


@dataclass
class DeltaLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`DeltaLlavaModel`]: transformers' own fields (`cache` or `past_key_values`, by its version), and

    image_outputs, video_outputs: what `get_image_features` and `get_video_features` returned.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class DeltaLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of [`DeltaLlavaForConditionalGeneration`], with the fields of the base model's."""

    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None


def pick_cache(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache | None]:
    """The cache, by its argument's name in the installed transformers."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument")
    return {CACHE_NAME: past_key_values if cache is None else cache}


class DeltaLlavaPreTrainedModel(DeltaMixin, PreTrainedModel):
    """What both models share: methods for deltas, initialisation, and what they tell transformers about themselves."""

    config: DeltaLlavaConfig
    config_class = DeltaLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (DeltaProjection, ProjectedWindowAttention, PositionEmbedding2D)):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # PyTorch's own, as in the released code
        else:
            super()._init_weights(module)


class DeltaLlavaModel(DeltaLlavaPreTrainedModel):
    """The vision tower, the projector and the language model without its head."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = PROJECTORS[config.projector_layout](config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._tower_calls = find_tower_calls(self.vision_tower)
        self.register_load_state_dict_pre_hook(rename_saved_tower)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_visual_tokens: VisualTokens = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        """Visual tokens of images.

        Args:
            pixel_values: (views, 3, height, width); an image has one view unless it is tiled.
            num_visual_tokens: of all views, or one number per view; the config's default when `None`.
            image_grid_thw: (images, 3), int64; the product of a row is the number of views of an image.
            kwargs: for the tower.

        Returns:
            The tower's output, in which `pooler_output` is a list with one (visual tokens, hidden_size) tensor per image,
            in the projector's dtype.

        Raises:
            ValueError: a number is not in `config.visual_token_budgets`, or there is not one per view.
        """
        features = self.get_patch_features(pixel_values, **kwargs)
        visual_tokens = self.project_features(features, num_visual_tokens)
        if image_grid_thw is not None:
            views = iter(visual_tokens)
            visual_tokens = [torch.cat(list(islice(views, count))) for count in image_grid_thw.prod(-1).tolist()]
        features.outputs.pooler_output = visual_tokens
        return features.outputs

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        num_visual_tokens_videos: VisualTokens = None,
        video_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        """Visual tokens of videos: as `get_image_features`, whose views are a video's frames."""
        return self.get_image_features(pixel_values_videos, num_visual_tokens_videos, video_grid_thw, **kwargs)

    def get_patch_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> PatchFeatures:
        """Runs the vision tower. `project_features` makes any number of visual tokens of the result.

        Args:
            pixel_values: (images, 3, height, width).
            kwargs: for the tower.
        """
        config, dtype = self.config, self.multi_modal_projector.dtype
        outputs, states = run_vision_tower(
            self.vision_tower, pixel_values, config.vision_feature_indices, self._tower_calls, **kwargs
        )
        stream, *levels = (
            states[index][:, config.num_prefix_tokens :].to(dtype)
            for index in (config.vision_feature_layer, *config.vision_feature_levels)
        )
        return PatchFeatures(stream, levels, outputs)

    def project_features(self, features: PatchFeatures, num_visual_tokens: VisualTokens = None) -> list[torch.Tensor]:
        """Patch features as they enter the language model: one (visual tokens, hidden_size) tensor per image.

        Args:
            features: of `get_patch_features`.
            num_visual_tokens: of all images, or one number per image; the config's default when `None`. Images with the same
                number go through the projector together.

        Raises:
            ValueError: a number is not in `config.visual_token_budgets`, or there is not one per image.
        """
        numbers = self._number_per_image(len(features.stream), num_visual_tokens)
        visual_tokens: list[torch.Tensor] = [features.stream] * len(numbers)
        for number in dict.fromkeys(numbers):
            images: Any = [image for image, own in enumerate(numbers) if own == number]
            # Usually all have one number; a slice does not copy the features.
            rows = slice(None) if len(images) == len(numbers) else images
            projected = self.multi_modal_projector(
                features.stream[rows], [level[rows] for level in features.levels], self.config.scale_factor_for(number)
            )
            for image, tokens in zip(images, projected):
                visual_tokens[image] = tokens
        # Gemma multiplies its embeddings by a constant. When Delta-LLaVA was released it did so to all that entered
        # the model, visual tokens too; now the embedding layer does it, and only to text.
        embed_scale = getattr(self.get_input_embeddings(), "embed_scale", None)
        if embed_scale is not None:
            visual_tokens = [tokens * embed_scale.to(tokens) for tokens in visual_tokens]
        return visual_tokens

    def _number_per_image(self, num_images: int, num_visual_tokens: VisualTokens) -> list[int]:
        if num_visual_tokens is None:
            num_visual_tokens = self.config.num_visual_tokens
        if isinstance(num_visual_tokens, torch.Tensor):
            num_visual_tokens = num_visual_tokens.flatten().tolist()
        several = isinstance(num_visual_tokens, (list, tuple))
        numbers: Any = num_visual_tokens if several else [num_visual_tokens] * num_images
        if len(numbers) != num_images:
            raise ValueError(f"num_visual_tokens has {len(numbers)} numbers for {num_images} images")
        return numbers

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None = None, modality: str = "image"
    ) -> torch.Tensor:
        """Where visual tokens go: a boolean (batch, sequence), from `inputs_embeds` where given, else from `input_ids`.

        Raises:
            ValueError: videos, and the config has no `video_token_id`.
        """
        token_id = getattr(self.config, f"{modality}_token_id")
        if token_id is None:
            raise ValueError(f"this model has no {modality}_token_id")
        if inputs_embeds is None:
            return input_ids == token_id
        token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _count_in_text(self, mask: torch.Tensor, num_placeholders: int, views: list[int]) -> list[int] | None:
        """Visual tokens per view from the text, for callers that drop `num_visual_tokens` (TRL's GRPOTrainer); `None` if
        the config's default fits, or the text does not tell."""
        if num_placeholders == sum(views) * self.config.num_visual_tokens:
            return None
        counts = [len(list(run)) for row in mask.tolist() for is_visual, run in groupby(row) if is_visual]
        numbers = [count / number for count, number in zip(counts, views) for _ in range(number)]
        known = len(counts) == len(views) and set(numbers) <= set(self.config.visual_token_budgets)
        return list(map(int, numbers)) if known else None

    def _fill_placeholders(
        self,
        modality: str,
        mask: torch.Tensor,
        inputs_embeds: torch.Tensor,
        pixel_values: Any,
        numbers: VisualTokens,
        grid_thw: torch.Tensor | None,
        outputs: Any,
    ) -> tuple[torch.Tensor, BaseModelOutputWithPooling]:
        """The embeddings with visual tokens where `mask` is, and what the visual tokens were taken from."""
        # Before the tower runs: later, reading the value would wait for it. A graph that is traced has no values.
        num_placeholders = None if torch.compiler.is_compiling() else int(mask.sum())
        if outputs is None:
            if numbers is None and num_placeholders is not None:
                views = [1] * len(pixel_values) if grid_thw is None else grid_thw.prod(-1).tolist()
                numbers = self._count_in_text(mask, num_placeholders, views)
            get_features = getattr(self, f"get_{modality}_features")
            outputs = get_features(pixel_values, numbers, grid_thw, return_dict=True)
        features = torch.cat(list(outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        if num_placeholders not in (None, len(features)):
            raise ValueError(
                f"the text has {num_placeholders} {modality} placeholders, the {modality}s give {len(features)} visual tokens; "
                "processor and model need the same num_visual_tokens, and the text must not be truncated"
            )
        mask = mask.to(inputs_embeds.device).unsqueeze(-1)
        return inputs_embeds.masked_scatter(mask, features), outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_visual_tokens: VisualTokens = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        num_visual_tokens_videos: VisualTokens = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple | DeltaLlavaModelOutputWithPast:
        """
        Args:
            input_ids: (batch, sequence), with `config.image_token_id` wherever a visual token of an image goes, and
                `config.video_token_id` for videos.
            pixel_values: (views of the images of the whole batch, 3, height, width), row by row in the order of their
                placeholders.
            attention_mask, position_ids, inputs_embeds: as in every decoder of transformers.
            cache, past_key_values: two names of one argument; which one transformers uses depends on its version.
            num_visual_tokens: of all views, or one number per view. When `None`: the config's default, or where the text
                has other numbers of placeholders in a row, one such number for each image, these.
            image_grid_thw: (images, 3), for images of several views; see `get_image_features`.
            pixel_values_videos, num_visual_tokens_videos, video_grid_thw: the same for videos, whose views are frames.
            mm_token_type_ids: accepted because processors emit it; not used.
            mm_encoder_outputs: `{"image": output of get_image_features}`, instead of `pixel_values`, and `"video"`. Prompts
                that show the same image share its features: encode it once, and repeat its tensor in `pooler_output`.

        Raises:
            ValueError: on both or neither of `input_ids` and `inputs_embeds`, on `pixel_values` together with
                `mm_encoder_outputs`, on `cache` together with `past_key_values`, or if placeholders and visual tokens
                differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("specify exactly one of input_ids and inputs_embeds")
        visual = {
            "image": (pixel_values, num_visual_tokens, image_grid_thw),
            "video": (pixel_values_videos, num_visual_tokens_videos, video_grid_thw),
        }
        encoded = dict(mm_encoder_outputs or {})
        for modality, (pixels, *_) in visual.items():
            if pixels is not None and encoded.get(modality) is not None:
                raise ValueError(f"specify only one of {MODALITIES[modality][0]} and mm_encoder_outputs[{modality!r}]")
        masks = {
            modality: self.get_placeholder_mask(input_ids, inputs_embeds, modality)
            for modality, (pixels, *_) in visual.items()
            if pixels is not None or encoded.get(modality) is not None
        }
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        for modality, mask in masks.items():
            inputs_embeds, encoded[modality] = self._fill_placeholders(
                modality, mask, inputs_embeds, *visual[modality], encoded.get(modality)
            )

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **pick_cache(cache, past_key_values),
            **kwargs,
        )
        return DeltaLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=encoded.get("image"),
            video_outputs=encoded.get("video"),
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


class DeltaLlavaForConditionalGeneration(DeltaLlavaPreTrainedModel, GenerationMixin):
    """[`DeltaLlavaModel`] with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        self.model = DeltaLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        processor: Any = None,
        dtype: torch.dtype | str | None = None,
        pixel_values: torch.Tensor | None = None,
        **config_kwargs: Any,
    ) -> "DeltaLlavaForConditionalGeneration":
        """An untrained Delta-LLaVA: a pretrained tower, a pretrained language model, and a new projector.

        Args:
            vision_model_name_or_path: a CLIP, SigLIP or DINOv2 model (or only its vision tower), on the Hub or in a
                folder.
            text_model_name_or_path: a causal language model, on the Hub or in a folder.
            processor: the `DeltaLlavaProcessor` for the model. Its image token becomes
                `config.image_token_id`, and the embeddings grow (to a multiple of 64) if its tokenizer needs it.
            dtype: dtype of the whole model; that of the language model by default.
            pixel_values: (images, 3, height, width) of real images, for `calibrate_projector`.
            config_kwargs: further arguments of [`DeltaLlavaConfig`].

        Raises:
            ValueError: on a bad config value, without both processor and `image_token_id`, or on a language model
                whose head has a bias.
        """
        language_model = AutoModelForCausalLM.from_pretrained(text_model_name_or_path, dtype=dtype or "auto")
        lm_head, dtype = language_model.get_output_embeddings(), language_model.dtype
        if lm_head.bias is not None:
            raise ValueError(
                f"{text_model_name_or_path}: the head of this language model has a bias; use one without."
            )
        vision_config = AutoConfig.from_pretrained(vision_model_name_or_path)
        vision_tower = AutoModel.from_pretrained(
            vision_model_name_or_path, config=getattr(vision_config, "vision_config", vision_config), dtype=dtype
        )
        if processor is not None:
            config_kwargs.setdefault("image_token_id", processor.image_token_id)
            config_kwargs.setdefault("video_token_id", processor.video_token_id)
            if len(processor.tokenizer) > language_model.config.vocab_size:
                language_model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
                lm_head = language_model.get_output_embeddings()
        elif "image_token_id" not in config_kwargs:
            raise ValueError("Pass the processor, or image_token_id: the model must know its placeholder token.")
        strategy = SELECT_STRATEGIES.get(vision_tower.config.model_type, "default")
        config_kwargs.setdefault("vision_feature_select_strategy", strategy)
        config = DeltaLlavaConfig(
            vision_config=vision_tower.config, text_config=language_model.config, **config_kwargs
        )

        with torch.device("meta"):  # everything but the projector is replaced
            model = cls(config)
        model.model.vision_tower = vision_tower
        model.model.language_model = language_model.get_decoder()
        model.lm_head = lm_head
        model.model.multi_modal_projector = (
            PROJECTORS[config.projector_layout](config).apply(model._init_weights).to(dtype)
        )
        model.generation_config = language_model.generation_config
        if pixel_values is not None:
            model.eval().calibrate_projector(pixel_values)
        return model.eval()

    @torch.no_grad()
    def calibrate_projector(self, pixel_values: torch.Tensor) -> None:
        """Make visual tokens of a new projector resemble text: over these images, at the config's budget, every channel
        has mean 0, and all together have the root mean square of the language model's input embeddings.

        Random weights give tokens that are much smaller than text and nearly the same for every image. Only the
        projector's last map changes. Not for a projector that has been trained: it would undo what was learned.

        Args:
            pixel_values: (images, 3, height, width) of a few dozen images such as training will show.

        Raises:
            ValueError: the visual tokens of these images do not differ.
        """
        tokens = torch.cat(list(self.get_image_features(pixel_values, return_dict=True).pooler_output)).float()
        embeddings = self.get_input_embeddings()
        target_rms = embeddings.weight.float().square().mean().sqrt()
        embed_scale = getattr(embeddings, "embed_scale", None)
        if embed_scale is not None:  # of Gemma: visual tokens are multiplied by it as text is, see `project_features`
            tokens = tokens / embed_scale.float()
        mean = tokens.mean(0)
        spread = (tokens - mean).square().mean().sqrt()
        if not spread > 0:
            raise ValueError(
                "calibrate_projector: the visual tokens of these images do not differ; give some real ones."
            )
        last = self.model.multi_modal_projector.output_map
        scale = target_rms / spread
        last.weight.copy_(last.weight.float() * scale)
        last.bias.copy_((last.bias.float() - mean) * scale)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`DeltaLlavaModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`DeltaLlavaModel.get_video_features`]."""
        return self.model.get_video_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_visual_tokens: VisualTokens = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        num_visual_tokens_videos: VisualTokens = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple | DeltaLlavaCausalLMOutputWithPast:
        """
        Args:
            labels: (batch, sequence), -100 where no loss is wanted; shifted inside.
            logits_to_keep: how many logits from the end to compute (0: all), or the positions to compute.

        The other arguments and the errors are those of [`DeltaLlavaModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_visual_tokens=num_visual_tokens,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            num_visual_tokens_videos=num_visual_tokens_videos,
            video_grid_thw=video_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **pick_cache(cache, past_key_values),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)  # Gemma 2
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)

        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return DeltaLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            video_outputs=outputs.video_outputs,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        visual = {name: kwargs.pop(name) for name in VISUAL_INPUTS if name in kwargs}
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # Later the images are in the cache.
        return {**inputs, **visual} if is_first_iteration or not kwargs.get("use_cache", True) else inputs

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
        encoded = dict(model_kwargs.get("mm_encoder_outputs") or {})
        for modality, names in MODALITIES.items():
            pixels, numbers, grid_thw = (model_kwargs.get(name) for name in names)
            if pixels is not None and expand_size > 1:
                get_features = getattr(self.model, f"get_{modality}_features")
                encoded[modality] = get_features(pixels, numbers, grid_thw, return_dict=True)
        if expand_size == 1 or not encoded:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        inputs_embeds = model_kwargs.get("inputs_embeds")
        for modality, outputs in encoded.items():
            features = outputs.pooler_output
            placeholders = self.model.get_placeholder_mask(input_ids, inputs_embeds, modality).sum(-1)
            rows = _images_per_row(placeholders.tolist(), [len(tokens) for tokens in features])
            repeated = [features[image] for row in rows for image in row * expand_size]
            encoded[modality] = BaseModelOutputWithPooling(pooler_output=repeated)
        for name in VISUAL_INPUTS:
            model_kwargs.pop(name, None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "mm_encoder_outputs": encoded}


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


__all__ = ["DeltaLlavaForConditionalGeneration", "DeltaLlavaModel", "DeltaLlavaPreTrainedModel"]
