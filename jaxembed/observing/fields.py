"""Which fields of a line of metrics are readings of a clock or of a machine: the one place that says so."""

from collections.abc import Mapping
from typing import Any

# All other fields are the same, bit by bit, in every run of one config on one mesh; see `speed` for what these mean.
READINGS = frozenset(
    {
        "pairs_per_s",
        "tokens_per_s",
        "padded_tokens_per_s",
        "tokens_per_s_per_chip",
        "padded_tokens_per_s_per_chip",
        "mfu",
        "step_s",
        "data_wait_s",
        "compute_s",
        "host_s",
        "compile_s",
        "eval_s",
        "checkpoint_s",
        "memory_peak_bytes",
        "goodput",
    }
)


def repeatable(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run that is done again has in its line too."""
    return {name: value for name, value in line.items() if name not in READINGS}
