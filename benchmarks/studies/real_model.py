"""Does an audit say what DPO will change in a real chat model, and which prediction says it best at its price?

SmolLM2-135M-Instruct is trained by plain DPO with LoRA on nine sets of real pairs and on two sets of its own responses,
labelled by a hidden preference; besides on pairs with sides swapped at random. Each training is read at up to three
doses, in responses to prompts that were held out, through the concepts of the set's audit and as rates of named habits.
The rivals stand side by side on the same runs.

    python benchmarks/studies/real_model.py --model SMOLLM2 --sae SAE --out FOLDER

Units (real_runs.py, real_rivals.py) are kept in `--out` and never made twice, so the study can be stopped and gone on
with, and several processes may work in one `--out`; of two seeds it takes some 12 hours of one core (by what three sets
took). `--table` records what is finished. Half the held-out prompts predict the other half, both ways, so that nothing
is judged on prompts that it has seen; the null drift alone, of prompts of all sets, has seen some. Results hold
numbers, no text.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_intervals import Foretold, by_prompts, coverage
from real_rivals import pilot_unit, steering_unit, step_unit
from real_runs import (
    BATCH,
    CHOSEN_ON,
    DOSES,
    OFF_POLICY,
    PARTS,
    PREFERENCES,
    RESPONSES,
    STEPS,
    SWAPPED,
    Place,
    Run,
    audit_unit,
    response_unit,
    start_unit,
    training_unit,
)
from scipy.stats import spearmanr

from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.predict import concept_means, explained_shift, odds_shift, step_shift
from trl_anatomy.audit.views import shard_activity
from trl_anatomy.checking.compare import fired_counts
from trl_anatomy.checking.responses import sampled_responses, slug
from trl_anatomy.reading.files import without_nan
from trl_anatomy.reading.habits import HABITS, measure
from trl_anatomy.reading.harvest import Harvest

RESULT = Path(__file__).parents[1] / "results" / "real_model.json"
_PACKAGES = ("trl_anatomy", "torch", "transformers", "trl", "peft", "numpy", "scipy")
LARGEST = 50  # predictions
# What COMBINED adds up, with weights of the other sets.
PARTED = ("disparity", "pilot, at the dose")
COMBINED = "pilot and disparity, fitted on the other sets"
RATES = {name: habit for name, habit in HABITS.items() if habit.kind == "rate"}
SETS = (*CHOSEN_ON, *PREFERENCES, *(name for name in OFF_POLICY if name not in CHOSEN_ON))


# --- making ---


def units(place: Place, seeds: Sequence[int]) -> Iterator[Callable[[], bool]]:
    """All of them, in the order in which they are worth having."""
    for seed in seeds:
        swapped = [Run(SWAPPED[seed], seed)] if seed < len(SWAPPED) else []
        runs = [Run(name, seed) for name in SETS]
        for run in [runs[0], *swapped, *runs[1:]]:
            yield lambda run=run: start_unit(place, run.of)
            yield lambda run=run: training_unit(place, run)
            yield lambda run=run: response_unit(place, run, 0)
            if run.of not in SWAPPED and not seed:
                yield lambda run=run: pilot_unit(place, run)
                yield lambda run=run: audit_unit(place, run.of)
        rivals = [lambda run, part=part: response_unit(place, run, part) for part in range(1, len(PARTS))]
        if not seed:
            rivals += [lambda run, unit=unit: unit(place, run) for unit in (step_unit, steering_unit)]
        for rival in rivals:
            for run in runs:
                yield lambda run=run, rival=rival: rival(run)


def make_all(place: Place, seeds: Sequence[int]) -> None:
    """Every unit that is not there; ends when those in work elsewhere are there too."""
    while True:
        there = [unit() for unit in units(place, seeds)]
        if all(there):
            return
        time.sleep(10)


# --- reading ---


@dataclass(frozen=True)
class Space:
    """What is predicted, of one set: its audit's concepts, or the named habits.

    Attributes:
        names: of the K columns.
        gaps: (n_pairs, K) of each pair, chosen less rejected.
        reported: (K,) bool, columns that the audit reports.
        shown: name of a folder of responses and of a model in it -> (RESPONSES, K), NaN where a response was left out.
        others: name of a prediction -> (K,), of those that see no responses of the prompts held out.
        odds: rows of the start model's responses -> (K,) shift by log-odds.
    """

    names: list[str]
    gaps: np.ndarray
    reported: np.ndarray
    shown: Callable[[str, str], np.ndarray | None]
    others: dict[str, np.ndarray]
    odds: Callable[[np.ndarray], np.ndarray]


def done(place: Place, folder: str) -> dict[str, Any] | None:
    file = place.out / folder / "done.json"
    return json.loads(file.read_text()) if file.is_file() else None


def where(place: Place, folder: str, model: str) -> tuple[Path, int] | None:
    """Folder of a model's responses, and their place among those read together; a snapshot's may be another's too."""
    if folder.startswith("start"):
        return (place.out / folder, int(model[-1])) if done(place, folder) else None
    trained = done(place, folder.replace("responses/", "trainings/")) if folder.startswith("responses/") else None
    steps = {} if trained is None else {name: shot["step"] for name, shot in trained["snapshots"].items()}
    for part in [f"{folder}-{i}" for i in range(len(PARTS))] if folder.startswith("responses/") else [folder]:
        for i, name in enumerate((done(place, part) or {"names": []})["names"]):
            if name == model or (name in steps and steps[name] == steps.get(model)):
                return place.out / part, i
    return None


def concepts_of(place: Place, name: str) -> Space:
    audit = load_audit(place.out / "audits" / slug(name) / "audit")
    table, features, tau = audit.concepts.to_pylist(), audit.communities, audit.tau

    @cache
    def shown(folder: str, model: str) -> np.ndarray | None:
        found = where(place, folder, model)
        if found is None:
            return None
        read, side = Harvest.open(found[0] / "harvest"), ("chosen", "rejected")[found[1]]
        values = np.full((RESPONSES, len(features)), np.nan)
        values[read.rows] = np.concatenate([shard_activity(shard, side, features, tau) for shard in read.shards()])
        return values

    start = Harvest.open(place.out / "start" / slug(name) / "harvest")  # responses-1 are its rejected ones
    fired = [fired_counts(audit.harvest, of, tau) for of in ("chosen", "rejected")]

    def odds(rows: np.ndarray) -> np.ndarray:
        here = rows[start.rows]
        counts = fired_counts(start, "rejected", tau, here) / here.sum()
        return concept_means(odds_shift(*fired, audit.harvest.n_pairs, counts), features)

    u = audit.activity.u
    chosen, rejected = habits_of_sides(place, name)
    rng = np.random.default_rng(0)
    others = {
        "length": explained_shift(u, audit.activity.log_ratio[:, None]),
        "text rules": explained_shift(u, (chosen - rejected)[audit.pairs["row"].to_numpy()]),
        "disparity, sides swapped at random": (u * rng.choice([-1.0, 1.0], len(u))[:, None]).mean(axis=0),
    }
    reported = np.array([row["verdict"] in ("rises", "falls") for row in table])
    return Space([row["concept"] for row in table], u, reported, shown, others, odds)


def habit_values(texts: Sequence[str]) -> np.ndarray:
    """(n, n_habits) 1 where a response shows a habit."""
    return (measure(texts, RATES) != 0).astype(np.float64)


def habits_of_sides(place: Place, name: str) -> tuple[np.ndarray, np.ndarray]:
    """`habit_values` of the chosen and of the rejected responses of a set."""
    rows = place.rows(name)[0]
    chosen, rejected = (habit_values([row[side][0]["content"] for row in rows]) for side in ("chosen", "rejected"))
    return chosen, rejected


def habits_of(place: Place, name: str) -> Space:
    rows, sides = place.rows(name)[0], habits_of_sides(place, name)
    gaps = sides[0] - sides[1]

    @cache
    def shown(folder: str, model: str) -> np.ndarray | None:
        found = where(place, folder, model)
        if found is None:
            return None
        names = (done(place, str(found[0].relative_to(place.out))) or {}).get("names", ["responses-0", "responses-1"])
        return habit_values(list(map(str, sampled_responses(found[0], names[found[1]]))))

    def odds(rows: np.ndarray) -> np.ndarray:
        start = shown(f"start/{slug(name)}", "responses-1")
        return odds_shift(sides[0].sum(axis=0), sides[1].sum(axis=0), len(gaps), start[rows].mean(axis=0))

    lengths = [np.array([len(row[side][0]["content"]) + 1 for row in rows]) for side in ("chosen", "rejected")]
    error = gaps.std(axis=0) / np.sqrt(len(gaps))
    rng = np.random.default_rng(0)
    others = {
        "length": explained_shift(gaps, np.log(lengths[0] / lengths[1])[:, None]),
        "disparity, sides swapped at random": (gaps * rng.choice([-1.0, 1.0], len(gaps))[:, None]).mean(axis=0),
    }
    return Space(list(RATES), gaps, np.abs(gaps.mean(axis=0)) > 3 * error, shown, others, odds)


# --- judging ---


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Of entries that are finite in both; NaN where that cannot be told."""
    ok = np.isfinite(x) & np.isfinite(y)
    if ok.sum() < 3 or np.ptp(x[ok]) == 0 or np.ptp(y[ok]) == 0:
        return np.nan
    return float(np.corrcoef(x[ok], y[ok])[0, 1])


def signed(r: float) -> float:
    """R² of a prediction that may only be scaled up: 0 where it points the other way."""
    return r if np.isnan(r) else max(r, 0.0) ** 2


def figures(predicted: np.ndarray, observed: np.ndarray, reported: np.ndarray) -> dict[str, Any]:
    large = np.argsort(-np.abs(np.nan_to_num(predicted)))[:LARGEST]
    told = reported & np.isfinite(predicted)
    same = np.sign(predicted[told]) == np.sign(observed[told])
    varies = np.ptp(predicted[np.isfinite(predicted)]) > 0 if np.isfinite(predicted).any() else False
    return {
        "all": signed(correlation(predicted, observed)),
        "reported": signed(correlation(predicted[told], observed[told])),
        "largest": signed(correlation(predicted[large], observed[large])),
        "rank": float(spearmanr(predicted, observed, nan_policy="omit").statistic) if varies else np.nan,
        "sign": float(same.mean()) if len(same) else np.nan,
    }


def mean_of(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if values is None else np.nanmean(values[rows], axis=0)


def less(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return None if a is None or b is None else a - b


def predictions(place: Place, space: Space, run: Run, dose: str, rows: np.ndarray) -> dict[str, np.ndarray | None]:
    """Every rival's shift at a dose, from the responses in `rows` at most."""
    start = f"start/{slug(run.of)}"

    def since(folder: str, model: str) -> np.ndarray | None:
        """Shift of a model's responses from the start model's, with the same random numbers."""
        return less(mean_of(space.shown(folder, model), rows), mean_of(space.shown(start, "responses-0"), rows))

    every = np.ones(RESPONSES, dtype=bool)
    drifts = [
        less(
            mean_of(space.shown(f"responses/{slug(Run(name, i).name)}", "end"), every),
            mean_of(space.shown(f"start/{slug(name)}", "responses-0"), every),
        )
        for i, name in enumerate(SWAPPED)
    ]
    drifts = [drift for drift in drifts if drift is not None]
    found: dict[str, np.ndarray | None] = {
        "disparity": space.gaps.mean(axis=0),
        **space.others,
        "log-odds": space.odds(rows),
        "null drift": np.mean(drifts, axis=0) if drifts else None,
        "pilot, as it is": since(f"responses/{slug(run.name)}", "pilot"),
        "pilot, at the dose": since(f"pilot/{slug(run.name)}", dose),
        "steering, at the dose": since(f"steering/{slug(run.name)}", dose),
        "first step": stepped(place, space, run, rows),
        "the training itself, other prompts": since(f"responses/{slug(run.name)}", dose),
        "another seed": since(f"responses/{slug(Run(run.of, 1 - run.seed).name)}", dose),
    }
    return found


def stepped(place: Place, space: Space, run: Run, rows: np.ndarray) -> np.ndarray | None:
    told = done(place, f"step/{slug(run.name)}")
    if told is None:
        return None
    start = [space.shown(f"start/{slug(run.of)}", f"responses-{seed}") for seed in (0, 1)]
    of, change = np.array(told["rows"]), np.array(told["change"])
    keep = rows[of]
    groups = np.unique([json.dumps(p) for p in place.asked(run.of)], return_inverse=True)[1][of][keep]
    activity = np.concatenate([side[of][keep] for side in start])
    finite = np.isfinite(activity).all(axis=1)
    both = np.concatenate([groups, groups])
    return step_shift(activity[finite], change[keep].T.ravel()[finite], both[finite])[0]


@dataclass(frozen=True)
class Half:
    """Predictions that saw the responses to one half of the held-out prompts, and the shift over the other half."""

    predicted: dict[str, np.ndarray]
    shift: np.ndarray
    reported: np.ndarray


def halves(place: Place, space: Space, run: Run, dose: str) -> list[Half]:
    """Both ways round; none where the training has no responses at the dose."""
    start = space.shown(f"start/{slug(run.of)}", "responses-0")
    after = space.shown(f"responses/{slug(run.name)}", dose)
    if start is None or after is None:
        return []
    _, half = in_halves(place, run.of)
    found = []
    for told, seen in ((half, ~half), (~half, half)):
        predicted = {n: p for n, p in predictions(place, space, run, dose, told).items() if p is not None}
        found.append(Half(predicted, np.nanmean((after - start)[seen], axis=0), space.reported))
    return found


def foretold(place: Place, space: Space, run: Run, dose: str) -> list[Foretold]:
    """The pilot's shifts and those observed, both ways round; none where either is missing."""
    start = space.shown(f"start/{slug(run.of)}", "responses-0")
    after = space.shown(f"responses/{slug(run.name)}", dose)
    pilot = space.shown(f"pilot/{slug(run.name)}", dose)
    if start is None or after is None or pilot is None:
        return []
    asked, half = in_halves(place, run.of)
    found = []
    for told, seen in ((half, ~half), (~half, half)):
        shift, error, n_prompts = by_prompts(pilot - start, asked, told)
        observed, noise, _ = by_prompts(after - start, asked, seen)
        found.append(Foretold(shift, error, observed, noise, n_prompts))
    return found


def in_halves(place: Place, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Number of each held-out prompt asked, and whether it is in the first half of them."""
    asked = np.unique([json.dumps(prompt) for prompt in place.asked(name)], return_inverse=True)[1]
    return asked, np.random.default_rng(0).permutation(asked.max() + 1)[asked] % 2 == 0


def judged(both: Sequence[Half]) -> dict[str, Any]:
    """Rival -> figures, as the mean over the two halves of the held-out prompts."""
    found: dict[str, list[dict[str, float]]] = {}
    for half in both:
        for name, predicted in half.predicted.items():
            found.setdefault(name, []).append(figures(predicted, half.shift, half.reported))
    return {
        name: {key: mean_told([each[key] for each in each_set]) for key in each_set[0]}
        for name, each_set in found.items()
    }


def combined(sets: Mapping[str, Sequence[Half]]) -> dict[str, list[float]]:
    """Adds `COMBINED` to the predictions of each set: a sum of `PARTED` whose weights the other sets have.

    Least squares without a constant; each set counts alike, its shifts divided by their root mean square.

    Returns:
        set -> weights. Sets that lack a part have none, and are not fitted on.
    """
    able = {n: [h for h in both if all(part in h.predicted for part in PARTED)] for n, both in sets.items()}
    able = {name: both for name, both in able.items() if both}
    found = {}
    for name in able:
        others = [half for other, both in able.items() if other != name for half in both]
        if not others:
            continue
        scale = [np.sqrt(np.nanmean(half.shift**2)) for half in others]
        x = np.concatenate([parted(half) / by for half, by in zip(others, scale, strict=True)])
        y = np.concatenate([np.nan_to_num(half.shift) / by for half, by in zip(others, scale, strict=True)])
        weights = np.linalg.lstsq(x, y, rcond=None)[0]
        found[name] = weights.tolist()
        for half in able[name]:
            half.predicted[COMBINED] = parted(half) @ weights
    return found


def parted(half: Half) -> np.ndarray:
    return np.stack([np.nan_to_num(half.predicted[part]) for part in PARTED], axis=1)


def mean_told(values: Sequence[float]) -> float | None:
    """Mean of what is not NaN; None where all is."""
    told = [value for value in values if not np.isnan(value)]
    return float(np.mean(told)) if told else None


def trained_runs(place: Place, name: str, seeds: Sequence[int]) -> dict[Run, dict[str, Any]]:
    runs = [Run(name, seed) for seed in seeds]
    return {run: told for run in runs if (told := done(place, f"trainings/{slug(run.name)}"))}


def doses_of(told: dict[str, Any]) -> list[str]:
    return [dose for dose in told["snapshots"] if dose != "pilot"]


def recorded(place: Place, name: str, trained: Mapping[Run, dict[str, Any]], first: int) -> dict[str, Any]:
    """What was done for a set, and what it cost."""
    return {
        "on_policy": name in PREFERENCES,
        "trainings": {
            str(run.seed): {key: told[key] for key in ("rows", "margins", "snapshots", "cpu_seconds")}
            for run, told in trained.items()
        },
        "rivals": {
            rival: {key: told[key] for key in ("doses", "cpu_seconds") if key in told}
            for rival in ("pilot", "steering", "step")
            if (told := done(place, f"{rival}/{slug(Run(name, first).name)}"))
        },
    }


def table(place: Place, seeds: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of each set what is recorded of it; and how well the pilot's intervals hold, over concepts and over habits."""
    result: dict[str, Any] = {}
    lines: dict[str, dict[str, list[Foretold]]] = {}  # space -> set -> at all doses
    ends: dict[tuple[str, str], dict[str, list[Half]]] = {}  # seed and space -> set -> at the end
    for name in SETS:
        trained = trained_runs(place, name, seeds)
        if not trained:
            continue
        spaces = {"habits": habits_of(place, name)}
        if done(place, f"audits/{slug(name)}") is not None:
            spaces["concepts"] = concepts_of(place, name)
        result[name] = recorded(place, name, trained, seeds[0])
        result[name]["columns"] = {of: [len(space.names), int(space.reported.sum())] for of, space in spaces.items()}
        found = result[name]["doses"] = {str(run.seed): {} for run in trained}
        for run, dose in ((run, dose) for run, told in trained.items() for dose in doses_of(told)):
            both = {of: halves(place, space, run, dose) for of, space in spaces.items()}
            found[str(run.seed)][dose] = {of: judged(each) for of, each in both.items()}
            for of, space in spaces.items():
                lines.setdefault(of, {}).setdefault(name, []).extend(foretold(place, space, run, dose))
                if dose == "end":
                    ends.setdefault((str(run.seed), of), {})[name] = both[of]
    for (seed, of), sets in ends.items():
        for name, weights in combined(sets).items():
            end = result[name]["doses"][seed]["end"][of]
            end[COMBINED] = judged(sets[name])[COMBINED] | {"weights": weights}
    return result, {of: coverage({name: told for name, told in sets.items() if told}) for of, sets in lines.items()}


def printed(result: dict[str, Any], space: str) -> str:
    """R² over all columns at the end of the first seed's training, one line a rival."""
    ends = {name: of["doses"].get("0", {}).get("end", {}).get(space) for name, of in result.items()}
    ends = {name: end for name, end in ends.items() if end}
    rivals = list(dict.fromkeys(rival for end in ends.values() for rival in end))
    lines = [f"{space}: R2 of all / largest", " " * 36 + "  ".join(name[:11].ljust(11) for name in ends)]
    for rival in rivals:
        cells = []
        for end in ends.values():
            values = [end.get(rival, {}).get(key) for key in ("all", "largest")]
            cells.append(" / ".join("  - " if value is None else f"{value:.2f}" for value in values).ljust(11))
        lines.append(rival.ljust(36) + "  ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--sae", required=True, help="its SAE, as `trl-anatomy sae` makes it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the units; it holds text")
    parser.add_argument("--shared", type=Path, default=os.environ.get("TRL_ANATOMY_SHARED", "../shared"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--table", action="store_true", help="make nothing; record what is finished")
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = Place(given.model, given.sae, Path(given.shared), given.out)
    if not given.table:
        make_all(place, given.seeds)
    result, intervals = table(place, given.seeds)
    print(printed(result, "concepts"), printed(result, "habits"), sep="\n\n")
    record = {
        "command": "python benchmarks/studies/real_model.py --model SMOLLM2 --sae SAE --out FOLDER",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread",
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "doses": list(DOSES),
        "steps": STEPS,
        "batch": BATCH,
        "responses": RESPONSES,
        "sets": result,
        "intervals": intervals,
    }
    RESULT.write_text(json.dumps(without_nan(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
