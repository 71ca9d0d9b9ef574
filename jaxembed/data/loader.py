"""From the plan to batches: texts dealt to bins, packed into rows of static shape, prepared ahead."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxembed.data.batch import Batch, Rows, Texts
from jaxembed.data.packing import deal, pack
from jaxembed.data.plan import Plan, StepPlan
from jaxembed.data.relation import relation
from jaxembed.data.rungs import choose_rungs, rung_for, worst_case_rows
from jaxembed.errors import UserError

_SAMPLED_STEPS = (32, 256)  # planned steps that the rungs are chosen from: least and most
_SAMPLED_TEXTS = 2**20  # and about so many texts, so that big batches do not delay the start


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the texts of a step lie. A text's number is pair · T + place in the pair.

    Attributes:
      texts_BinsxN: int64, the texts in each bin by slot: Tq queries, then the other texts of each pair; bin = shard ·
        M + micro-batch.
      rows_BinsxN: int64, the row of its bin that each of them lies in.
      starts_BinsxN: int64, its first place in that row.
      rows_needed: rows of the fullest bin.
    """

    texts_BinsxN: np.ndarray
    rows_BinsxN: np.ndarray
    starts_BinsxN: np.ndarray
    rows_needed: int


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What a step holds.

    Attributes:
      step: its number.
      pairs: B.
      real_tokens: of all texts, as the model reads them; a teacher's are not counted.
      padded_tokens: places in all rows, padding included.
      rows_per_bin: the rung.
      waste: the part of the places that is padding.
      lengths: integers [B, T], tokens of each text, 0 where there is none.
    """

    step: int
    pairs: int
    real_tokens: int
    padded_tokens: int
    rows_per_bin: int
    waste: float
    lengths: np.ndarray

    @property
    def counts(self) -> dict[str, float]:
        """What a line of metrics says of it."""
        counts = {"pairs": self.pairs, "tokens": self.real_tokens, "padded_tokens": self.padded_tokens}
        return {**counts, "padding_waste": self.waste}


def lay_out(step: StepPlan, n_bins: int, row_length: int) -> Layout:
    """Deals a step's pairs to bins and packs each bin, deterministically. All texts of a pair lie in one bin."""
    n_texts = step.lengths_BxT.shape[1]
    bin_of_pair = deal(step.lengths_BxT.sum(axis=1), n_bins)
    pair_BinsxQ = np.argsort(bin_of_pair, kind="stable").reshape(n_bins, -1)
    first_BinsxQ = pair_BinsxQ * n_texts
    documents = first_BinsxQ[:, :, None] + np.arange(1, n_texts)
    texts_BinsxN = np.concatenate([first_BinsxQ, documents.reshape(n_bins, -1)], axis=1)
    return pack_bins(texts_BinsxN, step, row_length)


def pack_bins(texts_BinsxN: np.ndarray, step: StepPlan, row_length: int) -> Layout:
    """Packs the texts of each bin into its rows, deterministically."""
    packed = [pack(lengths, row_length) for lengths in step.lengths_BxT.reshape(-1)[texts_BinsxN]]
    rows_BinsxN = np.stack([rows for rows, _ in packed])
    starts_BinsxN = np.stack([starts for _, starts in packed])
    return Layout(texts_BinsxN, rows_BinsxN, starts_BinsxN, int(rows_BinsxN.max()) + 1)


@dataclasses.dataclass(frozen=True)
class TeacherTexts:
    """The planned texts in the tokens of a teacher.

    Attributes:
      plan: over the teacher's caches. It names the same texts at every step, of other lengths.
      row_length: L', tokens.
      rungs: those of the run that is continued, as many as the model's; None where those are chosen too.
    """

    plan: Plan
    row_length: int
    rungs: Sequence[int] | None = None


class BatchBuilder:
    """Makes the batch of any step, the same on every process.

    Attributes:
      plan: which texts.
      shards: S, parts of the mesh that hold different rows.
      micro_batches: M.
      row_length: L, tokens.
      rungs: the numbers of rows that a bin may have, in ascending order.
      teacher: fills the rows of the same texts in a teacher's tokens, or None. A step takes the i-th rung of both
        builders, so that a teacher adds one shape to compile at the most.
    """

    def __init__(
        self,
        plan: Plan,
        shards: int,
        micro_batches: int,
        row_length: int,
        rungs: Sequence[int] | None = None,
        teacher: TeacherTexts | None = None,
    ) -> None:
        """Makes a builder.

        Args:
          plan: which texts each step holds.
          shards: S.
          micro_batches: M.
          row_length: L.
          rungs: those of the run that is continued; chosen from the first planned steps by default, then a teacher's
            too.
          teacher: the texts in a teacher's tokens; None where it reads the model's rows, or where there is none.

        Raises:
          UserError: the batch does not share out evenly, or a text does not fit in a row.
        """
        n_bins = shards * micro_batches
        if plan.batch_size % n_bins:
            raise UserError(
                f"config.batch_size = {plan.batch_size} is not a multiple of {shards} shards of the mesh "
                f"(data x fsdp x expert) times config.grad_cache = {micro_batches}: set a multiple of {n_bins}"
            )
        if plan.max_length > row_length:
            raise UserError(
                f"config.data.row_length = {row_length} does not hold the longest text, {plan.max_length} tokens: "
                "make rows longer or lower config.data.max_length"
            )
        self.plan = plan
        self.shards = shards
        self.micro_batches = micro_batches
        self.row_length = row_length
        teacher_rungs = teacher.rungs if teacher else None
        if rungs is None:
            rungs, teacher_rungs = self._choose_rungs(teacher)
        self.rungs = tuple(rungs)
        self.teacher: BatchBuilder | None = None
        if teacher:
            self.teacher = BatchBuilder(teacher.plan, shards, micro_batches, teacher.row_length, teacher_rungs)

    def layout(self, n: int) -> Layout:
        """Returns where the texts of step n lie."""
        return lay_out(self.plan.step(n), self.shards * self.micro_batches, self.row_length)

    def build(self, n: int, shards: Sequence[int] | None = None) -> tuple[Batch, StepInfo]:
        """Makes the batch of step n, of NumPy arrays.

        Args:
          n: the step.
          shards: whose rows to fill; all by default. The others' places in the arrays are left zero, memory that is
            never touched.

        Returns:
          Batch: rows [M, S · r, L], shard s owning rows s · r … (s + 1) · r - 1 of every micro-batch; queries [B] and
          documents [B, P + K] in the order (shard, micro-batch, slot), whole whatever `shards` is; and with a teacher
          that has rows of its own teacher_rows [M, S · r', L'], every text in the bin and slot that it has in rows.
        """
        step = self.plan.step(n)
        layout = lay_out(step, self.shards * self.micro_batches, self.row_length)
        filled = range(self.shards) if shards is None else shards
        rung, teacher_rows = self._rung_number(layout), None
        if self.teacher:
            read = self.teacher.plan.step(n)
            read_layout = pack_bins(layout.texts_BinsxN, read, self.teacher.row_length)
            rung = max(rung, self.teacher._rung_number(read_layout))
            teacher_rows = self.teacher._fill(read, read_layout, self.teacher.rungs[rung], filled)
        rows = self._fill(step, layout, self.rungs[rung], filled)
        batch = Batch(rows, *self._relate(step, layout), teacher_rows)
        real = int(step.lengths_BxT.sum(dtype=np.int64))
        padded = self.shards * self.micro_batches * self.rungs[rung] * self.row_length
        waste = 1 - real / padded
        return batch, StepInfo(n, self.plan.batch_size, real, padded, self.rungs[rung], waste, step.lengths_BxT)

    def _rung_number(self, layout: Layout) -> int:
        return self.rungs.index(rung_for(layout.rows_needed, self.rungs))

    def _choose_rungs(self, teacher: TeacherTexts | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the model's rungs and a teacher's, from what the first planned steps need."""
        texts = self.plan.batch_size * self.plan.texts_per_pair
        least, most = _SAMPLED_STEPS
        needed, read = [], []
        for n in range(min(max(_SAMPLED_TEXTS // texts, least), most)):
            layout = self.layout(n)
            needed.append(layout.rows_needed)
            if teacher:
                read.append(pack_bins(layout.texts_BinsxN, teacher.plan.step(n), teacher.row_length).rows_needed)
        texts_per_bin = texts // (self.shards * self.micro_batches)
        rungs = choose_rungs(needed, worst_case_rows(texts_per_bin, self.row_length, self.plan.max_length))
        if teacher is None:
            return rungs, ()
        worst_case = worst_case_rows(texts_per_bin, teacher.row_length, teacher.plan.max_length)
        return _couple(rungs, needed, read, worst_case)

    def _relate(self, step: StepPlan, layout: Layout) -> tuple[Texts, Texts]:
        """Returns the relation in the order (bin, slot)."""
        n_texts = self.plan.texts_per_pair
        n_pairs = layout.texts_BinsxN.shape[1] // n_texts
        order = layout.texts_BinsxN[:, :n_pairs].reshape(-1) // n_texts
        queries, documents = relation(self.plan, step, self.shards)
        return _reorder(queries, order), _reorder(documents, order)

    def _fill(self, step: StepPlan, layout: Layout, rung: int, shards: Sequence[int]) -> Rows:
        """Copies the tokens of these shards' texts into their rows."""
        shape = (self.micro_batches, self.shards * rung, self.row_length)
        tokens, segment_ids, positions, span_ids = (np.zeros(shape, np.int32) for _ in range(4))
        prompt_mask = np.zeros(shape, bool)

        shard, micro = np.divmod(np.arange(self.shards * self.micro_batches), self.micro_batches)
        bins = np.flatnonzero(np.isin(shard, shards))
        first_row_Bins = micro * shape[1] + shard * rung
        for s in shards:
            span_ids[:, s * rung : (s + 1) * rung] = -1

        number = layout.texts_BinsxN[bins]
        length = step.lengths_BxT.reshape(-1)[number]
        real = length > 0
        slot = np.nonzero(real)[1]
        start = ((first_row_Bins[bins, None] + layout.rows_BinsxN[bins]) * shape[2] + layout.starts_BinsxN[bins])[real]
        number, length = number[real], length[real]
        source, text = step.source_B[number // self.plan.texts_per_pair], step.texts_BxT.reshape(-1)[number]
        offset = self.plan.take(source, text, lambda cache, i: cache.offsets[i])
        n_prompt = self.plan.take(source, text, lambda cache, i: cache.prompt_lengths[i])

        def of_tokens(value: np.ndarray) -> np.ndarray:
            return np.repeat(value, length)

        position = np.arange(length.sum()) - of_tokens(np.cumsum(length) - length)
        place = of_tokens(start) + position
        tokens.reshape(-1)[place] = self.plan.take(
            of_tokens(source), of_tokens(offset) + position, lambda cache, i: cache.tokens[i].astype(np.int32)
        )
        segment_ids.reshape(-1)[place] = of_tokens(1 + number)
        positions.reshape(-1)[place] = position
        span_ids.reshape(-1)[place] = of_tokens(slot)
        prompt_mask.reshape(-1)[place] = position < of_tokens(n_prompt)
        return Rows(tokens, segment_ids, positions, span_ids, prompt_mask)


def prefetch(
    builder: BatchBuilder,
    first_step: int,
    last_step: int,
    buffer: int,
    shards: Sequence[int] | None = None,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[tuple[Batch, StepInfo]]:
    """Yields the batches of steps first_step … last_step - 1 in order, up to `buffer` of them prepared ahead.

    A thread makes them, from the first `next` on. An error in it comes out here as itself. Closing the iterator, or
    leaving it to be collected, ends the thread.

    Args:
      builder: makes a batch.
      first_step: to begin with.
      last_step: to stop before.
      buffer: batches to keep ready, at least 1.
      shards: whose rows to fill; all by default.
      place: lays a batch onto the devices; by default it stays with NumPy.
    """
    import grain  # slow to import, and the plan is of use without it

    def make(n: int) -> tuple[Batch, StepInfo]:
        batch, info = builder.build(n, shards)
        return place(batch), info

    steps = grain.MapDataset.range(first_step, last_step).map(make)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
    batches = iter(steps.to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()


def _reorder(texts: Texts, order: np.ndarray) -> Texts:
    return Texts(**{field.name: getattr(texts, field.name)[order] for field in dataclasses.fields(texts)})


def _couple(
    rungs: Sequence[int], needed: Sequence[int], teacher_needed: Sequence[int], teacher_worst_case: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Gives each of the model's rungs one of a teacher's, as lengths in the two kinds of tokens go together.

    A teacher's rung is the most rows that it needed in the steps that fit the model's. The rung that holds all of these
    steps has headroom for both, and the last one holds any step; the model's may be one rung, and then comes twice.

    Args:
      rungs: the model's.
      needed: rows of the model's fullest bin in each of some planned steps.
      teacher_needed: rows of the teacher's.
      teacher_worst_case: rows that no step exceeds.
    """
    top, most = choose_rungs(teacher_needed, teacher_worst_case, max_rungs=2)[0], max(needed)
    seen = rungs[:-1] if len(rungs) > 1 and rungs[-2] >= most else rungs
    of_seen = [
        top if rung >= most else max(rows for n, rows in zip(needed, teacher_needed) if n <= rung) for rung in seen
    ]
    pairs = dict.fromkeys([*zip(seen, of_seen), (rungs[-1], teacher_worst_case)])
    model, teacher = zip(*pairs)
    return model, teacher
