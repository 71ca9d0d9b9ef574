"""What a run's time went into, and the memory that it took, in words."""

import numpy as np

from jaxembed.reporting.history import History

# Fields of a line: means of its steps, and sums since the line before. See `jaxembed.observing.speed`.
OF_A_STEP = {"compute_s": "computing", "data_wait_s": "waiting for data", "host_s": "the loop's own code"}
IN_ALL = {"compile_s": "compiling", "eval_s": "evaluating", "checkpoint_s": "saving"}
LEAST = 0.0005  # a smaller part is not named


def seconds_by_part(history: History) -> dict[str, float]:
    """Returns the seconds of each part; nothing, where they were not logged."""
    if not history.series.keys() >= OF_A_STEP.keys():
        return {}
    seconds = {}
    logged = history.series["loss"].steps  # also by code that did not log these fields
    of_lines = np.diff(logged, prepend=history.before)
    for name, part in OF_A_STEP.items():
        steps, values = history.series[name]
        seconds[part] = float(of_lines[np.isin(logged, steps)] @ values)
    for name, part in IN_ALL.items():
        lines = history.series[name].values.sum() if name in history.series else 0.0
        seconds[part] = float(lines) + history.rest.get(name, 0.0)
    return {part: value for part, value in seconds.items() if value}


def time_in_words(history: History) -> str:
    """Returns such as 'computing 84.1%, compiling 15.9%', the largest first; '' where nothing was logged."""
    seconds = seconds_by_part(history)
    whole = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {value / whole:.1%}" for part, value in parts if value >= LEAST * whole)


def goodput_in_words(history: History) -> str:
    """Returns the part of the time since the run first began that went into steps; '' where it was not logged."""
    if "goodput" not in history.series:
        return ""
    return f"{history.series['goodput'].values[-1]:.1%} of the time since the run first began went into its steps"


def memory_in_words(history: History) -> str:
    """Returns the high-water mark of memory; '' where it was not logged."""
    if "memory_peak_bytes" not in history.series:
        return ""
    return f"{history.series['memory_peak_bytes'].values.max() / 1e9:.2f} GB at the most, on the fullest device"
