"""Peak memory without data against what tensors really hold."""

import torch

from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.analysis.profile import LiveMemory, language_peak_bytes, projector_peak_bytes


def test_memory_is_counted_while_it_is_held() -> None:
    x = torch.empty(1000, device="meta")

    def chain() -> torch.Tensor:
        y = x + 1  # 4 kB
        z = y * 2  # 8 kB in all
        del y
        w = z.view(10, 100).T  # a view holds nothing of its own
        return w.add_(1)

    memory = LiveMemory()
    assert memory.peak_of(chain) == 8000
    kept = []
    assert memory.peak_of(lambda: kept.append(x + 1)) == 4000
    assert memory.peak_of(chain) == 8000, "what is held from before does not count"
    assert sum(memory._held().values()) == 4000


def test_attention_is_fused() -> None:
    q = torch.empty(1, 2, 64, 8, device="meta")
    assert LiveMemory().peak_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == q.nbytes


def test_parts_of_a_model() -> None:
    """The tiny model's largest tensors, counted by hand."""
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(tiny_config()).to("meta").eval()
    # At scale factor 1 the output MLP: what goes into fc2 (144 x 48), the tokens before it, and what comes out.
    peak = projector_peak_bytes(model.model.multi_modal_projector, 1)
    assert 4 * 144 * 64 * 2 <= peak <= 4 * 144 * 64 * 8
    prefill, decode = language_peak_bytes(model, 50)
    assert 4 * 50 * 64 * 3 <= prefill <= 4 * 50 * 64 * 12
    assert decode < prefill
