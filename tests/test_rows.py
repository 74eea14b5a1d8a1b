"""Every row that trains is under the policy, on the tokens that the policy was planned on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from parity import EXACT, history
from reading_world import build_tokenizer, rows, tiny_model, tiny_sae
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.trainer import dpo_trainer, reward_trainer
from vision_world import chat_rows, shipped

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer, AuditConfig, run_audit
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.preparation import is_conversational, kinds_by_responses, plain_rows
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import read_pairs, turn_starts

BOLD = {"scorer": "text", "pattern": r"\*\*"}
EMPTY = {"scorer": "text", "pattern": r"\A\s*\Z"}
TRAINERS = {
    "dpo": (AnatomyDPOTrainer, DPOTrainer, DPOConfig),
    "reward": (AnatomyRewardTrainer, RewardTrainer, RewardConfig),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "model"
    tiny_model("qwen3", layers=2, vocab=340).save_pretrained(path)  # room for added tokens
    build_tokenizer().save_pretrained(path)
    return str(path)


def policy(concept: dict[str, Any] = BOLD, **rule: Any) -> dict[str, Any]:
    rule = rule if rule else {"with": "shape_reward", "strength": 1.0}
    return {"version": 1, "concepts": {"c": concept}, "rules": [{"explain_away": "c", **rule}]}


def trainer(kind: str, model: str, data: Any, folder: Path, rules: Any = None, **more: Any) -> Any:
    """Ours with a policy, TRL's without one."""
    ours, stock, config = TRAINERS[kind]
    given = {name: more.pop(name) for name in ("processing_class", "eval_dataset") if name in more}
    args = config(output_dir=str(folder / "out"), **EXACT | more)
    if rules is None:
        return stock(model=model, args=args, train_dataset=data, **given)
    return ours(model=model, args=args, train_dataset=data, concept_policy=rules, **given)


def sequences(prepared: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens of both responses after their prompts."""
    before = "prompt_ids" in prepared.column_names
    return [
        tuple([*(row["prompt_ids"] if before else []), *row[f"{side}_ids"]] for side in ("chosen", "rejected"))
        for row in prepared.with_format(None)
    ]


# Blank responses ------------------------------------------------------------------------------------------------------


def with_blanks(kind: str) -> Dataset:
    """12 rows, of which 0 to 3 have a blank response; a column marks those and one more."""
    made = rows("explicit", 12) if kind == "text" else chat_rows(12)
    blank = {"text": "", "chat": "", "spaces": " \n", "parts": ""}[kind]
    for i, row in enumerate(made):
        row["junk"] = i < 5
        for side in ("chosen", "rejected"):
            empties = i < 4 and (side == "rejected" or i == 3)
            if kind == "text":
                row[side] = blank if empties else row[side]
                continue
            text = blank if empties else row[side][0]["content"]
            row[side] = [
                {"role": "assistant", "content": [{"type": "text", "text": text}] if kind == "parts" else text}
            ]
        if kind == "parts":
            row["prompt"] = [{"role": "user", "content": [{"type": "text", "text": row["prompt"][0]["content"]}]}]
    return Dataset.from_list(made)


def tokenizer_of(kind: str) -> Any:
    tokenizer = build_tokenizer()
    if kind == "parts":
        text = "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", text)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "trained"), [("text", "reward"), ("chat", "dpo"), ("chat", "reward"), ("spaces", "dpo"), ("parts", "dpo")]
)
def test_rows_with_a_blank_response_are_reached(kind: str, trained: str, model: str, tmp_path: Path) -> None:
    data, tokenizer = with_blanks(kind), tokenizer_of(kind)
    stock = trainer(trained, model, data, tmp_path, processing_class=tokenizer_of(kind))
    assert len(stock.train_dataset) == 12  # or there is nothing to reach

    def rest(rules: dict[str, Any]) -> tuple[list[int], Any]:
        made = trainer(trained, model, data, tmp_path, rules, processing_class=tokenizer)
        left = sequences(made.train_dataset)
        every = sequences(stock.train_dataset)
        return [i for i, row in enumerate(every) if row in left], made.plan

    everything = {"scorer": "text", "pattern": "."}
    gate = {"column": "junk", "equals": True}
    left, plan = rest(policy(everything, **{"with": "filter_pairs", "fraction": "all", "where": gate}))
    assert left == list(range(5, 12))
    assert plan.rules[0]["rows"] == plan.rules[0]["pairs"] == 5
    assert plan.counts["blank"] == 4
    assert plan.counts["untouched"] == 0
    left, plan = rest(policy(EMPTY, **{"with": "filter_pairs", "side": "either"}))
    assert left == list(range(4, 12))
    gate = {"prompt": "story"}
    left, plan = rest(policy(everything, **{"with": "filter_pairs", "fraction": "all", "where": gate}))
    gated = [i for i, row in enumerate(data) if "story" in str(row["prompt"])]
    assert {1, 2, 3} & set(gated)  # some have a blank response
    assert left == [i for i in range(12) if i not in gated]
    _, plan = rest(policy(EMPTY))
    offsets = plan.rejected_offset
    assert (offsets[:4] != offsets[5]).all()
    assert "4 of the pairs scored have a blank response" in str(plan)


def test_hidden_concepts_score_blank_responses(model: str, tmp_path: Path) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    DirectionScorer(direction / direction.norm(), 1).save(tmp_path / "direction")
    concept = {"scorer": "direction", "path": str(tmp_path / "direction")}
    made = trainer("dpo", model, with_blanks("chat"), tmp_path, policy(concept))
    assert (made.plan.rejected_offset != 0).all()
    made.train()


@pytest.mark.parametrize("verb", ["mask_tokens", "inoculate", "reweight_pairs", "steer"])
def test_every_verb_takes_blank_responses(verb: str, model: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"with": verb}
    concept: dict[str, Any] = {"scorer": "text", "pattern": "."}
    if verb == "inoculate":
        keys |= {"instruction": "Be short."}
    if verb == "reweight_pairs":
        keys |= {"strength": 0.5}
    if verb == "steer":
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        DirectionScorer(direction / direction.norm(), 1).save(tmp_path / "direction")
        concept = {"scorer": "direction", "path": str(tmp_path / "direction")}
        keys |= {"strength": 2.0}
    made = trainer("dpo", model, with_blanks("chat"), tmp_path, policy(concept, **keys))
    assert made.plan.counts["pairs"] == 12
    made.train()


def test_audits_leave_blank_responses_out() -> None:
    """As before: an audit's pairs are those without, and what trains is checked against it by them."""
    for kind in ("text", "chat"):
        data, tokenizer = with_blanks(kind), build_tokenizer()
        read, kept = read_pairs(data, tokenizer), read_pairs(data, tokenizer, keep_blank=True)
        assert read.left_out == {"empty response": 4} == kept.audited.left_out
        assert kept.left_out == {}
        assert np.flatnonzero(kept.blank).tolist() == [0, 1, 2, 3]
        assert kept.audited.fingerprint == read.fingerprint != kept.fingerprint
        whole = data.select(range(4, 12))
        assert read_pairs(whole, tokenizer).fingerprint == read_pairs(whole, tokenizer, keep_blank=True).fingerprint


def test_plan_and_training_by_an_audit_agree(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, with_blanks("chat"))))
    tiny_sae("standard", d_in=32, d_sae=48, hook="blocks.0.hook_resid_post").save_model(tmp_path / "sae")
    settings = AuditConfig(model=model, dataset=str(data), sae=str(tmp_path / "sae"), out=str(tmp_path / "a"))
    audit = run_audit(settings, progress=False)
    assert audit.info["data"]["n_pairs"] == 8
    rules = policy(EMPTY, **{"with": "filter_pairs", "side": "either"})
    (tmp_path / "policy.json").write_text(json.dumps(rules))
    capsys.readouterr()
    assert main(["plan", "--audit", str(tmp_path / "a"), "--policy", str(tmp_path / "policy.json"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    ours, _, config = TRAINERS["dpo"]
    args = config(output_dir=str(tmp_path / "out"), **EXACT)
    made = ours(model=model, args=args, train_dataset=with_blanks("chat"), concept_policy=rules, audit=audit)
    assert planned["counts"]["pairs_kept"] == made.plan.counts["pairs_kept"] == 8
    assert planned["rules"][0]["rows"] == made.plan.rules[0]["rows"] == 4


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_row_without_a_response_is_named(side: str, model: str, tmp_path: Path) -> None:
    made = chat_rows()
    made[5][side] = None
    with pytest.raises(AnatomyError, match=f"^Dataset row 5, column '{side}': found nothing, which TRL cannot train"):
        trainer("dpo", model, Dataset.from_list(made), tmp_path, policy())


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_data_without_rows_end_in_one_sentence(kind: str, model: str, tmp_path: Path) -> None:
    for data in (chat_rows(), rows("explicit", 4), [{"chosen": "a b", "rejected": "a c"}]):
        with pytest.raises(AnatomyError, match="no usable row: it is empty"):
            trainer(kind, model, Dataset.from_list(data).select([]), tmp_path, policy())


def test_rows_that_trl_leaves_out_are_told(model: str, tmp_path: Path) -> None:
    for kind, reason in (("dpo", "prompt fills max_length"), ("reward", "longer than max_length")):
        made = chat_rows(12)
        for row in made[:3]:
            row["prompt"][0]["content"] = "Tell me a story " * 30
        ours = trainer(kind, model, Dataset.from_list(made), tmp_path, policy(), max_length=60)
        assert len(ours.train_dataset) == 9
        assert ours.plan.left_out == {reason: 3}
        assert f"TRL leaves rows out: 3 x {reason}." in str(ours.plan)
        assert ours.plan.counts["untouched"] == 0


# Planned and prepared tokens ------------------------------------------------------------------------------------------


def other_template(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", ": {{ m['content'] }}")


def other_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<pad>"


def other_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens(["true"])


@pytest.mark.parametrize("change", [other_template, other_end, other_tokens])
@pytest.mark.parametrize("kind", ["dpo", "reward", "precomputed"])
def test_other_tokens_than_planned_end_before_training(kind: str, change: Any, model: str, tmp_path: Path) -> None:
    """Whatever makes TRL read a row in another way than the policy did."""
    tokenizer, other = build_tokenizer(), build_tokenizer()
    change(other)
    tokenizer.__deepcopy__ = lambda memo: other  # what the policy is planned with
    rules, more = policy(), {}
    if kind == "precomputed":
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        DirectionScorer(direction / direction.norm(), 1).save(tmp_path / "direction")
        rules = policy({"scorer": "direction", "path": str(tmp_path / "direction")})
        more = {"precompute_ref_log_probs": True}
    with pytest.raises(AnatomyError, match=r"^Dataset row \d+: TRL prepared \d+ tokens.* planned on \d+"):
        trainer(
            "reward" if kind == "reward" else "dpo",
            model,
            Dataset.from_list(chat_rows()),
            tmp_path,
            rules,
            processing_class=tokenizer,
            **more,
        )


def test_the_row_that_differs_is_named(model: str, tmp_path: Path) -> None:
    """The raw row, after filters: of 8 rows 2 are dropped, and the sixth is read in another way."""
    made = chat_rows()
    made[5]["chosen"][0]["content"] = "a rare word: cheesecake"
    for i, row in enumerate(made):
        row["junk"] = i in (1, 3)
    tokenizer, other = build_tokenizer(), build_tokenizer()
    other.add_tokens(["cheesecake"])
    tokenizer.__deepcopy__ = lambda memo: other
    gate = {"column": "junk", "equals": True}
    rules = policy({"scorer": "text", "pattern": "."}, **{"with": "filter_pairs", "fraction": "all", "where": gate})
    with pytest.raises(AnatomyError, match=r"^Dataset row 5: TRL prepared .* of the chosen side"):
        trainer("dpo", model, Dataset.from_list(made), tmp_path, rules, processing_class=tokenizer)


def test_a_column_under_a_name_of_the_other_trainer_is_passed_over(model: str, tmp_path: Path) -> None:
    """Reward rows have no tokens of a prompt: a column of that name is one that TRL passes over."""
    made = [{**row, "prompt_ids": [1, 2]} for row in chat_rows()]
    ours = trainer("reward", model, Dataset.from_list(made), tmp_path, policy())
    assert ours.plan.counts["pairs"] == len(made)
    ours.train()


# Columns that decide by chance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["chosen", "messages"])
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("data", ["text", "chat"])
def test_messages_beside_pairs(
    data: str, kind: str, first: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever column a set gives TRL first, rows are what their responses are."""
    made = rows("explicit") if data == "text" else chat_rows()
    plain = trainer(kind, model, Dataset.from_list(made), tmp_path)
    for row in made:
        row["messages"] = [{"role": "user", "content": "Hi"}] if data == "text" else "not a conversation"

    def by(example: Any, theirs: Any = dpo_trainer.is_conversational) -> bool:
        return theirs({first: example[first]}) if first in example else theirs(example)

    for module in (dpo_trainer, reward_trainer):
        monkeypatch.setattr(module, "is_conversational", by)
    eval_rows = Dataset.from_list(made[:3])
    ours = trainer(kind, model, Dataset.from_list(made), tmp_path, policy(), eval_dataset=eval_rows)
    assert sequences(ours.train_dataset) == sequences(plain.train_dataset)
    assert sequences(ours.eval_dataset) == sequences(plain.train_dataset)[:3]
    assert dpo_trainer.is_conversational is by  # outside, TRL's own again
    ours.evaluate()


def test_is_conversational_looks_at_what_is_there() -> None:
    message = [{"role": "user", "content": "Hi"}]
    for example, expected in (
        ({"prompt": [], "chosen": message, "rejected": message}, True),
        ({"prompt": message, "chosen": [], "rejected": []}, True),
        ({"messages": message, "chosen": "a", "rejected": "b"}, False),
        ({"messages": "text", "chosen": message, "rejected": message}, True),
        ({"prompt": "", "chosen": "", "rejected": ""}, False),
        ({"other": message}, False),
    ):
        assert is_conversational(example) is expected
        assert is_conversational(dict(reversed(example.items()))) is expected


def test_kinds_are_settled_in_other_processes_too(tmp_path: Path) -> None:
    made = rows("explicit")
    for row in made:
        row["messages"] = [{"role": "user", "content": "Hi"}]
    tokenizer = build_tokenizer()
    with kinds_by_responses():
        args = DPOConfig(output_dir=str(tmp_path), dataset_num_proc=2, **EXACT)
        stand_in = type("", (), {"_tokenizer": tokenizer})()
        both = DPOTrainer._prepare_dataset(stand_in, Dataset.from_list(made), tokenizer, args, "train")
    alone = read_pairs(Dataset.from_list(rows("explicit")), tokenizer)
    assert [row["chosen_ids"] for row in both] == [alone.ids(i, "chosen").tolist() for i in range(len(alone))]


# Reward data without a shared prompt ----------------------------------------------------------------------------------


def without_prompt(kind: str) -> list[dict[str, Any]]:
    made = []
    for i, row in enumerate(chat_rows()):
        if kind == "empty list":
            made.append({**row, "prompt": []})
        elif kind == "assistant only":
            made.append({"chosen": row["chosen"], "rejected": row["rejected"]})
        elif kind == "some":
            made.append({**row, "prompt": row["prompt"] if i % 2 else []})
        elif kind == "system prompt":
            made.append(
                {
                    "prompt": [{"role": "system", "content": "Be kind."}],
                    "chosen": [*row["prompt"], *row["chosen"]],
                    "rejected": [{"role": "user", "content": "Where?"}, *row["rejected"]],
                }
            )
        else:
            first = {"role": "user", "content": "Please: " + row["prompt"][0]["content"]}
            made.append({"chosen": [first, *row["chosen"]], "rejected": [*row["prompt"], *row["rejected"]]})
    return made


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        *(("qwen3", kind) for kind in ("empty list", "assistant only", "some", "system prompt", "first turns differ")),
        *((name, kind) for name in ("llama3_2", "gemma3") for kind in ("assistant only", "first turns differ")),
        *((name, "first turns differ") for name in ("qwen2_5", "phi3")),
        ("gemma3", "system prompt"),
    ],
)
def test_reward_data_without_a_shared_prompt(template: str, kind: str, model: str, tmp_path: Path) -> None:
    """What stock TRL trains on trains with a policy too, on the same tokens; what it refuses is refused."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = shipped(template)
    data = Dataset.from_list(without_prompt(kind))
    with kinds_by_responses():  # TRL alone fails for some PYTHONHASHSEED where a prompt is an empty list
        try:
            stock = trainer("reward", model, data, tmp_path, processing_class=tokenizer)
        except Exception:
            stock = None
    if stock is None:
        with pytest.raises(AnatomyError, match=r"^Dataset row 0 cannot be tokenised"):
            trainer("reward", model, data, tmp_path, policy(), processing_class=tokenizer)
        return
    ours = trainer("reward", model, data, tmp_path, policy(), processing_class=tokenizer)
    assert sequences(ours.train_dataset) == sequences(stock.train_dataset)
    assert ours.plan.rules[0]["rows"] > 0
    pairs = read_pairs(data, tokenizer, truncation="drop")
    for i, row in enumerate(without_prompt(kind)):
        assert not (row.get("prompt") and kind == "some") or "Why?" in tokenizer.decode(pairs.ids(i, "prompt"))
        for side in ("chosen", "rejected"):
            read = tokenizer.decode(pairs.ids(i, side), skip_special_tokens=True).lstrip()
            first = row[side][0]["content"].strip()
            if kind in ("assistant only", "empty list", "first turns differ"):
                assert read.startswith(first), (read, first)  # nothing that the template opens a turn with
            assert first in read


def test_such_rows_train_and_have_user_turns(model: str, tmp_path: Path) -> None:
    for kind in ("some", "first turns differ"):
        data = Dataset.from_list(without_prompt(kind))
        trainer("reward", model, data, tmp_path, policy()).train()
        pairs = read_pairs(data, build_tokenizer(), truncation="drop", keep_blank=True)
        starts = turn_starts(pairs, build_tokenizer())
        assert ((starts > 0) == (np.arange(8) % 2 == 1) if kind == "some" else starts == 0).all()


@pytest.mark.parametrize("kind", ["empty list", "assistant only", "some"])
def test_dpo_refuses_them_as_trl_does(kind: str, model: str, tmp_path: Path) -> None:
    """transformers renders no conversation without messages, and DPO needs the prompt alone."""
    data = Dataset.from_list(without_prompt(kind))
    with kinds_by_responses(), pytest.raises(ValueError, match="empty conversation"):
        trainer("dpo", model, data, tmp_path)
    with pytest.raises(AnatomyError, match=r"^Dataset row 0 cannot be tokenised .*empty conversation"):
        trainer("dpo", model, data, tmp_path, policy())


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(
    ("form", "data"), [("torch", "text"), ("torch", "chat"), ("numpy", "text"), ("pandas", "chat"), ("arrow", "chat")]
)
def test_rows_in_another_format(form: str, data: str, kind: str, model: str, tmp_path: Path) -> None:
    """They train as plain ones do: the same numbers, with offsets and gaps of two concepts."""
    made = rows("explicit") if data == "text" else chat_rows(10)
    for i, row in enumerate(made):
        row["margin"], row["topic"] = i / 10, "a" if i % 3 else "b"
    rules = policy()
    rules["concepts"]["d"] = {"scorer": "text", "pattern": "a"}
    gate = {"column": "topic", "equals": "a"}
    rules["rules"].append({"explain_away": "d", "with": "shape_reward", "strength": 0.5, "where": gate})
    logs = []
    for dataset in (Dataset.from_list(made), Dataset.from_list(made).with_format(form)):
        ours = trainer(kind, model, dataset, tmp_path, rules, max_steps=1)
        ours.train()
        logs.append(history(ours))
    assert logs[0] == logs[1]


def test_columns_that_a_format_hides_are_not_there() -> None:
    data = Dataset.from_list(rows("explicit"))
    assert plain_rows(data) is data
    assert plain_rows(data.with_format("torch", columns=["chosen", "rejected"])).column_names == ["chosen", "rejected"]
    shown = data.with_format("torch", columns=["chosen"], output_all_columns=True)
    assert plain_rows(shown).column_names == ["prompt", "chosen", "rejected"]
    pairs = read_pairs(data.with_format("torch"), build_tokenizer())
    assert pairs.fingerprint == read_pairs(data, build_tokenizer()).fingerprint
    assert isinstance(pairs.raw[0]["chosen"], str)
