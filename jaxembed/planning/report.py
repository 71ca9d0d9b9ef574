"""What a plan says: tables for a person, a dict for a program."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxembed.errors import UserError
from jaxembed.planning.compiling import Compiled, Load
from jaxembed.planning.hlo import Program
from jaxembed.planning.roofline import Estimate

# Figures of a program, which only a step that compiles has.
TIMED = (
    "collective_bytes_per_step",
    "collectives",
    "hardware_flops_per_chip",
    "step_seconds_estimate",
    "seconds",
    "pairs_per_s_estimate",
    "tokens_per_s_estimate",
    "mfu_estimate",
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage's step for one shape of batches.

    Attributes:
      stage: its name, '' in a run without stages.
      load: the batches.
      pairs: in a batch.
      compiled: what XLA said.
      chips: how many. chip_bytes: of a chip's memory, those that programs may use; 0 where nobody knows.
      peak_flops: operations a second of a chip, at most.
      model_flops: of a step on all chips, by the model's own formula.
      program, estimate: None where the step does not fit.
    """

    stage: str
    load: Load
    pairs: int
    compiled: Compiled
    chips: int
    chip_bytes: int
    peak_flops: float
    model_flops: float
    program: Program | None
    estimate: Estimate | None

    @property
    def missing(self) -> int:
        """Bytes that a chip lacks; 0 where the step fits."""
        return self.compiled.missing or max(0, self.compiled.used - self.chip_bytes if self.chip_bytes else 0)

    @property
    def title(self) -> str:
        """What it is called."""
        return f"{self.stage}: {self.load.name}" if self.stage else self.load.name

    @property
    def sent(self) -> dict[str, tuple[int, float, float]]:
        """By kind of collective: how many a chip takes part in in a step, bytes that it sends, of these hidden ones."""
        totals: dict[str, tuple[int, float, float]] = defaultdict(lambda: (0, 0.0, 0.0))
        for c in self.program.collectives if self.program else ():
            count, sent, hidden = totals[c.kind]
            bytes_ = c.count * c.sent_bytes
            totals[c.kind] = count + c.count, sent + bytes_, hidden + bytes_ * c.hidden
        return dict(totals)

    def figures(self) -> dict[str, Any]:
        """Returns its figures, JSON-able. Bytes, FLOPs of the hardware and seconds are a chip's; others the step's."""
        said: dict[str, Any] = {
            "stage": self.stage,
            "batches": self.load.name,
            "rows": self.load.rows,
            "row_length": self.load.length,
            "bytes_per_chip": self.compiled.used,
            "bytes": self.compiled.bytes,
            "chip_bytes": self.chip_bytes,
            "fits": not self.missing,
            "missing_bytes": self.missing,
            "model_flops_per_step": self.model_flops,
            "compile_seconds": round(self.compiled.seconds, 1),
        } | dict.fromkeys(TIMED)  # null where the step does not compile
        if self.program and self.estimate:
            e = self.estimate
            said |= {
                "collective_bytes_per_step": round(sum(sent for _, sent, _ in self.sent.values())),
                "collectives": {kind: {"count": n, "bytes": round(sent)} for kind, (n, sent, _) in self.sent.items()},
                "hardware_flops_per_chip": self.hardware_flops,
                "step_seconds_estimate": e.step,
                "seconds": {"products": e.products, "memory": e.memory, "network": e.network, "exposed": e.exposed},
                "pairs_per_s_estimate": self.pairs / e.step,
                "tokens_per_s_estimate": int(self.load.lengths.sum()) / e.step,
                "mfu_estimate": self.mfu,
            }
        return said

    @property
    def hardware_flops(self) -> float:
        """Operations of matrix products that a chip does in a step, padding and recomputation included."""
        return sum(work.count * work.flops for work in self.program.work)

    @property
    def mfu(self) -> float:
        """The part of the chips' peak that the model's own operations take."""
        return self.model_flops / (self.chips * self.peak_flops * self.estimate.step)


def tables(plans: Sequence[Planned], title: str, assumptions: Sequence[str]) -> Group:
    """Returns what a person reads: a column for each shape of batches, and below what was assumed."""
    table = Table(title=title, title_justify="left")
    table.add_column("on each chip")
    for plan in plans:
        table.add_column(plan.title, justify="right")

    def row(name: str, *cells: str, end: bool = False) -> None:
        table.add_row(name, *cells, end_section=end)

    row("rows x tokens of a micro-batch, all chips", *(f"{p.load.rows:,} x {p.load.length:,}" for p in plans), end=True)
    for part in max((p.compiled.bytes for p in plans), key=len):
        row(f"{part}, GB", *(_gigabytes(p.compiled.bytes[part]) if part in p.compiled.bytes else "?" for p in plans))
    row("in all, GB", *(_gigabytes(p.compiled.used) for p in plans))
    row("the chip's, GB", *(_gigabytes(p.chip_bytes) if p.chip_bytes else "?" for p in plans))
    row("fits", *(f"no: {_gigabytes(p.missing)} missing" if p.missing else "yes" for p in plans), end=True)

    def timed(name: str, figure: Callable[[Planned], str], end: bool = False) -> None:
        row(name, *(figure(p) if p.estimate else "?" for p in plans), end=end)

    for kind in sorted({kind for p in plans for kind in p.sent}):
        timed(f"{kind}: number, sent MB", lambda p, kind=kind: _sent(p.sent.get(kind, (0, 0.0, 0.0))))
    timed("collectives' MB that may be hidden", lambda p: f"{sum(h for *_, h in p.sent.values()) / 1e6:,.1f}", True)
    row("model TFLOP", *(f"{p.model_flops / p.chips / 1e12:,.3f}" for p in plans))
    timed("products' TFLOP, recomputed and padding too", lambda p: f"{p.hardware_flops / 1e12:,.3f}", True)
    for name in ("products", "memory", "network"):
        timed(f"{name} alone, s", lambda p, name=name: f"{getattr(p.estimate, name):,.4f}")
    timed("a step, s", lambda p: f"{p.estimate.step:,.4f}")
    timed("MFU", lambda p: f"{p.mfu:.1%}")
    timed("pairs/s, all chips", lambda p: f"{p.pairs / p.estimate.step:,.0f}")
    lines = Text("Assumed:\n" + "\n".join(f"- {line}" for line in assumptions))
    return Group(table, lines)


def _sent(of_kind: tuple[int, float, float]) -> str:
    number, sent, _ = of_kind
    return f"{number:,}, {sent / 1e6:,.1f}"


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.3f}" if n < 1e9 else f"{n / 1e9:,.2f}"


def summary(plans: Sequence[Planned]) -> dict[str, Any]:
    """Returns the figures of a plan: memory of the largest program, times of the last one, all of them behind."""
    largest = max(plans, key=lambda plan: plan.compiled.used)
    of_memory = ("bytes_per_chip", "bytes", "chip_bytes")
    said = plans[-1].figures() | {name: largest.figures()[name] for name in of_memory}
    missing = max(plan.missing for plan in plans)
    return said | {"fits": not missing, "missing_bytes": missing, "programs": [plan.figures() for plan in plans]}


def require_fitting(plans: Sequence[Planned], where: str) -> None:
    """Raises UserError where a step does not fit, with the bytes missing and what helps."""
    worst = max(plans, key=lambda plan: plan.missing)
    if not worst.missing:
        return
    held = sum(worst.compiled.bytes[part] for part in ("parameters", "optimizer", "given"))
    weights = "the model and its optimizer are most of it: a larger config.mesh.fsdp, or config.model.lora"
    states = "activations are most of it: more micro-batches (config.grad_cache), config.model.remat = 'full'"
    raise UserError(
        f"does not fit {where}: {worst.title}: missing {worst.missing / 1e9:,.2f} GB on each chip; "
        f"{weights if 2 * held > worst.compiled.used else states}, or more chips"
    )
