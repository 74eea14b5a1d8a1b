"""Python as TRL's users write it: one import for everything public, and trainers with TRL's own signature."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trl import DPOTrainer, RewardTrainer, SFTTrainer

import trl_anatomy
from trl_anatomy.trainers.signature import extends

OURS = ["concept_policy", "audit"]


@pytest.mark.parametrize(
    ("name", "parent"),
    [("AnatomyDPOTrainer", DPOTrainer), ("AnatomyRewardTrainer", RewardTrainer), ("AnatomySFTTrainer", SFTTrainer)],
)
def test_trainers_have_the_signature_of_the_installed_trl(name: str, parent: Any) -> None:
    shown = inspect.signature(getattr(trl_anatomy, name)).parameters
    theirs = inspect.signature(parent).parameters
    assert [one for one in shown if one not in OURS] == list(theirs)
    for one in theirs:
        assert shown[one] == theirs[one]
    assert {"model", "args", "train_dataset", "peft_config"} <= set(shown)
    assert all(shown[one].kind is inspect.Parameter.KEYWORD_ONLY for one in OURS)
    assert all(shown[one].default is None for one in OURS)


def _old(self, model, args=None, *, train_dataset=None): ...


def _new(self, model, args=None, train_dataset=None, peft_config=None, quantization_config=None): ...


def _open(self, model, **kwargs): ...


@pytest.mark.parametrize("parent", [_old, _new, _open])
def test_whatever_trl_adds_or_takes_away_is_shown(parent: Any) -> None:
    class Ours:
        @extends(parent)
        def __init__(self, *args: Any, concept_policy: Any = None, audit: Any = None, **kwargs: Any) -> None:
            self.given = inspect.signature(parent).bind(self, *args, **kwargs).arguments

    shown = list(inspect.signature(Ours).parameters)
    theirs = [name for name in inspect.signature(parent).parameters if name not in ("self", "kwargs")]
    assert shown == [*theirs, *OURS, *(["kwargs"] if parent is _open else [])]
    assert Ours("m", audit="a").given["model"] == "m"

    class Theirs(Ours):
        def __init__(self, mine: int) -> None:
            super().__init__(mine)

    assert list(inspect.signature(Theirs).parameters) == ["mine"]  # a class of the user's own shows its own


def test_one_import_has_everything_public() -> None:
    for name in trl_anatomy.__all__:
        assert getattr(trl_anatomy, name) is not None
    assert {"AnatomyDPOTrainer", "load_audit", "ConceptPolicy", "compare", "predict"} <= set(dir(trl_anatomy))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trl_anatomy.nothing


def test_type_checkers_see_what_is_there() -> None:
    """The names are made on first use, so that a checker knows them from the block that it alone reads."""
    tree = ast.parse(Path(trl_anatomy.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(seen) == sorted(trl_anatomy.__all__) == sorted(trl_anatomy._HOME)


def test_the_import_alone_loads_nothing_of_weight() -> None:
    program = (
        "import sys; before = set(sys.modules); import trl_anatomy; dir(trl_anatomy);"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('trl_anatomy')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['trl_anatomy']"
