"""Delta-LLaVA for transformers: models, processor and conversion of checkpoints.

Importing the package registers its classes with the Auto classes, and makes them save their own code with every model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .modeling import (
    DeltaLlavaConfig,
    DeltaLlavaForConditionalGeneration,
    DeltaLlavaModel,
    DeltaLlavaPreTrainedModel,
    DeltaLlavaProjector,
    DeltaProjection,
)
from .processing import DeltaLlavaProcessor


__version__ = "0.1.0"

AutoConfig.register("delta_llava", DeltaLlavaConfig)
AutoModel.register(DeltaLlavaConfig, DeltaLlavaModel)
AutoModelForImageTextToText.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration)
AutoProcessor.register(DeltaLlavaConfig, DeltaLlavaProcessor)
# Without this, save_pretrained would write a repo that has no code in it.
DeltaLlavaConfig.register_for_auto_class()
DeltaLlavaModel.register_for_auto_class("AutoModel")
DeltaLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
DeltaLlavaProcessor.register_for_auto_class()

__all__ = [
    "DeltaLlavaConfig",
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaPreTrainedModel",
    "DeltaLlavaProcessor",
    "DeltaLlavaProjector",
    "DeltaProjection",
]
