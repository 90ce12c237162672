"""All makers, which importing their modules registers, and the choice among them."""

from collections.abc import Sequence
from importlib import import_module

# Kind -> share of the cases.
SHARES = {
    "checkpoints": 75,
    "safetensors": 35,
    "configs": 45,
    "folders": 45,
    "tables": 30,
    "shards": 25,
    "graphs": 20,
    "arguments": 45,
}
MODULES = (
    "checkpoints", "odd_files", "pickles", "headers", "configs", "reports", "folders", "tables", "shards", "graphs",
    "arguments",
)  # fmt: skip


def load_makers() -> None:
    """Register all makers."""
    for name in MODULES:
        import_module(f"{__package__}.{name}")


def choose(seed: int, count: int, kinds: Sequence[str]) -> list[tuple[int, str, int]]:
    """Return `count` cases of these kinds, by their shares: (seed, kind, index)."""
    total = sum(SHARES[kind] for kind in kinds)
    ends = [round(count * sum(SHARES[k] for k in kinds[: i + 1]) / total) for i in range(len(kinds))]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return [(seed, kind, i) for kind, number in zip(kinds, counts, strict=True) for i in range(number)]
