"""Finds vector registers that the innermost loops of x86-64 object files keep on the stack.

python tools/hot_loops.py build/target_avx512.o
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$")
# What the time goes to: sums of products, in whole vectors.
HOT = re.compile(r"^v(dpbf16ps|pdpbusd|fn?m(add|sub)\w*p[sd])$")
VECTOR = re.compile(r"%[xyz]mm")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    name: str
    arguments: str

    def __str__(self) -> str:
        """As objdump prints it."""
        return f"{self.address:x}: {self.name} {self.arguments}"


@dataclass(frozen=True)
class Loop:
    """An innermost loop that sums products."""

    function: str
    instructions: list[Instruction]
    spills: list[Instruction]  # those that move vectors to or from the stack

    def has(self, name: str) -> bool:
        """Whether it has such an instruction."""
        return any(i.name == name for i in self.instructions)


Function = list[Instruction]
Graph = list[list[int]]


def functions_of(path: Path) -> dict[str, Function]:
    """The functions of an object file, by their names in C++."""
    command = ["objdump", "-d", "--demangle", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, Function] = {}
    for line in listing.splitlines():
        if found := FUNCTION.match(line):
            name = found[1]
            functions[name] = []
        elif found := INSTRUCTION.match(line):
            functions[name].append(Instruction(int(found[1], 16), found[2], found[3]))
    return functions


def successors(function: Function, i: int, index: dict[int, int]) -> list[int]:
    """Where execution may go on after instruction i."""
    name, following = function[i].name, [i + 1] if i + 1 < len(function) else []
    if name.startswith("ret"):
        return []
    if not name.startswith("j"):
        return following
    target = re.match(r"[0-9a-f]+\b", function[i].arguments)
    jump = [index[int(target[0], 16)]] if target and int(target[0], 16) in index else []
    return jump if name.startswith("jmp") else jump + following


def basic_blocks(function: Function) -> tuple[list[range], Graph]:
    """Runs of instructions without a jump in or out, and which may follow each of them."""
    index = {instruction.address: i for i, instruction in enumerate(function)}
    after = [successors(function, i, index) for i in range(len(function))]
    first = {0}
    for i, targets in enumerate(after):
        if targets != [i + 1]:
            first |= {i + 1, *targets}
    starts = sorted(i for i in first if i < len(function))
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(function)], strict=True)]
    number = {block.start: n for n, block in enumerate(blocks)}
    return blocks, [[number[i] for i in after[block[-1]]] for block in blocks]


def reverse_postorder(graph: Graph) -> list[int]:
    """Blocks that can be reached from the first, each before those that follow it."""
    order, seen, stack = [], {0}, [(0, iter(graph[0]))]
    while stack:
        block, rest = stack[-1]
        unseen = next((n for n in rest if n not in seen), None)
        if unseen is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(unseen)
            stack.append((unseen, iter(graph[unseen])))
    return order[::-1]


def dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block the blocks that every way to it goes through."""
    through = {block: set(order) for block in order}
    through[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = set.intersection(*(through[b] for b in before[block])) | {block}
            changed |= common != through[block]
            through[block] = common
    return through


def innermost_loops(graph: Graph) -> list[set[int]]:
    """Blocks of the natural loops that hold no other loop."""
    order = reverse_postorder(graph)
    before: dict[int, list[int]] = defaultdict(list)
    for block in order:
        for following in graph[block]:
            before[following].append(block)
    through = dominators(order, before)
    loops: dict[int, set[int]] = {}
    for block in order:
        for head in set(graph[block]) & through[block]:
            body, waiting = loops.setdefault(head, {head}), [block]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += before[inside]
    return [body for head, body in loops.items() if not any(h in body for h in loops if h != head)]


def spills_in(loop: Function, function: Function) -> list[Instruction]:
    """Moves of vectors to or from the stack. A store that no vector is read from is none."""
    has_frame = any(i.name == "mov" and i.arguments == "%rsp,%rbp" for i in function[:16])
    # With an index it is an array that is meant to lie there.
    slot = re.compile(r"[-\w]*\(%r[sb]p\)" if has_frame else r"[-\w]*\(%rsp\)")
    vectors = [i for i in function if VECTOR.search(i.arguments)]
    places = {i: place[0] for i in vectors if (place := slot.search(i.arguments))}
    read = {place for i, place in places.items() if not i.arguments.endswith(place)}
    return [i for i in loop if places.get(i) in read]


def hot_loops(path: Path) -> list[Loop]:
    """The innermost loops of an object file that sum products."""
    found = []
    for name, function in functions_of(path).items():
        if not any(HOT.match(i.name) for i in function):
            continue
        blocks, graph = basic_blocks(function)
        for body in innermost_loops(graph):
            loop = [function[i] for block in sorted(body) for i in blocks[block]]
            if any(HOT.match(i.name) for i in loop):
                found.append(Loop(name, loop, spills_in(loop, function)))
    return found


def describe(loop: Loop) -> str:
    """What is wrong with a loop."""
    name = re.sub(r"\(anonymous namespace\)::|art::cpu::|\(.*", "", loop.function)
    return (
        f"{name}: {len(loop.spills)} moves to or from the stack among"
        f" {len(loop.instructions)} instructions, such as {loop.spills[0]}"
    )


def main() -> int:
    """Print the loops with spills of the files that are given."""
    spilling = [loop for path in sys.argv[1:] for loop in hot_loops(Path(path)) if loop.spills]
    for loop in spilling:
        print(describe(loop))
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
