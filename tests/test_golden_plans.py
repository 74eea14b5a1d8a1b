"""What policies of every verb, scorer and gate come to, held byte for byte but for last digits of floats."""

import json
from pathlib import Path

import pytest
from support.policies import (
    CASES,
    GOLDEN,
    POLICIES,
    World,
    as_text,
    assert_same,
    golden,
    make_world,
    planned,
    policy,
    refusals,
)

from trl_anatomy.cli import main
from trl_anatomy.shaping.interventions import VERBS
from trl_anatomy.shaping.policy import SCORERS


@pytest.fixture(scope="module")
def world(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("plans"), tiny_model_dir)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_plan_is_what_it_was(kind: str, name: str, world: World) -> None:
    assert_same(as_text(planned(world, kind, name)), golden(kind, name).read_text(encoding="utf-8"))


def test_what_losses_and_trainers_refuse_is_what_it_was() -> None:
    assert as_text(refusals()) == (GOLDEN / "refusals.json").read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    known = {golden(kind, name) for kind, name in CASES} | {GOLDEN / "refusals.json"}
    assert set(GOLDEN.rglob("*.json")) == known


def test_the_policies_have_every_verb_and_every_scorer(world: World) -> None:
    rules = [rule for name in POLICIES for rule in policy(world, name)["rules"]]
    of_pairs = {name for name, verb in VERBS.items() if verb.reads in ("", "pairs")}  # not those of rows
    assert {rule["with"] for rule in rules} == of_pairs
    used = {spec["scorer"] for name in POLICIES for spec in policy(world, name)["concepts"].values()}
    assert used == set(SCORERS)


@pytest.mark.parametrize("name", ["all stages", "in another order", "weigh two together"])
def test_the_command_says_the_same(name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policy.yaml").write_text(json.dumps(policy(world, name)))
    arguments = ["--audit", str(world.audits["dpo"].path), "--policy", str(tmp_path / "policy.yaml"), "--json"]
    assert main(["plan", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    held = json.loads(golden("dpo", name).read_text(encoding="utf-8"))["plan"]
    assert_same(as_text({**told, "predicted": held["predicted"]}), as_text(held))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a": 1.23456}', '{"a": 1.23457}', True),
        ('{"a": 1.23456}', '{"a": 1.23556}', False),
        ("from +0.145 sd", "from +0.146 sd", True),
        ("from +0.145 sd", "from +0.145 pp", False),
        ('{"rows": 3}', '{"rows": 4}', False),
        ('{"a": 2.5e-05}', '{"a": -2.5e-05}', False),
    ],
)
def test_only_last_digits_may_differ(one: str, other: str, same: bool) -> None:
    if same:
        assert_same(one, other)
    else:
        with pytest.raises(AssertionError):
            assert_same(one, other)
