"""What commands on deltas report."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeltaReport:
    """What was written.

    Attributes:
        output: the folder.
        rank: of the deltas in it; 0 where there are none.
        parameters: how many numbers the deltas are.
        energy: share of the squared Frobenius norm that was kept, of all updates together; measured on what was
            written, after rounding to its dtype.
        energy_by_projection: the same by projection.
        left_out: tensors of the projector that differ between two checkpoints and are no deltas.
    """

    output: str
    rank: int
    parameters: int
    energy: float = 1.0
    energy_by_projection: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
