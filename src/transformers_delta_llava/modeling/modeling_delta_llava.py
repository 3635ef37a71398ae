"""Delta-LLaVA: a vision tower, the delta projector and a language model, as transformers models."""

import math
import sys
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
)
from transformers.utils import ModelOutput

from .configuration_delta_llava import SELECT_STRATEGIES, DeltaLlavaConfig
from .delta_projection_delta_llava import DeltaProjection
from .deltas_delta_llava import DeltaMixin
from .generation_delta_llava import DeltaLlavaGenerationMixin
from .outputs_delta_llava import (
    CACHE_NAME,
    DeltaLlavaCausalLMOutputWithPast,
    DeltaLlavaModelOutputWithPast,
    pick_cache,
)
from .projector_delta_llava import DeltaLlavaProjector
from .projector_layers_delta_llava import PositionEmbedding2D, ProjectedWindowAttention
from .vision_tower_delta_llava import find_tower_calls, rename_saved_tower, run_vision_tower


# Modules that quantisers skip: every visual token passes through the tower and the projector, and they are small beside the
# language model. With the names of both models, with and without a head.
MODULES_NOT_TO_CONVERT = frozenset(
    f"{prefix}{part}" for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
) | {"lm_head"}

# How many visual tokens each image gets: one number for all, one per image, or None for the config's default.
VisualTokens: TypeAlias = int | list[int] | torch.Tensor | None


class DeltaLlavaPreTrainedModel(DeltaMixin, PreTrainedModel):
    """What both models share: methods for deltas, initialisation, and what they tell transformers about themselves."""

    config: DeltaLlavaConfig
    config_class = DeltaLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules: set[str] | list[str] | None = None

    def post_init(self) -> None:
        super().post_init()
        if getattr(self.config, "quantization_config", None) is not None:
            # All quantisers read it.
            self._keep_in_fp32_modules = set(self._keep_in_fp32_modules or ()) | MODULES_NOT_TO_CONVERT

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        # `_keep_in_fp32_modules` also means float32 in a float16 model; here it keeps modules from quantisers only.
        return {
            name: kept for name, kept in super()._get_dtype_plan(dtype).items() if name not in MODULES_NOT_TO_CONVERT
        }

    def _tuple_or_dict(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output as `return_dict`, or else the config, asks."""
        wants_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

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
        self.multi_modal_projector = DeltaLlavaProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._tower_calls = find_tower_calls(self.vision_tower)
        self.register_load_state_dict_pre_hook(rename_saved_tower)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_visual_tokens: VisualTokens = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        """Visual tokens of images.

        Args:
            pixel_values: (images, 3, height, width).
            num_visual_tokens: of all images, or one number per image; the config's default when `None`.

        Returns:
            The tower's output, in which `pooler_output` is a list with one (visual tokens, hidden_size) tensor per image,
            in the projector's dtype.

        Raises:
            ValueError: if a number is not one of `config.visual_token_budgets`, or there is not one per image.
        """
        outputs, features, levels = self.get_patch_features(pixel_values, **kwargs)
        numbers = self.num_visual_tokens_per_image(len(pixel_values), num_visual_tokens)
        outputs.pooler_output = self.project_features(features, levels, numbers)
        return self._tuple_or_dict(outputs, return_dict)

    def get_patch_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor, list[torch.Tensor]]:
        """The tower's output, and the projector's inputs: the single-level stream and the levels.

        Features are (images, N, C), of the patches alone, in the projector's dtype. `kwargs` go to the tower.
        """
        config, dtype = self.config, self.multi_modal_projector.dtype
        outputs, states = run_vision_tower(
            self.vision_tower, pixel_values, config.vision_feature_indices, self._tower_calls, **kwargs
        )
        features, *levels = (
            states[index][:, config.num_prefix_tokens :].to(dtype)
            for index in (config.vision_feature_layer, *config.vision_feature_levels)
        )
        return outputs, features, levels

    def num_visual_tokens_per_image(self, num_images: int, num_visual_tokens: VisualTokens = None) -> list[int]:
        """`num_visual_tokens` as one number per image.

        Raises:
            ValueError: if there are not as many numbers as images, or they are not integers.
        """
        if num_visual_tokens is None:
            num_visual_tokens = self.config.num_visual_tokens
        if isinstance(num_visual_tokens, torch.Tensor):
            num_visual_tokens = num_visual_tokens.flatten().tolist()
        if isinstance(num_visual_tokens, (str, bool, float)):
            raise ValueError(
                f"num_visual_tokens={num_visual_tokens!r}: give the model integers; 'auto' is an argument of the "
                "processor, which looks at the images and passes on what it picks."
            )
        if isinstance(num_visual_tokens, int):
            return [num_visual_tokens] * num_images
        if len(num_visual_tokens) != num_images:
            raise ValueError(
                f"num_visual_tokens holds {len(num_visual_tokens)} numbers for {num_images} images; "
                "give one per image."
            )
        return list(num_visual_tokens)

    def project_features(
        self, features: torch.Tensor, levels: list[torch.Tensor], num_visual_tokens: list[int]
    ) -> list[torch.Tensor]:
        """Patch features as they enter the language model: one (visual tokens, hidden_size) tensor per image.

        Args:
            features, levels: of `get_patch_features`.
            num_visual_tokens: one number per image. Images with the same number go through the projector together.

        Raises:
            ValueError: if a number is not one of `config.visual_token_budgets`.
        """
        visual_tokens: list[torch.Tensor] = [features] * len(num_visual_tokens)
        for number in dict.fromkeys(num_visual_tokens):
            images: Any = [image for image, own in enumerate(num_visual_tokens) if own == number]
            # Usually all have one number; a slice does not copy the features.
            rows = slice(None) if len(images) == len(num_visual_tokens) else images
            projected = self.multi_modal_projector(
                features[rows], [level[rows] for level in levels], self.config.scale_factor_for(number)
            )
            for image, tokens in zip(images, projected):
                visual_tokens[image] = tokens
        # Gemma multiplies its embeddings by a constant. When Delta-LLaVA was released it did so to all that entered
        # the model, visual tokens too; now the embedding layer does it, and only to text.
        embed_scale = getattr(self.get_input_embeddings(), "embed_scale", None)
        if embed_scale is not None:
            visual_tokens = [tokens * embed_scale.to(tokens) for tokens in visual_tokens]
        return visual_tokens

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where visual tokens go: a boolean (batch, sequence), from `inputs_embeds` where given, else from `input_ids`."""
        if inputs_embeds is None:
            return input_ids == self.config.image_token_id
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _count_in_text(self, mask: torch.Tensor, num_placeholders: int, num_images: int) -> list[int] | None:
        """Visual tokens per image from the text, for callers that drop `num_visual_tokens` (TRL's GRPOTrainer); `None` if
        the config's default fits, or the text does not tell."""
        if num_placeholders == num_images * self.config.num_visual_tokens:
            return None
        counts = [len(list(run)) for row in mask.tolist() for is_image, run in groupby(row) if is_image]
        known = len(counts) == num_images and set(counts) <= set(self.config.visual_token_budgets)
        return counts if known else None

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_visual_tokens: VisualTokens = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | DeltaLlavaModelOutputWithPast:
        """
        Args:
            input_ids: (batch, sequence), with `config.image_token_id` wherever a visual token goes.
            pixel_values: (images of the whole batch, 3, height, width), row by row in the order of their placeholders.
            attention_mask, position_ids, inputs_embeds: as in every decoder of transformers.
            cache, past_key_values: two names of one argument; which one transformers uses depends on its version.
            num_visual_tokens: of all images, or one number per image. When `None`: the config's default, or where the text
                has other numbers of placeholders in a row, one such number for each image, these.
            mm_token_type_ids: accepted because processors emit it; not used.
            mm_encoder_outputs: `{"image": output of get_image_features}`, instead of `pixel_values`. Prompts that show
                the same image share its features: encode it once, and repeat its tensor in `pooler_output`.

        Raises:
            ValueError: on both or neither of `input_ids` and `inputs_embeds`, on `pixel_values` together with
                `mm_encoder_outputs`, on `cache` together with `past_key_values`, or if placeholders and visual tokens
                differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs['image'].")
        if pixel_values is not None or image_outputs is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds)
            # Before the tower runs: later, reading the value would wait for it. A graph that is traced has no values.
            num_placeholders = None if torch.compiler.is_compiling() else int(mask.sum())
        if pixel_values is not None:
            if num_visual_tokens is None and num_placeholders is not None:
                num_visual_tokens = self._count_in_text(mask, num_placeholders, len(pixel_values))
            image_outputs = self.get_image_features(pixel_values, num_visual_tokens, return_dict=True)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = mask.to(inputs_embeds.device)
            if num_placeholders not in (None, len(image_features)):
                raise ValueError(
                    f"The text has {num_placeholders} image placeholders and the images give {len(image_features)} visual "
                    "tokens; give processor and model the same num_visual_tokens, and do not cut the text."
                )
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **pick_cache(cache, past_key_values),
            **kwargs,
        )
        output = DeltaLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            image_outputs=image_outputs,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return self._tuple_or_dict(output, return_dict)


class DeltaLlavaForConditionalGeneration(DeltaLlavaPreTrainedModel, DeltaLlavaGenerationMixin):
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
            vision_model_name_or_path: a CLIP, SigLIP or DINOv2 model (or its vision tower alone), on the Hub or in a
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
            if len(processor.tokenizer) > language_model.config.vocab_size:
                language_model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
                lm_head = language_model.get_output_embeddings()
        elif "image_token_id" not in config_kwargs:
            raise ValueError("Pass the processor, or image_token_id: the model must know its placeholder token.")
        strategy = SELECT_STRATEGIES.get(vision_tower.config.model_type, "default")
        config_kwargs.setdefault("vision_feature_select_strategy", strategy)
        config = DeltaLlavaConfig(vision_tower.config, language_model.config, **config_kwargs)

        with torch.device("meta"):  # everything but the projector is replaced
            model = cls(config)
        model.model.vision_tower = vision_tower
        model.model.language_model = language_model.get_decoder()
        model.lm_head = lm_head
        model.model.multi_modal_projector = DeltaLlavaProjector(config).apply(model._init_weights).to(dtype)
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

    def get_image_features(
        self, pixel_values: torch.Tensor, num_visual_tokens: VisualTokens = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See [`DeltaLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, num_visual_tokens, **kwargs)

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
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
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
        output = DeltaLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return self._tuple_or_dict(output, return_dict)


# transformers' Trainer shifts labels before it smooths them for the classes listed here, and for no other: without this
# `label_smoothing_factor` would compare each label with the logits of its own position.
getattr(sys.modules[AutoModelForCausalLM.__module__], "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {}).setdefault(
    DeltaLlavaConfig.model_type, DeltaLlavaForConditionalGeneration.__name__
)


__all__ = ["DeltaLlavaForConditionalGeneration", "DeltaLlavaModel", "DeltaLlavaPreTrainedModel"]
