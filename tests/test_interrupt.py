"""Killed at random moments, scoring, training and the page end in what an undisturbed run gives.

The audit is in `test_restart.py`; `benchmarks/interrupt.py` kills more often.
"""

from pathlib import Path

import pytest
from interrupting import Work, interrupt, page, scoring, training


@pytest.mark.parametrize("name", ["page", "scoring", "training"])
def test_killed_at_random_moments(name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    make = {"page": page, "scoring": scoring, "training": lambda root: training(root, tiny_model_dir)}[name]
    work: Work = make(tmp_path)
    record = interrupt(work, tmp_path, kills=3, seed=0, name=name)
    assert record.kills == 3
    assert record.finishes >= 1
    assert (record.different, record.failures) == (0, 0), record
