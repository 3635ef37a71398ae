"""The Hub files of the model; importing them registers its classes with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_delta_llava import DeltaLlavaConfig
from .deltas_delta_llava import DeltaProjection
from .modeling_delta_llava import (
    CACHE_NAME,
    DeltaLlavaForConditionalGeneration,
    DeltaLlavaModel,
    DeltaLlavaPreTrainedModel,
)
from .projector_delta_llava import PROJECTORS, DeltaLlavaProjector


__all__ = [
    "CACHE_NAME",
    "PROJECTORS",
    "DeltaLlavaConfig",
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaPreTrainedModel",
    "DeltaLlavaProjector",
    "DeltaProjection",
]

AutoConfig.register("delta_llava", DeltaLlavaConfig)
AutoModel.register(DeltaLlavaConfig, DeltaLlavaModel)
AutoModelForImageTextToText.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration)
# Without this, save_pretrained would write a repo that has no code in it.
DeltaLlavaConfig.register_for_auto_class()
DeltaLlavaModel.register_for_auto_class("AutoModel")
DeltaLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
