"""The layout of the library, held by numbers that may only fall.

Each number has a bound and a goal. A number above its bound fails. One below it fails too, until the bound is lowered: what was
won is not lost again. `python -m pytest tests/test_house.py` prints what is behind a number that fails.
"""  # noqa: E501

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from parity import EXACT, fresh
from reading_world import tiny_sae
from support.house import ROOT, Tree, Walk, import_all, walked
from trl import DPOConfig

from trl_anatomy import AnatomyDPOTrainer, AuditConfig, run_audit

N = 60


@dataclass(frozen=True)
class Bound:
    """What a number may be at most, where it is to end, and how far below its bound it may lie unnoticed."""

    most: int
    goal: int
    slack: int = 0


BOUNDS = {
    "files: rule to constructed trainer": Bound(49, 20),  # three of them check what is installed
    "files: pair to audit": Bound(89, 22),  # the same three
    "SAE loads at a start": Bound(1, 1),
    "gate evaluations at a start": Bound(1, 1),
    "modules in import circles": Bound(5, 0),
    "useless lazy imports": Bound(57, 0),
    "questions for a verb outside its stage": Bound(0, 0),
    "library files that a new verb touches": Bound(2, 1),  # its own, and the registry
    "functions over 60 lines": Bound(28, 8),
    "functions over 7 parameters": Bound(44, 8),
    "lines of the longest function": Bound(158, 80),
    # A trainer of SFT rows, a look in Python and a demo on a real model came.
    "lines of the library": Bound(44_700, 21_000, slack=1_000),
}


def hold(name: str, number: int, behind: Sequence[Any] = ()) -> None:
    """Fail where a number left its bound, whichever way."""
    bound = BOUNDS[name]
    listed = "\n".join(map(str, behind))
    assert number <= bound.most, f"{name}: {number}, at most {bound.most} (goal: {bound.goal}).\n{listed}"
    won = f"{name}: {number}, better than its bound of {bound.most}: lower the bound in {Path(__file__).name}."
    assert number >= bound.most - bound.slack, won


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree()


# -- read off the source ---------------------------------------------------------------------------------------------


def test_no_module_imports_itself_by_way_of_others(tree: Tree) -> None:
    circles = tree.circles()
    hold("modules in import circles", sum(map(len, circles)), circles)


def test_imports_inside_functions_save_something(tree: Tree) -> None:
    useless = tree.useless_lazy_imports()
    hold("useless lazy imports", len(useless), useless)


def test_only_a_stage_asks_for_its_verbs(tree: Tree) -> None:
    questions = tree.questions_for_verbs()
    hold("questions for a verb outside its stage", len(questions), questions)


def test_functions_are_short(tree: Tree) -> None:
    by_length = sorted(tree.functions, key=lambda function: -function.lines)
    hold("functions over 60 lines", len([f for f in by_length if f.lines > 60]), by_length[:10])
    hold("lines of the longest function", by_length[0].lines, by_length[:3])


def test_functions_ask_for_little(tree: Tree) -> None:
    many = [function for function in tree.functions if function.parameters > 7]
    hold("functions over 7 parameters", len(many), many)


def test_the_library_does_not_grow(tree: Tree) -> None:
    hold("lines of the library", tree.n_lines)


# -- traced while it runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import_all()
    folder = tmp_path_factory.mktemp("house")
    sae = tiny_sae("standard", d_in=16, d_sae=48, hook="blocks.0.hook_resid_post")
    with torch.no_grad():
        sae.W_enc.normal_(generator=torch.Generator().manual_seed(0))
        sae.b_enc.fill_(-2.0)
    sae.save_model(folder / "sae")
    (folder / "policy.yaml").write_text(
        "concepts:\n  habit: {scorer: features, features: [1, 5], sae: {path: sae}}\n"
        "rules:\n  - {explain_away: habit, with: shape_reward, strength: 1, where: {column: topic, equals: x}}\n"
    )
    return folder


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [{**row, "topic": "xy"[i % 2]} for i, row in enumerate(preference_rows(N))]


def _rule(folder: Path, model: Path, rows: list[dict[str, Any]]) -> Walk:
    settings = {**EXACT, "model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False}
    args = DPOConfig(output_dir=str(folder / "out"), **settings)
    with walked() as walk:
        trainer = AnatomyDPOTrainer(
            model=str(model), args=args, train_dataset=fresh(rows), concept_policy=folder / "policy.yaml"
        )
    assert trainer.plan.rules[0]["rows"] > 0
    return walk


def _audit(folder: Path, model: Path, rows: list[dict[str, Any]]) -> Walk:
    config = AuditConfig(sae=str(folder / "sae"), layer=0, out=str(folder / "audit"), model=str(model), bootstrap=100)
    with walked() as walk:
        audit = run_audit(config, dataset=fresh(rows), progress=False)
    assert audit.info["data"]["n_pairs"] == N
    return walk


@pytest.mark.parametrize(
    ("name", "walker"), [("files: rule to constructed trainer", _rule), ("files: pair to audit", _audit)]
)
def test_a_walk_enters_few_files(
    name: str, walker: Callable[..., Walk], folder: Path, tiny_model_dir: Path, rows: list[dict[str, Any]]
) -> None:
    walk = walker(folder, tiny_model_dir, rows)
    hold(name, len(walk.files), sorted(walk.files))
    if walker is _rule:
        hold("SAE loads at a start", walk.calls["reading/sae.py _from_folder"])
        hold("gate evaluations at a start", walk.calls["shaping/where.py Where.mask"])


# -- a dry addition ----------------------------------------------------------------------------------------------------

_NEW_VERB = '''
"""drop_shouts: pairs whose chosen response shows the concept more than the rejected one, and by how much, go."""

from dataclasses import dataclass
from typing import ClassVar

from .filter_pairs import FilterPairs


@dataclass(frozen=True)
class DropShouts(FilterPairs):
    verb: ClassVar[str] = "drop_shouts"

    def dropped(self, chosen, rejected, rows, gate):
        return gate & (chosen > rejected)
'''
_REGISTRY = [
    ("from .filter_pairs import", "from .drop_shouts import DropShouts\nfrom .filter_pairs import"),
    ("        FilterPairs,\n", "        FilterPairs,\n        DropShouts,\n"),
]
_PLAN = """
import json, sys
from conftest import build_tokenizer, preference_rows
from datasets import Dataset
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import settle_policy
from trl_anatomy.trainers.prepare import apply_plan
data = Dataset.from_list(preference_rows(20))
pairs = read_pairs(data, build_tokenizer())
rule = {"explain_away": "bold", "with": "drop_shouts", "above": 0}
policy = ConceptPolicy.load({"concepts": {"bold": {"scorer": "text", "pattern": "bold"}}, "rules": [rule]})
plan = settle_policy(policy, pairs, None)
print(json.dumps([plan.rules[0]["verb"], plan.rules[0]["rows"], len(apply_plan(data, plan))]))
"""


def test_a_new_verb_is_a_file_and_a_row(tmp_path: Path) -> None:
    """Added to a copy of the library by a script, it goes from policy to the rows of a trainer."""
    library = tmp_path / "trl_anatomy"
    shutil.copytree(ROOT, library, ignore=shutil.ignore_patterns("__pycache__"))
    verbs = library / "shaping" / "interventions"
    (verbs / "drop_shouts.py").write_text(_NEW_VERB)
    registry = (verbs / "__init__.py").read_text()
    for before, after in _REGISTRY:
        assert before in registry
        head, _, tail = registry.rpartition(before)
        registry = f"{head}{after}{tail}"
    (verbs / "__init__.py").write_text(registry)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])}
    done = subprocess.run([sys.executable, "-c", _PLAN], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    verb, n_dropped, n_left = json.loads(done.stdout.splitlines()[-1])
    assert verb == "drop_shouts"
    assert n_dropped > 0
    assert n_dropped + n_left == 20
    touched = [
        path.relative_to(library)
        for path in library.rglob("*.py")
        if not (ROOT / path.relative_to(library)).exists()
        or path.read_bytes() != (ROOT / path.relative_to(library)).read_bytes()
    ]
    hold("library files that a new verb touches", len(touched), touched)


# -- the measures themselves -----------------------------------------------------------------------------------------


def _written(root: Path, files: dict[str, str]) -> Tree:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Tree(root)


def test_measures_find_what_they_are_for(tmp_path: Path) -> None:
    tree = _written(
        tmp_path,
        {
            "__init__.py": "",
            "a.py": "import numpy as np\nfrom .b import f\n",
            "b.py": "def f():\n    from .a import f as g\n    return g\n",
            "c.py": "from . import a\ndef h():\n    import numpy.linalg\n    from .b import f\n    import json\n",
            "d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import h\n",
            "e.py": "def ask(rule):\n    return isinstance(rule, int | Steer) or rule.verb == 'steer'\n",
            "shaping/stages/rows.py": "def ask(rule):\n    return isinstance(rule, FilterPairs)\n",
            "g.py": "class A:\n    def f(self, a, *, b=1):\n        'One.\n\n        Two.'\n        return a\n".replace(
                "'", '"""'
            ),
        },
    )
    assert tree.circles() == [["trl_anatomy.a", "trl_anatomy.b"]]
    assert tree.useless_lazy_imports() == ["c.py:3 numpy", "c.py:4 trl_anatomy.b"]
    assert len(tree.questions_for_verbs()) == 2
    assert [(f.lines, f.parameters) for f in tree.functions if "g.py" in f.where] == [(2, 2)]


@pytest.mark.parametrize(("number", "words"), [(3, "at most 2"), (2, ""), (1, "lower the bound")])
def test_a_bound_holds_from_both_sides(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    monkeypatch.setitem(BOUNDS, "one", Bound(2, 0))
    if not words:
        return hold("one", number)
    with pytest.raises(AssertionError, match=words):
        hold("one", number)
    return None
