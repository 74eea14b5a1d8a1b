"""The rank-r edit for steering: how it is fitted, where it acts, what it does to text, and who may use it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import preference_rows
from datasets import Dataset
from explicit_dpo import dpo, lora
from explicit_dpo import formula as loss_formula
from hidden_world import (
    D,
    assert_step,
    conversations,
    decoded,
    dpo_loss,
    log_probability,
    reward,
    reward_loss,
    rule,
    vector,
)
from reading_world import FAMILIES, build_tokenizer, tiny_model
from torch import Tensor
from transformers import AutoTokenizer

from trl_anatomy.checking.dose import dose_response
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.fingerprint import layer_fingerprint
from trl_anatomy.reading.fit import fit_concept, read_examples
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.scorers.reft import ReftScorer, edited, ends_of, surprise
from trl_anatomy.shaping.located import PolicyError
from trl_anatomy.shaping.policy import ConceptPolicy

WIDTH = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(layers: list[int], width: int = WIDTH, ends: int = 2, rank: int = 3, scale: float = 0.3) -> ReftScorer:
    n = len(layers)
    w1, b, w2 = normal(n, rank, width), normal(n, rank, seed=1), scale * normal(n, width, rank, seed=2)
    return ReftScorer(w1, b, w2, layers, ends)


def formula(scorer: ReftScorer, layer: int, h: Tensor) -> Tensor:
    """W2(W1·h + b) in float64, token by token."""
    at = scorer.layers.index(layer)
    w1, b, w2 = (scorer.tensors[name][at].double() for name in ("w1", "b", "w2"))
    return torch.einsum("dr,...r->...d", w2, torch.einsum("rd,...d->...r", w1, h.double()) + b)


def at_ends(spans: list[tuple[int, int]], width: int, ends: int) -> Tensor:
    found = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        for place in range(start, stop):
            found[row, place] = place - start < ends or stop - place <= ends
    return found


# --- what is fitted ---

TEXTS = [[1, 9, 8, 7, 20, 21, 22, 23, 24, 25, 2], [1, 30, 31, 2], [1, 40, 41, 42, 43, 44], [50, 51, 52]]
SPANS = [(4, 11), (2, 4), (1, 6), (0, 3)]


def explicit_loss(model: Any, parts: dict[str, Tensor], layers: list[int], ends: int) -> Tensor:
    """Mean −log π per response token: every text by itself, layer by layer, without a hook."""
    told = []
    for ids, span in zip(TEXTS, SPANS, strict=True):
        where = at_ends([span], len(ids), ends)[..., None]

        def edit(layer: int, h: Tensor, where: Tensor = where) -> Tensor:
            if layer not in layers:
                return h
            w1, b, w2 = (parts[name][layers.index(layer)] for name in ("w1", "b", "w2"))
            return h + where * ((h @ w1.T + b) @ w2.T)

        inputs = torch.tensor([ids])
        logits = model.lm_head(decoded(model, inputs, torch.ones_like(inputs), edit))[0].log_softmax(-1)
        told += [-logits[place - 1, ids[place]] for place in range(max(1, span[0]), span[1])]
    return torch.stack(told).mean()


def test_loss_and_gradient_are_those_of_the_formula() -> None:
    model, layers = tiny_model().double(), [0, 2]
    scorer = made(layers)
    ours, theirs = ({name: t.double().requires_grad_() for name, t in scorer.tensors.items()} for _ in range(2))
    edit = (layers, ours, 2, 0.0)
    loss = surprise(model, TEXTS, SPANS, pad_token_id=0, edit=edit).mean()
    expected = explicit_loss(model, theirs, layers, 2)
    plain = explicit_loss(model, {n: 0 * t for n, t in theirs.items()}, layers, 2)
    assert (expected - plain).detach().abs() > 1e-2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    expected.backward()
    for name in scorer.names:
        assert theirs[name].grad.abs().max() > 1e-3
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_tokens", [4, 8192])
def test_fitting_is_adamw_on_that_loss(batch_tokens: int) -> None:
    """Against the same start, descended by torch's AdamW in float64 on the explicit loss, all texts in one step."""
    model, layers, steps = tiny_model(), [1, 3], 4
    settings: dict[str, Any] = {"layers": layers, "pad_token_id": 0, "rank": 3, "ends": 2, "dropout": 0.0}
    settings |= {"epochs": steps, "lr": 1e-2, "progress": False, "batch_tokens": batch_tokens}
    start = ReftScorer.fit(model, TEXTS, SPANS, **{**settings, "epochs": 0})
    assert start.tensors["w2"].abs().max() == 0
    bound = WIDTH**-0.5
    assert 0.9 * bound < start.tensors["w1"].abs().max() <= bound
    parts = {name: tensor.double().requires_grad_() for name, tensor in start.tensors.items()}
    optimiser, plain = torch.optim.AdamW(parts.values(), lr=1e-2, weight_decay=0.0), tiny_model().double()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimiser.zero_grad()
        explicit_loss(plain, parts, layers, 2).backward()
        optimiser.step()
    found = ReftScorer.fit(model, TEXTS, SPANS, **settings)
    for name in found.names:
        torch.testing.assert_close(found.tensors[name].double(), parts[name].detach(), rtol=1e-3, atol=1e-4)


def test_fitting_leaves_model_and_generators_alone() -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    state = torch.get_rng_state()
    fits = [
        ReftScorer.fit(model, TEXTS, SPANS, layers=[1], pad_token_id=0, epochs=2, seed=seed, progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    for name, p in model.named_parameters():
        assert p.requires_grad
        assert p.grad is None
        assert torch.equal(p, before[name])
    assert fits[0].key() == fits[1].key() != fits[2].key()
    with pytest.raises(AnatomyError, match="hold no token"):
        ReftScorer.fit(model, [[1, 2]], [(2, 2)], layers=[1], pad_token_id=0)
    with pytest.raises(AnatomyError, match="Layer 9 is out of range"):
        ReftScorer.fit(model, TEXTS, SPANS, layers=[9], pad_token_id=0)
    with pytest.raises(AnatomyError, match="no language-model head"):
        ReftScorer.fit(tiny_model(head="score"), TEXTS, SPANS, layers=[0], pad_token_id=0)


def test_dropout_hides_numbers_of_the_edit_only() -> None:
    model, scorer = tiny_model(), made([3])
    ids = torch.tensor([[5, 6, 7, 8]])
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    model(ids)
    for p in (0.0, 0.5):
        with torch.random.fork_rng(), edited(model, [3], scorer.tensors, lambda h: everywhere, dropout=p):
            torch.manual_seed(0)
            model(ids)
    handle.remove()
    plain, whole, part = seen
    gone = part == plain
    assert 0.3 < gone.float().mean() < 0.7
    torch.testing.assert_close((part - plain)[~gone], 2 * (whole - plain)[~gone], rtol=1e-4, atol=1e-4)


# --- where it acts ---


def test_the_ends_of_responses() -> None:
    spans = [(0, 9), (2, 5), (3, 3), (4, 9), (8, 12)]
    starts, stops = torch.tensor(spans).T
    for ends in (1, 2, 11):
        assert torch.equal(ends_of(starts, stops, 12, ends), at_ends(spans, 12, ends))


def test_at_the_start_it_changes_no_bit() -> None:
    model = tiny_model()
    scorer = ReftScorer.fit(model, TEXTS, SPANS, layers=range(4), pad_token_id=0, epochs=0, progress=False)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        plain = model(ids).logits
        with edited(model, scorer.layers, scorer.tensors, lambda h: torch.ones(h.shape[:2], dtype=torch.bool)):
            assert torch.equal(model(ids).logits, plain)
    prompts = ["Why?", "Tell me a story"]
    settings: dict[str, Any] = {"max_new_tokens": 6, "seed": 1}
    before = rollouts(model, build_tokenizer(), prompts, **settings)
    with scorer.generating(model, 7.0):
        assert rollouts(model, build_tokenizer(), prompts, **settings) == before


def test_a_text_is_edited_the_same_alone_and_in_a_batch() -> None:
    model, scorer = tiny_model(), made([0, 1, 2, 3])
    edit = (scorer.layers, scorer.tensors, 2, 0.0)
    with torch.no_grad():
        together = surprise(model, TEXTS, SPANS, pad_token_id=0, edit=edit)
        alone = [
            surprise(model, [ids], [span], pad_token_id=0, edit=edit) for ids, span in zip(TEXTS, SPANS, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts", [["Why?", "Tell me a story"], ["a", "b"]])
def test_every_generated_token_is_edited_and_no_prompt(prompts: list[str]) -> None:
    """Greedy text, against the whole row computed anew for every token; prompts of one token too."""
    tokenizer, model, scorer = build_tokenizer(bos=len(prompts[0]) > 1), tiny_model(), made([0, 2], scale=0.5)
    with scorer.generating(model, 1.5):
        found = rollouts(model, tokenizer, prompts, max_new_tokens=6, temperature=0)
    plain = rollouts(model, tokenizer, prompts, max_new_tokens=6, temperature=0)
    exact = tiny_model().double()
    for prompt, [text] in zip(prompts, found, strict=True):
        ids = list(tokenizer(prompt).input_ids)
        n_prompt = len(ids)
        if len(prompt) == 1:
            assert n_prompt == 1
        for _ in range(6):
            generated = (torch.arange(len(ids)) >= n_prompt)[None, :, None]

            def edit(layer: int, h: Tensor, generated: Tensor = generated) -> Tensor:
                return h + 1.5 * generated * formula(scorer, layer, h) if layer in scorer.layers else h

            inputs = torch.tensor([ids])
            with torch.no_grad():
                logits = exact.lm_head(decoded(exact, inputs, torch.ones_like(inputs), edit))
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)
    assert found != plain
    assert rollouts(model, tokenizer, prompts, max_new_tokens=6, temperature=0) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(family: str) -> None:
    """Surprise against the model's own logits, and greedy text against the row computed anew without a cache."""
    model, scorer = tiny_model(family).double(), made([1, 3], scale=0.5)
    edit = (scorer.layers, scorer.tensors, 2, 0.0)
    ids, span = TEXTS[0], SPANS[0]
    acts = at_ends([span], len(ids), 2)
    with torch.no_grad():
        with edited(model, scorer.layers, scorer.tensors, lambda h: acts):
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        told = surprise(model, [ids, TEXTS[1]], [span, SPANS[1]], pad_token_id=0, edit=edit)[: span[1] - span[0]]
    expected = torch.stack([-logits[place - 1, ids[place]] for place in range(*span)])
    torch.testing.assert_close(told, expected, rtol=1e-6, atol=1e-6)

    tokenizer, prompt = build_tokenizer(), "Tell me a story"
    with scorer.generating(model, 1.0):
        [[text], _] = rollouts(model, tokenizer, [prompt, "Why?"], max_new_tokens=12, temperature=0)
    row = list(tokenizer(prompt).input_ids)
    n_prompt = len(row)
    for _ in range(12):
        generated = (torch.arange(len(row)) >= n_prompt)[None]
        with torch.no_grad(), edited(model, scorer.layers, scorer.tensors, lambda h, where=generated: where):
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        if row[-1] == tokenizer.eos_token_id:
            break
    assert text == tokenizer.decode(row[n_prompt:], skip_special_tokens=True)


# --- what it does to text ---

WORDS = ["cat", "sky", "river", "story", "long", "air", "true"]


def labelled(n: int = 80) -> Dataset:
    """Responses full of exclamation marks, and responses of plain words, to the same prompts."""
    rng = np.random.default_rng(0)
    responses = ["!" * int(rng.integers(8, 13)) if i % 2 else " ".join(rng.choice(WORDS, 6)) for i in range(n)]
    rows = {"prompt": [f"Why {i}? " for i in range(n)], "response": responses, "label": [i % 2 for i in range(n)]}
    return Dataset.from_dict(rows)


@pytest.fixture(scope="module")
def fitted() -> Any:
    examples = read_examples(labelled(), build_tokenizer())
    return fit_concept(tiny_model(), examples, scorer="reft", lr=1e-2, progress=False)


def test_the_planted_habit_rises_with_the_strength(fitted: Any) -> None:
    scorer = fitted.scorer
    assert scorer.layers == (0, 1, 2, 3)
    assert scorer.tensors["w1"].shape == (4, 8, WIDTH)
    found = dose_response(
        tiny_model(),
        build_tokenizer(),
        scorer,
        [f"Why {i}? " for i in range(100, 180)],
        lambda texts: np.array(["!!" in text for text in texts]),
        strengths=(0.0, 0.25, 0.5, 1.0),
        max_new_tokens=12,
    )
    rates = [row["rate"] for row in found]
    assert rates == sorted(rates)
    assert found[-1]["rate_low"] > found[0]["rate_high"]  # the 95 % intervals lie apart


def test_the_card_says_what_it_does_to_held_out_text(fitted: Any, tmp_path: Path) -> None:
    model, card = tiny_model(), fitted.scorer.card
    judged = card["held_out"]
    assert judged["with_concept"]["nats_edited"] < 0.5 * judged["with_concept"]["nats"]
    assert judged["without_concept"]["nats_edited"] > judged["without_concept"]["nats"]
    assert card["model_fingerprint"] == layer_fingerprint(model, 3)
    assert (card["edited_layers"], card["ends"], card["n_positive"]) == ([0, 1, 2, 3], 11, 40)
    fitted.scorer.save(tmp_path)
    loaded = ReftScorer.load(tmp_path)
    loaded.check(model)
    assert loaded.key() == fitted.scorer.key()
    h = normal(2, 5, WIDTH, seed=9)
    torch.testing.assert_close(loaded.shift(2, h).double(), formula(fitted.scorer, 2, h), rtol=1e-4, atol=1e-4)
    with pytest.raises(AnatomyError, match="another model"):
        loaded.check(tiny_model(seed=1))
    with pytest.raises(AnatomyError, match="gives no score"):
        loaded.score_spans(h[0], [0, 5])
    with pytest.raises(AnatomyError, match="reft has no direction"):
        loaded.unit_direction()
    with pytest.raises(AnatomyError, match="read goes with"):
        fit_concept(model, read_examples(labelled(), build_tokenizer()), scorer="reft", read=({}, np.zeros(1)))


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for layers, message in (([1, 0], "rising list that ends at 1"), ([0, 1, 2], "has tensors of the shapes")):
        with pytest.raises(AnatomyError, match=message):
            ReftScorer(normal(2, 3, WIDTH), normal(2, 3), normal(2, WIDTH, 3), layers)
    with pytest.raises(AnatomyError, match="ends 0; allowed"):
        made([0], ends=0)
    made([0, 2]).save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    for change, message in (
        ({"edited_layers": [0, 1]}, "ends at 2"),
        ({"edited_layers": None}, "edits the layers None"),
        ({"edited_layers": [0, 1, 2]}, "on 3 layers has tensors"),
        ({"ends": "2"}, "has ends '2'"),
    ):
        (tmp_path / "card.json").write_text(json.dumps(card | change))
        with pytest.raises(AnatomyError, match=message):
            ReftScorer.load(tmp_path)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    labelled(30).to_json(str(tmp_path / "rows.jsonl"))
    Dataset.from_dict({"prompt": ["Why?", "No."]}).to_json(str(tmp_path / "prompts.jsonl"))
    dose = ["--dose=0,1", "--dose_prompts", str(tmp_path / "prompts.jsonl"), "--dose_pattern", "!"]
    given = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), "--scorer", "reft"]
    out = tmp_path / "loud"
    assert main(["fit", *given, "--out", str(out), "--layers", "1", *dose, "--max_new_tokens", "3"]) == 0
    shown = capsys.readouterr().out
    card = json.loads((out / "card.json").read_text())
    assert card["edited_layers"] == [1]
    assert f"with the concept        {card['held_out']['with_concept']['nats']:.3f}".replace(" ", "") in shown.replace(
        " ", ""
    )
    assert f"loud: {{scorer: reft, path: {out}}}" in shown
    assert [row["strength"] for row in card["dose_response"]] == [0.0, 1.0]
    assert main(["fit", *given, "--out", str(out), "--layers", "0", "--ends", "3"]) == 0
    assert json.loads((out / "card.json").read_text())["ends"] == ReftScorer.load(out).ends == 3
    capsys.readouterr()
    for more in (["--ends", "0"], ["--ends", "3", "--scorer", "probe"]):
        assert main(["fit", *given, "--out", str(out), *more]) == 2
        assert "--ends is a number above 0, and goes with --scorer reft" in capsys.readouterr().err
    for more in (["--reduce", "max"], ["--per", "token"], ["--tokens", "prompt_end"]):
        assert main(["fit", *given, "--out", str(out), *more]) == 2
        assert "do not go with --scorer reft" in capsys.readouterr().err


# --- who may use it ---


def test_verbs_that_need_a_score_refuse_it_by_file_line_and_key(tmp_path: Path) -> None:
    made([0]).save(tmp_path / "r")
    lines = [
        "concepts:",
        "  r: {scorer: reft, path: r}",
        "  child: {scorer: text, pattern: x, given: [r]}",
        "  grown: {scorer: reft, path: r, given: [child]}",
        "  deep: {scorer: reft, path: r, layer: 0}",
        "rules:",
        "  - {explain_away: r, with: shape_reward}",
        "  - {explain_away: r, with: filter_pairs, fraction: 0.1}",
        "  - {explain_away: r, with: mask_tokens, threshold: 1}",
        "  - {explain_away: r, with: inoculate, instruction: be r, above: 0}",
        "  - {explain_away: r, with: reweight_pairs}",
        "  - {explain_away: child, with: reweight_pairs, hold: [r]}",
        "  - {explain_away: r, with: residualize, steer: 2}",
        "  - {explain_away: r, with: project_out}",
        "  - {explain_away: r, with: ablate_features}",
        "  - {explain_away: r, with: steer, strength: 1, fraction: 0.5}",
    ]
    (tmp_path / "policy.yaml").write_text("\n".join(lines))
    with pytest.raises(PolicyError) as caught:
        ConceptPolicy.load(tmp_path / "policy.yaml")
    told = str(caught.value)
    for line, key in ((3, "concepts.child.given"), (4, "concepts.grown"), (5, "concepts.deep")):
        assert f"policy.yaml:{line}: {key}" in told
    for i in range(9):
        key = "hold" if i == 5 else "explain_away"
        assert f"policy.yaml:{7 + i}: rules[{i}].{key}: found 'r', a concept of the scorer 'reft'" in told
    assert "policy.yaml:16: rules[9].fraction: found 'r'" in told
    assert "which gives no score, allowed: concepts of the scorers text, features, direction" in told
    assert (
        "allowed with shape_reward: text, features, direction, probe, attention_probe, habit." in told
    )  # all that score


def test_it_is_never_among_the_concepts_that_weights_hold(tmp_path: Path) -> None:
    concepts = {"r": {"scorer": "reft", "path": "r"}, "a": {"scorer": "text", "pattern": "a"}}
    rules = [{"explain_away": "a", "with": "reweight_pairs"}]
    loaded = ConceptPolicy.load({"concepts": concepts, "rules": rules})
    assert loaded.held(loaded.rules[0]) == ()


def write(folder: Path, layers: list[int], **settings: Any) -> dict[str, Any]:
    """The concept r on some layers, the direction v at layer 0, a text rule."""
    made(layers, D, **settings).save(folder / "r")
    DirectionScorer(vector(1), 0).save(folder / "v")
    return {
        "r": {"scorer": "reft", "path": str(folder / "r")},
        "v": {"scorer": "direction", "path": str(folder / "v")},
        "t": {"scorer": "text", "pattern": "bold"},
    }


def edits(scorer: ReftScorer, alpha: Tensor, where: Tensor) -> Any:
    def edit(layer: int, h: Tensor) -> Tensor:
        if layer not in scorer.layers:
            return h
        return h + (alpha[:, None] * where)[:, :, None] * formula(scorer, layer, h)

    return edit


def sides(chosen: float, rejected: float, n: int) -> Tensor:
    return torch.tensor([chosen] * n + [rejected] * n, dtype=torch.float64)


def spans_of(mask: Tensor) -> list[tuple[int, int]]:
    """Of completion masks without holes."""
    return [(int(row.argmax()), int(row.argmax() + row.sum())) for row in mask]


OPTIONS: dict[str, dict[str, Any]] = {
    "explicit reference": {"other_reference": True},
    "lora": {"peft_config": lora()},
    "precomputed": {"precompute_ref_log_probs": True, "other_reference": True},
    "checkpointing, reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "other_reference": True},
    "lora, checkpointing, not reentrant": {
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "peft_config": lora(),
    },
    "keep_end": {"max_length": 9, "truncation_mode": "keep_end", "other_reference": True},
    "keep_start": {"max_length": 14, "other_reference": True},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_dpo_is_steered_at_the_ends_of_responses(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rules = [rule("r", "steer", "amplify", strength=0.7, side="both"), rule("v", "steer", strength=2.0, side="chosen")]
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        preference_rows(6) if name == "lora" else conversations(6),
        policy={"concepts": write(tmp_path, [0, 1]), "rules": rules[:1] if name != "lora" else rules},
        dtype=torch.float64,
        gradient_checkpointing="checkpointing" in name,
        **OPTIONS[name],
    )
    n, scorer = len(trainer.train_dataset), made([0, 1], D)

    def expected(batch: dict[str, Any]) -> Tensor:
        mask = batch["completion_mask"]
        where = at_ends(spans_of(mask), mask.shape[1], 2)
        assert where.sum() < mask.sum()
        own = edits(scorer, sides(-0.7, -0.7, n), where)

        def edit(layer: int, h: Tensor) -> Tensor:  # both rules read what the layer gave
            along = sides(2.0, 0.0, n)[:, None, None] * vector(1) if layer == 0 and name == "lora" else 0.0
            return own(layer, h) + along

        assert not torch.allclose(dpo_loss(trainer, batch, edit), dpo_loss(trainer, batch, None))
        return dpo_loss(trainer, batch, edit)

    assert_step(trainer, expected)


def test_dpo_with_instructed_prompts_and_masked_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The ends are those of the whole response in the row that the policy sees."""
    rules = [
        rule("r", "steer", strength=0.7),
        rule("t", "inoculate", instruction="w1 w2 w3"),
        rule("t", "mask_tokens"),
    ]
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        conversations(6),
        policy={"concepts": write(tmp_path, [0, 1]), "rules": rules},
        dtype=torch.float64,
        other_reference=True,
    )
    assistant, scorer = (
        AutoTokenizer.from_pretrained(tiny_model_dir).convert_tokens_to_ids("<assistant>"),
        made([0, 1], D),
    )

    def expected(batch: dict[str, Any]) -> Tensor:
        names = ("input_ids", "attention_mask", "completion_mask")
        seen = {name: batch[f"anatomy_policy_{name}"] for name in names}
        ids, stops = seen["input_ids"], seen["attention_mask"].sum(1)
        starts = torch.where(ids == assistant, torch.arange(ids.shape[1]), -1).max(1).values + 1
        assert (seen["completion_mask"].sum(1) < stops - starts).any()  # what is masked is still edited
        assert seen["input_ids"].shape[1] > batch["input_ids"].shape[1]
        where = at_ends(list(zip(starts.tolist(), stops.tolist(), strict=True)), ids.shape[1], 2)
        with torch.no_grad():
            reference = log_probability(trainer.ref_model, batch, None)
        logps = log_probability(trainer.model, seen, edits(scorer, sides(0.0, 0.7, 6), where))
        length = seen["completion_mask"].sum(1).view(2, -1).double()
        return loss_formula("sigmoid", logps - reference, torch.zeros_like(logps), length, logps).mean()

    assert_step(trainer, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reward_models_are_steered_at_the_ends_of_responses(
    checkpointing: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = conversations(6)
    rules = [rule("r", "steer", strength=0.7, where={"column": "topic", "equals": "x"})]
    policy = {"concepts": write(tmp_path, [0, 1]), "rules": rules}
    trainer = reward(tiny_model_dir, tmp_path, data, policy, gradient_checkpointing=checkpointing)
    tokenizer, scorer = AutoTokenizer.from_pretrained(tiny_model_dir), made([0, 1], D)

    def expected(batch: dict[str, Any]) -> Tensor:
        asked = [
            len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"])
            for row in data
        ]
        stops = batch["attention_mask"].sum(1).tolist()
        where = at_ends(list(zip(asked * 2, stops, strict=True)), batch["input_ids"].shape[1], 2)
        alpha = sides(0.0, 0.7, 6) * torch.tensor([row["topic"] == "x" for row in data] * 2)
        edit = edits(scorer, alpha, where)
        assert not torch.allclose(reward_loss(trainer, batch, edit), reward_loss(trainer, batch, None))
        return reward_loss(trainer, batch, edit)

    assert_step(trainer, expected)


def test_an_edit_fitted_on_another_model_is_refused_before_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    concepts = write(tmp_path, [0, 1])
    card = json.loads((tmp_path / "r" / "card.json").read_text())
    (tmp_path / "r" / "card.json").write_text(json.dumps(card | {"model_fingerprint": "0" * 32}))
    policy = {"concepts": concepts, "rules": [rule("r", "steer", strength=1)]}
    with pytest.raises(AnatomyError, match="fitted on another model"):
        dpo(tiny_model_dir, tmp_path, preference_rows(4), policy=policy)
    made([0, 1], 2 * D).save(tmp_path / "r")
    with pytest.raises(AnatomyError, match="found width 32, allowed: 16"):
        dpo(tiny_model_dir, tmp_path, preference_rows(4), policy=policy)
    made([0, 2], D).save(tmp_path / "r")
    with pytest.raises(AnatomyError, match="found 2, allowed: 0 to 1, the layers of the model"):
        dpo(tiny_model_dir, tmp_path, preference_rows(4), policy=policy)


def test_low_precision_states_keep_their_type() -> None:
    scorer = made([1])
    h = normal(3, 4, WIDTH, seed=3)
    low = scorer.shift(1, h.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), formula(scorer, 1, h.bfloat16()), rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(low.flatten(), scorer.shift(1, h).flatten(), dim=0) > 0.999
