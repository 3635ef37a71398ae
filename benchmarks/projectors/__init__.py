"""Projectors to compare Delta-LLaVA's with: others' from their papers' descriptions, and its own as released."""

from transformers_delta_llava import DeltaLlavaProjector

from .baselines import (
    AveragePoolingProjector,
    CAbstractorStyleProjector,
    MLPProjector,
    PixelShuffleProjector,
    ResamplerProjector,
    TokenPackerStyleProjector,
)
from .released import ReleasedProjector


# Those that are compared on one tower, language model and data: class, and arguments of the config.
VARIANTS = {
    "MLP, no reduction": (MLPProjector, {}),
    "average pooling + MLP": (AveragePoolingProjector, {}),
    "pixel shuffle + MLP": (PixelShuffleProjector, {}),
    "TokenPacker style": (TokenPackerStyleProjector, {}),
    "C-Abstractor style": (CAbstractorStyleProjector, {}),
    "query resampler": (ResamplerProjector, {}),
    "Delta, released": (DeltaLlavaProjector, {}),
    "Delta, paper": (DeltaLlavaProjector, {"projector_layout": "paper"}),
    "released, no EMHSA": (DeltaLlavaProjector, {"use_emhsa": False}),
    "released, no DeltaProj": (DeltaLlavaProjector, {"use_delta_projection": False}),
    "released, no TB": (DeltaLlavaProjector, {"use_transformer_block": False}),
}

__all__ = [
    "VARIANTS",
    "AveragePoolingProjector",
    "CAbstractorStyleProjector",
    "MLPProjector",
    "PixelShuffleProjector",
    "ReleasedProjector",
    "ResamplerProjector",
    "TokenPackerStyleProjector",
]
