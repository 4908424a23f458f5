"""The house as its imports draw it: rooms, arrows between them, floors, and what grew too long.

`python tests/house.py [FOLDER]` says it of the tree in FOLDER, this one by default; test_house.py
holds the same numbers against the plan.
"""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITTING = ("args", "model", "cache", "engine", "generation")  # what a newcomer reads
LONG_FILE, LONG_FUNCTION = 400, 60  # lines


def sources(root=ROOT):
    """Module name to file, of the package in `root`."""
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted((root / "llama").rglob("*.py"))
    }


def room_of(module):
    """What stands at the top of the package: a file or a folder; "" is llama/__init__.py."""
    return [*module.split("."), ""][1]


def imports(tree, modules):
    """(module, the import stands in a function) of every import; `from a import b` gives a.b where
    that is a module of ours."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in modules else node.module, id(node) in inside


def arrows(trees, name_of=room_of):
    """Room to the other rooms that it imports; `name_of` a module may cut finer, or leave it out
    with None."""
    graph = {name_of(module): set() for module in trees if name_of(module) is not None}
    for module, tree in trees.items():
        for target, _ in imports(tree, trees):
            if target in trees and None not in (name_of(module), name_of(target)):
                graph[name_of(module)].add(name_of(target))
    return {room: targets - {room} for room, targets in graph.items()}


def floors(graph):
    """Rooms by the longest way down from them: the first list imports nothing of ours."""
    level = {}
    for room in TopologicalSorter(graph).static_order():
        level[room] = 1 + max((level[target] for target in graph[room]), default=-1)
    return [sorted(r for r in level if level[r] == n) for n in range(max(level.values()) + 1)]


def lines(file):
    return len(file.read_text(encoding="utf-8").splitlines())


def long_functions(trees):
    """(module, name, lines) of every function that does not fit a page."""
    return [
        (module, node.name, node.end_lineno - node.lineno + 1)
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > LONG_FUNCTION
    ]


def in_checkpoint(module):
    """The formats of llama.checkpoint as rooms of their own; None for what lies elsewhere."""
    parts = module.split(".")
    return [*parts, ""][2] if parts[1:2] == ["checkpoint"] else None


def main(root):
    modules = sources(root)
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in modules.items()}
    for title, graph in (
        ("llama", arrows(trees)),
        ("llama.checkpoint", arrows(trees, in_checkpoint)),
    ):
        try:
            found = floors(graph)
            print(f"{title}: {len(graph)} rooms on {len(found)} floors, "
                  f"{sum(map(len, graph.values()))} imports between them")  # fmt: skip
            for number, rooms in enumerate(found):
                print(f"  {number:2}  {' '.join(room or '__init__' for room in rooms)}")
        except ValueError as cycle:  # graphlib's CycleError
            print(f"{title}: {len(graph)} rooms with {sum(map(len, graph.values()))} imports and "
                  f"a cycle, {' <- '.join(cycle.args[1])}")  # fmt: skip
    sizes = {name: lines(file) for name, file in modules.items()}
    over = {name: n for name, n in sizes.items() if n > LONG_FILE}
    print(f"{len(sizes)} files, {sum(sizes.values())} lines; over {LONG_FILE}: {over or 'none'}")
    print(f"functions over {LONG_FUNCTION} lines: {long_functions(trees) or 'none'}")
    sitting = {n: size for n, size in sizes.items() if room_of(n) in SITTING}
    print(f"the sitting: {sum(sitting.values())} lines, {sitting}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
