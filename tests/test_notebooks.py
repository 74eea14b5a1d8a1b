"""The notebooks of docs/notebooks run from the first cell to the last, and show what their text says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"


def ran(name: str, folder: Path) -> str:
    """What the code cells of a notebook print, in a process and a folder of their own."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    around = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    around |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_does_my_dataset_teach(tmp_path: Path) -> None:
    shown = ran("what_does_my_dataset_teach", tmp_path)
    assert (tmp_path / "audits" / "text" / "report.html").exists()
    length, habits = (int(re.search(rf"{part} +(\d+)%", shown)[1]) for part in ("length", "habits"))  # type: ignore[index]
    assert habits > length + 20
    assert "600 rows" in shown


def test_take_one_habit_out(tmp_path: Path) -> None:
    shown = ran("take_one_habit_out", tmp_path)
    start, plain, ruled = map(int, re.search(r"bold +start +(\d+)% +plain DPO +(\d+)% .*?(\d+)%", shown).groups())  # type: ignore[union-attr]
    assert start < plain
    assert ruled < plain
    assert "no pull left" in shown


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_are_kept_and_hold_no_place_of_this_machine(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    shown = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(shown)
    assert not re.search(r"/(?:tmp|home|root|work)/", json.dumps(shown))
