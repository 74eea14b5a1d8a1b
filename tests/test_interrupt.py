"""Killed at random moments, every piece of work ends in what an undisturbed run gives.

The audit in one process is in `test_restart.py`; `benchmarks/interrupt.py` kills more often.
"""

import signal
from pathlib import Path

import pytest
import torch
from interrupting import interrupt, works
from test_restart import killed_at_call

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.scorers.direction import DirectionScorer


@pytest.mark.parametrize(
    "name", ["page", "plan", "scoring", "sae", "sae, jumprelu", "predict", "fit", "training", "reward training"]
)
def test_killed_at_random_moments(name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    record = interrupt(works(tiny_model_dir)[name](tmp_path), tmp_path, kills=2, seed=0, name=name)
    assert record.kills == 2
    assert record.finishes >= 1
    assert (record.different, record.failures) == (0, 0), record


def test_both_processes_or_one_of_them_killed(tmp_path: Path, tiny_model_dir: Path) -> None:
    name = "audit by two processes"
    record = interrupt(works(tiny_model_dir)[name](tmp_path), tmp_path, kills=2, seed=0, name=name)
    assert record.kills == 2
    assert (record.different, record.failures) == (0, 0), record


def test_a_card_beside_the_tensors_of_another_fit_is_refused(tmp_path: Path) -> None:
    """Killed between its two files, a concept that replaces one of the same width would pass for whole."""
    DirectionScorer(torch.ones(8), 0).save(tmp_path)
    new = DirectionScorer(-torch.ones(8), 1)
    assert killed_at_call("replace", 2, lambda: new.save(tmp_path)) == -signal.SIGKILL
    with pytest.raises(AnatomyError, match="fit the concept again"):
        DirectionScorer.load(tmp_path)
    new.save(tmp_path)
    assert DirectionScorer.load(tmp_path).layer == 1
