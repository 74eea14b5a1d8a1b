"""The verdict on an SAE in every audit: right and wrong ones, what stops, what is said, what is kept."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae
from torch import nn
from trl import DPOConfig

from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.judge_sae import FILE, pairs_to_judge
from trl_anatomy.audit.report import write_report
from trl_anatomy.audit.run import dry_run, run_audit
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import sae_check
from trl_anatomy.reading.forward import read_layers
from trl_anatomy.reading.sae import SAE, load_sae
from trl_anatomy.reading.sae_check import CONTINUE, FITS, REFUSE, check_fit
from trl_anatomy.reading.sae_training import BATCH, SHORTEST, recipe, sequences_of, train_saes
from trl_anatomy.reading.sft import read_sft
from trl_anatomy.reading.spans import Pairs, read_pairs

LAYER = 2


def learned(pairs: Pairs, seed: int) -> Any:
    """A tiny model that has learned these pairs for a moment, well above chance."""
    model = tiny_model("llama", seed=seed)
    model.train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rows = [torch.tensor([[*map(int, pairs.ids(i, "prompt")), *map(int, pairs.ids(i, "chosen"))]]) for i in range(16)]
    for ids in rows * 2:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


class World:
    """A tiny language model, pairs, and SAEs of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, dataset("conversational", 40)
        self.tokenizer = build_tokenizer()
        self.pairs = read_pairs(self.data, self.tokenizer, max_length=None)
        self.model = learned(self.pairs, seed=0)
        self.model.save_pretrained(root / "model")
        self.tokenizer.save_pretrained(root / "model")
        self.data.to_json(root / "pairs.jsonl")
        own = sequences_of(self.pairs, [], self.pairs.pad_token_id)
        self.texts = sequences_of(None, [ids.tolist() for ids in own.ids] * 12, self.pairs.pad_token_id)
        self.right = self.trained("right", self.model, 200, 3e-3)

    def trained(self, name: str, model: nn.Module, steps: int, lr: float | None) -> Path:
        settings = recipe(32, steps * BATCH, d_sae=256, k=8, lr=lr)
        return train_saes(model, self.texts, [LAYER], settings, self.root / name, progress=False)[LAYER]

    def sae(self, change: Callable[[Any], None] | None = None) -> SAE:
        sae = load_sae(self.right)
        if change is None:
            return sae
        inner = sae._inner
        with torch.no_grad():
            change(inner)
        return SAE(inner, {"path": f"{self.root}/changed"})

    def config(self, out: Path, **changes: Any) -> AuditConfig:
        given = {"model": str(self.root / "model"), "dataset": str(self.root / "pairs.jsonl"), "device": "cpu"}
        return AuditConfig(**{**given, "sae": str(self.right), "out": str(out / "audit"), "bootstrap": 100, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("verdicts"))


def shuffled(inner: Any) -> None:
    inner.W_dec.copy_(inner.W_dec.roll(1, dims=0))


def at(layer: int) -> Callable[[Any], None]:
    def change(inner: Any) -> None:
        inner.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"

    return change


def test_the_right_sae_fits(world: World) -> None:
    fit = check_fit(world.model, world.sae(), world.pairs, LAYER, progress=False)
    assert fit.verdict == FITS, fit
    assert fit.better_layer is None
    assert fit.loss_gained is not None
    assert fit.loss_gained > 1
    assert not fit.untrained


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_another_layer_is_refused_also_next_to_the_right_one(world: World, layer: int) -> None:
    fit = check_fit(world.model, world.sae(), world.pairs, layer, progress=False)
    assert fit.verdict == REFUSE, fit
    assert fit.better_layer == LAYER
    assert f"it explains layer {LAYER} better" in fit.reason


def test_another_model_a_shuffled_decoder_and_a_short_training(world: World) -> None:
    other = learned(world.pairs, seed=5)
    assert check_fit(other, world.sae(), world.pairs, LAYER, progress=False).verdict == REFUSE
    assert check_fit(world.model, world.sae(shuffled), world.pairs, LAYER, progress=False).verdict == REFUSE
    early = load_sae(world.trained("early", world.model, SHORTEST, 1e-5))
    assert check_fit(world.model, early, world.pairs, LAYER, progress=False).verdict in (CONTINUE, REFUSE)


def test_an_audit_carries_the_figures_and_finds_them_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = dry_run(world.config(tmp_path))
    assert shown["judged_on"] == pairs_to_judge(40) == 5
    audit = run_audit(world.config(tmp_path), progress=False)
    fit = audit.info["sae"]["fit"]
    assert fit["verdict"] == FITS
    assert (fit["n_pairs"], fit["untrained"]) == (5, False)
    assert set(fit["variance_explained"]) == {"prompt", "chosen", "rejected"}
    page = (audit.path / "report.html").read_text()
    assert "How well the SAE reads these pairs" in page
    assert "Verdict: <b>fits</b>" in page
    for words in ("variance of the prompts", "fire per response token", "fired on none", "outliers", "cross-entropy"):
        assert words in page
    assert "This audit was forced" not in page

    real, calls = sae_check.check_fit, []
    monkeypatch.setattr(sae_check, "check_fit", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = run_audit(world.config(tmp_path), progress=False)
    assert not calls
    assert again.info["sae"]["fit"] == fit
    (audit.path / FILE).write_text("{half")
    assert run_audit(world.config(tmp_path), progress=False).info["sae"]["fit"] == fit
    assert len(calls) == 1
    with pytest.raises(AnatomyError, match="a harvest of something else"):  # told before anything is read
        run_audit(world.config(tmp_path, max_length=30), progress=False)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [(shuffled, "of the variance"), (at(1), "it explains layer 2 better"), (at(3), "layer 2 better")],
)
def test_an_sae_not_to_be_used_stops_the_audit_before_the_pass(
    world: World, tmp_path: Path, change: Callable[[Any], None], told: str
) -> None:
    given = {"model": world.model, "tokenizer": world.tokenizer, "dataset": world.data, "sae": world.sae(change)}
    config = world.config(tmp_path, model="", dataset=None, sae="")
    with pytest.raises(AnatomyError, match=told) as stopped:
        run_audit(config, **given, progress=False)
    assert "\n" not in str(stopped.value)
    assert "`trl-anatomy sae --model M --dataset D --out saes/run1 --device cpu`" in str(stopped.value)
    assert "--force" in str(stopped.value)
    assert not (tmp_path / "audit" / "harvest").exists()
    audit = run_audit(replace(config, force=True), **given, progress=False)
    assert audit.info["sae"]["fit"]["verdict"] == REFUSE
    page = (audit.path / "report.html").read_text()
    assert page.index("This audit was forced") < page.index("<h1>")
    assert any(note.startswith("This audit was forced") for note in audit.info["notes"])


def test_a_command_that_is_stopped_says_so_and_goes_on_by_force(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.sae(shuffled)._inner.save_model(tmp_path / "sae")
    words = ["audit", "--model", str(world.root / "model"), "--dataset", str(world.root / "pairs.jsonl")]
    words += ["--sae", str(tmp_path / "sae"), "--device", "cpu", "--out", str(tmp_path / "audit"), "--bootstrap", "100"]
    assert main(words) == 2
    assert "is not for this model, layer and data" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    assert load_audit(tmp_path / "audit").info["settings"]["force"] is True


def test_one_that_needs_more_training_is_noted_with_the_command(world: World, tmp_path: Path) -> None:
    def weaker(inner: Any) -> None:
        inner.W_dec.mul_(0.6)

    sae = world.sae(weaker)
    audit = run_audit(world.config(tmp_path, sae=""), sae=sae, progress=False)
    assert audit.info["sae"]["fit"]["verdict"] == CONTINUE
    (note,) = [note for note in audit.info["notes"] if note.startswith("The SAE should be trained on")]
    assert f"--init {world.root}/changed" in note
    assert "`trl-anatomy sae --model" in note
    assert "Verdict: <b>continue training it</b>" in (audit.path / "report.html").read_text()


def test_sft_rows_are_judged_too(world: World, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "source": "ab"[i % 2]}
        for i, row in enumerate(world.data)
    ]
    settings = {"data_kind": "sft", "region": "source=a", "dataset": None}
    audit = run_audit(world.config(tmp_path, **settings), dataset=Dataset.from_list(rows), progress=False)
    fit = audit.info["sae"]["fit"]
    assert fit["verdict"] == FITS
    assert fit["variance_explained"]["rejected"] is None
    page = (audit.path / "report.html").read_text()
    assert "Verdict: <b>fits</b>" in page
    assert "variance of the rejected responses" not in page
    wrong = world.config(tmp_path / "b", **settings, sae="")
    with pytest.raises(AnatomyError, match="is not for this model"):
        run_audit(wrong, dataset=Dataset.from_list(rows), sae=world.sae(shuffled), progress=False)


def test_a_trainer_that_audits_stops_too(world: World, tmp_path: Path) -> None:
    world.sae(shuffled)._inner.save_model(tmp_path / "sae")
    settings = AuditConfig(sae=str(tmp_path / "sae"), out=str(tmp_path / "audit"), bootstrap=100)
    args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], max_length=128)
    with pytest.raises(AnatomyError, match="is not for this model, layer and data"):
        AnatomyDPOTrainer(str(world.root / "model"), args=args, train_dataset=world.data, audit=settings)
    trainer = AnatomyDPOTrainer(
        str(world.root / "model"), args=args, train_dataset=world.data, audit=replace(settings, force=True)
    )
    assert trainer.audit.info["sae"]["fit"]["verdict"] == REFUSE


def test_a_model_that_has_learned_nothing_is_no_reason_to_stop(world: World, tmp_path: Path) -> None:
    given = {"model": tiny_model("llama"), "tokenizer": world.tokenizer, "sae": SAE(tiny_sae(hook="model.layers.1"))}
    audit = run_audit(world.config(tmp_path, model="", sae=""), **given, progress=False)
    fit = audit.info["sae"]["fit"]
    assert (fit["verdict"], fit["untrained"]) == (REFUSE, True)
    assert fit["loss_lost"] is None
    assert any("no better than chance" in note for note in audit.info["notes"])
    page = (audit.path / "report.html").read_text()
    assert "no better than chance" in page
    assert "This audit was forced" not in page


def test_audits_of_earlier_versions_are_read_and_damaged_figures_told(world: World, tmp_path: Path) -> None:
    audit = run_audit(world.config(tmp_path), progress=False)
    file = audit.path / "audit.json"
    info = json.loads(file.read_text())
    earlier = {key: info["sae"]["fit"][key] for key in sae_check.SAEFit.__annotations__ if key[:4] != "loss"}
    del earlier["better_layer"], earlier["n_pairs"]
    for fit in (None, earlier):
        sae = {key: value for key, value in info["sae"].items() if key != "fit"}
        file.write_text(json.dumps({**info, "sae": sae if fit is None else {**sae, "fit": fit}}))
        page = write_report(load_audit(audit.path)).read_text()
        assert ("How well the SAE reads" in page) == (fit is not None)
    for wrong in ("fits", {**earlier, "l0": "many"}, {"verdict": "fits"}):
        file.write_text(json.dumps({**info, "sae": {**info["sae"], "fit": wrong}}))
        with pytest.raises(AnatomyError, match=r"sae\.fit.*Run the audit again"):
            load_audit(audit.path)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_the_mean_that_a_centred_sae_leaves_alone_is_not_counted_as_explained(scale: float) -> None:
    """With the mean over the width in it, the figure would go to 1 as that mean varies more, whatever the SAE does."""
    model = tiny_model("gpt2")
    with torch.no_grad():  # adds to every dimension alike: LayerNorm takes it out again, nothing else changes
        model.transformer.wte.weight += scale * torch.randn(len(model.transformer.wte.weight), 1)
    pairs = read_pairs(dataset("conversational", 6), build_tokenizer(), max_length=None)
    inner = tiny_sae(hook="blocks.1.hook_resid_post")
    with torch.no_grad():
        inner.W_dec.copy_(0.05 * inner.W_enc.T)
    sae = SAE(inner, config={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    assert sae.centred
    fit = check_fit(model, sae, pairs, 1, progress=False)
    states = []
    for i in range(len(pairs)):
        prompt, chosen, _, rejected = pairs.arrays(i)
        for side, ids in (("chosen", chosen), ("rejected", rejected)):
            both = torch.tensor([[*prompt.tolist(), *ids.tolist()]])
            h = read_layers(model, [1], input_ids=both)[1][0].double()
            h = h - h.mean(dim=1, keepdim=True)
            states.append((side, h[len(prompt) :]))
            if side == "chosen":
                states.append(("prompt", h[1 : len(prompt)]))
    mean = torch.cat([h for _, h in states]).mean(dim=0)
    for span, found in fit.variance_explained.items():
        h = torch.cat([h for name, h in states if name == span])
        error = (sae.reconstruct(h.float()).double() - h).pow(2).sum()
        assert found == pytest.approx(float(1 - error / (h - mean).pow(2).sum()), abs=1e-4)


def test_the_first_token_of_a_text_without_a_prompt_is_left_out() -> None:
    model, tokenizer = tiny_model("llama"), build_tokenizer(bos=False)
    rows = read_sft(Dataset.from_list([{"text": "Once upon a time a cat sat."}, {"text": "Why? Because."}]), tokenizer)
    fit = check_fit(model, SAE(tiny_sae()), rows, 1, progress=False)
    assert fit.n_tokens == sum(len(rows.ids(i, "chosen")) - 1 for i in range(2))
    assert fit.variance_explained["prompt"] is None


@pytest.mark.parametrize("n", [30, 100, 600])
def test_judging_costs_at_most_half_of_the_pass(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tokens that go through the model."""
    rows = [dataset("explicit", 10)[i % 10] for i in range(n)]
    pairs, model = read_pairs(Dataset.from_list(rows), build_tokenizer(), max_length=None), tiny_model("llama")
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    check_fit(model, SAE(tiny_sae()), pairs, 1, n_pairs=pairs_to_judge(n), progress=False)
    assert sum(seen) < 0.5 * pairs.packed_lengths.sum()
