from .configuration_delta_llava import DeltaLlavaConfig
from .modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel, DeltaLlavaPreTrainedModel
from .projector_delta_llava import DeltaLlavaProjector, DeltaProjection


__all__ = [
    "DeltaLlavaConfig",
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaPreTrainedModel",
    "DeltaLlavaProjector",
    "DeltaProjection",
]
