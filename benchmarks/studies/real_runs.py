"""The runs behind real_model.py: a real chat model trained by DPO on real pairs, and its responses at three doses.

A *unit* is one piece of work with a folder of its own: the rows of a set, its audit, one training, the responses after
it and what the SAE reads in them. Each is kept in `--out` and never done twice; several processes may work in one
`--out` at once, since a unit is locked while it is made. Text stays there: results hold numbers only.

A dose is the reward margin that a training has reached, as the mean of its last four batches, each read before its own
step: it lags behind the snapshot's own margin where that still rises. Each batch is new to the model, since no training
sees its pairs twice. One training gives all its doses, as snapshots of its adapter: at the
margins of DOSES, after the first tenth (`pilot`), and where it ends (`end`): at the last dose, or after STEPS.
"""

import fcntl
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from habits import load
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOTrainer

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.run import run_audit
from trl_anatomy.checking.responses import as_pairs, sampled, slug
from trl_anatomy.checking.rollouts import Response, rollouts
from trl_anatomy.reading.habits import HABITS, measure
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.sae import check_sae, load_sae
from trl_anatomy.reading.spans import read_pairs

# Off-policy sets; the first four are those that choices are made on, the others are looked at once.
CHOSEN_ON = ("alpaca_eval2_cross_model", "hh_helpful_test", "rm_bench easy", "ultrafeedback_subset")
OFF_POLICY = (
    *CHOSEN_ON,
    "overrefusal_steered",
    "dsp_domain",
    "rm_bench hard",
    "alpaca_eval2_vs_gpt4turbo",
    "rm_bench matched",
)
# What labels the model's own responses, as a weighted sum of habits; `words` counts in hundreds.
PREFERENCES: dict[str, dict[str, float]] = {
    "own, lists and no exclamation": {"numbered": 1.0, "exclamation": -1.0},
    "own, short and plain": {"words": -1.0, "bold": -1.0, "first_person": 0.5},
}
NOISE = 0.5  # standard deviation of what is added to the sum
SWAPPED = ("sides swapped, 1", "sides swapped, 2")
PROMPT_TOKENS, TOKENS, NEW_TOKENS = 64, 160, 80
PAIRS, RESPONSES, HELD_OUT = 400, 128, 64  # audited, sampled, and prompts that they answer; all at most
POOL, EACH = 160, 4  # prompts and responses of the on-policy sets
DOSES, STEPS, BATCH, SMOOTH = (0.3, 1.0, 3.0), 24, 6, 4
PILOT = STEPS // 10 + 1
RECIPE = {
    "beta": 0.1,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "max_length": TOKENS,
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
}
# Snapshots that are sampled together, the most telling first.
PARTS = (("end", "dose 1.0"), ("pilot", "dose 0.3"))
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Run:
    """One training: of a set, or of rows of all off-policy sets with sides swapped at random."""

    of: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.of}, seed {self.seed}"


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether this process is the one to make a unit; the lock goes when the process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write(file: Path, value: Any) -> None:
    """All of it or nothing."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value))
    os.replace(part, file)


class Place:
    """Where the units are, and what they are made with."""

    def __init__(self, model: str, sae: str, shared: Path, out: Path) -> None:
        self.path, self.sae_path, self.shared, self.out = model, sae, shared, out
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    @cached_property
    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.bfloat16).eval()

    @cached_property
    def sae(self) -> Any:
        return load_sae(self.sae_path)

    @cached_property
    def layer(self) -> int:
        return check_sae(self.sae, self.model)

    # --- rows ---

    def rows(self, name: str) -> tuple[Dataset, list[Any]]:
        """The pairs of a set that are audited and trained on, and the prompts held out, as conversations."""
        folder = self.out / "rows" / slug(name)
        if not (folder / "held.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if name in PREFERENCES:
                texts, held = self.labelled(name)
            elif name in SWAPPED:
                texts, held = self.swapped(SWAPPED.index(name))
            else:
                texts, held = self.split(name)
            write(folder / "rows.json", texts)
            write(folder / "held.json", held)
        texts, held = (json.loads((folder / f"{part}.json").read_text()) for part in ("rows", "held"))
        return conversations(texts), [[{"role": "user", "content": prompt}] for prompt in held]

    def split(self, name: str) -> tuple[list[Any], list[str]]:
        texts = [text for text in load(self.shared, name) if all(part.strip() for part in text)]
        short = [text for text in texts if len(self.tokenizer(text[0]).input_ids) <= PROMPT_TOKENS]
        prompts = np.unique([text[0] for text in short])
        rng = np.random.default_rng(0)
        held = rng.permutation(prompts)[: min(HELD_OUT, len(prompts) // 5)]
        left = [text for text in short if text[0] not in set(held)]
        return [left[i] for i in rng.permutation(len(left))[:PAIRS]], held.tolist()

    def swapped(self, seed: int) -> tuple[list[Any], list[str]]:
        """Rows of all sets in equal parts, each pair the right way round or the wrong one; prompts of all sets."""
        rng = np.random.default_rng(seed)
        texts, held = [], []
        for name in OFF_POLICY:
            rows, prompts = self.rows(name)
            of = rng.permutation(len(rows))[: STEPS * BATCH // len(OFF_POLICY) + 1].tolist()
            for row in (rows[i] for i in of):
                sides = [row["chosen"][0]["content"], row["rejected"][0]["content"]]
                texts.append([row["prompt"][0]["content"], *(sides if rng.random() < 0.5 else sides[::-1])])
            held += [prompt[0]["content"] for prompt in prompts[: RESPONSES // len(OFF_POLICY) + 1]]
        return texts, held[:RESPONSES]

    def pool(self) -> tuple[list[str], list[list[str]]]:
        """Prompts of the off-policy sets' rows, and the start model's own responses to each."""
        file = self.out / "rows" / "pool.json"
        if not file.is_file():
            every = {row["prompt"][0]["content"] for name in OFF_POLICY for row in self.rows(name)[0]}
            held = {prompt[0]["content"] for name in OFF_POLICY for prompt in self.rows(name)[1]}
            asked = np.random.default_rng(1).permutation(sorted(every - held))[:POOL].tolist()
            said = rollouts(
                self.model,
                self.tokenizer,
                [[{"role": "user", "content": prompt}] for prompt in asked],
                n_per_prompt=EACH,
                max_new_tokens=TOKENS - PROMPT_TOKENS,
                batch_size=128,
                seed=2,
            )
            write(file, [asked, [list(map(str, group)) for group in said]])
        asked, said = json.loads(file.read_text())
        return asked, said

    def labelled(self, name: str) -> tuple[list[Any], list[str]]:
        """Pairs of the model's own responses by a hidden preference: a prompt's best and worst, and the two between."""
        asked, said = self.pool()
        weights = PREFERENCES[name]
        values = measure([text for group in said for text in group], {habit: HABITS[habit] for habit in weights})
        scale = [0.01 if habit == "words" else 1.0 for habit in weights]
        rng = np.random.default_rng(list(PREFERENCES).index(name))
        score = (values * scale) @ np.array(list(weights.values())) + NOISE * rng.standard_normal(len(values))
        texts = []
        for i, (prompt, group) in enumerate(zip(asked, said, strict=True)):
            order = np.argsort(score[i * EACH : (i + 1) * EACH])[::-1]
            texts += [[prompt, group[a], group[b]] for a, b in (order[[0, -1]], order[[1, -2]]) if group[a] != group[b]]
        texts = [text for text in texts if all(part.strip() for part in text)]
        held = self.rows(OFF_POLICY[0])[1] + self.rows(OFF_POLICY[1])[1]
        return [texts[i] for i in rng.permutation(len(texts))[:PAIRS]], [p[0]["content"] for p in held[:RESPONSES]]

    # --- audits ---

    def audit(self, name: str) -> Path:
        folder = self.out / "audits" / slug(name)
        rows, _ = self.rows(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (file := folder / "pairs.parquet").is_file():
            rows.to_parquet(file)
        config = AuditConfig(
            model=self.path,
            dataset=str(file),
            sae=self.sae_path,
            max_length=TOKENS,
            out=str(folder / "audit"),
        )
        run_audit(config, model=self.model, tokenizer=self.tokenizer, dataset=rows, progress=False)
        return folder / "audit"

    # --- responses ---

    def asked(self, name: str) -> list[Any]:
        """RESPONSES prompts of a set that were held out, each as often as another, give or take one."""
        _, held = self.rows(name)
        return [held[i % len(held)] for i in range(RESPONSES)]

    def said(self, model: Any, prompts: list[Any], file: Path, seed: int) -> list[Response]:
        """One response to each prompt. All models draw with the same random numbers."""
        sampling = {"max_new_tokens": NEW_TOKENS, "batch_size": RESPONSES, "seed": seed}
        return sampled(model, self.tokenizer, prompts, file, sampling)

    def read(self, prompts: list[Any], sides: Sequence[Sequence[Response]], out: Path) -> None:
        """What the SAE reads in two responses to each prompt."""
        pairs = read_pairs(
            as_pairs(prompts, *sides), self.tokenizer, max_length=TOKENS + NEW_TOKENS, truncation="keep_start"
        )
        harvest(self.model, self.sae, pairs, out, layer=self.layer, progress=False, replace=True)


def conversations(texts: Sequence[Sequence[str]]) -> Dataset:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return Dataset.from_list(
        [
            {side: [{"role": role, "content": part}] for (side, role), part in zip(roles.items(), text, strict=True)}
            for text in texts
        ]
    )


# --- training ---


class Snapshots(TrainerCallback):
    """Keeps the adapter where the margin passes a dose, after the pilot, and at the end."""

    def __init__(self, out: Path) -> None:
        self.out, self.margins, self.taken = out, list[float](), dict[str, dict[str, float]]()
        self.accuracies: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        if not logs or "rewards/margins" not in logs:
            return
        self.margins.append(float(logs["rewards/margins"]))
        self.accuracies.append(float(logs["rewards/accuracies"]))
        step, margin = state.global_step, float(np.mean(self.margins[-SMOOTH:]))
        names = [f"dose {dose}" for dose in DOSES if margin >= dose and f"dose {dose}" not in self.taken]
        if step == PILOT:
            names.append("pilot")
        if step == args.max_steps or margin >= DOSES[-1]:
            names.append("end")
            control.should_training_stop = True
        for name in names:
            model.save_pretrained(self.out / name)
            self.taken[name] = {"step": step, "margin": margin}


def dpo_trainer(
    place: Place,
    run: Run,
    out: Path,
    callbacks: list[TrainerCallback],
    *,
    of: type[Any] = DPOTrainer,
    rows: Dataset | None = None,
    max_steps: int = STEPS,
    **more: Any,
) -> Any:
    """TRL's own trainer (or `of`, with `more`) with LoRA, which has not begun and shows no progress."""
    from peft import LoraConfig
    from trl import DPOConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = DPOConfig(
            output_dir=str(out),
            model_init_kwargs={"dtype": "bfloat16"},
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            seed=run.seed,
            **RECIPE | {"max_steps": max_steps},
        )
        trainer = of(
            model=place.path,
            args=args,
            train_dataset=place.rows(run.of)[0] if rows is None else rows,
            processing_class=place.tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
            callbacks=callbacks,
            **more,
        )
    for talker in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(talker)
    return trainer


def train(place: Place, run: Run, out: Path) -> dict[str, Any]:
    """Plain DPO; says what margin each snapshot had, and what it cost."""
    began, clock, shots = time.process_time(), time.monotonic(), Snapshots(out)
    dpo_trainer(place, run, out / "trainer", [shots]).train()
    return {
        "of": run.of,
        "seed": run.seed,
        "rows": len(place.rows(run.of)[0]),
        "margins": shots.margins,
        "accuracies": shots.accuracies,
        "snapshots": shots.taken,
        "cpu_seconds": time.process_time() - began,
        "seconds": time.monotonic() - clock,
    }


def adapted(place: Place, folder: Path) -> Any:
    """The start model with a snapshot's adapter, which stays apart: in bfloat16 merging rounds it away."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(place.path, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(model, str(folder)).eval()


# --- units ---


def made_once(folder: Path, make: Callable[[], Any]) -> bool:
    """Makes a unit unless it is there or in work elsewhere; whether it is there now."""
    if (folder / "done.json").is_file():
        return True
    with locked(folder) as mine:
        if not mine:
            return False
        if not (folder / "done.json").is_file():
            clock = time.monotonic()
            told = make()
            write(folder / "done.json", told)
            seconds = time.monotonic() - clock
            print(f"{time.strftime('%H:%M')} {folder.parent.name}/{folder.name}: {seconds:.0f} s", flush=True)
    return True


def start_unit(place: Place, name: str) -> bool:
    """Two responses of the start model to each prompt held out, with different random numbers, and their reading."""
    folder = place.out / "start" / slug(name)

    def make() -> dict[str, Any]:
        prompts, clock = place.asked(name), time.process_time()
        sides = [place.said(place.model, prompts, folder / f"responses-{seed}.json", seed) for seed in (0, 1)]
        sampling = time.process_time() - clock
        place.read(prompts, sides, folder / "harvest")
        return {"sampling_cpu_seconds": sampling, "cpu_seconds": time.process_time() - clock}

    return made_once(folder, make)


def training_unit(place: Place, run: Run) -> bool:
    folder = place.out / "trainings" / slug(run.name)
    return made_once(folder, lambda: train(place, run, folder))


def response_unit(place: Place, run: Run, part: int) -> bool:
    """Responses of two snapshots of a training, and their reading; of one where they are the same or one was missed."""
    trained, folder = place.out / "trainings" / slug(run.name), place.out / "responses" / f"{slug(run.name)}-{part}"
    if not (trained / "done.json").is_file():
        return False

    def make() -> dict[str, Any]:
        taken = json.loads((trained / "done.json").read_text())["snapshots"]
        names = [name for name in PARTS[part] if name in taken]
        if len(names) == 2 and taken[names[0]]["step"] == taken[names[1]]["step"]:
            names = names[:1]
        prompts, clock = place.asked(run.of), time.process_time()
        said = [place.said(adapted(place, trained / n), prompts, folder / f"{slug(n)}.json", 0) for n in names]
        sampling = time.process_time() - clock
        if names:
            place.read(prompts, [said[0], said[-1]], folder / "harvest")
        return {"names": names, "sampling_cpu_seconds": sampling, "cpu_seconds": time.process_time() - clock}

    return made_once(folder, make)


def audit_unit(place: Place, name: str) -> bool:
    def make() -> dict[str, Any]:
        clock = time.process_time()
        place.audit(name)
        return {"cpu_seconds": time.process_time() - clock}

    return made_once(place.out / "audits" / slug(name), make)
