"""OpenVINO compared with onnxruntime on the files of an export: `openvino_parity.py EXPORT IMAGE QUESTION NUMBER [DTYPE]`.

Prints, for float32 and for the precision that OpenVINO takes by itself, the largest differences of visual tokens and logits, as a part of
the largest one, and whether the first token of the answer is the same.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from PIL import Image


def main() -> None:
    """Compare and print."""
    export, path, question, number = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    sys.path.insert(0, str(export))
    from run_onnx import OnnxModel

    model, image = OnnxModel(export, sys.argv[5] if len(sys.argv) > 5 else None, threads=1), Image.open(path)
    ids, pixels = model.encode(question, number), model.preprocess(image)
    visual = model.encode_image(image, number)
    logits, _ = model.forward(ids, visual)
    report = {}
    for precision in ("f32", "default"):
        options = {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}

        def run(name: str, inputs: dict, options: dict = options) -> np.ndarray:
            graph = openvino.compile_model(str(export / "onnx" / f"{name}{model.suffix}.onnx"), "CPU", options)
            for entry in graph.inputs:
                if "past_key_values" in entry.any_name:
                    shape = entry.partial_shape
                    empty = np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
                    inputs = {**inputs, entry.any_name: empty}
            return graph(inputs)[0].copy()

        tokens = run(model.export["vision_encoders"][str(number)], {"pixel_values": pixels})[0]
        embeds = run("embed_tokens", {"input_ids": ids})
        embeds[ids == model.config["image_token_index"]] = tokens
        mask, positions = np.ones(ids.shape, np.int64), np.arange(ids.shape[1])[None]
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        found = run("decoder_model_merged", inputs)[0, -1]
        report[precision] = {
            "visual_tokens": float(np.abs(tokens - visual).max() / np.abs(visual).max()),
            "logits": float(np.abs(found - logits).max() / np.abs(logits).max()),
            "same_token": bool(found.argmax() == logits.argmax()),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
