"""Peak memory of activations at inference, found by running a model without weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from ..modeling import CACHE_NAME, DeltaLlavaForConditionalGeneration, DeltaLlavaProjector


class FusedAttention(TorchFunctionMode):
    """Scaled dot-product attention makes its result and nothing else, as on devices; without data PyTorch spells it out."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or make the result of attention."""
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, _, value = args[:3]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as anything holds them; `peak` is the most.

    What a kernel needs for itself, and what an allocator rounds up, is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look what is new and what is gone."""
        kwargs = kwargs or {}
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = operation(*args, **kwargs)
        held = {reference.cdata for reference in self._held()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in held and storage._cdata not in given:
                    self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result

    def peak_of(self, function: Callable[[], Any]) -> int:
        """Most bytes that a call holds at a time, beyond what is held when it starts; what it returns is let go."""
        before = self.peak = sum(self._held().values())
        with torch.no_grad(), FusedAttention(), self:
            function()
        return self.peak - before

    def _held(self) -> dict[StorageWeakRef, int]:
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        return self.live


def tower_peak_bytes(model: DeltaLlavaForConditionalGeneration) -> int:
    """Of the vision tower for one image, the levels that it keeps among them; the model is on the meta device."""
    side = model.config.vision_config.image_size
    pixels = torch.empty(1, 3, side, side, dtype=model.dtype, device="meta")
    return LiveMemory().peak_of(lambda: model.model._run_vision_tower(pixels))


def projector_peak_bytes(projector: DeltaLlavaProjector, scale_factor: int) -> int:
    """Of the projector for one image, without the features that go in; it is on the meta device."""
    config = projector.config
    shape = (1, config.grid_size**2, config.vision_config.hidden_size)
    features = torch.empty(shape, dtype=projector.dtype, device="meta")
    levels = [features] * len(config.vision_feature_levels)
    return LiveMemory().peak_of(lambda: projector(features, levels, scale_factor))


def language_peak_bytes(model: DeltaLlavaForConditionalGeneration, prompt: int) -> tuple[int, int]:
    """Of the prefill of `prompt` tokens and of one step of decoding, without the cache; the model is on the meta device."""
    width, language_model = model.config.text_config.hidden_size, model.model.language_model
    embeddings = torch.empty(1, prompt, width, dtype=model.dtype, device="meta")
    cache, memory = DynamicCache(), LiveMemory()

    def run(tokens: torch.Tensor) -> Any:
        outputs = language_model(inputs_embeds=tokens, use_cache=True, **{CACHE_NAME: cache})
        return model.lm_head(outputs.last_hidden_state[:, -1:])

    prefill = memory.peak_of(lambda: run(embeddings))
    cached = sum(memory._held().values())  # the last layer runs when nearly all of it is there
    return prefill - cached, memory.peak_of(lambda: run(embeddings[:, :1]))
