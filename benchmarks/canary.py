"""Look up what this package rests on in the sources of every supported release, without installing one.

    python benchmarks/canary.py                       # the newest release of each minor version, from the package index
    python benchmarks/canary.py --wheels FOLDER       # wheels that lie there are not downloaded again

The places are those of `trl_anatomy/upstream.py`, and the names that our own import statements take from trl,
transformers, peft and sae-lens. They are read from wheels by `ast`: nothing of a release runs. Prints one sentence a
place that moved; exit status 1 where one did, 2 where no release could be read. Needs Python 3.11, pip, nothing else.
"""

import argparse
import ast
import importlib.util
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PACKAGES = {"trl": "trl", "transformers": "transformers", "peft": "peft", "sae_lens": "sae-lens"}  # import -> project
READ = Callable[[str], str | None]  # path inside a release -> its text


def upstream() -> ModuleType:
    """Our list of places, loaded by itself: the package may not be installed."""
    name = "trl_anatomy_upstream"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "trl_anatomy" / "upstream.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def version_range(project: str) -> str:
    """What `pyproject.toml` admits of a project: ``>=1.9,<1.17``."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [entry for entries in settings["optional-dependencies"].values() for entry in entries]
    for entry in [*settings["dependencies"], *extras]:
        found = re.fullmatch(rf"{re.escape(project)}([<>=~!].*?)\s*(;.*)?", entry)
        if found:
            return found[1]
    raise SystemExit(f"pyproject.toml does not name {project}.")


def admits(wanted: str, release: tuple[int, ...]) -> bool:
    """Whether a range of ``>=`` and ``<`` admits a release."""
    for part in wanted.split(","):
        sign, bound = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", part).groups()  # type: ignore[union-attr]
        number = upstream().release_of(bound)
        if (release < number) if sign == ">=" else (release >= number):
            return False
    return True


def newest_of_minors(versions: Iterable[str]) -> list[str]:
    """The newest release of each minor version, oldest first; releases that are not final are left out."""
    newest: dict[tuple[int, ...], str] = {}
    final = [v for v in versions if re.fullmatch(r"\d+(\.\d+)*", v)]
    for version in sorted(final, key=upstream().release_of):
        newest[upstream().release_of(version)[:2]] = version
    return list(newest.values())


class Release:
    """The sources of one release: looks names up as Python would, without running them.

    Args:
        package: the name that Python imports.
        version: for the sentences.
        read: path inside the release -> text, or None where there is no such file.
        names: all paths of the release.
    """

    def __init__(self, package: str, version: str, read: READ, names: Iterable[str]) -> None:
        self.package, self.version, self.names = package, version, list(names)
        self._text = cache(read)
        self._trees: dict[str, ast.Module] = {}

    def moved(self, seams: Iterable[object], imports: Iterable[tuple[str, str, str]]) -> list[str]:
        """One sentence for each place that is not what it was.

        Args:
            seams: of `upstream.SEAMS`, those that this version must have.
            imports: (module, name, our file) of our own import statements.
        """
        told = []
        for seam in seams:
            wrong = self._wrong(seam)
            if wrong:
                told.append(f"{PACKAGES[self.package]} {self.version}: {wrong}; {seam.ours} rests on it.")  # type: ignore[attr-defined]
        top = [name for module, name, _ in imports if module == self.package]
        homes = self._top_level(top)
        for module, name, ours in imports:
            there = name in homes if module == self.package else self._named(module, name)
            if not there:
                told.append(f"{PACKAGES[self.package]} {self.version}: {module} has no {name}; {ours} imports it.")
        return list(dict.fromkeys(told))

    def _wrong(self, seam: object) -> str | None:
        module, _, name = seam.name.partition(":")  # type: ignore[attr-defined]
        path = self._path(module)
        if path is None:
            return f"there is no module {module}"
        found: tuple[str, ast.AST] | None = (path, self._tree(path))
        if name:
            found = self._find(path, name)
            if found is None:
                return f"{module} has no {name}"
        assert found is not None
        place = name or module
        takes, says = seam.takes, seam.says  # type: ignore[attr-defined]
        if takes is not None and isinstance(found[1], ast.FunctionDef | ast.AsyncFunctionDef):
            has = _parameters(found[1])
            missing = [one for one in takes if one not in has]
            if missing:
                return f"{place} no longer takes {', '.join(missing)} (it takes {', '.join(has)})"
            if seam.exactly and list(takes) != has:  # type: ignore[attr-defined]
                return f"{place} takes {', '.join(has)}, which was {', '.join(takes)}"
        elif takes:
            return f"{place} is no function"
        return _unsaid(place, self._source(*found), says)

    def _path(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((path for path in (f"{base}.py", f"{base}/__init__.py") if self._text(path) is not None), None)

    def _tree(self, path: str) -> ast.Module:
        if path not in self._trees:
            self._trees[path] = ast.parse(self._text(path) or "")
        return self._trees[path]

    def _source(self, path: str, node: ast.AST) -> str:
        text = self._text(path) or ""
        return text if isinstance(node, ast.Module) else ast.get_source_segment(text, node) or ""

    def _named(self, module: str, name: str) -> bool:
        """Whether ``from module import name`` finds something."""
        path = self._path(module)
        return self._path(f"{module}.{name}") is not None or (path is not None and self._find(path, name) is not None)

    def _find(self, path: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a qualified name is defined: through imports inside the package, classes and their bases."""
        first, _, rest = name.partition(".")
        found: tuple[str, ast.AST] | None = None
        for node in _statements(self._tree(path)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                there = self._imported(path, node, first)
            else:
                there = (path, node) if first in _defined(node) else None
            # A class or a function that is wrapped by an assignment of its own name is still that class.
            if there is not None and (found is None or not isinstance(found[1], ast.ClassDef | ast.FunctionDef)):
                found = there
        if found is not None and isinstance(found[1], ast.Assign) and isinstance(found[1].value, ast.Name):
            found = self._find(found[0], found[1].value.id)  # another name of the same
        if found is None or not rest:
            return found
        return self._member(*found, rest)

    def _imported(self, path: str, node: ast.ImportFrom | ast.Import, name: str) -> tuple[str, ast.AST] | None:
        alias = next((a for a in node.names if (a.asname or a.name.split(".")[0]) == name), None)
        if alias is None:
            return None
        if isinstance(node, ast.Import):
            return path, node
        module = node.module or ""
        if node.level:
            parts = path.removesuffix(".py").split("/")[: -node.level]
            module = ".".join([*parts, module]) if module else ".".join(parts)
        if module.split(".")[0] != self.package:
            return path, node
        source = self._path(module)
        if source is None:
            return None
        if source == path or self._path(f"{module}.{alias.name}") is not None:
            return path, node
        return self._find(source, alias.name) or ((path, node) if self._lazy(source, alias.name) else None)

    def _lazy(self, path: str, name: str) -> bool:
        """Whether a package that imports its names when they are asked for has one of this name."""
        return any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(self._tree(path)))

    def _member(self, path: str, node: ast.AST, name: str) -> tuple[str, ast.AST] | None:
        if not isinstance(node, ast.ClassDef):
            return None
        first, _, rest = name.partition(".")
        for inner in _statements(node):
            if first in _defined(inner):
                return (path, inner) if not rest else self._member(path, inner, rest)
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                where = self._find(path, base.id)
                found = where and self._member(*where, name)
                if found:
                    return found
        return None

    def _top_level(self, wanted: list[str]) -> set[str]:
        """Of names that are imported from the package itself, those that it has."""
        tree = self._tree(f"{self.package}/__init__.py")
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        there = {name for name in wanted if name in texts or self._named(self.package, name)}
        left = sorted(set(wanted) - there)
        if left and self.package == "transformers":  # its models' names are gathered from their files
            pattern = re.compile(rf"^(?:class )?({'|'.join(map(re.escape, left))})\b", re.MULTILINE)
            for path in self.names:
                if path.startswith("transformers/models/") and path.endswith(".py") and "/modular_" not in path:
                    there |= set(pattern.findall(self._text(path) or ""))
                    if len(there) == len(set(wanted)):
                        break
        return there


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a module or class, also those under ``if`` and ``try``."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(inner)
        elif isinstance(inner, ast.stmt):
            yield inner


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names in the order of `inspect.signature`."""
    a = node.args
    named = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    return [argument.arg for argument in named]


def _unsaid(place: str, source: str, pieces: Iterable[str]) -> str | None:
    text, at = "".join(source.split()), 0
    for piece in pieces:
        found = text.find("".join(piece.split()), at)
        if found < 0:
            return f"{place} no longer says {piece!r}" + (" where it did" if at else "")
        at = found + 1
    return None


def our_imports() -> dict[str, list[tuple[str, str, str]]]:
    """Package -> (module, name, our file) of every name that our import statements take from it."""
    found: dict[str, list[tuple[str, str, str]]] = {package: [] for package in PACKAGES}
    for path in sorted((ROOT / "trl_anatomy").rglob("*.py")):
        ours = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in PACKAGES:
                package = str(node.module).split(".")[0]
                found[package] += [(str(node.module), alias.name, ours) for alias in node.names]
    return found


def from_wheel(path: Path) -> Release:
    """A release that lies in a wheel."""
    package, version = path.name.split("-")[:2]
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())
    return Release(package, version, lambda name: archive.read(name).decode() if name in names else None, sorted(names))


def from_folder(folder: Path, package: str, version: str) -> Release:
    """A release as it lies in a folder of packages, such as site-packages."""
    names = [path.relative_to(folder).as_posix() for path in sorted((folder / package).rglob("*.py"))]
    return Release(package, version, lambda name: _text_of(folder / name), names)


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _pip(*arguments: str) -> str | None:
    hurry = ("--retries", "1", "--timeout", "20")  # where there is no index, that is soon seen
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, *hurry], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def wheels(project: str, folder: Path) -> list[Path]:
    """A wheel of the newest release of each supported minor version; without an index, those that lie in the folder."""
    package = project.replace("-", "_")
    here = {path.name.split("-")[1]: path for path in folder.glob(f"{package}-*.whl")}
    listed = _pip("index", "versions", project)
    found = re.search(r"Available versions: (.*)", listed or "")
    versions = found[1].split(", ") if found else list(here)
    wanted = newest_of_minors(v for v in versions if admits(version_range(project), upstream().release_of(v)))
    get = ("download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda version: _pip(*get, f"{project}=={version}"), [v for v in wanted if v not in here]))
    return [path for v in wanted for path in folder.glob(f"{package}-{v}-*.whl")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels", help="folder in which wheels are kept")
    parser.add_argument("--packages", nargs="+", choices=PACKAGES.values(), default=[*PACKAGES.values()])
    given = parser.parse_args()
    folder = given.wheels
    folder.mkdir(parents=True, exist_ok=True)
    imports, told = our_imports(), []
    for package, project in PACKAGES.items():
        if project not in given.packages:
            continue
        paths = wheels(project, folder)
        if not paths:
            print(f"No release of {project} can be read: there is no index, and no wheel in {folder}.")
            sys.exit(2)
        for path in paths:
            start = time.perf_counter()
            release = from_wheel(path)
            seams = list(upstream().seams_of(package, release.version))
            moved = release.moved(seams, imports[package])
            told += moved
            places = len(seams) + len(imports[package])
            print(f"{project} {release.version}: {len(moved)} of {places} moved ({time.perf_counter() - start:.1f} s)")
    print("\n".join(told))
    sys.exit(1 if told else 0)


if __name__ == "__main__":
    main()
