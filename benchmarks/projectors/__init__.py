"""Projectors to compare Delta-LLaVA's with: others' from their papers' descriptions, and its own as released."""

from transformers_delta_llava.modeling import PROJECTORS

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
    "Delta, released": (PROJECTORS["released"], {}),
    "Delta, paper": (PROJECTORS["paper"], {"projector_layout": "paper"}),
    "released, no EMHSA": (PROJECTORS["released"], {"use_emhsa": False}),
    "released, no DeltaProj": (PROJECTORS["released"], {"use_delta_projection": False}),
    "released, no TB": (PROJECTORS["released"], {"use_transformer_block": False}),
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
