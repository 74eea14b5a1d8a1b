"""SAEs trained on a model's own activations: data, schedule, threshold, resumption; and the judgement of an SAE."""

import ctypes
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sae_lens
import torch
from reading_world import build_tokenizer, dataset, tiny_model
from test_restart import ended, in_a_process
from transformers import LlamaConfig, LlamaForCausalLM

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import sae_training
from trl_anatomy.reading.forward import read_layers
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.reading.sae_check import CONTINUE, FITS, REFUSE, check_fit, judge
from trl_anatomy.reading.sae_training import BATCH, SHORTEST, Sequences, recipe, rounds, sequences_of, train_saes
from trl_anatomy.reading.spans import read_pairs

TOKENS = 40 * BATCH


def texts(n: int = 60, length: int = 220, vocab: int = 330, seed: int = 1) -> Sequences:
    """Random sequences; a token is often followed by the same one."""
    next_token = np.random.default_rng(1).permutation(np.arange(3, vocab))
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        ids = [1, *rng.integers(3, vocab, 2).tolist()]
        while len(ids) < length:
            ids.append(int(next_token[ids[-1] - 3]) if rng.random() < 0.7 else int(rng.integers(3, vocab)))
        made.append(ids)
    return sequences_of(None, made, 0)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sae")
    settings = recipe(32, 150 * BATCH, d_sae=256, k=6, lr=3e-3)
    return train_saes(model, texts(), [2], settings, out, model_name="tiny", progress=False)[2], settings


def hidden_of(model, layer, seeds):
    """Seed, and the hidden states of a text drawn by it, without its first token."""
    for seed in seeds:
        ids = torch.tensor(texts(1, seed=seed).ids[0][None].astype(int))
        yield seed, read_layers(model, [layer], input_ids=ids)[layer][0, 1:]


def weights(folder):
    return {name: value.clone() for name, value in load_sae(folder)._inner.state_dict().items()}


def test_rounds_take_every_sequence_once_an_epoch_and_keep_to_the_buffer():
    lengths = np.array([5, 9, 2, 7, 7, 3, 8, 6, 4, 9])
    taken = list(islice(rounds(lengths, 20, seed=3), 12))
    assert all(lengths[batch].sum() <= 20 and batch == sorted(batch) for batch in taken)
    n = next(n for n in range(1, 12) if sum(map(len, taken[:n])) == len(lengths))
    assert sorted(i for batch in taken[:n] for i in batch) == list(range(10))
    assert taken[:n] != taken[n : 2 * n]  # another order in the next epoch
    assert taken == list(islice(rounds(lengths, 20, seed=3), 12))


def test_a_prompt_is_learned_once_and_first_tokens_never():
    pairs = read_pairs(dataset("conversational"), build_tokenizer(), max_length=None)
    found = sequences_of(pairs, [[5, 6, 7]], pairs.pad_token_id)
    prompt, chosen, rejected = (len(pairs.ids(0, span)) for span in ("prompt", "chosen", "rejected"))
    assert [len(ids) for ids in found.ids[:2]] == [prompt + chosen, prompt + rejected]
    assert found.n_learned[:2].tolist() == [prompt - 1 + chosen, rejected]
    assert found.n_learned[-1] == 2


def test_activations_are_those_of_a_plain_forward_without_first_tokens_and_outliers(model):
    sequences = texts(60)
    run = sae_training._Run(model, sequences, [1], recipe(32, TOKENS, d_sae=64, k=4), Path(), 4096, 1 << 20)
    some = sequences.select([3, 8])
    run._mean_norms[1] = 1e9
    expected = torch.cat(
        [read_layers(model, [1], input_ids=torch.tensor(ids[None].astype(int)))[1][0, 1:] for ids in some.ids]
    )
    torch.testing.assert_close(run._read(some)[1], expected, atol=1e-5, rtol=1e-5)
    norms = expected.norm(dim=1)
    run._mean_norms[1] = float(norms.median()) / sae_training.OUTLIER  # every norm above the median is an outlier
    torch.testing.assert_close(run._read(some)[1], expected[norms <= norms.median()], atol=1e-5, rtol=1e-5)


def test_a_trained_sae_explains_held_out_tokens_with_k_latents_a_token(trained):
    folder, settings = trained
    figures = json.loads((folder / "training.json").read_text())["figures"]["2"]
    assert figures["variance_explained"] > 0.6
    assert figures["l0"] == pytest.approx(settings.k, rel=0.02)
    sae = load_sae(folder)
    assert (sae.architecture, sae.layer, sae.d_sae) == ("jumprelu", 2, 256)
    assert not (folder / "state.safetensors").exists()


def test_the_threshold_lets_k_latents_fire_per_token(model):
    run = sae_training._Run(model, texts(), [2], recipe(32, TOKENS, d_sae=64, k=4), Path(), 4096, 1 << 20)
    run._mean_norms[2] = 1.0
    sae = run._trainer(2).sae
    hidden = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        threshold = float(run._smallest_kept(sae, hidden))
        acts = (hidden.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
        acts = acts * sae.W_dec.double().norm(dim=-1)
    assert threshold == pytest.approx(float(acts.clamp(min=0).flatten().sort(descending=True).values[4 * 500 - 1]))


@pytest.mark.parametrize("architecture", ["topk", "matryoshka"])
def test_other_architectures_by_name(model, tmp_path, architecture):
    settings = recipe(32, SHORTEST * BATCH, architecture=architecture, d_sae=64, k=3)
    sae = load_sae(train_saes(model, texts(), [0], settings, tmp_path, progress=False)[0])
    assert sae.architecture == {"topk": "topk", "matryoshka": "jumprelu"}[architecture]
    codes = sae.encode(torch.randn(50, 32) * 5)
    assert architecture != "topk" or int((codes > 0).sum(dim=1).max()) <= 3


def test_thresholds_of_a_jumprelu_sae_are_learned_and_let_k_latents_fire(model, tmp_path):
    settings = recipe(32, 100 * BATCH, architecture="jumprelu", d_sae=128, k=6, lr=3e-3)
    run = sae_training._Run(model, texts(), [2], settings, tmp_path / "state", 4096, 1 << 20)
    run.train(progress=False)
    assert run._l0[2] == pytest.approx(6, rel=0.2)  # the penalty alone, before thresholds are scaled
    figures = run.save(2, tmp_path / "sae", "tiny")
    assert figures["l0"] == pytest.approx(6, rel=0.01)
    assert figures["variance_explained"] > 0.6
    inner = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    assert inner.cfg.architecture() == "jumprelu"
    assert inner.threshold.std() > 0.01 * inner.threshold.mean() > 0  # each latent has its own
    others = torch.cat([hidden for _, hidden in hidden_of(model, 2, range(900, 920))])
    codes = inner.encode(others)
    torch.testing.assert_close(codes, load_sae(tmp_path / "sae").encode(others), atol=1e-4, rtol=1e-4)
    assert float((codes > 0).sum(dim=1).float().mean()) == pytest.approx(6, rel=0.1)


def test_layers_share_the_forward_passes_and_are_trained_as_alone(model, tmp_path, monkeypatch):
    settings = recipe(32, SHORTEST * BATCH, d_sae=64, k=4)
    calls = []
    real = sae_training.read_texts
    monkeypatch.setattr(sae_training, "read_texts", lambda *a, **k: calls.append(a[2]) or real(*a, **k))
    both = train_saes(model, texts(), [1, 3], settings, tmp_path / "both", progress=False)
    n_both = len(calls)
    alone = train_saes(model, texts(), [1], settings, tmp_path / "alone", progress=False)
    assert {tuple(layers) for layers in calls[:n_both]} == {(1, 3)}
    assert n_both - 2 == len(calls) - n_both - 1  # but for the held-out tokens, which each layer reads when it is saved
    a, b = weights(both[1]), weights(alone[1])
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("stop", "architecture"),
    [(3, "batchtopk"), (17, "batchtopk"), (29, "batchtopk"), (5, "jumprelu"), (23, "jumprelu"), (18, "topk")],
)
def test_an_interrupted_training_ends_in_the_same_weights(model, tmp_path, monkeypatch, stop, architecture):
    settings = recipe(32, SHORTEST * BATCH, architecture=architecture, d_sae=64, k=4)
    size = 4 * BATCH * 32 * 4 * 2  # two rounds an epoch
    whole = train_saes(model, texts(), [1], settings, tmp_path / "whole", buffer_bytes=size, progress=False)
    monkeypatch.setattr(sae_training, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(sae_training, "_SAVE_SHARE", 0)
    real, taken = sae_training._Run._step, []

    def step(self, *args):
        if len(taken) == stop:
            raise KeyboardInterrupt
        taken.append(args)
        real(self, *args)

    monkeypatch.setattr(sae_training._Run, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train_saes(model, texts(), [1], settings, tmp_path / "cut", buffer_bytes=size, progress=False)
    steps = []
    monkeypatch.setattr(sae_training._Run, "_step", lambda self, *args: steps.append(args) or real(self, *args))
    again = train_saes(model, texts(), [1], settings, tmp_path / "cut", buffer_bytes=size, progress=False)
    assert len(steps) == SHORTEST - stop
    a, b = weights(whole[1]), weights(again[1])
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps.clear()
    train_saes(model, texts(), [1], settings, tmp_path / "cut", buffer_bytes=size, progress=False)
    assert not steps  # finished: nothing is done again


def peak_of_training(folder: Path, buffer_bytes: int) -> int:
    """Bytes resident at most while two SAEs are trained in a process of its own, on more data than the buffer holds."""
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=64)).bfloat16()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 1000  # an outlier, which is left out of what was read
    rng = np.random.default_rng(0)
    sequences = sequences_of(None, [rng.integers(0, 64, 200).tolist() for _ in range(450)], 0)
    settings, sizes = recipe(256, 44 * BATCH, d_sae=32, k=4), {"batch_tokens": 1024, "buffer_bytes": buffer_bytes}

    def work() -> None:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: every buffer is memory of its own, given back when it is freed
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        train_saes(model, sequences, [0, 1], settings, folder / "sae", progress=False, **sizes)
        status = Path("/proc/self/status").read_text()
        (folder / "peak").write_text(status.split("VmHWM:")[1].split()[0])

    folder.mkdir()
    assert ended(in_a_process(work)) == 0
    return 1024 * int((folder / "peak").read_text())


def test_memory_grows_with_the_buffer_and_by_no_more(tmp_path):
    few, many = 8 << 20, 40 << 20
    grown = peak_of_training(tmp_path / "many", many) - peak_of_training(tmp_path / "few", few)
    assert 0.5 * (many - few) < grown < 1.2 * (many - few)


def test_verdicts_on_right_and_wrong_saes(model, trained, tmp_path):
    pairs = read_pairs(dataset("conversational", 40), build_tokenizer(), max_length=None)
    own = sequences_of(pairs, [], pairs.pad_token_id)
    own = sequences_of(None, [ids.tolist() for ids in own.ids] * 12, pairs.pad_token_id)
    settings = recipe(32, 200 * BATCH, d_sae=256, k=8, lr=3e-3)
    right = load_sae(train_saes(model, own, [2], settings, tmp_path / "right", progress=False)[2])
    fit = check_fit(model, right, pairs, 2)
    assert fit.verdict == FITS, fit
    assert fit.l0 == pytest.approx(8, rel=0.3)

    barely = recipe(32, SHORTEST * BATCH, d_sae=256, k=8, lr=1e-5)
    early = load_sae(train_saes(model, own, [2], barely, tmp_path / "early", progress=False)[2])
    assert check_fit(model, early, pairs, 2).verdict in (CONTINUE, REFUSE)
    assert check_fit(tiny_model("llama", seed=5), right, pairs, 2).verdict == REFUSE  # another model of the same width
    assert check_fit(model, right, pairs, 0).verdict == REFUSE  # another layer
    right._inner.W_dec.data = right._inner.W_dec.data.roll(1, dims=0)
    assert check_fit(model, right, pairs, 2).verdict == REFUSE  # decoder rows of other latents


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_going_on_from_an_sae_starts_at_its_reconstruction(model, trained, architecture):
    init = load_sae(trained[0])
    settings = recipe(32, SHORTEST * BATCH, architecture=architecture, d_sae=256, k=6, lr=1e-4)
    run = sae_training._Run(model, texts(), [2], settings, Path(), 4096, 1 << 20, init)
    hidden = run._read(texts().select([0, 1]))
    run._begin(hidden)
    scale = run._scale(2)
    sae = run._trainers[2].sae
    codes = init.encode(hidden[2])
    with torch.no_grad():
        pre = sae.process_sae_in(hidden[2] * scale) @ sae.W_enc + sae.b_enc
        # Where a latent fires, its activation, and so what is decoded of the same codes.
        norms = init.decoder_rows(range(256)).norm(dim=1) * (scale if architecture == "jumprelu" else 1.0)
        torch.testing.assert_close(pre[codes > 0], (codes * norms)[codes > 0], atol=1e-3, rtol=1e-3)
        if architecture == "jumprelu":
            torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(256))
            assert ((sae.encode(hidden[2] * scale) > 0) == (codes > 0)).float().mean() > 0.9999
        made = (pre * (codes > 0)) @ sae.W_dec / scale + sae.b_dec / scale
    torch.testing.assert_close(made, init.reconstruct(hidden[2]), atol=2e-3, rtol=1e-3)


def test_an_sae_of_the_base_model_fits_a_changed_model_after_going_on(model, trained, tmp_path):
    changed = tiny_model("llama")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in changed.model.layers[:3]:
            for weight in layer.parameters():
                weight.add_(
                    0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
                ) if weight.ndim > 1 else None
    settings = recipe(32, 60 * BATCH, d_sae=256, k=6, lr=1e-3)
    init = load_sae(trained[0])
    out = train_saes(changed, texts(), [2], settings, tmp_path, init=init, progress=False)[2]
    figures = json.loads((out / "training.json").read_text())["figures"]["2"]
    hidden = torch.cat(
        [read_layers(changed, [2], input_ids=torch.tensor(ids[None].astype(int)))[2][0, 1:] for ids in texts().ids[:20]]
    )

    def left(sae):
        return float((sae.reconstruct(hidden) - hidden).pow(2).sum() / (hidden - hidden.mean(0)).pow(2).sum())

    assert left(load_sae(out)) < left(init)
    table = pq.read_table(out / "latents.parquet")
    before, after = (sae.decoder_rows(range(256)).double() for sae in (init, load_sae(out)))
    expected = (before * after).sum(dim=1) / before.norm(dim=1) / after.norm(dim=1)
    np.testing.assert_allclose(table["cosine"].to_numpy(), expected.numpy(), atol=1e-5)
    assert figures["kept_latents"] == pytest.approx(float((expected > 0.9).double().mean()))
    assert figures["kept_latents"] > 0.5


def test_the_figures_of_a_check_are_those_of_a_plain_forward(model, trained):
    folder, _ = trained
    sae = load_sae(folder)
    pairs = read_pairs(dataset("conversational", 6), build_tokenizer(), max_length=None)
    fit = check_fit(model, sae, pairs, 2)
    parts = {"prompt": [], "chosen": [], "rejected": []}
    for i in range(len(pairs)):
        prompt, chosen, _, rejected = pairs.arrays(i)
        for side, ids in (("chosen", chosen), ("rejected", rejected)):
            both = torch.tensor(np.concatenate([prompt, ids]).astype(int))[None]
            h = read_layers(model, [2], input_ids=both)[2][0].double()
            parts[side].append(h[len(prompt) :])
            if side == "chosen":
                parts["prompt"].append(h[1 : len(prompt)])
    states = {span: torch.cat(rows) for span, rows in parts.items()}
    mean = torch.cat(list(states.values())).mean(dim=0)
    for span, h in states.items():
        error = (sae.reconstruct(h.float()).double() - h).pow(2).sum()
        assert fit.variance_explained[span] == pytest.approx(float(1 - error / (h - mean).pow(2).sum()), abs=1e-5)


@pytest.mark.parametrize(
    ("explained", "lost", "l0", "card", "silent", "verdict"),
    [
        (0.8, 0.05, 32, 32, 0.1, FITS),
        (0.8, None, 32, None, 0.1, FITS),
        (0.6, 0.05, 32, 32, 0.1, CONTINUE),
        (0.8, 0.3, 32, 32, 0.1, CONTINUE),
        (0.8, 0.05, 120, 32, 0.1, CONTINUE),
        (0.8, 0.05, 32, 32, 0.95, CONTINUE),
        (0.3, 0.05, 32, 32, 0.1, REFUSE),
        (0.8, 0.6, 32, 32, 0.1, REFUSE),
        (float("nan"), 0.05, 32, 32, 0.1, REFUSE),
    ],
)
def test_verdicts_by_threshold(explained, lost, l0, card, silent, verdict):
    assert judge({"prompt": None, "chosen": explained, "rejected": explained}, lost, l0, card, silent)[0] == verdict


def test_bad_input_ends_in_one_sentence(model, tmp_path):
    good = recipe(32, SHORTEST * BATCH, d_sae=64, k=4)
    for call, told in (
        (lambda: train_saes(model, texts(), [9], good, tmp_path / "a", progress=False), "Layer 9 is out of range"),
        (lambda: recipe(32, TOKENS, d_sae=16, k=17), "k is 17"),
        (lambda: recipe(32, TOKENS, d_sae=-3), "number of latents is -3"),
        (lambda: recipe(32, TOKENS, architecture="matryoshka", d_sae=15), "matryoshka needs 16 or more"),
        (lambda: recipe(32, TOKENS, lr=float("nan")), "lr is nan"),
        (lambda: recipe(32, 500), "needs 32 at least"),
        (lambda: recipe(32, TOKENS, architecture="gated"), "allowed: batchtopk, topk, jumprelu, matryoshka"),
        (lambda: sequences_of(None, [[4]], 0), "no token to train an SAE on"),
        (lambda: train_saes(model, texts(2), [1], good, tmp_path / "b", progress=False), "tokens to train an SAE on"),
    ):
        with pytest.raises(AnatomyError, match=told) as raised:
            call()
        assert "\n" not in str(raised.value)
    # What was refused leaves the folder free.
    train_saes(model, texts(), [1], good, tmp_path / "b", progress=False)
    train_saes(model, texts(), [1], good, tmp_path / "c", progress=False)
    with pytest.raises(AnatomyError, match=r"another training of an SAE \(recipe differ\)"):
        train_saes(model, texts(), [1], recipe(32, TOKENS, d_sae=64, k=4), tmp_path / "c", progress=False)
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(AnatomyError, match="activations of layer 1 are not finite"):
        train_saes(broken, texts(), [1], good, tmp_path / "d", progress=False)
