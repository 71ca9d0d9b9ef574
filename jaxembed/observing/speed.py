"""The speed of the steps since the last line of metrics, and where their time went.

| field | meaning |
|---|---|
| step_s | seconds of a step, mean; compiling, evaluating and saving apart, a new program's first call included |
| data_wait_s | of these, waiting for a batch and for its way to the devices |
| compute_s | … for dispatch and results |
| host_s | … the rest: the loop's own code |
| compile_s | seconds of compiling, and of each new program's first call until its result is there, if any |
| eval_s, checkpoint_s | seconds of these, if any; most of saving goes on beside steps |
| pairs_per_s, tokens_per_s, padded_tokens_per_s | of all devices; real tokens, and places in rows |
| tokens_per_s_per_chip, padded_tokens_per_s_per_chip | the same by the devices of the mesh |
| mfu | model FLOPs (`models.flops`; a teacher's are left out) by the peak of all chips, where that is known |
| memory_peak_bytes | high-water mark, of the fullest device of process 0, on CPU of the process |
| goodput | see `goodput` |

Results of a step are read while the next one runs, so a line's time is that of its steps shifted by part of a step.
"""

import dataclasses

import jax

from jaxembed.data.loader import StepInfo
from jaxembed.hardware import chip_of
from jaxembed.models.flops import StepFlops
from jaxembed.observing.clock import STEP, Phase, beside
from jaxembed.observing.memory import peak_bytes
from jaxembed.observing.observer import Observer


@dataclasses.dataclass
class _Sums:
    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    padded: int = 0
    flops: float = 0.0


def peak_flops(mesh: jax.sharding.Mesh, dtype: str) -> float:
    """Returns operations a second of all chips of a mesh with products of that dtype; 0 where it is not known."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return chip.flops[dtype] * mesh.size if chip else 0.0


class Meter:
    """Measures from one written line to the next."""

    def __init__(self, observer: Observer, mesh: jax.sharding.Mesh, flops: StepFlops, peak: float) -> None:
        """Starts at zero; what no line has told of yet, such as saving after the stage before, goes into the first.

        Args:
          observer: of the run.
          mesh: its devices.
          flops: of the model.
          peak: operations a second of all devices; 0 where it is not known.
        """
        self._observer, self._mesh, self._flops, self._peak = observer, mesh, flops, peak
        self._sums = _Sums()

    def add(self, info: StepInfo) -> None:
        """Counts a step that is done."""
        sums = self._sums
        sums.steps += 1
        sums.pairs += info.pairs
        sums.tokens += info.real_tokens
        sums.padded += info.padded_tokens
        if self._peak:
            sums.flops += self._flops.training(info.lengths)

    def rates(self) -> dict[str, float]:
        """Returns the figures of steps; there must have been one."""
        return self._rates(self._observer.clock.since_lap())

    def lap(self) -> dict[str, float]:
        """Returns all figures since the last lap, and begins the next one."""
        since = self._observer.clock.lap()
        figures = (self._rates(since) if self._sums.steps else {}) | beside(since)
        figures["memory_peak_bytes"] = peak_bytes(self._mesh.local_devices)
        figures["goodput"] = self._observer.goodput.value()
        self._sums = _Sums()
        return figures

    def _rates(self, since: dict[Phase, float]) -> dict[str, float]:
        sums, chips = self._sums, self._mesh.size
        seconds = sum(since[phase] for phase in (*STEP, Phase.FIRST))
        figures = {
            "pairs_per_s": sums.pairs / seconds,
            "tokens_per_s": sums.tokens / seconds,
            "padded_tokens_per_s": sums.padded / seconds,
            "tokens_per_s_per_chip": sums.tokens / seconds / chips,
            "padded_tokens_per_s_per_chip": sums.padded / seconds / chips,
        }
        if self._peak:
            figures["mfu"] = sums.flops / seconds / self._peak
        figures["step_s"] = seconds / sums.steps
        parts = {"data_wait_s": Phase.DATA, "compute_s": Phase.COMPUTE, "host_s": Phase.HOST}
        return figures | {name: since[phase] / sums.steps for name, phase in parts.items()}
