"""Delta-LLaVA (arXiv 2512.18910) for transformers: model, processor, conversion, training.

Importing a name registers the classes with transformers' Auto classes; importing the package does so where transformers has been
imported before. The command line starts without either.
"""

import sys
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING or "transformers" in sys.modules:
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
__all__ = [
    "DeltaLlavaConfig",
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaPreTrainedModel",
    "DeltaLlavaProcessor",
    "DeltaLlavaProjector",
    "DeltaProjection",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import modeling, processing

    return getattr(processing if name == "DeltaLlavaProcessor" else modeling, name)
