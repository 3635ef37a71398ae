"""PyPI's torchvision is built for CUDA. With a CPU build of torch its import fails, unless these operators are known."""

import importlib.util


if importlib.util.find_spec("torch") is not None:
    import torch

    # Kept in a name: what a library defines goes when the library does.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
