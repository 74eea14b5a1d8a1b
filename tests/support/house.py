"""Measures of how the library is laid out: read off its source by `ast`, or traced while it runs."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = "trl_anatomy"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE
STAGE_FILES = ("shaping/stages/", "shaping/interventions/")  # the only files that may ask for a verb


@dataclass(frozen=True)
class Function:
    """A function of the library; lines count without its docstring and its decorators."""

    where: str
    lines: int
    parameters: int


@dataclass(frozen=True)
class Import:
    """One imported module: `trl_anatomy.reading.spans`, or the first name of another package."""

    module: str
    line: int
    lazy: bool


class Tree:
    """The source of the library, parsed once."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}
        self.parsed = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}
        self.modules = {_module(name): name for name in self.files}

    @property
    def n_lines(self) -> int:
        """Lines of all files."""
        return sum(path.read_text(encoding="utf-8").count("\n") for path in self.files.values())

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, nested ones too."""
        found = []
        for name, tree in self.parsed.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    first = node.body[0]
                    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
                    a = node.args
                    named = [part.arg for part in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
                    parameters = len([part for part in named if part not in ("self", "cls")])
                    found.append(Function(f"{name}:{node.lineno} {node.name}", lines, parameters))
        return found

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """File -> its imports, without those for type checkers alone."""
        return {name: list(self._imports(name)) for name in self.files}

    def _imports(self, name: str) -> Iterator[Import]:
        module = _module(name)
        package = module if name.endswith("__init__.py") else module.rpartition(".")[0]
        for node, lazy in _executed(self.parsed[name], False):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(self._known(alias.name), node.lineno, lazy)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in node.names:
                    inside = f"{base}.{alias.name}"
                    yield Import(self._known(inside if inside in self.modules else base), node.lineno, lazy)

    def _known(self, module: str) -> str:
        """A module of the library by its whole name, of another package by its first name."""
        return module if module in self.modules else module.split(".")[0]

    @cached_property
    def _loads(self) -> dict[str, set[str]]:
        """Module -> all modules and packages that importing it loads."""
        direct = {}
        for name in self.files:
            top = {found.module for found in self.imports[name] if not found.lazy}
            direct[_module(name)] = top | set(_parents(_module(name)))
        loaded: dict[str, set[str]] = {}
        for module in direct:
            seen: set[str] = set()
            rest = [module]
            while rest:
                for one in direct.get(rest.pop(), ()):
                    for each in (one, *(_parents(one) if one in direct else ())):
                        if each not in seen:
                            seen.add(each)
                            rest.append(each)
            loaded[module] = seen
        return loaded

    def useless_lazy_imports(self) -> list[str]:
        """Imports inside functions of what the file's own top has loaded already, by whatever way."""
        found = (
            f"{name}:{one.line} {one.module}"
            for name, imports in self.imports.items()
            for one in imports
            if one.lazy and one.module in self._loads[_module(name)]
        )
        return list(dict.fromkeys(found))  # a line that imports several names is one

    def circles(self) -> list[list[str]]:
        """Groups of modules of which each imports each, by whatever way, also inside functions."""
        graph = {
            _module(name): {found.module for found in imports if found.module in self.modules} - {_module(name)}
            for name, imports in self.imports.items()
        }
        return [sorted(group) for group in _strongly_connected(graph) if len(group) > 1]

    def questions_for_verbs(self) -> list[str]:
        """Places outside the stages that ask which verb a rule is: by its class, or by its name."""
        from trl_anatomy.shaping.interventions import VERBS

        classes = {verb.__name__ for verb in VERBS.values()}
        found = []
        for name, tree in self.parsed.items():
            if name.startswith(STAGE_FILES):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                    names = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                    if names & classes:
                        found.append(f"{name}:{node.lineno} {ast.unparse(node)}")
                elif isinstance(node, ast.Compare):
                    sides = [node.left, *node.comparators]
                    verbs = any(isinstance(part, ast.Name) and part.id in classes for part in sides)
                    by_name = any(isinstance(part, ast.Attribute) and part.attr == "verb" for part in sides)
                    if verbs or by_name:
                        found.append(f"{name}:{node.lineno} {ast.unparse(node)}")
        return found


@dataclass
class Walk:
    """Files of the library that ran, hops from one to another, and calls of its functions."""

    files: set[str] = field(default_factory=set)
    hops: int = 0
    calls: Counter[str] = field(default_factory=Counter)


@contextmanager
def walked() -> Iterator[Walk]:
    """Trace the calls of this thread. Import what runs first: what modules do when imported counts as well."""
    walk, prefix, before = Walk(), f"{ROOT}/", sys.gettrace()

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        name = frame.f_code.co_filename
        if not name.startswith(prefix):
            return
        file = name[len(prefix) :]
        walk.files.add(file)
        walk.calls[f"{file} {frame.f_code.co_qualname}"] += 1
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(prefix):
            caller = caller.f_back
        walk.hops += caller is not None and caller.f_code.co_filename != name

    sys.settrace(trace)
    try:
        yield walk
    finally:
        sys.settrace(before)


def import_all() -> None:
    """Import every module of the library, so that a trace holds what runs and not what is loaded."""
    import importlib

    for name in sorted(Tree().modules):
        if not name.endswith("__main__"):
            importlib.import_module(name)


def _module(name: str) -> str:
    parts = [PACKAGE, *name.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _executed(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes that may run, each with whether it stands in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other, lazy
                yield from _executed(other, lazy)
            continue
        yield child, lazy
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _executed(child, inside)


def _strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Tarjan's components, by two passes (Kosaraju): small graphs, so plainly."""
    order: list[str] = []
    seen: set[str] = set()
    back: dict[str, set[str]] = {node: set() for node in graph}
    for node, ends in graph.items():
        for end in ends:
            back[end].add(node)

    def visit(node: str, edges: dict[str, set[str]], into: list[str]) -> None:
        stack = [(node, iter(sorted(edges[node])))]
        seen.add(node)
        while stack:
            at, rest = stack[-1]
            following = next((end for end in rest if end not in seen), None)
            if following is None:
                into.append(at)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(sorted(edges[following]))))

    for node in sorted(graph):
        if node not in seen:
            visit(node, graph, order)
    seen.clear()
    groups = []
    for node in reversed(order):
        if node not in seen:
            group: list[str] = []
            visit(node, back, group)
            groups.append(set(group))
    return groups
