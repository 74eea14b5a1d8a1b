"""Templates that write the date: it is the audit's wherever tokens are made again, and today's where nothing acts."""

import copy
import datetime
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers.utils.chat_template_utils as templates
from chat_world import chat_audit, chat_rows, trl_template
from datasets import Dataset
from datasets.fingerprint import Hasher
from reading_world import build_tokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from vision_world import VISION, vision_model

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import Audit, load_audit
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.audit.run import dry_run, run_audit
from trl_anatomy.checking.responses import audited_tokenizer, prompts_for
from trl_anatomy.checking.rollouts import encode_prompt
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.clock import date_of, dated, running, template_now
from trl_anatomy.reading.instruct import instructed_prompts
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.trainers.dpo import AnatomyDPOTrainer
from trl_anatomy.trainers.reward import AnatomyRewardTrainer

# The two clocks of templates that TRL ships, and one with the time of day in it.
DATED = {
    "llama3_2": trl_template("llama3_2"),
    "gptoss": trl_template("gptoss"),
    "muse_glimmer": trl_template("muse_glimmer"),
    "hours": "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}
FIRST, LATER = "2026-03-01T10:20:30", "2027-11-09T23:59:59"
SHOWN = {
    "llama3_2": ("01 Mar 2026", "09 Nov 2027"),
    "gptoss": ("2026-03-01", "2027-11-09"),
    "muse_glimmer": ("2026-03-01", "2027-11-09"),
    "hours": ("2026-03-01 10:20:30", "2027-11-09 23:59:59"),
}
ROW = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
RULE = {
    "version": 1,
    "concepts": {"air": {"scorer": "text", "pattern": "air"}},
    "rules": [{"explain_away": "air", "with": "shape_reward", "strength": 1.0}],
}


class Clock(datetime.datetime):
    """The clock of templates, set by a test."""

    shows = FIRST

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime.fromisoformat(cls.shows)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Clock]]:
    monkeypatch.setattr(templates, "datetime", Clock)
    monkeypatch.setattr(Clock, "shows", FIRST)
    yield Clock
    assert templates.datetime is Clock, "the clock of templates was not put back"


def tokenizer_of(name: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = DATED[name]
    return tokenizer


def rendered(tokenizer: Any) -> str:
    return str(tokenizer.apply_chat_template(ROW["prompt"], add_generation_prompt=True, tokenize=False))


@pytest.mark.parametrize("name", DATED)
def test_a_dated_tokenizer_writes_its_date_and_nothing_else_changes(name: str, clock: type[Clock]) -> None:
    tokenizer = tokenizer_of(name)
    today = rendered(tokenizer)
    assert SHOWN[name][0] in today
    other = dated(tokenizer, LATER)
    assert rendered(other) == today.replace(*SHOWN[name])
    assert rendered(tokenizer) == today
    clock.shows = LATER
    assert rendered(dated(other, FIRST)) == today  # dated anew
    assert (date_of(other), date_of(tokenizer)) == (LATER, None)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        copied.chat_template = "!" + copied.chat_template  # its own template, not that of the first
        clock.shows = FIRST
        assert rendered(copied).startswith("!")
        assert SHOWN[name][1] in rendered(copied)


def test_a_template_without_a_clock_is_left_as_it_is() -> None:
    tokenizer = build_tokenizer()
    assert dated(tokenizer, FIRST) is tokenizer
    assert dated(tokenizer_of("hours"), None) is not None
    assert date_of(dated(tokenizer_of("hours"), None)) is None


def test_a_dated_tokenizer_runs_again(clock: type[Clock]) -> None:
    stopped = dated(tokenizer_of("hours"), LATER)
    again = running(stopped)
    assert SHOWN["hours"][0] in rendered(again)
    assert (date_of(again), date_of(stopped)) == (None, LATER)
    assert running(again) is again


@pytest.mark.parametrize("kind", VISION)
def test_a_processor_is_dated_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    """TRL asks the processor; what reads text alone asks its tokenizer."""
    processor = vision_model(kind, tmp_path)
    processor.chat_template = DATED["hours"]
    assert read_pairs(Dataset.from_list([ROW]), dated(processor, LATER)).date == LATER  # its tokenizer's reads no clock
    processor.tokenizer.chat_template = DATED["hours"]
    made = dated(processor, LATER)
    for whole, stopped in ((processor, made), (processor.tokenizer, made.tokenizer), (running(made), made)):
        assert SHOWN["hours"][0] in rendered(whole)
        assert SHOWN["hours"][1] in rendered(stopped)
    pairs = read_pairs(Dataset.from_list([ROW]), made)
    assert SHOWN["hours"][1] in made.tokenizer.decode(pairs.ids(0, "prompt"))
    assert pairs.date == LATER


def test_a_template_that_fails_leaves_the_clock_running() -> None:
    tokenizer = tokenizer_of("hours")
    tokenizer.chat_template += "{{ raise_exception('no') }}"
    with pytest.raises(Exception, match="no"):
        rendered(dated(tokenizer, LATER))  # the fixture looks at the clock


def test_threads_of_two_dates_do_not_mix() -> None:
    tokenizer, wrong = tokenizer_of("hours"), []

    def work(when: str) -> None:
        mine = dated(tokenizer, when)
        wrong.extend(when for _ in range(50) if when.replace("T", " ") not in rendered(mine))

    threads = [threading.Thread(target=work, args=(when,)) for when in (FIRST, LATER) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", DATED)
def test_caches_of_datasets_tell_dates_apart(name: str, tmp_path: Path) -> None:
    """Else tokens of yesterday, kept beside a dataset on disk, would be read as those of the audit."""
    tokenizer = tokenizer_of(name)
    keys = [Hasher.hash(dated(tokenizer, when)) for when in (FIRST, FIRST, LATER)]
    assert keys[0] == keys[1] != keys[2]
    Dataset.from_list([ROW] * 3).save_to_disk(str(tmp_path / "rows"))
    ids = [
        read_pairs(datasets.load_from_disk(str(tmp_path / "rows")), dated(tokenizer, when)).ids(0, "prompt").tolist()
        for when in (FIRST, LATER, FIRST)
    ]
    assert ids[0] == ids[2] != ids[1]


def test_several_processes_write_one_date(clock: type[Clock]) -> None:
    raw = Dataset.from_list([ROW] * 4)
    one = read_pairs(raw, dated(tokenizer_of("llama3_2"), LATER))
    clock.shows = "2030-01-01T00:00:00"
    two = read_pairs(raw, dated(tokenizer_of("llama3_2"), LATER), num_proc=2)
    assert two.fingerprint == one.fingerprint
    assert SHOWN["llama3_2"][1] in one.tokenizer.decode(one.ids(0, "prompt"))


@pytest.fixture(scope="module", params=["llama3_2", "hours"])
def audited(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Audit]:
    """A template's name, a folder with model and rows, and their audit on the first day."""
    root = tmp_path_factory.mktemp("dated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "datetime", Clock)
        return request.param, root, chat_audit(root, DATED[request.param], chat_rows())


def test_an_audit_of_a_template_without_a_clock_tells_no_date(tmp_path: Path) -> None:
    """So that two audits of the same rows are the same bytes, whenever they were made."""
    assert chat_audit(tmp_path, trl_template("qwen3"), chat_rows()).info["data"]["date"] is None


def test_an_audit_is_used_again_on_another_day(audited: tuple[str, Path, Audit], clock: type[Clock]) -> None:
    _, root, audit = audited
    assert audit.info["data"]["date"] == audit.date == FIRST
    clock.shows = LATER
    source = reopen(audit)
    pairs = source.pairs  # checked against the audit's fingerprint
    assert encode_prompt(source.tokenizer, prompts_for(audit, None, 1, 0)[0]) in [
        pairs.ids(i, "prompt").tolist() for i in range(len(pairs))
    ]
    file = root / "asked.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "tell me about the sea"}]}))
    [asked] = prompts_for(audit, str(file), 1, 0)
    at_audit = encode_prompt(audited_tokenizer(audit, str(root / "model")), asked)
    assert at_audit != encode_prompt(dated(source.tokenizer, LATER), asked)
    assert date_of(audited_tokenizer(audit, str(root / "model"))) == FIRST
    before, _ = instructed_prompts(pairs, [0], "Be brief.")[0]
    today = dated(source.tokenizer, LATER).apply_chat_template(ROW["prompt"], return_dict=True)["input_ids"]
    of_audit = source.tokenizer.apply_chat_template(ROW["prompt"], return_dict=True)["input_ids"]
    common = next(n for n, (a, b) in enumerate(zip(today, of_audit, strict=False)) if a != b)
    assert before[: common + 1] == of_audit[: common + 1]  # the date of the audit, in an instructed prompt too


def test_an_interrupted_audit_goes_on_after_midnight(audited: tuple[str, Path, Audit], clock: type[Clock]) -> None:
    """Without audit.json, the harvest tells the date that its pairs were read at."""
    _, _, audit = audited
    clock.shows = LATER
    (audit.path / "audit.json").rename(audit.path / "kept")
    try:
        config = AuditConfig(**audit.info["settings"])
        assert dry_run(config)["shards_done"] == dry_run(config)["shards"]
        again = run_audit(config, progress=False)
        assert again.date == FIRST
        assert again.info["data"]["fingerprint"] == audit.info["data"]["fingerprint"]
    finally:
        (audit.path / "kept").unlink()


def test_audits_of_earlier_versions_have_no_date_and_bad_ones_are_told(audited: tuple[str, Path, Audit]) -> None:
    _, _, audit = audited
    file = audit.path / "audit.json"
    text = file.read_text()
    info = json.loads(text)
    try:
        for name in ("date", "chat_template"):
            info["data"].pop(name)
        file.write_text(json.dumps(info))
        old = load_audit(audit.path)
        assert old.date is None
        assert date_of(reopen(old).tokenizer) is None
        for wrong in ("yesterday", 3, ["2026-03-01"]):
            info["data"]["date"] = wrong
            file.write_text(json.dumps(info))
            with pytest.raises(AnatomyError, match=r"data\.date is no date"):
                load_audit(audit.path)
    finally:
        file.write_text(text)


def prepared(trainer: Any) -> list[list[int]]:
    rows = trainer.train_dataset
    names = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in rows.column_names]
    return [[token for name in names for token in row[name]] for row in rows]


KINDS = {
    "dpo": (AnatomyDPOTrainer, DPOTrainer, DPOConfig),
    "reward": (AnatomyRewardTrainer, RewardTrainer, RewardConfig),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_trains_on_the_date_of_its_audit(
    kind: str, audited: tuple[str, Path, Audit], clock: type[Clock], tmp_path: Path
) -> None:
    """With an audit or a policy the plan's tokens and the trained ones are the same; else the trainer is stock."""
    name, root, audit = audited
    ours, stock, config = KINDS[kind]

    def trainer(cls: Any, **more: Any) -> Any:
        rows = Dataset.from_list(chat_rows())
        settings = {"max_length": audit.info["settings"]["max_length"], "use_cpu": True, "bf16": False}
        args = config(output_dir=str(tmp_path / "out"), report_to=[], eval_strategy="no", **settings)
        return cls(model=str(root / "model"), args=args, train_dataset=rows, eval_dataset=rows.select([0]), **more)

    clock.shows = LATER
    today = prepared(trainer(stock))
    assert prepared(trainer(ours)) == today
    assert prepared(trainer(ours, concept_policy={})) == today
    logged = trainer(ours, audit=audit)
    acting = trainer(ours, audit=audit, concept_policy=RULE) if kind == "dpo" else logged
    clock.shows = FIRST
    of_audit = prepared(trainer(stock))
    assert of_audit != today
    assert prepared(logged) == prepared(acting) == of_audit
    clock.shows = LATER
    # Rows of an evaluation too, which come later: they are asked as the trained ones are.
    eval_rows = logged._prepare_dataset(Dataset.from_list([ROW]), logged.processing_class, logged.args, "eval")
    text = logged.processing_class.decode(
        np.concatenate([eval_rows[0][n] for n in eval_rows.column_names if "ids" in n])
    )
    assert SHOWN[name][0] in text
    assert SHOWN[name][1] not in text
    assert date_of(logged.processing_class) is None  # what is saved with the model writes its own day


def test_a_policy_without_an_audit_reads_and_trains_on_one_date(
    audited: tuple[str, Path, Audit], clock: type[Clock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Midnight between the plan and TRL's preparation: the clock is read once."""
    _, root, _ = audited
    rows = Dataset.from_list(chat_rows())
    args = DPOConfig(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False)
    trainer = DPOTrainer(model=str(root / "model"), args=args, train_dataset=rows)
    asked = []

    def now(cls: Any, tz: Any = None) -> datetime.datetime:
        asked.append(tz)
        return datetime.datetime.fromisoformat(FIRST) + datetime.timedelta(days=len(asked) - 1)

    monkeypatch.setattr(Clock, "now", classmethod(now))
    acting = AnatomyDPOTrainer(model=str(root / "model"), args=args, train_dataset=rows, concept_policy=RULE)
    assert len(asked) == 1
    assert prepared(acting) == prepared(trainer)


def test_the_clock_of_templates_is_where_it_is_looked_for() -> None:
    """The seam into transformers: `strftime_now` asks the module's `datetime`."""
    assert template_now() == FIRST
    tokenizer = tokenizer_of("hours")
    assert FIRST.replace("T", " ") in rendered(tokenizer)
