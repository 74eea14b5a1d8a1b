"""Resolve this package together with what people train, serve and evaluate with; nothing is installed.

    python benchmarks/beside.py

For each package the newest version that goes with ours, and what both then rest on, by uv, on the lowest Python that
the newest release takes. Written to `benchmarks/results/beside.json`; exit status 1 where there is no solution.
"""

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "beside.json"
PACKAGES = {"unsloth": "3.11", "axolotl": "3.12", "vllm": "3.11", "lm-eval": "3.11"}  # and Python
SHOWN = ("trl", "transformers", "peft", "torch", "datasets")


def resolved(package: str, python: str) -> dict[str, str] | None:
    """Versions of the package and of what is shown, in one solution with ours; None without one."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.in"
        asked.write_text(f"trl-anatomy[all] @ {ROOT.as_uri()}\n{package}\n")
        words = ["uv", "pip", "compile", "-q", "--no-header", "--no-annotate", "--index-strategy", "unsafe-best-match"]
        done = subprocess.run([*words, "--python-version", python, str(asked)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    found = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    return {"python": python, **{name: found[name].split(" ")[0] for name in (package, *SHOWN)}}


def main() -> None:
    packages = {name: resolved(name, python) for name, python in PACKAGES.items()}
    for name, found in packages.items():
        print(f"{name}: {found or 'no solution'}")
    record = {
        "command": "python benchmarks/beside.py",
        "date": datetime.date.today().isoformat(),
        "packages": packages,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(not all(packages.values()))


if __name__ == "__main__":
    main()
