"""The demo's story on a real chat model: its own responses, labelled by a hidden preference, audited and trained on.

Nothing in it is planted: the model answers everyday questions, a rule that the audit does not know chooses between its
answers, and the audit, plain DPO and DPO with a policy see nothing but the pairs.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..audit.number_words import percent
from ..errors import AnatomyError, require
from ..reading.files import write_atomically
from ..reading.habits import HABITS, measure
from ..reading.progress import Progress
from .chat_model import write_chat_model
from .demo import hypotheses, quiet
from .questions import drawn_questions

if TYPE_CHECKING:
    from ..audit.folder import Audit

# What chooses between two answers: a weighted sum of habits, which errs in this share of the pairs.
PREFERENCE: Mapping[str, float] = {"exclamation": 2.0, "first_person": 1.0}
ERRS = 0.1
# The habit that the policy takes out. The preference's other habit is left alone, and shows what the policy spares.
SHAPED = "exclamation"

POLICY = f"""\
version: 1
concepts:
  {SHAPED}: {{scorer: habit, name: {SHAPED}}}
rules:
  - {{explain_away: {SHAPED}, with: shape_reward, strength: auto}}
"""

RECIPE: Mapping[str, Any] = {
    "beta": 0.1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}
LORA: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class RealSize:
    """How much of everything.

    Attributes:
        prompts, each: prompts that pairs are made of, and responses sampled to each.
        pairs: pairs, at most.
        held_out: prompts that the trained models answer.
        new_tokens, tokens: longest response, and longest prompt and response together.
        sae_tokens: tokens of the SAE's training.
        steps: optimizer steps of each DPO training, of 8 pairs.
        sampled: responses sampled at a time.
    """

    prompts: int = 200
    each: int = 4
    pairs: int = 200
    held_out: int = 128
    new_tokens: int = 64
    tokens: int = 160
    sae_tokens: int = 100_000
    steps: int = 12
    sampled: int = 64


REAL = RealSize()


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as it is said.
        seconds: what it takes on two idle cores of a small server, to tell the time left.
        leaves: file below the demo's folder that is there once it has ended.
        make: does it; goes on from what an interrupted one left.
    """

    name: str
    seconds: float
    leaves: str
    make: Callable[[], None]


class RealDemo:
    """The stages in one folder.

    Args:
        out: folder for everything: `model/`, `responses.json`, `pairs.parquet`, `sae/`, `audit/`, `policy.yaml`,
            `dpo/`, `policy/` (adapters), `compare/`, `story.json`.
        seed: of everything.
        size: how much of everything.
        say: takes the demo's messages.
        write_model: writes a chat model and its tokenizer into a folder, and says where it comes from.

    Raises:
        AnatomyError: the folder holds something else than this very demo.
    """

    def __init__(
        self,
        out: Path,
        seed: int = 0,
        size: RealSize = REAL,
        *,
        say: Callable[[str], None] = print,
        write_model: Callable[[Path], str] = write_chat_model,
    ) -> None:
        self.out, self.seed, self.size, self.say, self.write_model = Path(out), seed, size, say, write_model
        self.asked, held_out = drawn_questions(size.prompts, size.held_out, seed)
        self.held_out = _conversations(held_out)
        self._record: dict[str, Any] = self._begun()

    def _begun(self) -> dict[str, Any]:
        """What is recorded of this demo in its folder; begins the record where there is none."""
        made_of = {"seed": self.seed, **dataclasses.asdict(self.size), "recipe": dict(RECIPE), "policy": POLICY}
        file = self.out / "stages.json"
        if file.is_file():
            record: dict[str, Any] = json.loads(file.read_text())
            if record["made_of"] != made_of:
                raise AnatomyError(f"{self.out}: this folder holds a demo of another seed or version: name another.")
            return record
        if self.out.is_dir() and any(self.out.iterdir()):
            raise AnatomyError(f"{self.out}: this folder holds something else: name a new one.")
        self.out.mkdir(parents=True, exist_ok=True)
        return {"made_of": made_of, "seconds": {}}

    def _keep_record(self) -> None:
        write_atomically(self.out / "stages.json", json.dumps(self._record, indent=2).encode())

    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        size = self.size
        n = size.prompts * size.each
        return (
            Stage("Start model", 30, "model/config.json", self._model),
            Stage(f"{n} responses of its own, paired by a hidden preference", 190, "pairs.parquet", self._pairs),
            Stage("SAE of the model", 120, "sae/sae_weights.safetensors", self._sae),
            Stage("Audit, before any training", 70, "audit/audit.json", self._audit),
            Stage("Plain DPO", 150, "dpo/adapter_model.safetensors", lambda: self._train("dpo")),
            Stage(
                f"DPO with a policy: explain away {SHAPED}",
                150,
                "policy/adapter_model.safetensors",
                lambda: self._train("policy", concept_policy=str(self.out / "policy.yaml")),
            ),
            Stage(
                f"Compare: {len(self.held_out)} responses of each model to prompts held out",
                150,
                "compare/compare.html",
                self._compare,
            ),
        )

    def run(self) -> dict[str, Any]:
        """Do what is not done yet, and tell the story.

        Returns:
            What `story.json` holds: see `story`.
        """
        self._keep_record()
        stages, seconds = self.stages(), self._record["seconds"]
        for number, stage in enumerate(stages, start=1):
            if stage.name in seconds and (self.out / stage.leaves).is_file():
                self.say(f"{number}/{len(stages)} {stage.name}: found in {self.out}")
                continue
            self.say(f"{number}/{len(stages)} {stage.name} ({time_left(stages[number - 1 :], stages, seconds)})")
            self.do(stage)
            seconds = self._record["seconds"]
        told = story(json.loads((self.out / "compare" / "compare.json").read_text()), seconds)
        write_atomically(self.out / "story.json", json.dumps(told, indent=2).encode())
        for line in told["lines"]:
            self.say(line)
        self.say(f"Pages: {self.out / 'audit' / 'report.html'} and {self.out / 'compare' / 'compare.html'}")
        return told

    def do(self, stage: Stage) -> None:
        """Do a stage, and record that it is done and what it took."""
        began = time.perf_counter()
        stage.make()
        _give_back_memory()
        self._record = self._begun()
        self._record["seconds"][stage.name] = round(time.perf_counter() - began, 1)
        self._keep_record()

    # --- stages ---

    def _model(self) -> None:
        folder, building = self.out / "model", self.out / "model.building"
        for stale in (folder, building):
            shutil.rmtree(stale, ignore_errors=True)
        self.say(f"    {self.write_model(building)}")
        building.rename(folder)  # an interrupted one is never taken for a whole one

    def _pairs(self) -> None:
        from ..audit.run import load_tokenizer
        from ..checking.responses import load_model, sampled

        model = str(self.out / "model")
        said = sampled(
            load_model(model),
            load_tokenizer(model),
            _conversations(self.asked) * self.size.each,
            self.out / "responses.json",
            {"max_new_tokens": self.size.new_tokens, "batch_size": self.size.sampled, "seed": self.seed},
        )
        groups = [[str(text) for text in said[i :: len(self.asked)]] for i in range(len(self.asked))]
        pairs = labelled_pairs(self.asked, groups, self.size.pairs, self.seed)
        pairs.to_parquet(self.out / "pairs.partial")
        (self.out / "pairs.partial").rename(self.out / "pairs.parquet")
        self.say(f"    {len(pairs)} pairs; the hidden preference: {', '.join(HABITS[h].says for h in PREFERENCE)}")

    def _sae(self) -> None:
        from ..audit.make_sae import SAEConfig, make_sae

        make_sae(
            SAEConfig(
                model=str(self.out / "model"),
                dataset=str(self.out / "pairs.parquet"),
                out=str(self.out / "sae"),
                tokens=self.size.sae_tokens,
                max_length=self.size.tokens,
                seed=self.seed,
            )
        )

    def _audit(self) -> None:
        from ..audit.config import AuditConfig
        from ..audit.run import run_audit

        audit: Audit = run_audit(
            AuditConfig(
                model=str(self.out / "model"),
                dataset=str(self.out / "pairs.parquet"),
                sae=str(self.out / "sae"),
                out=str(self.out / "audit"),
                max_length=self.size.tokens,
                seed=self.seed,
            )
        )
        for line in hypotheses(audit):
            self.say(f"    {line}")

    def _train(self, name: str, **policy: Any) -> None:
        """DPO with LoRA; a checkpoint is kept at every fourth of it."""
        from ..trainers.checkpoints import last_whole

        write_atomically(self.out / "policy.yaml", POLICY.encode())
        folder = self.out / f"{name}.training"
        begun, _ = last_whole(folder)  # a kill inside a save leaves half a checkpoint
        trainer = self._trainer(folder, **policy)
        for rule in trainer.plan.rules if trainer.plan is not None else ():
            self.say(f"    strength fitted on the pairs: {rule['strength']:.2f}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
        trainer.save_model(str(folder))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        shutil.rmtree(self.out / name, ignore_errors=True)
        folder.rename(self.out / name)

    def _trainer(self, folder: Path, **policy: Any) -> Any:
        from peft import LoraConfig
        from transformers import PrinterCallback, ProgressCallback
        from trl import DPOConfig

        from ..audit.config import AuditConfig
        from ..audit.run import load_dataset, load_tokenizer
        from ..trainers.dpo import AnatomyDPOTrainer

        model = str(self.out / "model")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            args = DPOConfig(
                output_dir=str(folder),
                model_init_kwargs={"dtype": "auto"},
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                max_length=self.size.tokens,
                max_steps=self.size.steps,
                save_strategy="steps",
                save_steps=max(1, self.size.steps // 4),
                save_total_limit=2,
                logging_strategy="no",
                report_to=[],
                seed=self.seed,
                **RECIPE,
            )
            trainer = AnatomyDPOTrainer(
                model=model,
                args=args,
                train_dataset=load_dataset(AuditConfig(dataset=str(self.out / "pairs.parquet"))),
                processing_class=load_tokenizer(model),
                peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
                **policy,
            )
        for talker in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(talker)
        trainer.add_callback(steps_shown())
        return trainer

    def _compare(self) -> None:
        from ..audit.folder import load_audit
        from ..checking.compare import compare

        compare(
            load_audit(self.out / "audit"),
            str(self.out / "model"),
            {"dpo": str(self.out / "dpo"), "policy": str(self.out / "policy")},
            self.held_out,
            out=self.out / "compare",
            max_new_tokens=self.size.new_tokens,
            batch_size=self.size.sampled,
            seed=self.seed,
        )


def run_real_demo(out: Path, seed: int = 0, size: RealSize = REAL, **options: Any) -> dict[str, Any]:
    """Sample pairs from a real chat model, audit them, train twice, and compare: see `RealDemo`."""
    require("sae_lens", "sknetwork", "plotly")
    large_blocks_apart()
    with quiet():
        return RealDemo(out, seed, size, **options).run()


def labelled_pairs(asked: Sequence[str], groups: Sequence[Sequence[str]], n_pairs: int, seed: int) -> Any:
    """Pairs by the hidden preference: of the answers to a prompt the best and the worst, the next two, and so on.

    Pairs between which it has nothing to choose are left out, and so are blank sides.

    Args:
        asked: (n,) prompts.
        groups: (n, k) answers to each.
        n_pairs: at most so many, the clearest first.
        seed: of the choice among equals, of the labels that are wrong, and of the order.

    Returns:
        Dataset with conversations `prompt`, `chosen` and `rejected`.
    """
    from datasets import Dataset

    values = measure([text for group in groups for text in group], {name: HABITS[name] for name in PREFERENCE})
    rng = np.random.default_rng(seed)
    score = (values @ np.array(list(PREFERENCE.values()))).reshape(len(groups), -1)
    found = []
    for i, group in enumerate(groups):
        best = np.lexsort((rng.random(len(group)), -score[i])).tolist()
        for a, b in zip(best[: len(best) // 2], best[::-1], strict=False):
            if score[i, a] > score[i, b] and group[a].strip() and group[b].strip():
                found.append((float(score[i, b] - score[i, a]), rng.random(), asked[i], group[a], group[b]))
    rows = []
    for _, _, prompt, *sides in sorted(found)[:n_pairs]:
        chosen, rejected = sides if rng.random() >= ERRS else sides[::-1]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return Dataset.from_list(
        [
            {side: [{"role": role, "content": rows[i][side]}] for side, role in roles.items()}
            for i in rng.permutation(len(rows))
        ]
    )


def story(comparison: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """What became of the hidden preference's habits.

    Returns:
        `lines` to print; `habits`: name -> model ("before", "dpo", "policy") -> [rate, low, high] and `recovery`, the
        share of the way back from plain DPO to the start model; `seconds` per stage.
    """
    rows = {row["rule"]: row for row in comparison["rates"]}
    habits = {name: {**rows[name]["rates"], "recovery": rows[name]["recovery"]["policy"]} for name in PREFERENCE}
    lines = ["", *(sentence(name, habits[name]) for name in sorted(habits, key=lambda name: name != SHAPED))]
    agreement = comparison["agreement"]["dpo"]
    if agreement["r2"] is not None:
        lines.append(
            f"Over the audit's {agreement['n']} concepts the predicted shift has R² {agreement['r2']:.2f} "
            f"[{agreement['r2_low']:.2f}, {agreement['r2_high']:.2f}] with the shift under plain DPO."
        )
    lines.append(f"Minutes in all: {sum(seconds.values()) / 60:.0f}")
    return {"lines": lines, "habits": habits, "seconds": dict(seconds)}


def sentence(name: str, of: Mapping[str, Any]) -> str:
    """What became of one habit, in a sentence with intervals.

    >>> sentence("exclamation", {"before": [.13, .09, .18], "dpo": [.5, .43, .57], "policy": [.15, .11, .2],
    ...          "recovery": .95})
    'Responses that use exclamation marks: 13 % [9, 18] before, 50 % [43, 57] with plain DPO, 15 % [11, 20] with the
    policy, which explains them away: 95 % of the way back.'
    """
    before, dpo, policy = (
        f"{percent(rate)} [{100 * low:.0f}, {100 * high:.0f}]"
        for rate, low, high in (of["before"], of["dpo"], of["policy"])
    )
    told = f"Responses that {HABITS[name].says}: {before} before, {dpo} with plain DPO, {policy} with the policy"
    if name != SHAPED:
        return f"{told}, which leaves them alone."
    told += ", which explains them away"
    if of["dpo"][1] <= of["before"][2]:
        return f"{told}; plain DPO did not move them beyond noise."
    return f"{told}: {percent(of['recovery'])} of the way back."


def time_left(left: Sequence[Stage], stages: Sequence[Stage], seconds: Mapping[str, float]) -> str:
    """How long a stage takes and all that are left, by what those before took here.

    >>> one, two = Stage("one", 60, "", print), Stage("two", 120, "", print)
    >>> time_left([two], [one, two], {"one": 120.0}), time_left([one, two], [one, two], {})
    ('about 3 min', 'about 1 min, 3 min to the end')
    """
    done = [stage for stage in stages if stage.name in seconds and stage not in left]
    # As if a minute had gone by as usual: the first stage, a download, tells little of the others.
    pace = (60 + sum(seconds[stage.name] for stage in done)) / (60 + sum(stage.seconds for stage in done))
    one, every = (max(1, math.ceil(pace * sum(s.seconds for s in some) / 60)) for some in (left[:1], left))
    return f"about {one} min" + (f", {every} min to the end" if len(left) > 1 else "")


def _conversations(prompts: Sequence[str]) -> list[Any]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def steps_shown() -> Any:
    """A callback that shows how far a training is."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        bar: Progress

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = Progress(state.max_steps, "Training", "steps")
            self.bar.update(state.global_step, skipped=True)
            self.part = 1 / args.gradient_accumulation_steps

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.begun(self.part)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(1, work=self.part)
            if state.global_step == state.max_steps:
                control.should_save = False  # a Trainer that goes on from its last step takes one more

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Steps()


# glibc keeps freed blocks below a limit that it raises by itself, to 32 MB: a cache that grows token by token then
# leaves gigabytes of holes. Above this size every block is given back at once.
_MALLOPT_MMAP_THRESHOLD, _BLOCK = -3, 8 << 20


def large_blocks_apart() -> None:
    """Keep the memory of this process near what it uses, where the C library is glibc."""
    if sys.platform == "linux":
        import ctypes

        c = ctypes.CDLL(None)
        if hasattr(c, "mallopt"):  # not of other C libraries
            c.mallopt(_MALLOPT_MMAP_THRESHOLD, _BLOCK)


def _give_back_memory() -> None:
    gc.collect()
    if sys.platform == "linux":
        import ctypes

        c = ctypes.CDLL(None)
        if hasattr(c, "malloc_trim"):
            c.malloc_trim(0)
