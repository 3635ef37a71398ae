"""Features of a frozen vision tower, computed once per image and kept on disk."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.modeling.modeling_delta_llava import PatchFeatures


class FrozenFeatures:
    """Takes the place of a model's `get_patch_features`: reads an image's features from disk, or runs the tower once.

    A file holds the patches of the hidden states that the projector reads, in float16 (states x patches x channels x 2
    bytes). The folder is named by a hash of the tower's weights and settings, so features of another tower are never read.

    Args:
        model: its `get_patch_features` is replaced; its tower must not be trained.
        folder: where to keep the features.
    """

    def __init__(self, model: DeltaLlavaForConditionalGeneration, folder: str | Path):
        self.base, config = model.model, model.config
        states = config.vision_config.num_hidden_layers + 1
        self.order = [index % states for index in (config.vision_feature_layer, *config.vision_feature_levels)]
        self.indices = config.vision_feature_indices
        self.folder = Path(folder).expanduser() / self._hash()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run = self.base.get_patch_features
        self.base.get_patch_features = self.get_patch_features  # type: ignore[method-assign]

    def _hash(self) -> str:
        digest = hashlib.blake2b(repr(self.indices).encode(), digest_size=8)
        digest.update(self.base.config.vision_config.to_json_string().encode())
        for name, tensor in sorted(self.base.vision_tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def get_patch_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> PatchFeatures:
        """As that of `DeltaLlavaModel`; the tower's output has no `last_hidden_state`."""
        read = self.load(self.keep(pixel_values, **kwargs)).to(pixel_values.device)
        stream, *levels = self.split(read.to(self.base.multi_modal_projector.dtype))
        return PatchFeatures(stream, levels, BaseModelOutputWithPooling())

    @torch.no_grad()
    def keep(self, pixel_values: torch.Tensor, **kwargs: Any) -> list[Path]:
        """The files of images (images, 3, height, width), written where they are not there yet."""
        images = pixel_values.detach().float().cpu().contiguous().numpy()
        files = [self.folder / f"{hashlib.blake2b(image, digest_size=16).hexdigest()}.npy" for image in images]
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        if missing:
            features = self._run(pixel_values[missing], **kwargs)
            states = dict(zip(self.order, [features.stream, *features.levels]))
            kept = torch.stack([states[index] for index in self.indices], dim=1).to(torch.float16).cpu().numpy()
            for index, array in zip(missing, kept):
                unfinished = files[index].with_suffix(f".{os.getpid()}")
                with unfinished.open("wb") as file:
                    np.save(file, array)
                unfinished.replace(files[index])
        return files

    def load(self, files: Sequence[Path]) -> torch.Tensor:
        """(images, states, patches, channels) in float16, the states as in `indices`."""
        arrays = []
        for file in files:
            try:
                arrays.append(np.load(file))
            except (ValueError, EOFError) as error:  # noqa: PERF203
                raise ValueError(f"{file} is damaged; delete it") from error
        return torch.from_numpy(np.stack(arrays))

    def split(self, states: torch.Tensor) -> list[torch.Tensor]:
        """The projector's single-level stream, then its levels, of what `load` gives."""
        return [states[:, self.indices.index(index)] for index in self.order]
