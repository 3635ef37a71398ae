"""Requests per second and time to first token in vLLM: Delta-LLaVA at several budgets beside LLaVA with all 576 tokens.

    make test-engines ENGINES=vllm          # builds the environment
    python benchmarks/serving.py [--size small] [--requests 48] [--concurrency 8] [--output serving.json]

Both models have the same vision tower and the same language model, of random weights, and run in the same engine with the same
settings through the same code path (transformers' modelling backend). Each request brings an image of its own, so that no
cache helps, and wants a fixed number of tokens, streamed. What differs is what stands between tower and language model.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.processing import load_chat_template


ROOT = Path(__file__).resolve().parents[1]
# (hidden, layers, heads, feed-forward) of the language model and of the tower; "7b" is that of the published models.
SIZES = {
    "tiny": ((128, 2, 4, 256), (64, 4, 4, 128)),
    "small": ((512, 8, 8, 1376), (256, 6, 4, 1024)),
    "7b": ((4096, 32, 32, 11008), (1024, 24, 16, 4096)),
}
BUDGETS = (144, 36, 1)
LEVELS = {"tiny": [1, 2, 3], "small": [3, 4, 5], "7b": [12, 16, 22, 23]}


def main() -> None:
    """Write both models, serve one after the other, and print what a client sees."""
    parser = argparse.ArgumentParser(description="Serve Delta-LLaVA and LLaVA with vLLM and measure both.")
    parser.add_argument("--python", type=Path, default=ROOT / ".engines" / "vllm" / "bin" / "python", help="vLLM's")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--requests", type=int, default=48, help="measured requests per line of the table")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="JSON file to write the numbers to")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        print(f"{arguments.python} is not there: make test-engines ENGINES=vllm builds it.")
        return

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with this script
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), arguments.size, getattr(torch, arguments.dtype))
        for name, budgets in (("LLaVA", (None,)), ("Delta-LLaVA", BUDGETS)):
            with serve(arguments.python, folders[name], arguments.dtype, Path(scratch)) as port:
                for budget in budgets:
                    for requests in (arguments.concurrency, arguments.requests):  # the first is a warm-up
                        row = measure(port, budget, requests, arguments.concurrency, arguments.new_tokens)
                    rows.append({"model": name, "visual_tokens": budget or 576, **row})
    show(rows, arguments)
    if arguments.output is not None:
        settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("python", "output")}
        report = {"benchmark": "serving", **settings, "cpus": os.cpu_count(), "rows": rows}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def write_models(scratch: Path, size: str, dtype: torch.dtype) -> dict[str, Path]:
    """Both models with processor and tokenizer, in folders that vLLM loads."""
    (width, layers, heads, inner), (tower_width, tower_layers, tower_heads, tower_inner) = SIZES[size]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "examples" / "easy-vqa")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.model_max_length = 4096
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=448,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=tower_width,
        num_hidden_layers=tower_layers,
        num_attention_heads=tower_heads,
        intermediate_size=tower_inner,
        image_size=336,
        patch_size=14,
    )
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    template = load_chat_template("vicuna_v1")

    torch.manual_seed(0)
    delta_config = DeltaLlavaConfig(vision, text, image_token_id, vision_feature_levels=LEVELS[size])
    delta_processor = DeltaLlavaProcessor(image_processor, tokenizer, chat_template=template)
    llava_config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token_id, image_seq_length=576
    )
    llava_processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    folders = {"Delta-LLaVA": scratch / "delta-llava", "LLaVA": scratch / "llava"}
    for model, processor, folder in (
        (DeltaLlavaForConditionalGeneration(delta_config), delta_processor, folders["Delta-LLaVA"]),
        (LlavaForConditionalGeneration(llava_config), llava_processor, folders["LLaVA"]),
    ):
        model.to(dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
    return folders


@contextlib.contextmanager
def serve(python: Path, folder: Path, dtype: str, scratch: Path) -> Iterator[int]:
    """vLLM's server for `folder` on a free port, ended with all its processes afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--trust-remote-code"]
    command += ["--model-impl", "transformers", "--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", "64"]
    command += ["--no-enable-prefix-caching", "--trust-request-mm-kwargs", "--mm-processor-cache-gb", "0"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    if not torch.cuda.is_available():
        command.append("--enforce-eager")
    log = scratch / f"{folder.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + 600
        while not _is_up(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{log.read_text()[-4000:]}\nvLLM did not start.")
            time.sleep(1)
        yield port
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)


def _is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def measure(port: int, budget: int | None, requests: int, concurrency: int, new_tokens: int) -> dict[str, float]:
    """Send `requests`, `concurrency` at a time; returns requests per second and times to the first token in ms."""
    bodies = [_body(budget, new_tokens) for _ in range(requests)]
    with ThreadPoolExecutor(concurrency) as pool:
        start = time.perf_counter()
        first_tokens = list(pool.map(partial(_first_token, port), bodies))
        seconds = time.perf_counter() - start
    return {
        "requests_per_second": round(requests / seconds, 3),
        "first_token_ms_median": round(1000 * statistics.median(first_tokens), 1),
        "first_token_ms_p95": round(1000 * float(np.percentile(first_tokens, 95)), 1),
    }


def _body(budget: int | None, new_tokens: int) -> bytes:
    """A request with an image that nobody has sent before."""
    buffer = io.BytesIO()
    noise = np.frombuffer(os.urandom(42 * 42 * 3), dtype=np.uint8).reshape(42, 42, 3)
    Image.fromarray(noise).resize((336, 336)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is in the image?"}]
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": content}], "stream": True}
    body |= {"temperature": 0, "max_tokens": new_tokens, "min_tokens": new_tokens, "ignore_eos": True}
    if budget is not None:
        body["mm_processor_kwargs"] = {"num_visual_tokens": budget}
    return json.dumps(body).encode()


def _first_token(port: int, body: bytes) -> float:
    """Seconds to the first generated token; reads the answer to its end."""
    url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    start = time.perf_counter()
    seconds = None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=600) as response:
            for line in response:
                # The first event has the role; tokens follow, which may decode to no text.
                if seconds is None and line.startswith(b"data: {") and b'"role"' not in line:
                    seconds = time.perf_counter() - start
    except urllib.error.HTTPError as error:
        raise SystemExit(f"vLLM answered {error.code}: {error.read()[:500].decode(errors='replace')}") from None
    if seconds is None:
        raise SystemExit("vLLM streamed no token.")
    return seconds


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the table, with the gain in requests over LLaVA."""
    title = (
        f"vLLM, {arguments.size}, {arguments.dtype}, {arguments.concurrency} clients, {arguments.requests} requests"
    )
    table = Table(
        "model", "visual tokens", "requests/s", "of LLaVA's", "first token, ms", "95th percentile, ms", title=title
    )
    for row in rows:
        gain = row["requests_per_second"] / rows[0]["requests_per_second"]
        cells = (row["requests_per_second"], gain, row["first_token_ms_median"], row["first_token_ms_p95"])
        table.add_row(
            row["model"], str(row["visual_tokens"]), f"{cells[0]:.2f}", f"{cells[1]:.2f} x", *map(str, cells[2:])
        )
    Console().print(table)


if __name__ == "__main__":
    main()
