"""`constraints.txt` and `pyproject.toml` agree: every requirement is pinned to a version that it admits."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOT_PINNED = {"triton", "trl-anatomy"}  # the first comes with the build of PyTorch


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines if not line.startswith("#"))  # type: ignore[union-attr]


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    apart = ("storage",)  # wants an older python-dateutil
    entries = [entry for name, listed in extras.items() if name not in apart for entry in listed]
    return [Requirement(entry) for entry in [*project["dependencies"], *entries]]


def test_every_requirement_is_pinned_to_what_it_admits() -> None:
    pinned = {canonicalize_name(name): found for name, found in pins().items()}
    for requirement in wanted():
        if requirement.name not in NOT_PINNED:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_constraints_are_written_by_the_tool() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "`.ci/constraints`" in lines[1]
    assert lines[2:] == sorted(lines[2:], key=str.lower)
    assert not [line for line in lines if re.match(r"(nvidia|triton|cuda)", line)]


def test_each_requirement_has_a_lower_and_an_upper_bound_or_a_reason() -> None:
    """A range without a lower bound lets an installer fall back to a release of years ago."""
    for requirement in wanted():
        if requirement.name not in NOT_PINNED and not requirement.name.startswith("types-"):
            assert any(bound.operator == ">=" for bound in requirement.specifier), requirement


def test_the_bounds_of_trl_are_those_of_the_matrix() -> None:
    (trl,) = (requirement for requirement in wanted() if requirement.name == "trl")
    assert trl.specifier.contains("1.9.0")
    assert trl.specifier.contains(version("trl"))
    assert not trl.specifier.contains("1.8.0")


def test_the_nightly_workflow_runs_every_row_of_the_matrix() -> None:
    import importlib.util

    import yaml

    spec = importlib.util.spec_from_file_location("matrix", ROOT / "benchmarks" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "matrix.yml").read_text())
    assert tuple(workflow["jobs"]["row"]["strategy"]["matrix"]["row"]) == matrix.ROWS
    for row in ("1.9", "oldest", "newest", "main"):
        for entry in matrix.requirements(row):
            if entry not in ("-e", ".[all]"):
                Requirement(entry)
    assert all((ROOT / path).is_file() for path in matrix.TESTS)
    recorded = json.loads((ROOT / "benchmarks" / "results" / "matrix.json").read_text())
    shown = (ROOT / "CONTRIBUTING.md").read_text().partition("<!-- matrix -->")[2].partition("<!-- end -->")[0]
    assert shown.strip() == matrix.table(recorded)
    assert not any(row["failed"] for row in recorded["rows"])
