"""Hostile and odd input ends in one documented error."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from fuzz_targets import CORPUS, STRICT, TARGETS, read_dataset, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading_world import build_tokenizer, tiny_sae
from safetensors.torch import load_file, save_file

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.files import misfit, sealed, unsealed
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.interventions import VERBS
from trl_anatomy.shaping.policy import SCORERS, ConceptPolicy
from trl_anatomy.shaping.resolve import check_policy

# No database of examples and no deadline: what fails here fails everywhere, and CI machines are slow at times.
CALM = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_fuzzers_kept_is_read_or_refused(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) > 20
    outcomes = {TARGETS[target](file.read_bytes()) for file in inputs}  # any other error than AnatomyError fails
    assert {"read" if target != "folder" else "refused in part", "refused"} <= outcomes


# Policies

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["a", "b", "T1", "max", "../..", "/dev/null", "\x00", "\ud800", "(" * 50, "(a+)+$"]),
    st.binary(max_size=4),
)
ANY = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = sorted({key for keys in SCORERS.values() for key in keys} | {"scorer", "given"})
VERB_KEYS = sorted({key for verb in VERBS.values() for key in verb.keys} | {"explain_away", "amplify", "with", "where"})
CONCEPT = st.dictionaries(st.sampled_from(KEYS), ANY, max_size=3).flatmap(
    lambda entry: st.sampled_from(sorted(SCORERS)).map(lambda scorer: {"scorer": scorer, "pattern": "x"} | entry)
)
RULE = st.dictionaries(st.sampled_from(VERB_KEYS), ANY, max_size=3).flatmap(
    lambda entry: st.sampled_from(sorted(VERBS)).map(lambda verb: {"explain_away": "a", "with": verb} | entry)
)
POLICY = st.fixed_dictionaries(
    {"concepts": st.fixed_dictionaries({"a": CONCEPT | ANY, "b": CONCEPT}), "rules": st.lists(RULE | ANY, max_size=3)}
)


@CALM
@given(POLICY | ANY)
def test_any_python_value_is_a_policy_or_a_policy_error(value: Any) -> None:
    try:
        policy = ConceptPolicy.load(value)
    except AnatomyError:
        return
    assert policy.used.keys() <= policy.concepts.keys()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc", "/proc/self/mem", "/dev/zero", "a\x00b", "x" * 5000, "~"]
)
@pytest.mark.parametrize(("scorer", "key"), [("direction", "path"), ("features", "audit"), ("features", "sae")])
def test_a_policy_that_points_outside_its_folder_reads_nothing_but_concepts(
    scorer: str, key: str, path: str, tmp_path: Path
) -> None:
    """Any folder may be named; what is not a concept, an audit or an SAE is refused, at the policy's own line."""
    value: Any = {"path": path} if key == "sae" else path
    concept = {"scorer": scorer, key: value}
    concept |= {"sae": {"features": [1]}, "audit": {"cluster": "T1"}}.get(key, {})
    policy = ConceptPolicy.load({"concepts": {"c": concept}, "rules": [{"explain_away": "c", "with": "shape_reward"}]})
    with pytest.raises(AnatomyError, match=r"concepts\.c"):
        check_policy(policy)


# Datasets

TEXT = st.text(max_size=30) | st.sampled_from(
    [
        "",
        " ",
        "\u202eright to left\u202c",
        "\x00\x1b[2J",
        "{{ messages }}{% endfor %}",
        "</s><assistant>",
        "‏שלום‎",
        "x" * 20_000,
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "</s>"]), "content": TEXT}),
    max_size=3,
)


@CALM
@given(st.lists(st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}), min_size=1, max_size=4))
def test_any_texts_are_read_as_they_are_or_counted(made: list[dict[str, str]]) -> None:
    """Control characters, right-to-left marks, template code and special tokens are text like any other."""
    raw = Dataset.from_list(made)
    outcome = read_dataset(raw, {"data_kind": "pairs", "max_length": 64, "truncation": "keep_start"}, tokenizer(False))
    usable = [row for row in made if row["chosen"].strip() and row["rejected"].strip()]
    assert outcome == "read" or not usable or all(len(row["prompt"]) > 10 for row in usable)


@CALM
@given(
    st.lists(st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES)), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_conversations_are_read_or_refused(made: list[dict[str, Any]], strict: bool) -> None:
    raw = Dataset.from_list(made)
    read_dataset(raw, {"data_kind": "pairs", "max_length": 64, "truncation": "keep_end"}, tokenizer(strict))


def refused(rows: list[dict[str, Any]], match: str, template: str | None = None) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    with pytest.raises(AnatomyError, match=match):
        read_pairs(Dataset.from_list(rows), tokenizer)


def test_what_is_no_text_is_named_by_row_and_column() -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    turn = [{"role": "user", "content": "a"}]
    said = {
        "prompt": turn,
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "x", "content": "c"}],
    }
    refused([{"prompt": "a", "chosen": 7, "rejected": 8}], r"row 0, column 'chosen': found 7, allowed: text, or a list")
    refused([good, {**good, "prompt": None}], r"row 1, column 'prompt': found nothing")
    refused([{**said, "prompt": "a"}], r"row 0, column 'chosen': found messages, but .* is text")
    refused(
        [{**said, "prompt": [{"role": None, "content": "a"}]}],
        r"column 'prompt': found a message whose role is nothing",
    )
    refused(
        [{**said, "chosen": [{"role": "user", "content": 7}]}], r"column 'chosen': found a message whose content is 7"
    )
    refused([{**said, "chosen": ["a"]}], r"column 'chosen': found 'a' among the messages")
    refused([{**good, "tools": "not JSON"}], r"row 0 cannot be tokenised \(JSONDecodeError")
    rows = [{**said, "rejected": said["chosen"]}] * 5 + [said] + [{**said, "rejected": said["chosen"]}] * 3
    refused(rows, r"row 5 cannot be tokenised \(TemplateError: roles must alternate\)", STRICT)


def test_identical_and_huge_responses_are_read() -> None:
    rows = [{"prompt": "Why? ", "chosen": "So.", "rejected": "So."}] * 3
    rows.append({"prompt": "Why? ", "chosen": "word " * 50_000, "rejected": "\u202eno\u202c"})
    pairs = read_pairs(Dataset.from_list(rows), build_tokenizer(), max_length=128)
    assert len(pairs) == 4
    assert pairs.tokens(0)[1] == pairs.tokens(0)[3]
    assert len(pairs.tokens(3)[0]) + len(pairs.tokens(3)[1]) == 128


# Files


def test_a_changed_cache_is_no_cache(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    whole = sealed({"values": np.arange(20.0)})
    file.write_bytes(whole)
    assert np.array_equal((unsealed(file) or {})["values"], np.arange(20.0))
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at])
        assert unsealed(file) is None, "half a file"
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert unsealed(file) is None or np.array_equal((unsealed(file) or {})["values"], np.arange(20.0))
    file.unlink()
    assert unsealed(file) is None


def test_misfit_tells_bools_numbers_and_texts_apart() -> None:
    assert misfit(True, int) == "it is True"
    assert misfit(1, float) is None
    assert misfit({"a": {"b": [1, "x"]}}, {"a": {"b": [int]}}) == "a.b[1] is 'x'"
    assert misfit([], {}) == "it is []"


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
@pytest.mark.parametrize("damage", ["transposed", "short", "missing", "flat", "nan"])
def test_an_sae_of_wrong_shapes_is_refused(architecture: str, damage: str, tmp_path: Path) -> None:
    tiny_sae(architecture).save_model(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    weights = load_file(file)
    if damage == "transposed":
        weights["W_dec"] = weights["W_dec"].T.contiguous()
    elif damage == "short":
        weights["b_enc"] = weights["b_enc"][:-1]
    elif damage == "missing":
        del weights["W_enc"]
    elif damage == "flat":
        weights["W_enc"] = weights["W_enc"].reshape(-1)
    else:
        weights["W_enc"][0, 0] = math.nan
    save_file(weights, file)
    with pytest.raises(AnatomyError, match=r"The SAE at .* (cannot be read|holds NaN or infinity)"):
        load_sae(tmp_path)
