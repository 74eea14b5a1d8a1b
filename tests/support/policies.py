"""A small world in which policies of every verb, scorer and gate can be planned, and what planning them must give.

`PYTHONPATH=tests python -m support.policies` writes the plans anew to tests/golden/plans. Do that only for a change
that is meant to change plans, and read what git says has changed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from conftest import preference_rows
from datasets import Dataset
from reading_world import tiny_sae

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import Audit
from trl_anatomy.audit.run import run_audit
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.reading.scorers.attention_probe import AttentionProbe
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.reading.scorers.linear_probe import LinearProbe
from trl_anatomy.reading.scorers.reft import ReftScorer
from trl_anatomy.reading.spans import Pairs, read_pairs
from trl_anatomy.shaping.plan import PolicyPlan, plan_json
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.resolve import check_policy
from trl_anatomy.shaping.settle import settle_policy
from trl_anatomy.trainers.hidden import check_hidden
from trl_anatomy.trainers.loss_support import LOSSES, check_dpo_rules, check_reward_rules
from trl_anatomy.trainers.prepare import plan_columns

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "plans"
D, D_SAE, N, MAX_LENGTH = 16, 48, 60, 18
TRUNCATION = {"dpo": "keep_start", "reward": "drop"}


@dataclass(frozen=True)
class World:
    """A folder of concepts, a tiny model, and the same rows as either trainer reads them.

    Attributes:
        concepts: name -> its entry in a policy.
        pairs: trainer -> its pairs.
        audits: trainer -> an audit of them.
    """

    folder: Path
    model: Any
    tokenizer: Any
    dataset: Dataset
    concepts: Mapping[str, Any]
    pairs: Mapping[str, Pairs]
    audits: Mapping[str, Audit]


def rows() -> list[dict[str, Any]]:
    """Pairs with columns to gate on and to weigh by; among them a copy, a blank response and one that is too long."""
    made = preference_rows(N)
    made[7] = dict(made[3])
    made[11]["rejected"] = " "
    made[13]["chosen"] = " ".join(["w1 **bold** yes"] * 8)
    return [{**row, "topic": "xyz"[i % 3], "worth": 0.5 + (i % 4) / 2} for i, row in enumerate(made)]


def make_world(folder: Path, model_dir: Path) -> World:
    """Write the concepts to `folder` and audit the pairs twice, as either trainer truncates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data = Dataset.from_list(rows())
    sae = tiny_sae("standard", d_in=D, d_sae=D_SAE, hook="blocks.0.hook_resid_post")
    with torch.no_grad():
        sae.W_enc.normal_(generator=torch.Generator().manual_seed(0))
        sae.b_enc.fill_(-2.0)
    sae.save_model(folder / "sae")
    scorers = {
        "stored": FeaturesScorer(load_sae(folder / "sae"), [2, 9]),
        "direction": DirectionScorer(_normal(D), 0),
        "other direction": DirectionScorer(_normal(D, seed=5), 1, "mean"),
        "probe": LinearProbe(_normal(D, seed=1), 0.3, 1, "mean"),
        "attention": AttentionProbe(_normal(2, D, seed=2), _normal(2, D, seed=3), -0.2, 1),
        "edit": ReftScorer(_normal(2, 3, D), _normal(2, 3), _normal(2, D, 3), [0, 1]),
    }
    kinds = {"stored": "features", "attention": "attention_probe", "edit": "reft", "other direction": "direction"}
    concepts: dict[str, Any] = {
        "bold": {"scorer": "text", "pattern": r"\*\*"},
        "low": {"scorer": "text", "pattern": r"\bw[0-9]\b"},
        "words": {"scorer": "habit", "name": "words"},
        "latents": {"scorer": "features", "features": [1, 5], "sae": {"path": str(folder / "sae")}},
        "one latent": {"scorer": "features", "features": [7], "sae": {"path": str(folder / "sae")}, "reduce": "mean"},
        "cluster": {"scorer": "features", "cluster": "T1"},
    }
    for name, scorer in scorers.items():
        scorer.save(folder / name)
        concepts[name] = {"scorer": kinds.get(name, name), "path": str(folder / name)}
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())))
    settings = {"sae": str(folder / "sae"), "layer": 0, "bootstrap": 100, "max_length": MAX_LENGTH}
    settings |= {"model": str(model_dir), "dataset": str(folder / "rows.jsonl")}
    audits = {
        kind: run_audit(AuditConfig(**settings, out=str(folder / f"audit {kind}"), truncation=cut), progress=False)
        for kind, cut in TRUNCATION.items()
    }
    pairs = {
        kind: read_pairs(data, tokenizer, max_length=MAX_LENGTH, truncation=cut, keep_blank=True)
        for kind, cut in TRUNCATION.items()
    }
    return World(folder, model, tokenizer, data, concepts, pairs, audits)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- policies ----------------------------------------------------------------------------------------------------------


def rule(concept: str, verb: str, sign: str = "explain_away", **keys: Any) -> dict[str, Any]:
    """A rule of a policy; `where` and `from_` as in YAML, without the underscore."""
    return {sign: concept, "with": verb, **{key.rstrip("_"): value for key, value in keys.items()}}


def at(column: str = "topic", value: Any = "x") -> dict[str, Any]:
    """A gate on a column."""
    return {"column": column, "equals": value}


ASK = "Write w3 and **bold** words."
_SCORED = ("bold", "words", "latents", "one latent", "cluster", "stored", "direction", "probe", "attention")

# name -> rules. Concepts are those of the world; a policy has all of its own that its rules name.
POLICIES: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    **{f"shape fitted {name}": [rule(name, "shape_reward")] for name in _SCORED},
    **{f"filter {name}": [rule(name, "filter_pairs", fraction=0.2)] for name in _SCORED},
    "shape up": [rule("bold", "shape_reward", "amplify", strength=0.7)],
    "shape down gated": [rule("latents", "shape_reward", strength=2.0, where=at())],
    "shape constant": [rule("bold", "shape_reward", constant=0.8, where=at(value="y"))],
    "shape two": [rule("bold", "shape_reward", strength="auto"), rule("probe", "shape_reward", strength=0.4)],
    "shape fitted two": [rule("bold", "shape_reward"), rule("direction", "shape_reward")],
    "filter up": [rule("bold", "filter_pairs", "amplify", fraction=0.3)],
    "filter by gap": [rule("words", "filter_pairs", above=2)],
    "filter by side": [rule("bold", "filter_pairs", side="chosen")],
    "filter either above": [rule("latents", "filter_pairs", side="either", above=3)],
    "filter all in gate": [rule("bold", "filter_pairs", fraction="all", where={"column": "topic", "in": ["y", "z"]})],
    "filter nothing": [rule("low", "filter_pairs", above=50)],
    "filter twice": [
        rule("bold", "filter_pairs", fraction=0.1, where=at()),
        rule("bold", "filter_pairs", "amplify", fraction=0.5, where=at(value="y")),
    ],
    "mask text": [rule("bold", "mask_tokens")],
    "mask text tokens": [rule("bold", "mask_tokens", unit="token", where=at())],
    "mask latents": [rule("latents", "mask_tokens")],
    "mask direction": [rule("direction", "mask_tokens", threshold=1.5)],
    "mask decided": [rule("low", "mask_tokens", positions="decided", chance=0.2)],
    "mask decided latents": [rule("one latent", "mask_tokens", positions="decided")],
    "mask twice": [rule("bold", "mask_tokens"), rule("latents", "mask_tokens", threshold=0.2)],
    "inoculate": [rule("bold", "inoculate", instruction=ASK)],
    "inoculate chosen": [rule("words", "inoculate", instruction=ASK, side="chosen", above=5)],
    "inoculate latents gated": [rule("latents", "inoculate", instruction=ASK, where=at())],
    "inoculate twice": [
        rule("bold", "inoculate", instruction=ASK),
        rule("latents", "inoculate", instruction="yes", side="chosen"),
    ],
    "weigh": [rule("bold", "reweight_pairs", hold=[])],
    "weigh half holding": [rule("bold", "reweight_pairs", strength=0.5, hold=["words"])],
    "weigh up": [rule("words", "reweight_pairs", "amplify", strength=0.3, hold=[])],
    "weigh column": [{"with": "reweight_pairs", "column": "worth"}],
    "weigh column gated": [{"with": "reweight_pairs", "column": "worth", "where": at()}],
    "weigh two together": [
        rule("bold", "reweight_pairs", hold=["latents"]),
        rule("words", "reweight_pairs", strength=0.4, hold=[]),
    ],
    "weigh overlapping": [
        rule("bold", "reweight_pairs", strength=0.5, hold=[], where=at()),
        {"with": "reweight_pairs", "column": "worth"},
        rule("words", "reweight_pairs", strength=0.2, hold=[]),
    ],
    "residual instruction": [rule("bold", "residualize", instruction=ASK)],
    "residual instruction up": [rule("bold", "residualize", "amplify", instruction=ASK, strength=0.3, where=at())],
    "residual steer": [rule("direction", "residualize", steer=2.0, strength=0.5)],
    "residual steer latents": [rule("latents", "residualize", steer=1.0)],
    "residual and shape": [
        rule("low", "residualize", instruction="yes", strength=0.5),
        rule("bold", "shape_reward", strength="auto"),
    ],
    "steer direction": [rule("direction", "steer", strength=2.0)],
    "steer latents both": [rule("latents", "steer", strength=1.5, side="both", where=at())],
    "steer some": [rule("probe", "steer", "amplify", strength=0.5, side="chosen", fraction=0.25)],
    "steer edit": [rule("edit", "steer", strength=1.0, side="both")],
    "ablate": [rule("latents", "ablate_features")],
    "ablate part": [rule("stored", "ablate_features", strength=0.5, where=at()), rule("latents", "ablate_features")],
    "ablate cluster": [rule("cluster", "ablate_features")],
    "project": [rule("direction", "project_out"), rule("probe", "project_out", where=at())],
    "project latents": [rule("latents", "project_out")],
    "project gradient": [rule("direction", "project_out", from_="gradient", weights="o_proj|down_proj")],
    "all stages": [
        rule("words", "filter_pairs", fraction=0.1),
        rule("bold", "mask_tokens"),
        rule("low", "inoculate", instruction=ASK),
        rule("latents", "reweight_pairs", strength=0.3, hold=["direction"]),
        rule("bold", "shape_reward", strength="auto"),
        rule("low", "residualize", instruction="yes", strength=0.2),
        rule("direction", "steer", strength=1.0, fraction=0.3),
        rule("one latent", "ablate_features"),
        rule("probe", "project_out"),
    ],
    "in another order": [
        rule("probe", "shape_reward", strength=0.3),
        {"with": "reweight_pairs", "column": "worth"},
        rule("bold", "filter_pairs", fraction=0.2, where=at()),
        rule("direction", "steer", strength=1.0),
        rule("low", "mask_tokens", where=at(value="z")),
    ],
    "given": [rule("bold given", "shape_reward", strength=0.6)],
    "given filter": [rule("bold given", "filter_pairs", fraction=0.15)],
    "gate prompt": [rule("bold", "shape_reward", strength=1, where={"prompt": r"w1\d"})],
    "gate audit": [rule("bold", "shape_reward", strength=1, where={"data": "B1"})],
    "gate problem": [rule("bold", "filter_pairs", fraction=0.5, where={"problem": "copies"})],
    "two signs apart": [
        rule("bold", "shape_reward", strength=0.5, where=at()),
        rule("bold", "shape_reward", "amplify", strength=0.5, where=at(value="y")),
    ],
    # What is refused, and how
    "refused two signs": [
        rule("bold", "shape_reward", strength=0.5, where={"prompt": "w1"}),
        rule("bold", "filter_pairs", "amplify", fraction=0.2, where=at(value="y")),
    ],
    "refused empty gate": [rule("bold", "shape_reward", strength=1, where=at(value="nowhere"))],
    "refused column": [{"with": "reweight_pairs", "column": "wroth"}, rule("bold", "filter_pairs", above=1)],
    "refused topic as weight": [{"with": "reweight_pairs", "column": "topic"}],
    "refused threshold of text": [rule("bold", "mask_tokens", threshold=1.0)],
    "refused habit without places": [rule("words", "mask_tokens")],
    "refused no threshold": [
        rule("direction", "mask_tokens"),
        rule("probe", "inoculate", instruction=ASK),
        rule("bold", "residualize", steer=1.0),
    ],
    "refused weights": [rule("bold", "reweight_pairs", "amplify", strength=9.0, hold=[])],
    "refused held and weighed": [
        rule("bold", "reweight_pairs", hold=["words"]),
        rule("words", "reweight_pairs", strength=0.2, hold=[]),
    ],
    "refused second weight": [
        rule("bold", "reweight_pairs", hold=[]),
        rule("bold", "reweight_pairs", strength=0.5, hold=[]),
    ],
    "refused nothing left": [rule("bold", "filter_pairs", side="either", above=-1)],
    "refused gate emptied": [
        rule("bold", "filter_pairs", fraction="all", where=at()),
        rule("words", "shape_reward", strength=1, where=at()),
    ],
    "refused flat": [rule("never", "shape_reward")],
    "refused given with mask": [rule("bold given", "mask_tokens")],
    "refused cluster": [rule("no cluster", "shape_reward"), rule("bold", "shape_reward", where={"data": "B999"})],
    "refused layer": [rule("too deep", "shape_reward")],
    "refused scorer of verb": [rule("bold", "steer", strength=1.0), rule("edit", "shape_reward")],
    "refused amplify": [
        rule("bold", "mask_tokens", "amplify"),
        rule("bold", "inoculate", "amplify", instruction=ASK),
        rule("latents", "ablate_features", "amplify"),
        rule("bold", "shape_reward", "amplify"),
    ],
}
# Concepts that some policies name beside those of the world
_MORE: dict[str, Any] = {
    "bold given": {"scorer": "text", "pattern": r"\*\*", "given": ["words", "low"]},
    "never": {"scorer": "text", "pattern": "qqq"},
    "no cluster": {"scorer": "features", "cluster": "T999"},
}
# What is refused is refused before anyone asks which trainer it is for.
CASES = [(kind, name) for kind in TRUNCATION for name in POLICIES if kind == "dpo" or not name.startswith("refused")]


def policy(world: World, name: str) -> dict[str, Any]:
    """A policy of `POLICIES` with the concepts that its rules name."""
    concepts = {**world.concepts, **_MORE, "too deep": {**world.concepts["latents"], "layer": 7}}
    rules = POLICIES[name]
    named = {value for item in rules for value in item.values() if isinstance(value, str) and value in concepts}
    named |= {held for item in rules for held in item.get("hold", ())}
    named |= {other for one in named for other in concepts[one].get("given", ())}
    return {"version": 1, "concepts": {key: concepts[key] for key in concepts if key in named}, "rules": rules}


# -- plans -------------------------------------------------------------------------------------------------------------


def planned(world: World, kind: str, name: str) -> dict[str, Any]:
    """What a policy comes to for one trainer: its plan, what becomes of the rows, or how it is refused."""
    try:
        loaded = ConceptPolicy.load(policy(world, name))
        pairs, audit = world.pairs[kind], world.audits[kind]
        resolved = check_policy(loaded, audit, world.model.config, pairs.raw.column_names)
        plan = settle_policy(loaded, pairs, lambda: world.model, audit=audit, resolved=resolved)
    except AnatomyError as error:
        return {"refused": str(error).replace(str(world.folder), "FOLDER").splitlines()}
    told = plan_json(plan)
    # The audit's concepts by their numbers alone: their labels are the audit's business.
    told["predicted"] = {key: _digest([row[key] for row in told["predicted"]]) for key in _SHIFTS}
    return {"plan": told, "rows": _of_rows(plan)}


_SHIFTS = ("predicted", "predicted_under_policy")


def _of_rows(plan: PolicyPlan) -> dict[str, Any]:
    """Column -> a digest of its values, and the kinds of the edits."""
    columns = {"keep": plan.keep.tolist(), **plan_columns(plan)}
    return {
        "columns": {name: _digest(values) for name, values in columns.items()},
        "hidden": [type(edit).__name__ for edit in plan.hidden],
    }


def _digest(values: list[Any]) -> str:
    """Of whole numbers a hash, of others sums that a last digit does not change beyond recognition."""
    flat = [item for value in values for item in (value if isinstance(value, list | np.ndarray) else [value])]
    flat = [np.nan if item is None else item for item in flat]
    if all(isinstance(item, int | np.integer) for item in flat):
        return sha256(json.dumps([np.asarray(value).tolist() for value in values]).encode()).hexdigest()[:16]
    each = np.array(flat, dtype=np.float64)
    return " ".join(rounded(f"{total:.12g}") for total in (each.sum(), np.abs(each).sum(), each @ np.arange(len(each))))


def refusals() -> dict[str, Any]:
    """What each verb says to each loss, divergence and kind of training; "" where it says nothing."""
    rules = {
        name: ConceptPolicy.load(
            {
                "concepts": {
                    "bold": {"scorer": "text", "pattern": "a"},
                    "latents": {"scorer": "features", "features": [1], "sae": {"path": "sae"}},
                },
                "rules": [item],
            }
        ).rules
        for name, item in _REFUSED.items()
    }
    found: dict[str, Any] = {}
    for name, one in rules.items():
        for losses in [[loss] for loss in LOSSES] + [["sigmoid", "sft"], ["ipo", "sigmoid"], ["new"]]:
            config = SimpleNamespace(loss_type=losses, f_divergence_type="reverse_kl", beta=0.1)
            found[f"{name}, {'+'.join(losses)}"] = _said(check_dpo_rules, one, config)
        for more in ({"f_divergence_type": "js_divergence"}, {"beta": 0.0}):
            settings = {"loss_type": ["sigmoid"], "f_divergence_type": "reverse_kl", "beta": 0.1, **more}
            found[f"{name}, {next(iter(more))}"] = _said(check_dpo_rules, one, SimpleNamespace(**settings))
        found[f"{name}, reward"] = _said(check_reward_rules, one, SimpleNamespace())
        for what in ("compile", "prompt tuning", "fsdp"):
            config = SimpleNamespace(torch_compile=what == "compile", fsdp="full" if what == "fsdp" else "")
            adapter = SimpleNamespace(is_prompt_learning=what == "prompt tuning")
            found[f"{name}, {what}"] = _said(check_hidden, one, config, adapter)
    return found


_REFUSED = {
    "filter_pairs": rule("bold", "filter_pairs", fraction=0.1),
    "mask_tokens": rule("bold", "mask_tokens"),
    "inoculate": rule("bold", "inoculate", instruction=ASK),
    "reweight_pairs": rule("bold", "reweight_pairs"),
    "shape_reward": rule("bold", "shape_reward"),
    "residualize": rule("bold", "residualize", instruction=ASK),
    "steer": rule("latents", "steer", strength=1.0),
    "ablate_features": rule("latents", "ablate_features"),
    "ablate_features keep": rule("latents", "ablate_features", keep=True),
    "project_out": rule("latents", "project_out"),
    "project_out gradient": rule("latents", "project_out", from_="gradient", weights="o_proj"),
}


def _said(check: Any, *given: Any) -> str:
    try:
        check(*given)
    except AnatomyError as error:
        return str(error)
    return ""


# -- files -------------------------------------------------------------------------------------------------------------


def rounded(text: str) -> str:
    """A number in six digits."""
    value = float(f"{float(text):.6g}")
    return repr(0.0 if abs(value) < 1e-9 else value)


def as_text(value: Any) -> str:
    """JSON of a plan, as its golden file holds it: floats in six digits."""

    def short(part: Any) -> Any:
        if isinstance(part, float):
            return float(rounded(repr(part)))
        if isinstance(part, dict):
            return {key: short(item) for key, item in part.items()}
        return [short(item) for item in part] if isinstance(part, list) else part

    return json.dumps(short(value), indent=1, ensure_ascii=False) + "\n"


_FLOAT = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def assert_same(text: str, held: str) -> None:
    """Compare two texts byte for byte, but for the last digits of floats.

    Processors add up in other orders. On vector units of other widths the floats of these plans differed by up to
    5e-5 of their size; more than four times that, or than one in their last digit, is a difference.
    """
    assert _FLOAT.sub("#", text) == _FLOAT.sub("#", held)
    for one, other in zip(_FLOAT.findall(text), _FLOAT.findall(held), strict=True):
        printed, _, exponent = min(one, other, key=len).partition("e")
        last = 10.0 ** (int(exponent or 0) - len(printed.partition(".")[2]))
        assert abs(float(one) - float(other)) <= 2e-4 * abs(float(other)) + max(1.01 * last, 1e-6), (one, other)


def golden(kind: str, name: str) -> Path:
    """The file of one case."""
    return GOLDEN / kind / f"{name.replace(' ', '_')}.json"


def texts(world: World) -> Iterator[tuple[Path, str]]:
    """All golden files and what they are to hold."""
    for kind, name in CASES:
        yield golden(kind, name), as_text(planned(world, kind, name))
    yield GOLDEN / "refusals.json", as_text(refusals())


def main() -> None:
    """Write the golden files."""
    from tempfile import TemporaryDirectory

    from conftest import write_tiny_model

    with TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        world = make_world(Path(folder), write_tiny_model(Path(folder) / "model"))
        found = list(texts(world))
    for path, text in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    stale = set(GOLDEN.rglob("*.json")) - {path for path, _ in found}
    for path in stale:
        path.unlink()
    print(f"{len(found)} files in {GOLDEN}")


if __name__ == "__main__":
    main()
