"""Run the core tests against every supported minor version of TRL, each in an environment of its own.

    python benchmarks/matrix.py                       # every row
    python benchmarks/matrix.py --rows 1.14 oldest    # some of them; main: TRL's main branch, from its repository
    python benchmarks/matrix.py --table               # the recorded table as Markdown

A row is a minor version of TRL beside the versions of `constraints.txt`; `oldest` has the lowest version of each
package that `pyproject.toml` admits, `newest` the newest. Environments are made by uv, which shares one cache between
them and the next run. Rows that were run replace those of `benchmarks/results/matrix.json`; exit status 1 where a test
failed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "matrix.json"
MAIN = "trl @ git+https://github.com/huggingface/trl"
MINORS = ("1.9", "1.10", "1.11", "1.12", "1.13", "1.14", "1.15", "1.16")
ROWS = (*MINORS, "oldest", "newest", "main")
# Parity without a policy, each seam, shaping against explicit formulas, planning: some two minutes on an idle core.
TESTS = (
    "tests/test_trl_contract.py",
    "tests/test_package_contract.py",
    "tests/test_stock_habits.py",
    "tests/test_parity_dpo.py",
    "tests/test_parity_reward.py",
    "tests/test_shaping_seam.py",
)
LEFT_OUT = "not two_ranks"  # launches processes of its own; the whole suite has it
SHOWN = (
    "trl",
    "transformers",
    "peft",
    "torch",
    "datasets",
    "accelerate",
    "sae-lens",
    "wandb",
    "plotly",
    "scikit-learn",
)


def requirements(row: str) -> list[str]:
    """What is installed for a row, as words for ``uv pip install``."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if row == "newest":
        return ["-e", ".[all]", *tools(project)]
    if row == "oldest":
        extras = project["optional-dependencies"]
        direct = [
            *project["dependencies"],
            *(entry for name in extras["all"][0][12:-1].split(",") for entry in extras[name]),
        ]
        lowest = [re.sub(r">=([\d.]+).*", r"==\1.*", entry) for entry in direct if ">=" in entry]
        lowest = [entry for entry in lowest if not entry.startswith(("trl==", "torch=="))]
        return [*lowest, "trl~=1.9.0", f"torch=={pinned(pins, 'torch')}", "-e", ".[all]", *tools(project)]
    trl = f"trl~={MINORS[-1] if row == 'main' else row}.0"
    named = ("transformers", "peft", "torch", "datasets", "accelerate", "sae-lens", "wandb", "plotly", "scikit-learn")
    return [trl, *(f"{name}=={pinned(pins, name)}" for name in named), "-e", ".[all]", *tools(project)]


def pinned(pins: list[str], name: str) -> str:
    """The version to which `constraints.txt` pins a package."""
    return next(pin.partition("==")[2] for pin in pins if pin.startswith(f"{name}=="))


def tools(project: dict[str, Any]) -> list[str]:
    """What the tests need beside the package."""
    # Without Triton, which TRL 1.15 runs on a CPU too
    wanted = ("pytest", "hypothesis", "tensorboard", "trackio", "playwright")
    found = (entry.partition(";")[0].strip() for entry in project["optional-dependencies"]["dev"])
    return [entry for entry in found if entry.startswith(wanted) and not entry.startswith("pytest-")]


def run_row(row: str, folder: Path) -> dict[str, Any]:
    """Make the environment of a row and run the tests in it."""
    environment = folder / row
    python = environment / "bin" / "python"
    subprocess.run(["uv", "venv", "-q", "--clear", "--python", "3.11", str(environment)], check=True)
    made = subprocess.run(
        ["uv", "pip", "install", "-q", "--python", str(python), *requirements(row)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if made.returncode:
        return {"row": row, "installed": made.stderr.strip().splitlines()[-12:], "failed": ["installation"]}
    if row == "main":
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), "--no-deps", MAIN], check=True)
    listed = subprocess.run(
        ["uv", "pip", "list", "--format", "json", "--python", str(python)], capture_output=True, text=True, check=True
    )
    versions = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    report = environment / "report.xml"
    before = os.times()
    subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, f"--junitxml={report}", *TESTS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    after = os.times()
    text = report.read_text() if report.is_file() else ""
    cases = re.findall(r"<testcase [^>]*?name=\"([^\"]*)\"[^>]*?(?:/>|>(.*?)</testcase>)", text, re.DOTALL)
    failed = sorted(name for name, inside in cases if "<failure" in inside or "<error" in inside)
    skipped = sum("<skipped" in inside for _, inside in cases)
    return {
        "row": row,
        "versions": {name: versions[name] for name in SHOWN if name in versions},
        "python": platform.python_version(),
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed if cases else ["no test ran"],
        "cpu_seconds": round(
            after.children_user + after.children_system - before.children_user - before.children_system
        ),
    }


def table(result: dict[str, Any]) -> str:
    """The recorded rows as Markdown."""
    lines = ["| row | " + " | ".join(SHOWN) + " | passed | failed |", "|---" * (len(SHOWN) + 3) + "|"]
    for row in result["rows"]:
        versions = [row.get("versions", {}).get(name, "") for name in SHOWN]
        failed = ", ".join(row["failed"]) or "0"
        lines.append("| " + " | ".join([row["row"], *versions, str(row.get("passed", 0)), failed]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if row != "main"])
    parser.add_argument("--environments", type=Path, default=ROOT / ".matrix", help="folder of the environments")
    parser.add_argument("--table", action="store_true", help="print the recorded table and stop")
    asked = parser.parse_args()
    recorded = json.loads(RESULT.read_text()) if RESULT.is_file() else {"tests": list(TESTS), "rows": []}
    if asked.table:
        print(table(recorded))
        return
    rows = {row["row"]: row for row in recorded["rows"]}
    for name in asked.rows:
        rows[name] = run_row(name, asked.environments)
        recorded = {"tests": list(TESTS), "rows": [rows[row] for row in ROWS if row in rows]}
        RESULT.write_text(json.dumps(recorded, indent=1) + "\n")
    print(table(recorded))
    sys.exit(any(rows[name]["failed"] for name in asked.rows))


if __name__ == "__main__":
    main()
