"""The processing class is the one that TRL's trainers load, with the template that they take."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from parity import EXACT
from reading_world import build_tokenizer, tiny_model, tiny_sae
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from vision_world import VISION, chat_rows, shipped, vision_model

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer, AuditConfig, run_audit
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.audit.run import load_model, load_tokenizer
from trl_anatomy.checking.responses import audited_tokenizer
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.processing import lengthen_embeddings, load_processing_class, prompt_ids, set_chat_template
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import read_pairs

BOLD = {"scorer": "text", "pattern": r"\*\*"}


def policy(concept: dict[str, Any] = BOLD) -> dict[str, Any]:
    return {
        "version": 1,
        "concepts": {"c": concept},
        "rules": [{"explain_away": "c", "with": "shape_reward", "strength": 1.0}],
    }


def config(kind: type, folder: Path, **more: Any) -> Any:
    return kind(output_dir=str(folder / "out"), **EXACT | more)


def sequences(trainer: Any) -> list[list[int]]:
    """Tokens of the chosen responses as the trainer has them, after their prompts."""
    rows = trainer.train_dataset
    if "prompt_ids" in rows.column_names:
        return [row["prompt_ids"] + row["chosen_ids"] for row in rows]
    return [row["chosen_ids"] for row in rows]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model: its tokenizer has no template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tiny_model("qwen3", layers=2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# Processors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VISION)
def test_text_only_dpo_of_a_vision_model(kind: str, tmp_path: Path) -> None:
    """A policy, on text and on hidden states, trains what stock TRL trains: the rows as the processor renders them."""
    processor = vision_model(kind, tmp_path)
    assert isinstance(load_processing_class(str(tmp_path)), ProcessorMixin)
    assert isinstance(load_processing_class(str(tmp_path), reward=True), PreTrainedTokenizerBase)
    data = Dataset.from_list(chat_rows())
    stock = DPOTrainer(model=str(tmp_path), args=config(DPOConfig, tmp_path), train_dataset=data)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    DirectionScorer(direction / direction.norm(), 1).save(tmp_path / "direction")
    hidden = {"scorer": "direction", "path": str(tmp_path / "direction")}
    for given, concept in ((None, BOLD), (processor, hidden)):
        ours = AnatomyDPOTrainer(
            model=str(tmp_path),
            args=config(DPOConfig, tmp_path),
            train_dataset=data,
            concept_policy=policy(concept),
            processing_class=given,
        )
        assert sequences(ours) == sequences(stock)
        assert ours.plan is not None
        assert ours.plan.rules[0]["rows"] > 0
        ours.train()


def test_the_template_of_the_processor_is_read_where_the_tokenizer_keeps_another(tmp_path: Path) -> None:
    vision_model("gemma3", tmp_path, tokenizer_template="{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    data = Dataset.from_list(chat_rows())
    dpo = DPOTrainer(model=str(tmp_path), args=config(DPOConfig, tmp_path), train_dataset=data)
    read = read_pairs(data, load_processing_class(str(tmp_path)))
    assert [[*read.ids(i, "prompt"), *read.ids(i, "chosen")] for i in range(len(read))] == sequences(dpo)
    tokenizer = load_tokenizer(str(tmp_path), AuditConfig(truncation="drop"))
    other = read_pairs(data, tokenizer, truncation="drop")
    assert other.tokenizer.decode(other.ids(0, "chosen")).startswith("It is **air** today 0!")


def test_a_processor_is_refused_where_trl_wants_a_tokenizer(tmp_path: Path) -> None:
    processor = vision_model("llava", tmp_path)
    with pytest.raises(AnatomyError, match="takes a tokenizer"):
        AnatomyRewardTrainer(
            model=str(tmp_path),
            args=config(RewardConfig, tmp_path),
            train_dataset=Dataset.from_list(chat_rows()),
            processing_class=processor,
            concept_policy=policy(),
        )


def test_messages_with_images_are_refused(tmp_path: Path) -> None:
    rows = chat_rows()
    rows[3]["prompt"][0]["content"] = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    for row in rows[:3] + rows[4:]:
        row["prompt"][0]["content"] = [{"type": "text", "text": "What?"}]
    vision_model("gemma3", tmp_path)
    with pytest.raises(AnatomyError, match=r"row 3, column 'prompt'.*type 'image'; only text can be read"):
        read_pairs(Dataset.from_list(rows), load_processing_class(str(tmp_path)))


@pytest.mark.parametrize("kind", ["gemma3", "idefics3"])
def test_prompts_are_sampled_from_as_the_processor_renders_them(kind: str, tmp_path: Path) -> None:
    vision_model(kind, tmp_path)
    processor, prompts = load_processing_class(str(tmp_path)), [row["prompt"] for row in chat_rows(3)]
    pairs = read_pairs(Dataset.from_list(chat_rows(3)), processor)
    made = [prompt_ids(processor, prompt) for prompt in prompts]
    assert all(ids[: len(pairs.ids(i, "prompt"))] == pairs.ids(i, "prompt").tolist() for i, ids in enumerate(made))
    model = load_model(AuditConfig(model=str(tmp_path), device="cpu"))
    assert [len(texts) for texts in rollouts(model, processor, prompts, max_new_tokens=3)] == [1, 1, 1]


# chat_template_path ---------------------------------------------------------------------------------------------------


def template_source(kind: str, folder: Path) -> str:
    """A template as TRL takes it: a file, or a folder of a tokenizer that brings a token and its EOS."""
    if kind != "folder":
        (folder / "t.jinja").write_text(shipped(kind))
        return str(folder / "t.jinja")
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = shipped("qwen2_5")
    tokenizer.save_pretrained(folder / "source")
    return str(folder / "source")


@pytest.mark.parametrize("kind", ["qwen3", "llama3", "folder"])
def test_a_base_model_takes_the_template_of_the_recipe(kind: str, base: Path, tmp_path: Path) -> None:
    template, data = template_source(kind, tmp_path), Dataset.from_list(chat_rows())
    args = config(RewardConfig, tmp_path, chat_template_path=template)
    stock = RewardTrainer(model=str(base), args=args, train_dataset=data)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    DirectionScorer(direction / direction.norm(), 1).save(tmp_path / "direction")
    for concept in (BOLD, {"scorer": "direction", "path": str(tmp_path / "direction")}):
        ours = AnatomyRewardTrainer(model=str(base), args=args, train_dataset=data, concept_policy=policy(concept))
        assert sequences(ours) == sequences(stock)
        ours.train()


@pytest.mark.parametrize("kind", ["llama3", "folder"])
def test_an_audit_keeps_its_template(kind: str, base: Path, tmp_path: Path) -> None:
    """What reopens the audit reads the same tokens, and the same model where the template brought tokens."""
    template = template_source(kind, tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, chat_rows(12))))
    tiny_sae("standard", d_in=32, d_sae=48, hook="blocks.0.hook_resid_post").save_model(tmp_path / "sae")
    made = AuditConfig(
        model=str(base),
        dataset=str(tmp_path / "rows.jsonl"),
        sae=str(tmp_path / "sae"),
        out=str(tmp_path / "audit"),
        chat_template_path=template,
    )
    audit = run_audit(made, progress=False)
    source = reopen(audit)
    assert audit.info["settings"]["chat_template_path"] == template
    assert len(source.pairs) == 12
    assert source.model is not None
    tokenizer = load_tokenizer(str(base))
    set_chat_template(tokenizer, template)
    pairs = read_pairs(Dataset.from_list(chat_rows(12)), tokenizer)
    assert pairs.fingerprint == source.pairs.fingerprint
    ids = max(int(pairs.ids(i, span).max()) for i in range(12) for span in ("prompt", "chosen"))
    assert ids < source.model.get_input_embeddings().num_embeddings

    args = config(RewardConfig, tmp_path, chat_template_path=template)
    data = Dataset.from_list(chat_rows(12))
    trainer = AnatomyRewardTrainer(
        model=str(base),
        args=args,
        train_dataset=data,
        audit=AuditConfig(sae=str(tmp_path / "sae"), out=str(tmp_path / "now")),
        concept_policy=policy(),
    )
    assert trainer.audit is not None
    assert trainer.audit.info["settings"]["chat_template_path"] == template


@pytest.mark.parametrize("change", ["gone", "rewritten", "moved"])
def test_an_audit_needs_no_file_of_its_template_again(change: str, base: Path, tmp_path: Path) -> None:
    template = Path(template_source("qwen3", tmp_path))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, chat_rows(12))))
    tiny_sae("standard", d_in=32, d_sae=48, hook="blocks.0.hook_resid_post").save_model(tmp_path / "sae")
    made = AuditConfig(
        model=str(base),
        dataset=str(tmp_path / "rows.jsonl"),
        sae=str(tmp_path / "sae"),
        out=str(tmp_path / "audit"),
        chat_template_path=str(template),
    )
    audit = run_audit(made, progress=False)
    if change == "rewritten":
        template.write_text(shipped("llama3"))
    else:
        template.rename(tmp_path / "elsewhere.jinja") if change == "moved" else template.unlink()
    source = reopen(audit)
    assert source.tokenizer.chat_template == shipped("qwen3")
    assert len(source.pairs) == 12
    assert source.model is not None
    assert audited_tokenizer(audit, str(base)).chat_template == shipped("qwen3")


def test_a_trainer_refuses_an_audit_by_another_template(base: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(AnatomyError, match=r"audit setting chat_template_path: .* another template"):
        AnatomyDPOTrainer(
            model=str(base),
            args=config(DPOConfig, tmp_path),
            train_dataset=Dataset.from_list(chat_rows()),
            processing_class=tokenizer,
            audit=AuditConfig(sae="none", chat_template_path=template_source("qwen3", tmp_path)),
        )


@pytest.mark.parametrize("name", ["gone.jinja", "gone", "."])
def test_a_template_that_is_not_there_is_one_sentence(name: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match=r"^chat_template_path .*: (cannot be read|no template)"):
        load_tokenizer(str(base), AuditConfig(chat_template_path=str(tmp_path / name)))


def test_added_tokens_begin_at_the_mean_of_the_embeddings() -> None:
    model, tokenizer = tiny_model(layers=1), build_tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    lengthen_embeddings(model, tokenizer)
    assert torch.equal(model.get_input_embeddings().weight, before)  # nothing to add
    tokenizer.add_tokens([f"<|{i}|>" for i in range(340 - len(tokenizer))])
    state = torch.get_rng_state()
    lengthen_embeddings(model, tokenizer)
    after = model.get_input_embeddings().weight
    assert torch.equal(torch.get_rng_state(), state)
    assert after.shape[0] == 340
    assert torch.equal(after[:330], before)
    assert torch.allclose(after[330:], before.mean(dim=0).expand(10, -1))


# Remote code ----------------------------------------------------------------------------------------------------------


def test_remote_code_is_never_run_or_asked_for(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repositories that bring code of their own end in one sentence: configuration, model, tokenizer, template."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether remote code may run"))
    settings = {"model_type": "its_own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (base / "config.json").write_text(json.dumps(settings))
    path = base / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer |= {"tokenizer_class": "Its", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    path.write_text(json.dumps(tokenizer))
    (base / "code.py").write_text("raise SystemExit('ran')")
    for load in (
        lambda: load_model(AuditConfig(model=str(base), device="cpu")),
        lambda: load_tokenizer(str(base)),
        lambda: load_processing_class(str(base), reward=True),
        lambda: set_chat_template(build_tokenizer(), str(base)),
    ):
        with pytest.raises(AnatomyError, match=r"cannot be loaded|no template can be loaded"):
            load()
