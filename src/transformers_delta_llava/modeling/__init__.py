from .configuration_delta_llava import DeltaLlavaConfig
from .delta_projection_delta_llava import DeltaProjection
from .modeling_delta_llava import (
    CACHE_NAME,
    DeltaLlavaForConditionalGeneration,
    DeltaLlavaModel,
    DeltaLlavaPreTrainedModel,
)
from .projector_delta_llava import DeltaLlavaProjector


__all__ = [
    "CACHE_NAME",
    "DeltaLlavaConfig",
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaPreTrainedModel",
    "DeltaLlavaProjector",
    "DeltaProjection",
]
