"""Run from an unpacked wheel, outside the checkout: `python wheel_check.py SITE`. Part of `.ci/run`.

The files that code reads are in it, its command runs, and a text audit of a few pairs writes its page.
"""

import json
import sys
from pathlib import Path

import trl_anatomy
from trl_anatomy.cli import main


def check(site: Path, folder: Path) -> None:
    """Audit from the wheel that lies in `site`; everything is written into `folder`."""
    assert Path(trl_anatomy.__file__).is_relative_to(site), f"{trl_anatomy.__file__} was imported, not the wheel"
    names = {path.name for path in (site / "trl_anatomy").rglob("*")}
    assert {"py.typed", "common.js"} <= names, "the wheel lacks files that are no Python"
    pairs = [
        {"prompt": f"Question {i}?", "chosen": f"**Answer** {i}.", "rejected": f"Answer {i}, sorry."} for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    main(["audit", "--dataset", str(folder / "pairs.jsonl"), "--out", str(folder / "audit")])
    assert "Answer" in (folder / "audit" / "report.html").read_text()


if __name__ == "__main__":
    check(Path(sys.argv[1]).resolve(), Path.cwd())
