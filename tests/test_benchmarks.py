"""Benchmarks are run by hand and rarely: that they still find what they import is seen here."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the studies have in common, and parts of one.
SHARED = ("worlds.py", "tables.py", "real_runs.py", "real_rivals.py", "real_intervals.py")
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if path.name not in SHARED)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_can_be_imported_and_says_what_it_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    name = f"benchmark_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert callable(module.main)
    assert path.relative_to(ROOT).as_posix() in (module.__doc__ or "")
