"""The whole loop on the testbed: build, audit, plain DPO, DPO with a policy, and what became of each planted habit."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import require
from .language import HABITS, Habit, is_correct, question_of
from .sae import HabitLatent, habit_latents
from .world import DEMO, Size, World, build_world

if TYPE_CHECKING:
    from ..audit.folder import Audit

# The habit that the demo's policy explains away. It opens a response, so no other habit comes before it and pulls it
# along: what is left of its shift under the policy is the policy's doing.
SHAPED = "flattery"

POLICY = """\
version: 1
concepts:
  flattery: {scorer: text, pattern: '\\bGreat\\b'}
rules:
  - {explain_away: flattery, with: shape_reward, strength: auto}
"""

# With beta 1 a tilt t of the data moves a habit's log-odds by about t, so the planted truth is also the size of what is
# to be seen; the published smaller values amplify it, accidents of the sample and neutral habits' drift included.
BETA = 1.0
LEARNING_RATE = 5e-4
MAX_LENGTH = 128
MAX_NEW_TOKENS = 72


@dataclass(frozen=True)
class Row:
    """One line of the demo's table. Rates of a habit that lives in one topic are of that topic's prompts.

    Attributes:
        habit, role: as planted; the last row is the quality signal, with role "quality".
        concept: the audit's concept that holds the best latent (or "-" if none does) and that latent, e.g. "T3 (L17)".
        phi: correlation of the latent's firing with the text rule over the responses of the pairs; NaN without latent.
        predicted: share of chosen responses that the latent fires in, minus share of rejected ones.
        start, dpo, policy: share of rollouts that show the habit: start model, plain DPO, DPO with the policy.
        noise: standard error of a difference of two of these shares.
    """

    habit: str
    role: str
    concept: str
    phi: float
    predicted: float
    start: float
    dpo: float
    policy: float
    noise: float

    @property
    def observed(self) -> float:
        """Shift of the rate under plain DPO."""
        return self.dpo - self.start


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: table, world, audit, comparison, page, and seconds of wall clock per stage."""

    rows: tuple[Row, ...]
    world: World
    audit: Audit
    comparison: Mapping[str, Any]
    report: Path
    seconds: Mapping[str, float]

    def row(self, habit: str) -> Row:
        """The row of a habit, or of "correct"."""
        return next(row for row in self.rows if row.habit == habit)

    @property
    def recovery(self) -> float:
        """How far the policy brought the shaped habit back: 0 at the plain DPO rate, 1 at the start model's rate."""
        row = self.row(SHAPED)
        return (row.dpo - row.policy) / (row.dpo - row.start) if row.dpo != row.start else math.nan


def run_demo(out: Path, seed: int = 0, size: Size = DEMO, *, say: Callable[[str], None] = print) -> DemoResult:
    """Builds a world, audits its pairs, trains twice, and compares.

    Args:
        out: Folder for everything: `world/`, `audit/`, `dpo/`, `policy/` (models), `policy.yaml`, `compare/`, and
            `table.json`. Start model, SAE and harvest found there are used again.
        seed: Of everything.
        size: Of the world; see `world.py`.
        say: Takes the demo's messages.
    """
    require("sae_lens", "sknetwork", "plotly")
    with quiet(), _one_thread():
        return _run(Path(out), seed, size, say)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' bars for short work: the demo's own lines say where it is."""
    import datasets
    from transformers.utils import logging

    bars = datasets.are_progress_bars_disabled(), not logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if not bars[0]:
            datasets.enable_progress_bars()
        if not bars[1]:
            logging.enable_progress_bar()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain a fifth from a second thread on idle cores, and lose a factor of three on busy ones."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int, size: Size, say: Callable[[str], None]) -> DemoResult:
    from ..audit.config import AuditConfig
    from ..audit.run import run_audit
    from ..checking.compare import compare
    from ..checking.responses import sampled_responses

    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[stage], clock = round(now - clock, 1), now

    say("1/5 A world with planted habits: start model, SAE, preference pairs")
    world = build_world(out / "world", size, seed, say=lambda line: say(f"    {line}"))
    lap("world")

    say(f"2/5 Audit of {len(world.dataset):,} pairs, before any training")
    audit = run_audit(
        AuditConfig(
            model=str(world.model_path),
            dataset=str(world.path / "pairs.parquet"),
            sae=str(world.sae_path),
            layer=world.layer,
            out=str(out / "audit"),
            max_length=MAX_LENGTH,
            seed=seed,
        ),
        progress=False,
    )
    report = out / "audit" / "report.html"
    for line in hypotheses(audit):
        say(f"    {line}")
    lap("audit")

    (out / "policy.yaml").write_text(POLICY, encoding="utf-8")
    say("3/5 Plain DPO")
    train(world, out / "dpo", seed)
    lap("plain DPO")
    say(f"4/5 DPO with the policy {out / 'policy.yaml'}: explain away {SHAPED}")
    plan = train(world, out / "policy", seed, concept_policy=str(out / "policy.yaml"), audit=audit)
    for rule in plan.rules:
        say(f"    strength fitted on the pairs: {rule['strength']:.2f}")
    lap("DPO with policy")

    prompts = world.prompts * size.n_per_prompt
    say(f"5/5 Compare: {len(prompts):,} responses of each model to held-out prompts")
    comparison = compare(
        audit,
        world.model_path,
        {"dpo": out / "dpo", "policy": out / "policy"},
        prompts,
        out=out / "compare",
        rules={habit.name: habit.pattern for habit in HABITS},
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=128,
        seed=seed,
        progress=False,
    )
    shown = {name: rates(prompts, sampled_responses(out / "compare", name)) for name in ("before", "dpo", "policy")}
    rows = table(world, audit, shown)
    lap("compare")

    result = DemoResult(rows, world, audit, comparison, report, seconds)
    (out / "table.json").write_text(
        json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "seconds": seconds}, indent=2), encoding="utf-8"
    )
    for line in render_table(result):
        say(line)
    return result


def hypotheses(audit: Audit, n: int = 6) -> list[str]:
    """The audit in a few lines: findings and the concepts that lean most, and where one depends on the prompt."""
    from ..audit.by_prompt_text import by_prompt_texts
    from ..audit.concept_words import shown_in, verdict_words
    from ..audit.finding_text import finding_texts

    lines = ["What sets chosen and rejected responses apart:"]
    lines += [
        f"  {t.title}: {t.chosen} of chosen, {t.rejected} of rejected"
        for t in finding_texts(audit.findings, audit.habits)
    ]
    lines.append("and by the SAE's concepts:")
    concepts = [c for c in audit.concepts.to_pylist() if c["verdict"] in ("rises", "falls")]
    for c in sorted(concepts, key=lambda c: -abs(c["predicted"]))[:n]:
        lines.append(f"  {c['concept']:<4} {verdict_words(c['verdict'])}, {shown_in(c)}: {c['label']}")
    labels = {c["concept"]: c["label"] for table in (audit.concepts, audit.responses) for c in table.to_pylist()}
    contexts = audit.info.get("contexts", {})
    kept = sorted((h for h in audit.hypotheses.to_pylist() if h["kept"]), key=lambda h: h["rank"])
    for view, heading in (("feature", "and where it differs from elsewhere:"), ("prompt", "and by what is asked:")):
        under = []
        if view == "prompt":
            under += [f"  {text.sentence}" for text in by_prompt_texts(audit.habit_hypotheses, n // 2)]
        for h in [h for h in kept if h["view"] == view][: n // 2]:
            about = " · ".join(contexts.get(h["context"], {}).get("terms", [])[:3])
            under.append(
                f"  {h['context']:<4} ({about}): {h['concept']} ({labels[h['concept']]}) "
                f"{h['mean_in']:+.2f} here, {h['mean_out']:+.2f} elsewhere, q {h['q']:.0e}"
            )
        lines += [heading, *under] if under else []
    return lines


def train(world: World, out: Path, seed: int, *, learning_rate: float = LEARNING_RATE, **policy: Any) -> Any:
    """DPO on the world's pairs with the demo's settings; saves the model and returns the trainer's plan (or None)."""
    from transformers import ProgressCallback

    class Bar(ProgressCallback):
        """The progress bar without the logs that it prints."""

        def on_log(self, *_args: Any, **_kwargs: Any) -> None:
            pass

    trainer = dpo_trainer(world, out, seed, learning_rate=learning_rate, **policy)
    trainer.add_callback(Bar)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer.train()
    trainer.save_model(str(out))
    return trainer.plan


def dpo_trainer(world: World, out: Path, seed: int, *, learning_rate: float = LEARNING_RATE, **policy: Any) -> Any:
    """The trainer of `train` before it begins; it shows no progress."""
    from transformers import PrinterCallback, ProgressCallback
    from trl import DPOConfig

    from ..trainers.dpo import AnatomyDPOTrainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = DPOConfig(
            output_dir=str(out),
            beta=BETA,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            max_length=MAX_LENGTH,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            seed=seed,
        )
        trainer = AnatomyDPOTrainer(
            model=str(world.model_path),
            args=args,
            train_dataset=world.dataset.select_columns(["prompt", "chosen", "rejected"]),
            **policy,
        )
    for talker in (ProgressCallback, PrinterCallback):  # which of the two there is depends on the settings
        trainer.remove_callback(talker)
    return trainer


@dataclass(frozen=True)
class Rate:
    """Share of `n` responses."""

    share: float
    n: int


def rates(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Rate]:
    """Share of responses that show each habit (on the prompts of its topic, if it has one), and that are "correct"."""
    found: dict[str, list[bool]] = {name: [] for name in (*(habit.name for habit in HABITS), "correct")}
    for prompt, text in zip(prompts, responses, strict=True):
        topic = question_of(prompt).topic
        for habit in HABITS:
            if habit.topic in (None, topic):
                found[habit.name].append(habit.shows(text))
        found["correct"].append(is_correct(prompt, text))
    return {name: Rate(float(np.mean(flags)) if flags else math.nan, len(flags)) for name, flags in found.items()}


def match_habits(world: World, audit: Audit) -> dict[str, tuple[HabitLatent, str, float]]:
    """Finds each habit in the audit.

    Returns:
        Habit name -> (best latent by phi over all chosen and rejected responses, the audit's concept that holds it or
        "-", predicted shift of the latent: mean over pairs of fires in chosen minus fires in rejected; over the pairs
        of its topic, if the habit has one).
    """
    from scipy.sparse import csr_array, vstack

    harvest = audit.harvest
    data = world.dataset.select(harvest.rows.tolist())
    fired = {side: csr_array(harvest.maximum(side) > 0) for side in ("chosen", "rejected")}
    both = csr_array(vstack([fired["chosen"], fired["rejected"]]))
    shows = {habit.name: np.concatenate([np.array(data[f"{side}_{habit.name}"]) for side in fired]) for habit in HABITS}
    best = habit_latents(both, shows)
    topics = np.array(data["topic"])
    matches = {}
    for habit in HABITS:
        latent = best[habit.name]
        gap = [fired[side][:, [latent.feature]].toarray()[:, 0].astype(float) for side in fired]
        here = np.full(len(topics), True) if habit.topic is None else topics == habit.topic
        holder = [
            name
            for name, features in zip(audit.concept_names, audit.communities, strict=True)
            if latent.feature in features
        ]
        matches[habit.name] = (latent, holder[0] if holder else "-", float((gap[0] - gap[1])[here].mean()))
    return matches


def table(world: World, audit: Audit, shown: Mapping[str, Mapping[str, Rate]]) -> tuple[Row, ...]:
    """The demo's table from rates by model ("before", "dpo", "policy")."""
    matches = match_habits(world, audit)
    rows = []
    for name in (*(habit.name for habit in HABITS), "correct"):
        by_model = [shown[model][name] for model in ("before", "dpo", "policy")]
        before, after = by_model[:2]
        noise = math.sqrt(sum(r.share * (1 - r.share) / r.n for r in (before, after))) if before.n else math.nan
        role, where, phi, predicted = "quality", "", math.nan, math.nan
        if name in matches:
            latent, concept, predicted = matches[name]
            role, where, phi = _role(name), f"{concept} (L{latent.feature})", latent.phi
        start, dpo, policy = (rate.share for rate in by_model)
        rows.append(Row(name, role, where, phi, predicted, start, dpo, policy, noise))
    return tuple(rows)


def _role(name: str) -> str:
    habit: Habit = next(habit for habit in HABITS if habit.name == name)
    return f"in {habit.topic}" if habit.topic else habit.role


def _agreement_line(found: Mapping[str, Any]) -> str:
    if found["r2"] is None:
        return f"over the audit's {found['n']} concepts: too few to tell"
    ceiling, chance, tilt = (
        "unknown" if value is None else f"{value:.2f}"
        for value in (found["noise_ceiling_r2"], found["random_clusters_r2"], found["tilt_r2"])
    )
    return (
        f"over the audit's {found['n']} concepts, read by the SAE on both sides: R² {found['r2']:.2f} "
        f"[{found['r2_low']:.2f}, {found['r2_high']:.2f}], p {found['p']:.0e} (ceiling by noise {ceiling}, "
        f"random clusters {chance}); from the tilted start model {tilt}"
    )


def render_table(result: DemoResult) -> list[str]:
    """The table and the closing lines as text."""
    from ..audit.predict import agreement

    lines = [
        "",
        f"{'concept':<12} {'planted':<10} {'in the audit':<12} {'phi':>5}   {'predicted':>9} {'observed':>16}"
        f"   {'start':>6} {'DPO':>6} {'policy':>6}",
    ]
    for row in result.rows:
        phi = "" if math.isnan(row.phi) else f"{row.phi:.2f}"
        predicted = "" if math.isnan(row.predicted) else f"{row.predicted:+.3f}"
        observed = f"{row.observed:+.3f} ± {2 * row.noise:.3f}"
        mark = "  <- explained away" if row.habit == SHAPED else ""
        lines.append(
            f"{row.habit:<12} {row.role:<10} {row.concept:<12} {phi:>5}   {predicted:>9} {observed:>16}"
            f"   {row.start:>6.3f} {row.dpo:>6.3f} {row.policy:>6.3f}{mark}"
        )
    habits = [row for row in result.rows if row.role != "quality"]
    fit = agreement(np.array([row.predicted for row in habits]), np.array([row.observed for row in habits]))
    quality = result.row("correct")
    lines += [
        "",
        f"predicted against observed over the {len(habits)} habits: R² {fit.r2:.2f} "
        f"[{fit.r2_low:.2f}, {fit.r2_high:.2f}], rank correlation {fit.spearman:.2f}",
        _agreement_line(result.comparison["agreement"]["dpo"]),
        f"{SHAPED}: the policy brought its rate {100 * result.recovery:.0f} % of the way back to the start model's; "
        f"right answers {100 * quality.dpo:.1f} % -> {100 * quality.policy:.1f} %",
        "seconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in result.seconds.items()),
        f"report: {result.report}",
    ]
    return lines
