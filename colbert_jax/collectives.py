"""What devices send each other in a step, read out of the compiled program's text (HLO).

XLA's own counts name no kinds and count the body of a loop once. Here each collective is counted as
often as the loops around it turn, and its bytes are those on the wire.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

# Bytes of an element; dtypes that are not here (tokens, opaque values) are not sent.
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
ITEM_BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of `KINDS`.
      group: devices that take part together.
      bytes: on the wire for one chip, each time it runs.
      count: how often a step runs it.
      chain: XLA for TPU lays an asynchronous collective over several fusions in a row and repeats
        it in each; this names the chain, and is empty elsewhere.
    """

    kind: str
    group: int
    bytes: float
    count: int = 1
    chain: str = ""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a step.

    Attributes:
      collectives: each of the program's once, with its count.
      unknown_loops: loops around collectives whose number of turns the text does not tell; they
        are counted as one turn.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: int = 0

    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes that one chip sends in a step, by kind."""
        return {
            kind: sum(c.bytes * c.count for c in self.collectives if c.kind == kind)
            for kind in KINDS
        }

    @property
    def bytes(self) -> float:
        """Bytes that one chip sends in a step."""
        return sum(self.bytes_by_kind().values())


def wire_bytes(kind: str, result_bytes: float, group: int) -> float:
    """Bytes that one chip sends for one collective, by the ring algorithms (which are optimal).

    With n devices and an array of B bytes: an all-gather to B sends B (n-1)/n, a reduce-scatter of
    B likewise, an all-reduce is one after the other, an all-to-all of B keeps its own n-th part,
    and a permutation sends B. (Thakur et al., Optimization of Collective Communication Operations
    in MPICH, 2005.)

    Args:
      kind: one of `KINDS`.
      result_bytes: of the result on one device, from which B follows.
      group: n.
    """
    others = (group - 1) / group
    return {
        "all-gather": result_bytes * others,
        "reduce-scatter": result_bytes * group * others,
        "all-reduce": 2 * result_bytes * others,
        "collective-permute": result_bytes,
        "all-to-all": result_bytes * others,
    }[kind]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """`name = type opcode(operands), attributes` of the text."""

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str

    def calls(self, key: str) -> str | None:
        """The computation named by an attribute such as `body=%name`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def operand_names(self) -> list[str]:
        """The names of the operands, in order."""
        return re.findall(r"%([\w.\-]+)", self.operands)


_Program = dict[str, list[_Instruction]]


def read_traffic(hlo: str) -> Traffic:
    """Reads a compiled program's collectives.

    Args:
      hlo: `compiled.as_text()`, of any platform.
    """
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    program, entry = _parse(hlo)
    return _traffic(program, entry, int(partitions.group(1)) if partitions else 1, {})


def _parse(hlo: str) -> tuple[_Program, str]:
    """The computations of the text by name, and the name of the one that runs first."""
    program: _Program = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = head.group(2)
            program[current] = []
            entry = current if head.group(1) else entry
        elif current and (found := _INSTRUCTION.match(line)):
            program[current].append(_instruction(found.group(1), found.group(2)))
    return program, entry


def _instruction(name: str, rest: str) -> _Instruction:
    """Splits what stands right of `name =`."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return _Instruction(
        name, result, rest[:opening], rest[opening + 1 : closing - 1], rest[closing:]
    )


def _closing(text: str, opening: int) -> int:
    """The position behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for position in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return len(text)


def _traffic(program: _Program, name: str, partitions: int, seen: dict[str, Traffic]) -> Traffic:
    """The collectives of a computation and of all that it calls."""
    if name not in seen:
        found: list[Collective] = []
        unknown = 0
        for instruction in program.get(name, []):
            if collective := _collective(instruction, program, partitions):
                found.append(collective)
                continue
            for inner, times in _called(instruction, program, name, partitions, seen):
                if inner.collectives:
                    unknown += inner.unknown_loops + (times is None)
                    found += [
                        dataclasses.replace(c, count=c.count * (times or 1))
                        for c in inner.collectives
                        if not c.chain or c.chain not in {other.chain for other in found}
                    ]
        seen[name] = Traffic(tuple(found), unknown)
    return seen[name]


def _called(
    instruction: _Instruction,
    program: _Program,
    parent: str,
    partitions: int,
    seen: dict[str, Traffic],
) -> Iterator[tuple[Traffic, int | None]]:
    """What an instruction runs, and how often; None where that is not known.

    Of a conditional's branches the one that sends most is taken.
    """
    if instruction.opcode == "while":
        body = instruction.calls("body") or ""
        yield (
            _traffic(program, body, partitions, seen),
            _trip_count(instruction, program, parent),
        )
    elif instruction.opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed.group(1)) if listed else []
        names += [n for n in map(instruction.calls, ("true_computation", "false_computation")) if n]
        branches = [_traffic(program, name, partitions, seen) for name in names]
        yield max(branches, key=lambda branch: branch.bytes), 1
    elif instruction.opcode in ("call", "fusion", "async-start"):
        # The updates and the end of an asynchronous computation name it once more.
        inner = instruction.calls("calls") or instruction.calls("to_apply") or ""
        yield _traffic(program, inner, partitions, seen), 1


def _trip_count(loop: _Instruction, program: _Program, parent: str) -> int | None:
    """How often a loop's body runs: as XLA notes it, or by the condition `counter < constant`.

    JAX's loops with a fixed number of turns count from 0 by 1.
    """
    if noted := re.search(r'known_trip_count":\s*\{"n":\s*"(\d+)"', loop.attributes):
        return int(noted.group(1))
    condition = {i.name: i for i in program.get(loop.calls("condition") or "", [])}
    start = {i.name: i for i in program[parent]}
    compares = [i for i in condition.values() if i.opcode in ("compare", "fusion")]
    for compare in compares:
        for name in compare.operand_names():
            if (limit := _constant(name, condition, loop, start)) is not None:
                direction = re.search(r"direction=(\w+)", compare.attributes)
                return limit + (direction is not None and direction.group(1) == "LE")
    return None


def _constant(
    name: str,
    condition: dict[str, _Instruction],
    loop: _Instruction,
    start: dict[str, _Instruction],
) -> int | None:
    """The constant that a loop's condition compares with; it may come in with the loop's state."""
    instruction = condition.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return _number(instruction)
    if instruction.opcode == "copy":
        return _constant(instruction.operand_names()[0], condition, loop, start)
    if instruction.opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", instruction.attributes)
    state = start.get(loop.operand_names()[0])
    if index is None or state is None or state.opcode != "tuple":
        return None
    element = start.get(state.operand_names()[int(index.group(1))])
    while element is not None and element.opcode == "copy":
        element = start.get(element.operand_names()[0])
    # The counter's own start is 0, which is no limit.
    return (_number(element) or None) if element is not None else None


def _number(instruction: _Instruction) -> int | None:
    whole = re.fullmatch(r"-?\d+", instruction.operands.strip())
    return int(whole.group()) if whole and instruction.opcode == "constant" else None


def _collective(instruction: _Instruction, program: _Program, partitions: int) -> Collective | None:
    """The collective that an instruction is, if it is one.

    Only the start of an asynchronous one counts. XLA for TPU writes a reduce-scatter as a fusion of
    an all-reduce and the slice of its result that is kept.
    """
    opcode = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    if opcode in KINDS:
        group = _group(instruction, partitions)
        size = _result_bytes(instruction)
        chain = re.search(r'chain_id="([^"]*)"', instruction.attributes)
        sent = wire_bytes(opcode, size, group) if group > 1 else 0.0
        return Collective(opcode, group, sent, chain=chain.group(1) if chain else "")
    called = instruction.calls("calls") or ""
    if instruction.opcode == "fusion" and called.startswith("all-reduce-scatter"):
        inner = next(i for i in program[called] if i.opcode == "all-reduce")
        group, size = _group(inner, partitions), _result_bytes(inner)
        return Collective("reduce-scatter", group, size * (group - 1) / group)
    return None


def _group(instruction: _Instruction, partitions: int) -> int:
    """How many devices take part together."""
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
        return len(re.findall(r"\{\d+,\d+", pairs.group(0))) if pairs else 0
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes):
        return len(listed.group(1).split(","))
    if short := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", instruction.attributes):
        return int(short.group(2))
    return partitions


def _result_bytes(instruction: _Instruction) -> int:
    """Bytes of the result on one device; a start's tuple holds operands first, then results."""
    kind = instruction.type
    if instruction.opcode.endswith("-start") and not instruction.opcode.startswith("all-reduce"):
        kind = _elements(kind)[1]
    arrays = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", kind))
    return sum(
        ITEM_BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in arrays
    )


def _elements(kind: str) -> list[str]:
    """The elements of a tuple's type."""
    elements, depth = [""], 0
    for letter in kind[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += letter
    return elements
