"""Collective operations of a compiled program, read from its HLO text."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
)


class Collective(NamedTuple):
    """One kind of exchange among groups of one size, in one execution of a program.

    Attributes:
      kind: HLO's name, one of `KINDS`.
      group: devices that exchange with each other.
      span: devices between the first and the last of a group, both included.
      count: executions, loops included.
      bytes: of all of them on one device: of the larger of what goes in and what comes out.
    """

    kind: str
    group: int
    span: int
    count: int
    bytes: int


def merge(found: Iterable[Collective]) -> list[Collective]:
    """Add up those of one kind among equal groups; the largest first."""
    sums: dict[tuple[str, int, int], Collective] = {}
    for each in found:
        key = each[:3]
        total = sums.get(key, Collective(*key, 0, 0))
        sums[key] = Collective(*key, total.count + each.count, total.bytes + each.bytes)
    return sorted(sums.values(), key=lambda each: (-each.bytes, each))


def collectives(text: str) -> list[Collective]:
    """Collectives of a program's text (`compiled.as_text()`), on CPU, GPU and TPU.

    What is in the body of a loop is counted as often as the loop runs: the text says so
    (`known_trip_count`), or on TPU the constant that the loop's condition compares with. A loop
    without either counts once. Exchanges within one device are left out.
    """
    text = re.sub(r"/\*.*?\*/", "", text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    num_devices = int(partitions[1]) if partitions else 1
    computations, entry = _computations(text)
    runs = dict.fromkeys(computations, 0)
    # A computation is written before those that call it.
    runs[entry] = 1
    found = []
    for name in reversed(computations):
        if not runs[name]:
            continue
        for instruction in computations[name]:
            for called, times in _calls(instruction, computations):
                runs[called] += runs[name] * times
            if each := _collective(instruction, num_devices):
                count = runs[name]
                found.append(each._replace(count=count, bytes=each.bytes * count))
    return merge(each for each in found if each.group > 1)


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    rest: str


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of every computation in the order of the text, and the entry's name."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)", line):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _calls(
    instruction: _Instruction, computations: dict[str, list[_Instruction]]
) -> Iterator[tuple[str, int]]:
    """Computations that an instruction runs, and how often."""
    if instruction.opcode.endswith(("-done", "-update")):
        return
    rest = instruction.rest
    if instruction.opcode == "while":
        names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", rest))
        known = re.search(r"known_trip_count[^\d]*(\d+)", rest)
        times = int(known[1]) if known else _trips(names["condition"], computations)
        yield names["body"], times
        return
    for name in re.findall(r"\b(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)", rest):
        yield name, 1
    for names in re.findall(r"branch_computations=\{(.*?)\}", rest):
        for name in re.findall(r"[\w.\-]+", names):
            yield name, 1


def _trips(condition: str, computations: dict[str, list[_Instruction]]) -> int:
    """The largest integer among the constants of a loop's condition, which counts from 0."""
    limits = []
    for instruction in computations[condition]:
        if instruction.opcode == "constant" and re.match(r"[su]\d+\[\]", instruction.shape):
            limits.append(int(re.match(r"-?\d+", instruction.rest)[0]))  # type: ignore[index]
        limits += [_trips(name, computations) for name, _ in _calls(instruction, computations)]
    return max(limits, default=1)


def _collective(instruction: _Instruction, num_devices: int) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    shapes = re.findall(r"([a-z]\w*)\[([\d,]*)\]", instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # Operands, then results; what a backend notes for itself are scalars behind them.
        shapes = [shape for shape in shapes if shape != ("u32", "")]
        shapes = shapes[len(shapes) // 2 :]
    sizes = [_num_bytes(*shape) for shape in shapes]
    devices = _group(instruction.rest, num_devices)
    num_bytes = sum(sizes) * (len(devices) if kind == "reduce-scatter" else 1)
    span = max(devices) - min(devices) + 1
    return Collective(kind, len(devices), span, 1, num_bytes)


def _num_bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
    return math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8


def _group(rest: str, num_devices: int) -> list[int]:
    """Devices of the first group of an instruction, in each of the notations there are."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        numbers = list(map(int, re.findall(r"\d+", pairs[1])))
        first = max(zip(numbers[::2], numbers[1::2], strict=True), key=lambda p: abs(p[0] - p[1]))
        return sorted(set(first))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return list(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, order, axes = (
            tuple(map(int, numbers.split(","))) if numbers else () for numbers in iota.groups()
        )
        devices = np.arange(math.prod(order)).reshape(order)
        return devices.transpose(axes or range(len(order))).reshape(shape)[0].tolist()
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'", mesh[2])
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return devices[tuple(slice(None) if name in axes else 0 for name in sizes)].ravel().tolist()
    return list(range(num_devices))
