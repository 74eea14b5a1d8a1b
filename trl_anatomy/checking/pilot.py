"""Train the first steps of a recipe, and go on along the straight line they took as far as the training would go.

`θ_α = θ_0 + α·(θ_k − θ_0)` with α such that the mean margin of pairs that were not trained on is the one expected at
the end (`margin_curve`). Weight extrapolation: arXiv 2404.16792.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, get_scheduler

from .. import __version__
from ..errors import AnatomyError
from ..reading.files import make_folder, without_nan, write_atomically
from ..reading.fingerprint import hash_json, hash_tensors
from ..reading.progress import Progress
from ..trainers.checkpoints import last_whole
from ..trainers.seams import WHOLE_MASK
from .margin_curve import Expected, Reached, alpha_for_margin, expected_margin
from .pilot_price import Training, held_out
from .straight_line import extrapolated, trained_weights

# A killed pilot loses at most so much work.
SAVE_SECONDS = 60.0
# Losses whose pull on a margin falls as that of the logistic loss.
_LOGISTIC = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "discopop", "bco_pair", "nca_pair")
# Settings of a training that say where and how it is told, not what it computes.
_TOLD = ("output_dir", "logging", "log_", "save_", "report_to", "run_name", "push_to_hub", "hub_", "disable_tqdm")


@dataclass(frozen=True)
class Pilot:
    """A pilot, and how far its way is gone.

    Attributes:
        steps, of: optimizer steps of the pilot, and of the training.
        alpha: how many times its way is gone.
        alpha_error: relative standard error of alpha, from that of the margin expected.
        margin: mean reward margin of the held-out pairs after the pilot.
        n_held_out: pairs that it is the mean of; the pilot did not train on them.
        expected: margin expected at the end.
        reached: margin at alpha, as measured.
        capped: the margin expected is not met as far as the learning rates go, and alpha is where it is largest.
        reason: why it is not known how far the training goes; None where it is.
    """

    steps: int
    of: int
    alpha: float
    alpha_error: float
    margin: float
    n_held_out: int
    expected: Expected
    reached: float
    capped: bool
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(trainer: Any) -> Training:
    """What the training of a DPO trainer that has not begun computes.

    Raises:
        AnatomyError: a training set without a length, or whose rows TRL does not tokenise before it trains.
    """
    args, rows = trainer.args, trainer.train_dataset
    if not hasattr(rows, "__len__") or "chosen_ids" not in rows.column_names:
        raise AnatomyError(
            "A pilot needs a training set of known length whose rows are tokenised before training: give --budget 0."
        )
    batches = len(rows) / args.train_batch_size
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    lengths = {name: np.zeros(0) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    for name in lengths:
        column = rows.select_columns([name]).with_format("arrow")
        parts = [table[name].combine_chunks().value_lengths().to_numpy() for table in column.iter(batch_size=4096)]
        lengths[name] = np.concatenate(parts)
    longest = args.max_length or math.inf
    sides = [np.minimum(lengths["prompt_ids"] + lengths[side], longest) for side in ("chosen_ids", "rejected_ids")]
    sizes = [(weight.numel(), weight.requires_grad) for weight in trainer.model.parameters()]
    return Training(
        steps=steps,
        pairs_per_step=args.train_batch_size * args.gradient_accumulation_steps,
        n_pairs=len(rows),
        pair_tokens=float(np.mean(sides[0] + sides[1])),
        weights=sum(n for n, _ in sizes),
        trained=sum(n for n, trained in sizes if trained),
        recomputed=bool(args.gradient_checkpointing),
        stored_reference=bool(trainer.precompute_ref_logps),
        rates=learning_rates(args, steps),
    )


def learning_rates(args: Any, steps: int) -> np.ndarray:
    """(steps,) learning rate of each step of a training by its arguments.

    Schedules that wait for evaluations are taken to stay where they begin.
    """
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) in ("reduce_lr_on_plateau", "greedy"):
        return np.full(steps, args.learning_rate)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    found = np.empty(steps)
    for n in range(steps):
        found[n] = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
    return found


# training ------------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A pilot's trained weights, as they were and as they are after it, and what it saw on its way.

    Attributes:
        margins: (k,) mean margin of the pairs of each step, before it.
        seen: hashes of the pairs that it read.
        key: hash of all that it depends on.
    """

    start: dict[str, Tensor]
    ahead: dict[str, Tensor]
    margins: list[float]
    seen: set[str]
    key: str


class _Watch(TrainerCallback):
    """Stop a training after `steps`, save from time to time, and keep what it saw with each checkpoint."""

    def __init__(self, steps: int, key: str, seen: set[str], bar: Progress) -> None:
        self.steps, self.key, self.seen, self.bar = steps, key, seen, bar
        self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()
        if state.global_step >= self.steps:
            control.should_training_stop = True
        elif time.monotonic() - self.saved >= SAVE_SECONDS:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_atomically(folder / _SEEN, json.dumps({"key": self.key, "seen": sorted(self.seen)}).encode(), send=False)
        self.saved = time.monotonic()


_SEEN = "pilot.json"  # in a checkpoint: written after it is whole


def train_pilot(trainer: Any, steps: int, file: Path, *, name: str, progress: bool = True) -> Trained:
    """Train the first steps of a training, by its own trainer and schedule; what was trained before is read.

    The trained weights stay beside the prediction on this machine. A pilot that was interrupted goes on from its last
    checkpoint, and ends where it would have without.

    Args:
        trainer: a DPO trainer that has not begun; what its weights are afterwards is not said.
        steps: of the pilot.
        file: safetensors file that keeps the weights; the folder beside it of the same name takes checkpoints.
        name: of the pilot, which is part of what it depends on.

    Raises:
        AnatomyError: no room for the weights.
    """
    key = _key(trainer, steps, name)
    weights = trained_weights(trainer.model)
    start = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    folder = file.with_suffix("")
    if (stored := _stored(file, key)) is not None:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed between the two
        ahead, notes = stored
        return Trained(start, ahead, notes["margins"], set(notes["seen"]), key)
    checkpoint, seen = _checkpoint(folder, key)
    args = trainer.args
    args.output_dir, args.save_strategy = str(folder), type(args.save_strategy)("no")
    args.logging_strategy, args.logging_steps = type(args.logging_strategy)("steps"), 1
    args.save_total_limit, args.load_best_model_at_end = 1, False
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    with Progress(steps, "Training a pilot", "steps", show=progress) as bar:
        trainer.add_callback(_Watch(steps, key, seen, bar))
        own_step = trainer.training_step

        def step(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            seen.update(_pairs_of(inputs))
            return own_step(model, inputs, *rest, **more)

        trainer.training_step = step
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            del trainer.training_step
    logged = {entry["step"]: entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry}
    margins = [logged[n + 1] for n in range(steps)]
    ahead = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}
    _store(file, ahead, {"key": key, "margins": margins, "seen": sorted(seen)})
    shutil.rmtree(folder, ignore_errors=True)
    return Trained(start, ahead, margins, seen, key)


def _key(trainer: Any, steps: int, name: str) -> str:
    """Hash of all that a pilot depends on."""
    settings = {k: v for k, v in trainer.args.to_dict().items() if not k.startswith(_TOLD)}
    model = trainer.model
    return hash_json(
        [
            *(__version__, *map(version, ("torch", "transformers", "trl", "peft"))),
            *(name, steps, settings, trainer.policy_text, hash_tensors(model.named_parameters())),
            _rows_key(trainer.train_dataset),
        ]
    )


def _rows_key(rows: Any) -> str:
    """Hash of what stands in a dataset."""
    import pyarrow as pa

    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=4096):
        sink = pa.BufferOutputStream()
        bare = table.replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, bare.schema) as stream:
            stream.write_table(bare)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _pairs_of(inputs: Mapping[str, Any]) -> Iterator[str]:
    """A hash of each pair of a batch, by the tokens of its chosen row: prompt and response."""
    ids, real = inputs["input_ids"].cpu().numpy(), inputs["attention_mask"].cpu().numpy() != 0
    for row in range(len(ids) // 2):
        yield hashlib.sha256(ids[row][real[row]].tobytes()).hexdigest()[:16]


def _checkpoint(folder: Path, key: str) -> tuple[Path | None, set[str]]:
    """The last whole checkpoint of the same pilot, and what was seen by then; those of another are removed."""
    whole, _ = last_whole(folder)
    try:
        notes = None if whole is None else json.loads((whole / _SEEN).read_bytes())
    except (OSError, ValueError):
        notes = None
    if notes is not None and notes["key"] == key:
        return whole, set(notes["seen"])
    shutil.rmtree(folder, ignore_errors=True)
    return None, set()


def _store(file: Path, ahead: dict[str, Tensor], notes: Mapping[str, Any]) -> None:
    make_folder(file.parent)
    partial = file.with_name(f"{file.name}.partial")
    try:
        save_file(ahead, partial, metadata={"notes": json.dumps(notes)})
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise AnatomyError(f"{file}: the pilot's weights cannot be written ({error}); make room.") from error
    finally:
        partial.unlink(missing_ok=True)


def _stored(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and notes of the same pilot, or None."""
    try:
        with safe_open(file, "pt") as stored:
            notes = json.loads((stored.metadata() or {})["notes"])
            if notes["key"] != key:
                return None
            return {name: stored.get_tensor(name) for name in stored.keys()}, notes  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


# how far -------------------------------------------------------------------------------------------------------------


class HeldOut:
    """Pairs of a training set that a pilot did not train on, and their mean reward margin.

    The reference's log-probabilities are computed once.

    Attributes:
        n: how many pairs.
        size, sizes: pairs of a batch, and of each.

    Args:
        trainer: the pilot's trainer.
        seen: hashes of the pairs that it read.
        n: pairs wanted, at most.
        seed: of the draw.
    """

    def __init__(self, trainer: Any, seen: set[str], n: int, seed: int) -> None:
        self.trainer = trainer
        rows, collate = trainer.train_dataset, trainer.data_collator
        drawn: list[dict[str, Any]] = []
        for row in np.random.default_rng(seed).permutation(len(rows)).tolist():
            if len(drawn) == n:
                break
            example = rows[row]
            if not seen.intersection(_pairs_of(collate([example]))):
                drawn.append(example)
        self.n, size = len(drawn), trainer.args.per_device_train_batch_size
        # Several batches, so that their means say how far pairs lie apart.
        self.size = max(1, min(size, self.n // 8))
        parts = [drawn[at : at + self.size] for at in range(0, self.n, self.size)]
        self.sizes = np.array([len(part) for part in parts])
        self.batches = [self._with_reference(part) for part in parts]

    def _with_reference(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        trainer = self.trainer
        batch = trainer._prepare_inputs(trainer.data_collator(examples))
        if not trainer.precompute_ref_logps:
            batch["completion_mask"] = batch.pop(WHOLE_MASK, batch["completion_mask"])
            with torch.no_grad(), trainer.accelerator.autocast():
                found = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = found
        return batch

    def margins(self) -> np.ndarray:
        """(len(sizes),) mean margin of each batch under the trainer's weights as they are, in evaluation mode."""
        trainer, found = self.trainer, []
        precomputed, trainer.precompute_ref_logps = trainer.precompute_ref_logps, True
        training = trainer.model.training
        trainer.model.eval()
        try:
            with trainer._aside(), trainer.accelerator.autocast():
                for batch in self.batches:
                    trainer._compute_loss(trainer.model, batch, False)
                    found.append(trainer._metrics["eval"]["rewards/margins"][-1])
        finally:
            trainer.model.train(training)
            trainer.precompute_ref_logps = precomputed
        return np.array(found)


def carry_on(
    trainer: Any, trained: Trained, training: Training, file: Path, *, seed: int, progress: bool = True
) -> Pilot:
    """How far along a pilot's way its training would end; what was measured before is read.

    Args:
        trainer: the pilot's; its weights are moved, and put back.
        trained: what the pilot came to.
        training: what it is the beginning of.
        file: JSON file that keeps what was measured.
        seed: of the draw of held-out pairs.
    """
    steps, weights, key = len(trained.margins), trained_weights(trainer.model), hash_json([trained.key, seed])
    if (measured := _measured(file, key)) is not None:
        return measured
    pairs = HeldOut(trainer, trained.seen, held_out(steps, training), seed)
    s = np.concatenate([[0.0], np.cumsum(training.rates)])
    with Progress(None, "Measuring margins", show=progress):

        def margins_at(alpha: float) -> np.ndarray:
            with extrapolated(weights, trained.start, trained.ahead, alpha):
                return pairs.margins()

        def margin_at(alpha: float) -> float:
            return float(np.average(margins_at(alpha), weights=pairs.sizes))

        means = margins_at(1.0)
        margin = float(np.average(means, weights=pairs.sizes))
        spread = float(np.sqrt(np.average((means - margin) ** 2, weights=pairs.sizes) * pairs.size))
        losses = trainer.loss_types
        expected = expected_margin(
            [*s[:steps], s[steps]],
            [*trained.margins, margin],
            [*[training.pairs_per_step] * steps, pairs.n],
            spread,
            s[-1],
            logistic=all(loss in _LOGISTIC for loss in losses),
        )
        cap = float(s[-1] / s[steps])
        if expected.known and margin > 0:
            there = alpha_for_margin(margin_at, expected.margin, cap, at_one=margin)
            reason = None
        else:
            there = Reached(cap, margin_at(cap), margin, capped=False)
            reason = (
                f"after {steps} steps the margin of held-out pairs is {margin:+.3f}, no different from zero by its "
                "error: how far the training goes is not known"
            )
    half = (expected.high - expected.low) / 2 / 1.96
    error = half / (abs(there.slope) * there.alpha) if there.slope else math.inf
    found = Pilot(
        steps=steps,
        of=training.steps,
        alpha=there.alpha,
        alpha_error=error,
        margin=margin,
        n_held_out=pairs.n,
        expected=expected,
        reached=there.margin,
        capped=there.capped,
        reason=reason,
    )
    write_atomically(file, json.dumps({"key": key, "pilot": without_nan(found.to_dict())}, indent=2).encode())
    return found


def _measured(file: Path, key: str) -> Pilot | None:
    """What `carry_on` kept of the same pilot, or None."""
    try:
        stored = json.loads(file.read_bytes())
        if stored["key"] != key:
            return None
        values = stored["pilot"]
        error = math.inf if values["alpha_error"] is None else values["alpha_error"]
        return Pilot(**{**values, "alpha_error": error, "expected": Expected(**values["expected"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def swap_sides(trainer: Any, seed: int) -> None:
    """Swap chosen and rejected in half the rows of a trainer, at random: no preference is left to learn.

    Args:
        trainer: one that has not begun, without a policy.
        seed: of the draw.
    """
    rows = trainer.train_dataset
    flip = np.random.default_rng(seed).permutation(len(rows)) < len(rows) // 2
    sides = [(name, name.replace("chosen", "rejected")) for name in rows.column_names if "chosen" in name]
    sides = [(one, other) for one, other in sides if other in rows.column_names]

    def swapped(row: dict[str, Any], at: int) -> dict[str, Any]:
        if not flip[at]:
            return row
        return row | {one: row[other] for one, other in sides} | {other: row[one] for one, other in sides}

    key = hash_json([rows._fingerprint, seed, "swapped"])[:16]
    trainer.train_dataset = rows.map(swapped, with_indices=True, new_fingerprint=key)
