"""What a compiled program does, read from its text: products, memory traffic, collectives, with loops counted in full.

XLA's own cost analysis counts the body of a loop once, and says nothing of what travels. The grammar is that of
openxla.org/xla/operation_semantics; text of jax 0.10's CPU, GPU and TPU compilers was read.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}  # of others, the digits in their name
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_WORK = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "opt-barrier",
}
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
# Products of rows sorted by expert: XLA's own for TPUs, and megablox (both are kernels).
_GROUPED = re.compile(r"ragged-dot|\btgmm\b|\bgmm\b")
_EVEN = re.compile(r'op_name="[^"]*/evenly_(\d+)/while"')  # `jaxembed.models.layers.blocks.evenly`
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_KERNEL_PRODUCTS = (
    ("preprocess", 0),
    ("dkv", 4),
    ("dq", 3),
    ("backward", 5),
    ("bwd", 5),
    ("forward", 2),
    ("fwd", 2),
    ("splash", 2),
)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a program; `near` means in a memory on the chip that is not its main memory."""

    dtype: str
    shape: tuple[int, ...]
    near: bool = False

    @property
    def size(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in bytes, without padding."""
        bits = _BITS.get(self.dtype) or int((re.search(r"\d+", self.dtype) or [0])[0])
        return self.size * bits // 8

    @property
    def far_bytes(self) -> int:
        """The bytes that reading or writing it moves to or from main memory."""
        return 0 if self.near else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program: the arrays that it makes, of which operands, how."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # attributes, metadata; of a parameter its number, of a constant its value
    root: bool

    def called(self, word: str) -> str | None:
        """Returns the computation that it names as `word`."""
        return next((name for key, name in _CALLED.findall(self.rest) if key == word), None)


@dataclasses.dataclass(frozen=True)
class Collective:
    """What each chip sends to others in one kind of place of the program.

    Attributes:
      kind: such as 'all-gather'.
      operand_bytes: of a chip's arrays that go in, once.
      group: the chips that take part, one group as an example, as numbers in the order of the mesh. For a permutation:
        one that sends and who gets it.
      hidden: whether chips may go on computing meanwhile.
      count: how often in a step.
    """

    kind: str
    operand_bytes: int
    group: tuple[int, ...]
    hidden: bool
    count: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a chip sends, once, where its group passes blocks round in a ring."""
        n = len(self.group)
        factors = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        return self.operand_bytes * factors.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Work:
    """One instruction's work on each chip.

    Attributes:
      flops: operations of matrix products.
      dtype: what these multiply, in XLA's words; '' for none.
      batched: whether they are many small products at once, as in attention.
      bytes: to and from main memory.
      count: how often in a step.
    """

    flops: float
    dtype: str
    batched: bool
    bytes: int
    count: int


_NO_PRODUCT = 0.0, "", False  # operations, dtype, whether batched


class Program:
    """A compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      chips: how many it is for.
      row_length: tokens in a row, by which attention kernels are read.
    """

    def __init__(self, text: str, chips: int, row_length: int) -> None:
        self.computations, self.entry = _parse(text)
        self.chips, self.row_length = chips, row_length
        self._uncounted: set[str] = set()
        self._even: set[str] = set()

    @functools.cached_property
    def work(self) -> list[Work]:
        """What is computed, instruction by instruction."""
        return list(self._work(self.entry, 1))

    @property
    def uncounted_loops(self) -> int:
        """How many loops, met so far, do not say how often they run; they count once."""
        return len(self._uncounted)

    @property
    def even_loops(self) -> int:
        """How many loops, met so far, are as long as the data say; they count as where tokens spread evenly."""
        return len(self._even)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """What travels."""
        return list(self._collectives(self.entry, 1))

    def _steps(self, name: str, count: int) -> Iterator[tuple[Instruction, int, list[tuple[str, int]]]]:
        """Yields a computation's instructions, how often each runs, and the computations that it runs, how often."""
        for line in self.computations[name].values():
            if line.opcode == "while":
                trips = count * self._trips(line)
                yield line, count, [(line.called("body"), trips), (line.called("condition"), trips)]
            elif line.opcode == "conditional":
                yield line, count, [(self._largest(_branches(line)), count)]
            else:
                inner = line.called("calls") or (line.called("to_apply") if line.opcode == "call" else None)
                yield line, count, [(inner, count)] if inner else []

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a loop's body runs: what XLA says, else the bound that its counter, from 0, is held to."""
        if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(said[1])
        lines = self.computations[loop.called("condition")]
        root = next(line for line in lines.values() if line.root)
        bounds = [lines[name].rest for name in root.operands if lines[name].opcode == "constant"]
        if root.opcode == "compare" and "direction=LT" in root.rest and bounds:
            return int(bounds[0])
        if even := _EVEN.search(loop.rest):
            self._even.add(loop.called("body"))
            return int(even[1])
        self._uncounted.add(loop.called("body"))
        return 1

    def _largest(self, names: Sequence[str]) -> str:
        return max(names, key=lambda name: sum(w.count * (w.flops + w.bytes) for w in self._work(name, 1)))

    def _work(self, name: str, count: int) -> Iterator[Work]:
        lines = self.computations[name]
        for line, times, inner in self._steps(name, count):
            if line.opcode == "fusion":
                called = self.computations[inner[0][0]]
                products = [product for product in self._products(inner[0][0]) if product[0]]
                flops = sum(flops for flops, *_ in products)
                _, dtype, batched = max(products, default=_NO_PRODUCT)
                yield Work(flops, dtype, batched, self._fusion_bytes(line, lines, called), times)
            elif inner:
                for called, often in inner:
                    yield from self._work(called, often)
            elif line.opcode not in _NO_WORK and not line.opcode.endswith("-done"):
                yield Work(*self._product(line, lines), _bytes(line, lines), times)

    def _products(self, name: str) -> Iterator[tuple[float, str, bool]]:
        lines = self.computations[name]
        for line in lines.values():
            yield self._product(line, lines)
            if line.opcode == "fusion":
                yield from self._products(line.called("calls"))

    def _product(self, line: Instruction, lines: dict[str, Instruction]) -> tuple[float, str, bool]:
        """Returns a matrix product's or attention kernel's operations, what dtype it multiplies, whether batched."""
        if line.opcode not in ("dot", "convolution", "custom-call"):
            return _NO_PRODUCT
        arrays = [array for name in line.operands if name in lines for array in lines[name].arrays]
        if line.opcode == "custom-call" and not re.search(r'custom_call_target="[^"]*(gemm|matmul)', line.rest):
            return self._kernel(line, arrays)
        left, right, out = arrays[0], arrays[1], line.arrays[0]
        batch = _batch(line, left, right, out)
        # [b, m, k] · [b, k, n] → [b, m, n]: the three sizes' product is b³ m² k² n².
        return 2 * math.sqrt(left.size * right.size * out.size / batch), left.dtype, batch > 1

    def _kernel(self, line: Instruction, arrays: Sequence[Array]) -> tuple[float, str, bool]:
        called = line.name + "".join(re.findall(r'op_name="([^"]*)"', line.rest))
        if _GROUPED.search(called):
            return _grouped(line, arrays)
        states = [a for a in arrays if len(a.shape) >= 3 and self.row_length in a.shape]
        products = next((n for word, n in _KERNEL_PRODUCTS if word in called), 0)
        if not states or not products:
            return _NO_PRODUCT
        return 2.0 * products * states[0].size * self.row_length, states[0].dtype, True

    def _fusion_bytes(self, line: Instruction, lines: dict[str, Instruction], inner: dict[str, Instruction]) -> int:
        """Returns what a fusion reads and writes: of an array that it cuts from, the cut alone."""
        total = 0
        for parameter in inner.values():
            if parameter.opcode == "parameter":
                operand = lines[line.operands[int(parameter.rest)]].arrays[0]
                total += 0 if operand.near else min(operand.bytes, self._read(parameter.name, inner))
        root, inner = self._written(next(user for user in inner.values() if user.root), inner)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for array, part in zip(line.arrays, parts):
            part, at = self._written(part, inner)
            cut = part.opcode == "dynamic-update-slice"
            total += 0 if array.near else at[part.operands[1]].arrays[0].bytes if cut else array.bytes
        return total

    def _read(self, name: str, inner: dict[str, Instruction]) -> int:
        """Returns how many bytes of an array a fusion's instructions read, also those of fusions in it."""
        total = 0
        for user in inner.values():
            for place in (i for i, operand in enumerate(user.operands) if operand == name):
                if user.opcode == "fusion":
                    called = self.computations[user.called("calls")]
                    given = (x for x in called.values() if x.opcode == "parameter" and int(x.rest) == place)
                    total += self._read(next(given).name, called)
                elif user.opcode == "bitcast":
                    total += self._read(user.name, inner)
                elif user.opcode in ("dynamic-slice", "gather", "slice") and place == 0:
                    total += user.arrays[0].bytes
                elif user.opcode != "dynamic-update-slice" or place:  # written in place; the update counts as output
                    total += inner[name].arrays[0].bytes
        return total

    def _written(self, line: Instruction, inner: dict[str, Instruction]) -> tuple[Instruction, dict[str, Instruction]]:
        """Returns the instruction that makes what this one passes on, and the computation that it stands in."""
        while line.opcode in ("bitcast", "fusion"):
            if line.opcode == "bitcast":
                line = inner[line.operands[0]]
            else:
                inner = self.computations[line.called("calls")]
                line = next(x for x in inner.values() if x.root)
        return line, inner

    def _collectives(self, name: str, count: int, started: bool = False) -> Iterator[Collective]:
        lines = self.computations[name]
        for line, times, inner in self._steps(name, count):
            kind = line.opcode.removesuffix("-start")
            if kind in _KINDS:
                operands = sum(array.bytes for operand in line.operands for array in lines[operand].arrays)
                # How XLA's compiler for TPUs writes it: a sum of which each chip keeps its slice.
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                group = self._group(line)
                if len(group) > 1:
                    alone = line.opcode.endswith("-start") and '"is_sync":true' not in line.rest
                    yield Collective(kind, operands, group, started or alone, times)
            elif line.opcode != "fusion":
                for called, often in inner:
                    yield from self._collectives(called, often)
            elif inner[0][0].startswith("all-reduce-scatter") or self._starts(inner[0][0]):
                yield from self._collectives(*inner[0], started=self._starts(inner[0][0]))

    def _starts(self, name: str) -> bool:
        """Whether a fusion starts a collective. Those that go on with it, or wait for it, name it again."""
        return any("AsyncCollectiveStart" in line.rest for line in self.computations[name].values())

    def _group(self, line: Instruction) -> tuple[int, ...]:
        """Returns one of the groups of chips that a collective joins."""
        if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line.rest):
            return int(pairs[1]), int(pairs[2])
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line.rest):
            return tuple(map(int, listed[1].split(",")))
        if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", line.rest):
            return tuple(_iota(iota[2], iota[3], _sizes(iota[1])[-1]))
        if named := re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? ?\{{(.*?)\}}", line.rest):
            mesh, dims, order, chosen = named.groups()
            numbers = list(_iota(dims, order, self.chips)) if dims else range(self.chips)
            return tuple(numbers[place] for place in _along_axes(mesh, chosen))
        if "replica_groups={}" in line.rest:
            return tuple(range(self.chips))
        raise ValueError(f"groups of a collective in a form that is not known: {line.rest[:200]}")


def _sizes(listed: str) -> tuple[int, ...]:
    return tuple(map(int, listed.split(",")))


def _iota(dims: str, order: str | None, n: int) -> Iterator[int]:
    """Yields the first n numbers of 0, 1, …, laid out in `dims`, transposed by `order` and read in turn."""
    sizes = _sizes(dims)
    axes = _sizes(order) if order else tuple(range(len(sizes)))
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    for place in range(n):
        number = 0
        for axis in reversed(axes):
            place, digit = divmod(place, sizes[axis])
            number += digit * strides[axis]
        yield number


def _along_axes(mesh: str, chosen: str) -> tuple[int, ...]:
    """Returns the first chips along axes of a mesh: "'a'=2,'b'=4" and "'b':(1)2", the outer half of b, make 0, 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    places = [0]
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen):
        names = list(sizes)
        behind = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
        n = int(size or sizes[name])
        stride = behind * sizes[name] // (int(before or 1) * n)
        places = [place + i * stride for place in places for i in range(n)]
    return tuple(places)


def _bytes(line: Instruction, lines: dict[str, Instruction]) -> int:
    """Returns what an instruction outside of fusions moves to and from main memory."""
    operands = [array for name in line.operands if name in lines for array in lines[name].arrays]
    out = sum(array.far_bytes for array in line.arrays)
    match line.opcode:
        case "dynamic-slice" | "gather" | "slice":
            return 2 * out
        case "dynamic-update-slice":
            return 2 * operands[1].far_bytes
        case "scatter":
            return 2 * operands[-1].far_bytes
        case "copy-start":
            return sum(array.far_bytes for array in line.arrays[:2])
        case "slice-start":  # its operand, what is cut from it
            return line.arrays[1].bytes + line.arrays[1].far_bytes
        case "iota" | "broadcast" | "rng-bit-generator":
            return out
        case opcode if opcode.removesuffix("-start") in _KINDS:
            return 2 * sum(array.far_bytes for array in operands)
        case _:
            return out + sum(array.far_bytes for array in operands)


def _grouped(line: Instruction, arrays: Sequence[Array]) -> tuple[float, str, bool]:
    """Returns the product of rows sorted by expert with their experts' kernels, or the sums of rows times rows."""
    factors = [array for array in arrays if len(array.shape) >= 2]
    if len(factors) != 2:  # what a kernel is to know of the groups
        return _NO_PRODUCT
    left, right, out = *factors, line.arrays[0]
    n_experts = next(array.shape[0] for array in (left, right, out) if len(array.shape) == 3)
    return 2 * math.sqrt(left.size * right.size * out.size / n_experts), left.dtype, False


def _batch(line: Instruction, left: Array, right: Array, out: Array) -> int:
    """Returns b, the product of the dimensions that both factors and the result have."""
    if said := re.search(r'lhs_batch_dim(?:s=\{|ensions":\[)([\d,"]+)', line.rest):
        return math.prod(left.shape[int(dim)] for dim in re.findall(r"\d+", said[1]))
    if labels := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest):  # a batch is a spatial dimension of all three
        shared = [c for c in labels[1] if c.isdigit() and c in labels[2] and c in labels[3]]
        sizes = [tuple(a.shape[word.index(c)] for a, word in zip((left, right, out), labels.groups())) for c in shared]
        return math.prod(a for a, b, c in sizes if a == b == c)
    return 1


def _branches(line: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    return [line.called("true_computation"), line.called("false_computation")]


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Splits a program's text into computations: name → instructions by name. Also returns the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, lines = "", {}
    for text_line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", text_line):
            computations[head[2]] = lines = {}
            entry = head[2] if head[1] else entry
        elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", text_line):
            line = _instruction(match[2], text_line[match.end() :], bool(match[1]))
            lines[line.name] = line
    return computations, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """Reads 'TYPE opcode(operands), attributes'."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    opcode, _, _ = text.partition("(")
    end = _closing(text, len(opcode))
    inside, rest = text[len(opcode) + 1 : end - 1], text[end:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    arrays = tuple(
        Array(dtype, tuple(map(int, filter(None, sizes.split(",")))), "S(" in (layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(kind)
    )
    return Instruction(name, opcode, arrays, operands, inside if opcode in ("parameter", "constant") else rest, root)


def _closing(text: str, start: int) -> int:
    """Returns the place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced: {text[:80]}")
