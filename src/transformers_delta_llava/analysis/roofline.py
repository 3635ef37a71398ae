"""What the hardware allows: the shortest time that operations and weights of a model permit, whatever the software."""

from dataclasses import dataclass

from .flops import PARTS, ModelProfile


@dataclass(frozen=True)
class Floor:
    """Least seconds at one number of visual tokens.

    num_visual_tokens: per image.
    seconds: by part, with the keys of `PARTS`; `decode` is all of an answer but its first token.
    limited_by: by part, `"compute"` or `"memory"`, whichever takes longer.
    first_token: tower, projector and prefill, one after the other.
    per_token: mean of the steps of decoding; `None` for an answer of one token.
    """

    num_visual_tokens: int
    seconds: dict[str, float]
    limited_by: dict[str, str]
    first_token: float
    per_token: float | None


def roofline(
    profile: ModelProfile, flops_per_second: float, bytes_per_second: float, batch_size: int = 1
) -> list[Floor]:
    """
    Floors of a batch of images, one prompt each, at every number of visual tokens of a profile.

    A part takes at least its operations over the rate of operations, and at least the bytes that it reads over the bandwidth: its
    weights once per step, whatever the batch, and in decoding the keys and values of each row. Activations are not counted.

    Args:
        profile: of `profile_model`, whose dtype says how large weights and cache are.
        flops_per_second: what the device computes in that dtype, best measured with a large matrix product.
        bytes_per_second: bandwidth of the device's memory.
        batch_size: rows, with one image each.

    Raises:
        ValueError: on a rate or a batch that is not positive.
    """
    rates = {"flops_per_second": flops_per_second, "bytes_per_second": bytes_per_second, "batch_size": batch_size}
    for name, value in rates.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: it must be above 0.")
    floors = []
    steps = profile.new_tokens - 1
    for budget in profile.budgets:
        prompt = profile.text_tokens + budget.num_visual_tokens
        cached = sum(prompt + step for step in range(1, steps + 1))  # tokens read in all steps of decoding
        cache_bytes = batch_size * budget.kv_cache_bytes * cached / (prompt + steps)
        reads = {**budget.weight_bytes, "decode": steps * budget.weight_bytes["decode"] + cache_bytes}
        times = {
            part: {
                "compute": batch_size * budget.exact_flops[part] / flops_per_second,
                "memory": reads[part] / bytes_per_second,
            }
            for part in PARTS
        }
        seconds = {part: max(both.values()) for part, both in times.items()}
        floors.append(
            Floor(
                num_visual_tokens=budget.num_visual_tokens,
                seconds=seconds,
                limited_by={part: max(both, key=both.__getitem__) for part, both in times.items()},
                first_token=sum(seconds.values()) - seconds["decode"],
                per_token=seconds["decode"] / steps if steps else None,
            )
        )
    return floors
