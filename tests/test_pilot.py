"""Pilots: what they cost, that they are the beginning of the very training, and how far they are carried on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from explicit_dpo import BETA, dpo, log_probability, lora, reference_of
from parity import state
from trl import DPOTrainer

from trl_anatomy.checking import pilot
from trl_anatomy.checking.pilot import HeldOut, carry_on, describe, learning_rates, swap_sides, train_pilot
from trl_anatomy.checking.pilot_price import Training, choose_steps, held_out, price, price_report
from trl_anatomy.checking.straight_line import extrapolated, trained_weights, weights_at
from trl_anatomy.errors import AnatomyError

ROWS = preference_rows(40)
EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3}


def training_of(**changes: Any) -> Training:
    given = {"steps": 100, "pairs_per_step": 8, "n_pairs": 400, "pair_tokens": 300.0, "weights": 1000, "trained": 1000}
    rest = {"recomputed": False, "stored_reference": False, "rates": np.ones(100)}
    return Training(**{**given, **rest, **changes})


# --- price and length ---


@pytest.mark.parametrize(
    ("changes", "a_weight_and_token"),
    [
        ({}, 2 + 4 + 2),  # forward, backward, reference
        ({"recomputed": True}, 4 + 4 + 2),
        ({"trained": 0}, 2 + 2 + 2),  # nothing but the gradient that passes through
        ({"stored_reference": True}, 2 + 4 + 1),  # two epochs, one reference
    ],
)
def test_the_flops_of_a_training(changes: dict[str, Any], a_weight_and_token: float) -> None:
    assert training_of(**changes).flops == pytest.approx(a_weight_and_token * 1000 * 300 * 800)


def test_the_price_adds_up() -> None:
    training = training_of()
    found = price(
        training,
        10,
        n_trainers=2,
        n_pilots=2,
        n_null=1,
        evaluations=7,
        n_first=100,
        prompt_lengths=[20, 30],
        n_per_prompt=4,
        max_new_tokens=50,
        layers_read=0.6,
    )
    generation = 2 * 1000 * 4 * (20 + 30 + 2 * 50)
    expected = {
        "pilot": 3 * 80 * 8 * 1000 * 300,
        "margins": 2 * 8 * 40 * 2 * 1000 * 300,
        "sampling": 4 * generation,
        "reading": 4 * 0.6 * generation,
        "first_step": 2 * (100 * 8 * 1000 * 300 + 2 * generation),
    }
    assert found.parts == pytest.approx(expected)
    assert found.total == pytest.approx(sum(expected.values()))
    told = found.to_dict()
    assert told["share"]["pilot"] == pytest.approx(3 * 0.1)
    assert told["share"]["total"] == pytest.approx(sum(told["share"][name] for name in expected))
    assert price_report(found, 10, training).startswith("A pilot takes 10 of the training's 100 steps. ")
    none = price(
        training, 0, n_trainers=1, n_pilots=1, n_null=0, evaluations=7, n_first=9, prompt_lengths=[20],
        n_per_prompt=4, max_new_tokens=50, layers_read=0.6,
    )  # fmt: skip
    assert none.parts["pilot"] == none.parts["margins"] == 0
    assert "pilot" not in price_report(none, 0, training).lower()


@pytest.mark.parametrize(
    ("budget", "changes", "steps", "held"),
    [
        (0.1, {}, 10, 40),
        (0.1, {"steps": 57}, 5, 20),
        (0.29, {}, 29, 64),
        (1.0, {}, 48, 16),  # of 400 pairs 16 are left alone
        (0.02, {}, 2, 16),
    ],
)
def test_the_length_of_a_pilot(budget: float, changes: dict[str, Any], steps: int, held: int) -> None:
    training = training_of(**changes)
    assert choose_steps(budget, training) == (steps, None)
    assert held_out(steps, training) == held
    assert steps * training.pairs_per_step + held <= training.n_pairs


def test_no_pilot_and_why() -> None:
    assert choose_steps(0.1, training_of(steps=9)) == (
        0, "10 % of the training's 9 steps is less than one step: give a larger --budget",
    )  # fmt: skip
    steps, why = choose_steps(0.5, training_of(n_pairs=20))
    assert (steps, why is not None and "20 pairs" in why) == (0, True)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_what_is_said_of_a_training_is_what_it_does(schedule: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {**EPOCHS, "lr_scheduler_type": schedule, "warmup_steps": 3, "gradient_accumulation_steps": 2}
    trainer = dpo(tiny_model_dir, tmp_path, ROWS, policy=None, **options)
    training = describe(trainer)
    lengths = [
        len(row["prompt_ids"]) * 2 + len(row["chosen_ids"] + row["rejected_ids"]) for row in trainer.train_dataset
    ]
    assert training.pair_tokens == pytest.approx(np.mean(lengths))
    assert training.weights == training.trained == sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    assert trainer.state.max_steps == training.steps == 10
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    np.testing.assert_allclose(training.rates, logged, rtol=1e-9)
    assert len(learning_rates(trainer.args, 5)) == 5


def test_rows_that_are_not_counted_are_refused() -> None:
    class Stream:
        column_names = ("chosen_ids",)

    trainer = type("Trainer", (), {"args": None, "train_dataset": Stream()})()
    with pytest.raises(AnatomyError, match="known length"):
        describe(trainer)


# --- weights ---


def test_the_ends_of_the_line_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        start = {"a": torch.randn(40, 30, generator=generator).to(dtype)}
        ahead = {"a": torch.randn(40, 30, generator=generator).to(dtype)}
        assert torch.equal(dict(weights_at(start, ahead, 0.0))["a"], start["a"])
        assert torch.equal(dict(weights_at(start, ahead, 1.0))["a"], ahead["a"])
        expected = start["a"].double() + 3.5 * (ahead["a"].double() - start["a"].double())
        torch.testing.assert_close(dict(weights_at(start, ahead, 3.5))["a"], expected.to(dtype))


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_embedding_B", "lora_embedding_A")])
def test_an_adapters_product_is_scaled(names: tuple[str, str]) -> None:
    """The factor that was zero is scaled; the product is alpha times as large, whatever the other did meanwhile."""
    generator = torch.Generator().manual_seed(0)
    kept, zero = (f"model.q_proj.{name}.default.weight" for name in names)
    start = {kept: torch.randn(2, 30, generator=generator), zero: torch.zeros(40, 2)}
    ahead = {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in start.items()}
    found = dict(weights_at(start, ahead, 7.0))
    product = ahead[zero].double() @ ahead[kept].double()
    torch.testing.assert_close(found[zero].double() @ found[kept].double(), 7 * product)
    assert not dict(weights_at(start, ahead, 0.0))[zero].any()


def test_factors_that_began_elsewhere_move_each_on_its_line() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {f"q.lora_{side}.default.weight": torch.randn(3, 3, generator=generator) for side in "AB"}
    ahead = {name: weight + 1e-3 * torch.randn(3, 3, generator=generator) for name, weight in start.items()}
    found = dict(weights_at(start, ahead, 2.0))
    for name in start:
        torch.testing.assert_close(found[name], start[name] + 2 * (ahead[name] - start[name]))


def test_weights_are_put_back_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = dpo(tiny_model_dir, tmp_path, ROWS, policy=None, peft_config=lora()).model
    weights, before = trained_weights(model), state(model)
    ahead = {name: weight.detach() + 0.3 for name, weight in weights.items()}
    start = {name: weight.detach().clone() for name, weight in weights.items()}

    def moved() -> None:
        with extrapolated(weights, start, ahead, 5.0):
            assert all(not torch.equal(w, before[name]) for name, w in state(model).items() if "lora" in name)
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        moved()
    after = state(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- training ---


def made(model_dir: Path, out: Path, peft: bool, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Any:
    given = {**EPOCHS, "policy": None, "peft_config": lora(init=True) if peft else None, **options}
    return dpo(model_dir, out, rows, **given)


@pytest.mark.parametrize("peft", [False, True])
def test_a_pilot_is_the_beginning_of_the_training(peft: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its weights are those of TRL's own training after as many steps: same order, rates, optimizer."""
    trained = train_pilot(made(tiny_model_dir, tmp_path, peft), 3, tmp_path / "pilot-plain.safetensors", name="plain")
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = made(tiny_model_dir, tmp_path / "whole", peft, cls=DPOTrainer, **options)

    seen: dict[str, torch.Tensor] = {}
    own = whole._save_checkpoint

    def save(model: Any, trial: Any) -> None:
        if whole.state.global_step == 3:
            seen.update({name: weight.detach().clone() for name, weight in trained_weights(model).items()})
        own(model, trial)

    whole._save_checkpoint = save
    whole.train()
    assert seen.keys() == trained.ahead.keys()
    assert all(torch.equal(seen[name], trained.ahead[name]) for name in seen)
    assert any(not torch.equal(trained.start[name], trained.ahead[name]) for name in seen)
    margins = [entry["rewards/margins"] for entry in whole.state.log_history if "loss" in entry]
    assert trained.margins == margins[:3]
    assert 12 <= len(trained.seen) <= 16


@pytest.mark.parametrize("peft", [False, True])
def test_an_interrupted_pilot_ends_where_it_would_have(
    peft: bool, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "SAVE_SECONDS", 0.0)
    whole = train_pilot(made(tiny_model_dir, tmp_path, peft), 4, tmp_path / "whole.safetensors", name="plain")
    trainer, file = made(tiny_model_dir, tmp_path, peft), tmp_path / "cut.safetensors"
    own = trainer.training_step

    def step(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    trainer.training_step = step
    with pytest.raises(KeyboardInterrupt):
        train_pilot(trainer, 4, file, name="plain")
    assert not file.exists()
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    again = made(tiny_model_dir, tmp_path, peft)
    steps: list[int] = []
    own_again = again.training_step
    again.training_step = lambda *args, **kwargs: steps.append(again.state.global_step) or own_again(*args, **kwargs)
    resumed = train_pilot(again, 4, file, name="plain")
    assert steps == [2, 3]
    assert all(torch.equal(whole.ahead[name], resumed.ahead[name]) for name in whole.ahead)
    assert (resumed.margins, resumed.seen) == (whole.margins, whole.seen)
    assert not (tmp_path / "cut").exists()

    # Never run twice: a trainer that cannot train finds it; another training does not.
    idle = made(tiny_model_dir, tmp_path, peft)
    idle.train = None
    stored = train_pilot(idle, 4, file, name="plain")
    assert all(torch.equal(stored.ahead[name], whole.ahead[name]) for name in whole.ahead)
    assert (stored.margins, stored.seen) == (whole.margins, whole.seen)
    for other in ({"learning_rate": 4e-3}, {"seed": 8}, {"beta": 0.2}):
        changed = made(tiny_model_dir, tmp_path, peft, **other)
        changed.train = None
        with pytest.raises(TypeError, match="not callable"):
            train_pilot(changed, 4, file, name="plain")


# --- how far ---


@pytest.mark.parametrize("kind", ["full", "adapter", "stored reference"])
def test_the_margin_of_pairs_it_did_not_see(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precompute_ref_log_probs": kind == "stored reference"}
    trainer = made(tiny_model_dir, tmp_path, kind == "adapter", **options)
    trained = train_pilot(trainer, 3, tmp_path / "pilot.safetensors", name="plain")
    weights = trained_weights(trainer.model)
    pairs = HeldOut(trainer, trained.seen, 16, seed=0)
    assert pairs.n == 16
    logged = len(trainer._metrics["eval"])
    with extrapolated(weights, trained.start, trained.ahead, 2.5):
        means = pairs.margins()
        trainer.model.eval()
        for found, batch in zip(means, pairs.batches, strict=True):
            assert not trained.seen.intersection(pilot._pairs_of(batch))
            reference = (
                torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
                if kind == "stored reference"
                else reference_of(trainer, batch)
            )
            with torch.no_grad():
                ratio = log_probability(trainer.model, batch).double() - reference.double()
            assert found == pytest.approx(BETA * float((ratio[0] - ratio[1]).mean()), abs=1e-5)
    assert len(trainer._metrics["eval"]) == logged
    assert abs(means).max() > 1e-3


def test_how_far_a_pilot_is_carried_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [row | {"chosen": " w1 w2 w3 **bold**", "rejected": " w30 w31 w32 w33"} for row in ROWS]
    trainer = made(tiny_model_dir, tmp_path, True, rows, learning_rate=2e-2, beta=1.0)
    training = describe(trainer)
    trained = train_pilot(trainer, 4, tmp_path / "pilot.safetensors", name="plain")
    before = state(trainer.model)
    found = carry_on(trainer, trained, training, tmp_path / "pilot.json", seed=0)
    after = state(trainer.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (found.steps, found.of) == (4, 20)
    assert 1 < found.alpha <= training.rates.sum() / training.rates[:4].sum() + 1e-9
    assert found.margin > 0
    assert found.reason is None
    assert found.expected.low < found.expected.margin < found.expected.high
    assert found.capped or found.reached == pytest.approx(found.expected.margin, rel=0.06)
    assert found.alpha_error > 0
    # What was measured is not measured again, unless it is of another pilot.
    assert carry_on(SimpleNamespace(model=trainer.model), trained, training, tmp_path / "pilot.json", seed=0) == found
    # With nothing learned, nothing is said of how far it goes.
    still = pilot.Trained(trained.start, trained.start, [0.0] * 4, trained.seen, "another")
    nothing = carry_on(trainer, still, training, tmp_path / "still.json", seed=0)
    assert nothing.reason is not None
    assert "no different from zero by its error" in nothing.reason


def test_sides_are_swapped_in_half_the_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = made(tiny_model_dir, tmp_path, False, precompute_ref_log_probs=True)
    before = [dict(row) for row in trainer.train_dataset]
    swap_sides(trainer, seed=3)
    n_swapped = 0
    for old, new in zip(before, trainer.train_dataset, strict=True):
        assert old["prompt_ids"] == new["prompt_ids"]
        swapped = new["chosen_ids"] == old["rejected_ids"] and new["rejected_ids"] == old["chosen_ids"]
        if swapped:
            assert new["ref_chosen_logps"] == old["ref_rejected_logps"]
        else:
            assert new == old
        n_swapped += swapped
    assert n_swapped == len(ROWS) // 2
