"""The policy's language: what is read, what is refused, and in which words."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trl_anatomy.errors import AnatomyError
from trl_anatomy.shaping.interventions import VERBS, FilterPairs, ShapeReward
from trl_anatomy.shaping.located import MAX_BYTES, PolicyError
from trl_anatomy.shaping.policy import SCORERS, ConceptPolicy, ConceptSpec
from trl_anatomy.shaping.where import FIELDS as WHERE_FIELDS
from trl_anatomy.shaping.where import Where

GOOD = """\
version: 1
concepts:
  flattery: {scorer: direction, path: concepts/flattery, layer: 3, reduce: mean}
  flourish: {scorer: features, features: [8, 4], sae: {release: some-release, id: layer_3}, layer: 3}
  local: {scorer: features, features: [0], sae: {path: saes/one}}
  em_dash: {scorer: text, pattern: "—"}
  habit: {scorer: features, audit: audits/run1, cluster: T17, reduce: sum}
rules:
  - {explain_away: flattery, with: shape_reward, strength: 4}
  - {explain_away: em_dash, with: shape_reward}
  - {amplify: local, with: shape_reward, strength: 0.5, where: {column: topic, equals: sums}}
  - {explain_away: habit, with: filter_pairs, fraction: 0.03, where: {data: B12}}
  - {explain_away: flourish, with: filter_pairs, fraction: 0.5, where: {prompt: "(?i)poem"}}
"""


def write(folder: Path, text: str | bytes, name: str = "policy.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems_of(source: Any) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        ConceptPolicy.load(source)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert isinstance(caught.value, AnatomyError)
    return caught.value.problems


def test_reads_every_scorer_verb_and_gate(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    policy = ConceptPolicy.load(path)
    assert policy.source == str(path)
    assert policy.concepts == {
        "flattery": ConceptSpec("flattery", "direction", path=f"{tmp_path}/concepts/flattery", layer=3, reduce="mean"),
        "flourish": ConceptSpec(
            "flourish", "features", features=(8, 4), sae={"release": "some-release", "id": "layer_3"}, layer=3
        ),
        "local": ConceptSpec("local", "features", features=(0,), sae={"path": f"{tmp_path}/saes/one"}),
        "em_dash": ConceptSpec("em_dash", "text", pattern="—"),
        "habit": ConceptSpec("habit", "features", audit=f"{tmp_path}/audits/run1", cluster="T17", reduce="sum"),
    }
    assert policy.rules == (
        ShapeReward("flattery", "explain_away", 4.0),
        ShapeReward("em_dash", "explain_away", "auto"),
        ShapeReward("local", "amplify", 0.5, Where(column="topic", values=("sums",))),
        FilterPairs("habit", "explain_away", 0.03, Where(data="B12")),
        FilterPairs("flourish", "explain_away", 0.5, Where(prompt="(?i)poem")),
    )
    assert [rule.stage for rule in policy.rules] == ["margin", "margin", "margin", "rows", "rows"]
    assert list(policy.used) == list(policy.concepts)


def test_a_dict_reads_as_the_file_does(tmp_path: Path) -> None:
    import yaml

    from_file = ConceptPolicy.load(str(write(tmp_path, GOOD)))
    content = yaml.safe_load(GOOD)
    content["concepts"]["flattery"]["path"] = tmp_path / "concepts/flattery"
    content["concepts"]["flourish"]["features"] = np.array([8, 4])
    content["concepts"]["local"]["sae"]["path"] = str(tmp_path / "saes/one")
    content["concepts"]["habit"]["audit"] = str(tmp_path / "audits/run1")
    content["rules"][0]["strength"] = np.float32(4)
    from_dict = ConceptPolicy.load(content)
    assert (from_dict.concepts, from_dict.rules) == (from_file.concepts, from_file.rules)
    assert ConceptPolicy.load(from_dict) is from_dict


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "null\n", "version: 1\n", "rules: []\n", "concepts:\nrules:\n"]
)
def test_no_rules_is_the_empty_policy(tmp_path: Path, text: str) -> None:
    policy = ConceptPolicy.load(write(tmp_path, text))
    assert not policy
    assert policy.rules == ()


@pytest.mark.parametrize("source", [None, {}, {"version": 1, "rules": None}])
def test_no_rules_in_python(source: Any) -> None:
    assert not ConceptPolicy.load(source)


TEXT = 'concepts:\n  dash: {scorer: text, pattern: "—"}\n  bold: {scorer: text, pattern: "b"}\n'
RULE = "explain_away: dash, with: shape_reward"
# (policy, problems as (line, key path, fragments of the message) in the order of the lines)
BAD: dict[str, tuple[str, list[tuple[int, str, list[str]]]]] = {
    "typo in a top key": ("rule: []\n", [(1, "", ["'rule'", "version, concepts, rules", "mean 'rules'"])]),
    "no mapping": ("- a\n- b\n", [(1, "", ["a list", "a mapping"])]),
    "text": ("hello\n", [(1, "", ["'hello'", "a mapping"])]),
    "version": ("version: 2\n", [(1, "version", ["found 2", "allowed: 1"])]),
    "version true": ("version: true\n", [(1, "version", ["found true"])]),
    "rules is a mapping": ("rules: {a: b}\n", [(1, "rules", ["a mapping", "a list of rules"])]),
    "rule is text": ("rules: [a]\n", [(1, "rules[0]", ["'a'", "a mapping"])]),
    "concepts is a list": ("concepts: [a]\n", [(1, "concepts", ["a list", "a mapping"])]),
    "concept is text": ("concepts:\n  a: b\n", [(2, "concepts.a", ["'b'", "scorer"])]),
    "no scorer": ("concepts:\n  a: {pattern: b}\n", [(2, "concepts.a", ["scorer", "text, features, direction"])]),
    "scorer typo": ("concepts:\n  a: {scorer: txt}\n", [(2, "concepts.a.scorer", ["'txt'", "mean 'text'"])]),
    "probe without a path": ("concepts:\n  a: {scorer: probe}\n", [(2, "concepts.a", ["no key 'path'"])]),
    "stored features and their numbers": (
        "concepts:\n  a: {scorer: features, path: p, features: [1]}\n",
        [(2, "concepts.a.features", ["beside path", "{path}"])],
    ),
    "scorer list": ("concepts:\n  a: {scorer: [x]}\n", [(2, "concepts.a.scorer", ["a list"])]),
    "no pattern": ("concepts:\n  a: {scorer: text}\n", [(2, "concepts.a", ["'pattern'"])]),
    "key of another scorer": (
        "concepts:\n  a: {scorer: text, pattern: b, layer: 1}\n",
        [(2, "concepts.a", ["'layer'", "scorer, pattern"])],
    ),
    "bad regex": ("concepts:\n  a: {scorer: text, pattern: '('}\n", [(2, "concepts.a.pattern", ["re says"])]),
    "empty regex": ("concepts:\n  a: {scorer: text, pattern: ''}\n", [(2, "concepts.a.pattern", ["''"])]),
    "number as regex": ("concepts:\n  a: {scorer: text, pattern: 5}\n", [(2, "concepts.a.pattern", ["quotes"])]),
    "layer": (
        "concepts:\n  a:\n    scorer: direction\n    path: x\n    layer: -1\n",
        [(5, "concepts.a.layer", ["found -1", "counted from 0"])],
    ),
    "layer bool": ("concepts:\n  a: {scorer: direction, path: x, layer: true}\n", [(2, "concepts.a.layer", ["true"])]),
    "layer float": ("concepts:\n  a: {scorer: direction, path: x, layer: 2.0}\n", [(2, "concepts.a.layer", ["2.0"])]),
    "reduce": (
        "concepts:\n  a: {scorer: direction, path: x, reduce: min}\n",
        [(2, "concepts.a.reduce", ["max, mean"])],
    ),
    "direction without path": ("concepts:\n  a: {scorer: direction}\n", [(2, "concepts.a", ["'path'"])]),
    "features without sae": ("concepts:\n  a: {scorer: features, features: [1]}\n", [(2, "concepts.a", ["'sae'"])]),
    "features empty": (
        "concepts:\n  a: {scorer: features, features: [], sae: {path: x}}\n",
        [(2, "concepts.a.features", ["a list"])],
    ),
    "features mixed": (
        "concepts:\n  a: {scorer: features, features: [1, x], sae: {path: x}}\n",
        [(2, "concepts.a.features", ["Item 2", "'x'"])],
    ),
    "features twice": (
        "concepts:\n  a: {scorer: features, features: [1, 1], sae: {path: x}}\n",
        [(2, "concepts.a.features", ["twice"])],
    ),
    "sae both ways": (
        "concepts:\n  a: {scorer: features, features: [1], sae: {path: x, id: y}}\n",
        [(2, "concepts.a.sae", ["path, id", "{path: FOLDER} or {release: NAME, id: NAME}"])],
    ),
    "sae text": (
        "concepts:\n  a: {scorer: features, features: [1], sae: x}\n",
        [(2, "concepts.a.sae", ["'x'", "release"])],
    ),
    "audit without cluster": ("concepts:\n  a: {scorer: features, audit: x}\n", [(2, "concepts.a", ["'cluster'"])]),
    "cluster name": (
        "concepts:\n  a: {scorer: features, audit: x, cluster: B3}\n",
        [(2, "concepts.a.cluster", ["'B3'", "T17"])],
    ),
    "cluster beside features": (
        "concepts:\n  a: {scorer: features, audit: x, cluster: T3, features: [1]}\n",
        [(2, "concepts.a.features", ["cluster"])],
    ),
    "concept name": ("concepts:\n  'a/b': {scorer: text, pattern: b}\n", [(2, "concepts", ["'a/b'"])]),
    "unknown concept": (
        TEXT + "rules:\n  - {explain_away: dahs, with: shape_reward}\n",
        [(5, "rules[0].explain_away", ["'dahs'", "dash, bold", "mean 'dash'"])],
    ),
    "both signs": (
        TEXT + "rules:\n  - {explain_away: dash, amplify: bold, with: filter_pairs, fraction: 0.1}\n",
        [(5, "rules[0]", ["both explain_away and amplify"])],
    ),
    "neither sign": (
        TEXT + "rules:\n  - {with: filter_pairs, fraction: 0.1}\n",
        [(5, "rules[0]", ["neither explain_away nor amplify"])],
    ),
    "no verb": (
        TEXT + "rules:\n  - {explain_away: dash}\n",
        [(5, "rules[0]", ["'with'", ", ".join(VERBS)])],
    ),
    "verb typo": (
        TEXT + "rules:\n  - explain_away: dash\n    with: shape\n",
        [(6, "rules[0].with", ["'shape'", f"allowed: {', '.join(VERBS)}", "mean 'shape_reward'"])],
    ),
    "verb null": (TEXT + "rules:\n  - {explain_away: dash, with: }\n", [(5, "rules[0].with", ["nothing"])]),
    "key of another verb": (
        TEXT + f"rules:\n  - {{{RULE}, fraction: 0.1}}\n",
        [(5, "rules[0]", ["'fraction'", "strength"])],
    ),
    "no fraction": (
        TEXT + "rules:\n  - {explain_away: dash, with: filter_pairs}\n",
        [(5, "rules[0].fraction", ["no way to choose", "above 0 and below 1, or all), above, side"])],
    ),
    "amplify without a number": (
        TEXT + "rules:\n  - {amplify: dash, with: shape_reward}\n",
        [(5, "rules[0].strength", ["auto", "a number above 0"])],
    ),
    "amplify auto": (
        TEXT + "rules:\n  - amplify: dash\n    with: shape_reward\n    strength: auto\n",
        [(7, "rules[0].strength", ["auto", "a number above 0"])],
    ),
    "where text": (TEXT + f"rules:\n  - {{{RULE}, where: B3}}\n", [(5, "rules[0].where", ["'B3'", "{data}"])]),
    "where empty": (TEXT + f"rules:\n  - {{{RULE}, where: {{}}}}\n", [(5, "rules[0].where", ["no gate"])]),
    "where two gates": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{data: B3, prompt: x}}}}\n",
        [(5, "rules[0].where", ["data, prompt"])],
    ),
    "where half a column": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{column: x}}}}\n",
        [(5, "rules[0].where", ["column", "{column, equals}"])],
    ),
    "where typo": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{colum: x, equals: y}}}}\n",
        [(5, "rules[0].where", ["mean 'column'"]), (5, "rules[0].where", ["equals"])],
    ),
    "where prompts": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{prompts: B12}}}}\n",
        [(5, "rules[0].where.prompts", ["'B12'", "A12"])],
    ),
    "where data and prompts": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{data: B3, prompts: A3}}}}\n",
        [(5, "rules[0].where", ["data, prompts"])],
    ),
    "where side": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{side: chosen}}}}\n",
        [(5, "rules[0].where.side", ["not available in this version"])],
    ),
    "where data": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{data: T3}}}}\n",
        [(5, "rules[0].where.data", ["'T3'", "B12"])],
    ),
    "where in": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{column: x, in: y}}}}\n",
        [(5, "rules[0].where.in", ["'y'", "a list"])],
    ),
    "fight": (
        TEXT + f"rules:\n  - {{{RULE}}}\n  - {{amplify: dash, with: shape_reward, strength: 2}}\n",
        [(6, "rules[1]", ["amplify: dash", "rules[0]", "explain_away"])],
    ),
    "fight across verbs, one gated": (
        TEXT
        + f"rules:\n  - {{{RULE}, where: {{data: B1}}}}\n  - {{amplify: dash, with: filter_pairs, fraction: 0.1}}\n",
        [(6, "rules[1]", ["rules[0]"])],
    ),
    "fight within a column": (
        TEXT + f"rules:\n  - {{{RULE}, where: {{column: t, in: [a, b]}}}}\n"
        "  - {amplify: dash, with: shape_reward, strength: 1, where: {column: t, equals: b}}\n",
        [(6, "rules[1]", ["rules[0]"])],
    ),
    "duplicate key": (
        "concepts:\n  a: {scorer: text, pattern: x}\n  a: {scorer: text, pattern: y}\n",
        [(3, "concepts.a", ["second time", "first on line 2"])],
    ),
    "key is a number": ("concepts:\n  1: {scorer: text, pattern: x}\n", [(2, "concepts", ["the key '1'", "quotes"])]),
    "key is on": ("on: 1\n", [(1, "", ["the key 'on'", "quotes"])]),
    "key is a list": ("? [a]\n: b\n", [(1, "", ["the key a list"])]),
    "merge key": ("<<: {version: 1}\n", [(1, "", ["the key '<<'"])]),
    "tag": (
        "version: !!python/object/apply:os.system ['true']\n",
        [(1, "version", ["the YAML tag", "python/object"]), (1, "version", ["a list"])],
    ),
    "invalid YAML": ("concepts: {a\nrules: [\n", [(2, "", ["not valid YAML"])]),
    "two documents": ("version: 1\n---\nversion: 1\n", [(2, "", ["not valid YAML"])]),
    "tab": ("concepts:\n\ta: b\n", [(2, "", ["not valid YAML"])]),
    "anchor that is not there": ("concepts: *x\n", [(1, "", ["not valid YAML"])]),
}


@pytest.mark.parametrize("case", BAD)
def test_each_problem_names_line_key_finding_and_remedy(tmp_path: Path, case: str) -> None:
    text, expected = BAD[case]
    path = write(tmp_path, text)
    problems = problems_of(path)
    assert len(problems) == len(expected), problems
    for problem, (line, key, fragments) in zip(problems, expected, strict=True):
        assert problem.startswith(f"{path}:{line}: {key}{': ' if key else ''}"), problem
        for fragment in fragments:
            assert fragment in problem, problem


@pytest.mark.parametrize(
    "value", [".nan", ".inf", "-.inf", "0", "0.0", "-2", "true", "yes", "null", "[1]", "'4'", "1e3", "fast"]
)
@pytest.mark.parametrize("key", ["strength", "fraction"])
def test_bad_numbers(tmp_path: Path, key: str, value: str) -> None:
    verb = {"strength": "shape_reward", "fraction": "filter_pairs"}[key]
    text = TEXT + f"rules:\n  - explain_away: dash\n    with: {verb}\n    {key}: {value}\n"
    [problem] = problems_of(write(tmp_path, text))
    assert f":7: rules[0].{key}: found " in problem
    assert "a number above 0" in problem
    if value == "1e3":
        assert "write 1000.0" in problem


def test_fraction_of_one_is_refused(tmp_path: Path) -> None:
    [problem] = problems_of(
        write(tmp_path, TEXT + "rules:\n  - {explain_away: dash, with: filter_pairs, fraction: 1}\n")
    )
    assert "found 1, allowed: a number above 0 and below 1" in problem


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1" + "0" * 5000])
def test_numbers_beyond_floating_point(tmp_path: Path, number: str) -> None:
    problems = problems_of(write(tmp_path, TEXT + f"rules:\n  - {{{RULE}, strength: {number}}}\n"))
    assert all("strength" in problem and len(problem) < 400 for problem in problems)


def test_all_problems_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "rules:\n  - {explain_away: nobody, with: shape}\n  - {amplify: a, with: shape_reward, strength: -1}\n"
        "concepts:\n  a: {scorer: text, patern: x}\n  b: {scorer: direction, path: p, layer: x}\nversoin: 1\n"
    )
    path = write(tmp_path, text)
    lines = [int(problem.removeprefix(f"{path}:").split(":")[0]) for problem in problems_of(path)]
    assert lines == [2, 2, 3, 5, 5, 6, 7]


def test_problems_of_a_dict_name_the_key_path() -> None:
    assert problems_of(
        {"concepts": {"a": {"scorer": "text"}}, "rules": [{"amplify": "b", "with": "shape_reward"}]}
    ) == [
        "policy: concepts.a: found no key 'pattern', allowed: a regular expression (text that is not empty).",
        "policy: rules[0].amplify: found the concept 'b', allowed: a.",
    ]
    [problem] = problems_of({1: 2})
    assert "the key 1" in problem
    assert "found a object" in problems_of({"version": object()})[0]


@pytest.mark.parametrize(
    "gates",
    [
        ("{column: t, equals: a}", "{column: t, equals: b}"),
        ("{data: B1}", "{data: B2}"),
        ("{prompts: A1}", "{data: B1}"),
    ],
)
def test_gates_that_share_no_pair_do_not_fight(tmp_path: Path, gates: tuple[str, str]) -> None:
    text = TEXT + f"rules:\n  - {{{RULE}, where: {gates[0]}}}\n"
    text += f"  - {{amplify: dash, with: shape_reward, strength: 1, where: {gates[1]}}}\n"
    assert len(ConceptPolicy.load(write(tmp_path, text)).rules) == 2


def test_true_and_1_are_different_values_of_a_column(tmp_path: Path) -> None:
    text = TEXT + f"rules:\n  - {{{RULE}, where: {{column: t, equals: true}}}}\n"
    text += "  - {amplify: dash, with: shape_reward, strength: 1, where: {column: t, equals: 1}}\n"
    assert len(ConceptPolicy.load(write(tmp_path, text)).rules) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a" + (b"%d" % (i - 1) if i else b"")] * 9)) for i in range(12)
        ),
        b"concepts: &a {b: *a}\n",
        b"rules: &a [*a, *a]\n",
        b"[" * 100_000,
        b"a: " * 1 + b"{a: " * 5000,
        b"- " * 5000 + b"x",
        b"#" * (MAX_BYTES + 1),
        b"version: 1\x00",
        b"version: \xff\xfe",
        b"version: !!int ''",
        b"!!bool maybe: !!float x",
        b"version: '\xed\xa0\x80'",
    ],
    ids=[
        "aliases",
        "loop",
        "list loop",
        "brackets",
        "braces",
        "dashes",
        "size",
        "zero byte",
        "no UTF-8",
        "forced number",
        "forced key",
        "surrogate",
    ],
)
def test_hostile_files_end_in_a_problem(tmp_path: Path, content: bytes) -> None:
    problems = problems_of(write(tmp_path, content))
    assert sum(map(len, problems)) < 2000


def test_damaged_files_end_in_problems_or_a_policy(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = [
        "[",
        "]",
        "{",
        "}",
        ": ",
        "\n",
        "- ",
        "null",
        "true",
        ".nan",
        "&a ",
        "*a",
        "!!int ",
        "? ",
        "'",
        "|",
        "<<: ",
    ]
    refused = 0
    for _ in range(150):
        text = list(GOOD)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(text))
            text[place : place + rng.randint(0, 8)] = rng.choice(pieces)
        try:
            ConceptPolicy.load(write(tmp_path, "".join(text)))
        except AnatomyError:  # anything else fails the test
            refused += 1
    assert refused > 100


def test_anchors_may_be_used(tmp_path: Path) -> None:
    text = "concepts:\n  a: {scorer: features, features: [1], sae: &sae {path: x}}\n"
    text += "  b: {scorer: features, features: [2], sae: *sae}\n"
    policy = ConceptPolicy.load(write(tmp_path, text))
    assert policy.concepts["a"].sae == policy.concepts["b"].sae == {"path": f"{tmp_path}/x"}


@pytest.mark.parametrize("source", ["nothing.yaml", GOOD, ".", "x" * 5000, "a\0b", "~nobody-of-this-name/x.yaml"])
def test_a_string_is_a_path(source: str) -> None:
    with pytest.raises(AnatomyError, match=r"no such file|a folder") as caught:
        ConceptPolicy.load(source)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("source", [3, ["a"], object()])
def test_other_sources(source: Any) -> None:
    with pytest.raises(AnatomyError, match="give the path"):
        ConceptPolicy.load(source)


DOCS = Path(__file__).parent.parent / "docs" / "reference"
PAGES = ("policy.md", "concepts.md", "rules.md", "verbs.md", "data.md")


def test_every_example_of_the_documentation_is_a_policy(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (DOCS / "policy.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 3
    for example in examples:
        assert ConceptPolicy.load(write(tmp_path, example))


def test_the_documentation_names_every_scorer_key_verb_and_gate() -> None:
    text = "".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    named = [*SCORERS, *(key for keys in SCORERS.values() for key in keys), *VERBS]
    named += [key for verb in VERBS.values() for key in verb.keys]
    assert [name for name in named if f"`{name}`" not in text] == []
    assert [gate for gate in WHERE_FIELDS if f"{gate}:" not in text] == []
