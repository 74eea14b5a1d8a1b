"""Every architecture of sae-lens loads, encodes as sae-lens does, and is checked against the model."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reading_world import tiny_model, tiny_sae

from trl_anatomy.errors import AnatomyError
from trl_anatomy.ops.ablate_features import ablate_features
from trl_anatomy.reading.sae import SAE, check_sae, load_sae

ARCHITECTURES = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "transcoder")
HIDDEN = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))


def naive_encode(inner: Any, h: torch.Tensor) -> torch.Tensor:
    """The architectures' definitions, written out in float64."""
    cfg, weights = inner.cfg, {name: value.double() for name, value in inner.state_dict().items()}
    x = h.double()
    if cfg.apply_b_dec_to_input:
        x = x - weights["b_dec"]
    kind = cfg.architecture()
    if kind == "matching_pursuit":
        codes = torch.zeros(len(x), cfg.d_sae, dtype=torch.float64)
        for i, rest in enumerate(x):
            support: set[int] = set()
            for _ in range(cfg.max_iterations):
                best = int((weights["W_dec"] @ rest).argmax())
                value = (weights["W_dec"][best] @ rest).relu()
                codes[i, best] += value
                rest = rest - value * weights["W_dec"][best]
                if best in support or rest.norm() < cfg.residual_threshold:
                    break
                support.add(best)
        return codes
    pre = x @ weights["W_enc"]
    if kind == "gated":
        magnitude = pre * weights["r_mag"].exp() + weights["b_mag"]
        return (pre + weights["b_gate"] > 0) * magnitude.relu()
    pre = pre + weights["b_enc"]
    if kind == "jumprelu":
        return pre.relu() * (pre > weights["threshold"])
    if kind in ("topk", "abstopk"):
        if getattr(cfg, "rescale_acts_by_decoder_norm", False):
            pre = pre * weights["W_dec"].norm(dim=-1)
        size = pre.abs() if kind == "abstopk" else pre
        keep = torch.zeros_like(pre).scatter_(1, size.topk(cfg.k, dim=1).indices, 1.0)
        return keep * (pre if kind == "abstopk" else pre.relu())
    return pre.relu()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_loaded_saes_encode_by_their_definition(architecture: str, tmp_path: Path) -> None:
    inner = tiny_sae(architecture, hook="blocks.1.hook_resid_post")
    inner.save_model(tmp_path)
    sae = load_sae(tmp_path)
    assert (sae.d_in, sae.d_sae, sae.architecture, sae.layer) == (32, 64, architecture, 1)
    codes = sae.encode(HIDDEN)
    assert codes.dtype == torch.float32
    assert 0 < (codes != 0).float().mean() < 1
    assert (architecture == "abstopk") == bool((codes < 0).any())
    torch.testing.assert_close(codes, inner.encode(HIDDEN))
    torch.testing.assert_close(codes.double(), naive_encode(inner, HIDDEN), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.encode_features(HIDDEN, [5, 0, 63]), codes[:, [5, 0, 63]], rtol=1e-5, atol=1e-6)
    assert sae.encode_features(HIDDEN[:0], [1]).shape == (0, 1)
    assert sae.fingerprint == load_sae({"path": str(tmp_path)}).fingerprint
    assert sae.fingerprint != SAE(tiny_sae(architecture, seed=1)).fingerprint


@pytest.mark.parametrize(
    "kind", ["BatchTopK", "MatryoshkaBatchTopK", "TopK", "JumpReLU", "Standard", "Gated", "AbsTopK"]
)
@pytest.mark.parametrize("inference", [True, False])
def test_saes_saved_by_their_training_class(kind: str, inference: bool, tmp_path: Path) -> None:
    import sae_lens as sl

    extra: dict[str, Any] = {"k": 6} if "TopK" in kind else {}
    if kind.startswith("Matryoshka"):
        extra["matryoshka_widths"] = [32, 64]
    torch.manual_seed(0)
    config = getattr(sl, f"{kind}TrainingSAEConfig")(d_in=32, d_sae=64, **extra)
    training = getattr(sl, f"{kind}TrainingSAE")(config)
    if hasattr(training, "topk_threshold"):
        training.topk_threshold.fill_(0.7)
    (training.save_inference_model if inference else training.save_model)(tmp_path)
    sae = load_sae(tmp_path)
    pre = (HIDDEN - training.b_dec) @ training.W_enc + training.b_enc if kind != "Gated" else None
    codes = sae.encode(HIDDEN)
    if kind.endswith("BatchTopK"):
        assert sae.architecture == "jumprelu"
        norm = training.W_dec.norm(dim=-1)
        scaled = pre * norm if training.cfg.rescale_acts_by_decoder_norm else pre
        torch.testing.assert_close(codes, (scaled.relu() * (scaled > 0.7)).detach(), rtol=1e-4, atol=1e-5)
    else:
        reference = training.eval().encode(HIDDEN)
        reference = reference.to_dense() if reference.is_sparse else reference
        torch.testing.assert_close(codes, reference.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_normalisation_per_token_is_applied(normalization: str, tmp_path: Path) -> None:
    inner = tiny_sae("standard", normalize_activations=normalization)
    inner.save_model(tmp_path)
    x = HIDDEN.double()
    if normalization == "layer_norm":
        x = (x - x.mean(1, keepdim=True)) / ((x - x.mean(1, keepdim=True)).std(1, keepdim=True) + 1e-5)
    else:
        x = x * 32**0.5 / x.norm(dim=1, keepdim=True)
    wanted = ((x - inner.b_dec.double()) @ inner.W_enc.double() + inner.b_enc.double()).relu()
    sae = load_sae(tmp_path)
    torch.testing.assert_close(sae.encode(HIDDEN).double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.encode_features(HIDDEN, [3]).double(), wanted[:, [3]].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
def test_unfolded_normalisation_is_refused(normalization: str, tmp_path: Path) -> None:
    tiny_sae("standard", normalize_activations=normalization).save_model(tmp_path)
    with pytest.raises(AnatomyError, match=f"{normalization}.*constants that it does not carry: fold"):
        load_sae(tmp_path)


def test_a_scaling_factor_stored_beside_the_weights_is_folded(tmp_path: Path) -> None:
    inner = tiny_sae("standard", normalize_activations="expected_average_only_in")
    inner.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.5}))
    wanted = inner.encode(HIDDEN * 0.5).detach()
    torch.testing.assert_close(load_sae(tmp_path).encode(HIDDEN), wanted, rtol=1e-4, atol=1e-5)


def test_half_precision_saes_are_computed_in_float32(tmp_path: Path) -> None:
    inner = tiny_sae("topk")
    inner.to(dtype=torch.bfloat16).save_model(tmp_path)
    codes = load_sae(tmp_path).encode(HIDDEN.bfloat16())
    assert codes.dtype == torch.float32
    wanted = naive_encode(inner.to(dtype=torch.float32), HIDDEN.bfloat16().float())
    torch.testing.assert_close(codes.double(), wanted, rtol=1e-4, atol=1e-5)


def test_decoder_rows_carry_the_rescaling() -> None:
    inner = tiny_sae("topk", rescale_acts_by_decoder_norm=True)
    sae = SAE(inner)
    codes = sae.encode(HIDDEN)
    wanted = inner.decode(codes).detach() - inner.b_dec.detach()
    torch.testing.assert_close(codes @ sae.decoder_rows(range(64)), wanted, rtol=1e-4, atol=1e-5)
    plain = tiny_sae("jumprelu")
    assert torch.equal(SAE(plain).decoder_rows([7, 2]), plain.W_dec[[7, 2]])


def test_temporal_saes_are_refused(tmp_path: Path) -> None:
    from sae_lens import TemporalSAE, TemporalSAEConfig

    config = TemporalSAEConfig(d_in=32, d_sae=64, n_heads=1, bottleneck_factor=8, kval_topk=4)
    TemporalSAE(config).save_model(tmp_path)
    with pytest.raises(AnatomyError, match="'temporal', which encodes a token from the tokens before it"):
        load_sae(tmp_path)


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.3.hook_resid_pre", "model.layers.2"])
def test_the_layer_comes_from_the_hook(hook: str) -> None:
    sae, model = SAE(tiny_sae(hook=hook)), tiny_model()
    assert check_sae(sae, model) == check_sae(sae, model, 2) == 2
    with pytest.raises(AnatomyError, match=r"layer is 1, but the SAE .* the output of layer 2"):
        check_sae(sae, model, 1)


def test_saes_that_do_not_fit_the_model_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(AnatomyError, match="width 24, the model's have width 32"):
        check_sae(SAE(tiny_sae(d_in=24)), model, 1)
    with pytest.raises(AnatomyError, match="Layer 9 is out of range: the model has 4 layers"):
        check_sae(SAE(tiny_sae(hook="blocks.9.hook_resid_post")), model)
    with pytest.raises(AnatomyError, match="Layer -1 is out of range"):
        check_sae(SAE(tiny_sae()), model, -1)
    with pytest.raises(AnatomyError, match="give layer"):
        check_sae(SAE(tiny_sae()), model)
    with pytest.raises(AnatomyError, match="only the residual stream can be read"):
        check_sae(SAE(tiny_sae(hook="blocks.1.hook_mlp_out")), model, 1)
    assert check_sae(SAE(tiny_sae()), model, 3) == 3


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match=r"cfg\.json and sae_weights\.safetensors not found"):
        load_sae(tmp_path)
    with pytest.raises(AnatomyError, match="no such folder, and a release is written 'RELEASE:ID'"):
        load_sae(str(tmp_path / "nowhere"))
    with pytest.raises(AnatomyError, match="give 'path', or 'release' and 'id'"):
        load_sae({"folder": "x"})
    tiny_sae().save_model(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AnatomyError, match="cannot be read"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "crosscoder", "d_in": 2, "d_sae": 2}))
    with pytest.raises(AnatomyError, match="'crosscoder'; known"):
        load_sae(tmp_path)


def test_releases_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AnatomyError, match="knows no SAE not-a-release:layer_1"):
        load_sae("not-a-release:layer_1")
    warnings.simplefilter("ignore")
    with pytest.raises(AnatomyError, match=r"could not be fetched .*: connect once"):
        load_sae({"release": "gemma-scope-2b-pt-res-canonical", "id": "layer_12/width_16k/canonical"})


def test_nothing_in_a_folder_is_unpickled(tmp_path: Path) -> None:
    tiny_sae().save_model(tmp_path)
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "sae_weights.pt")
    with pytest.raises(AnatomyError, match=r"sae_weights\.safetensors not found"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("standard", {}), ("jumprelu", {}), ("topk", {}), ("topk", {"rescale_acts_by_decoder_norm": True})],
)
@pytest.mark.parametrize("centred", [False, True])
def test_rows_take_latents_out_as_zeroing_them_between_encode_and_decode(
    architecture: str, changes: dict[str, Any], centred: bool
) -> None:
    inner = tiny_sae(architecture, apply_b_dec_to_input=centred, **changes)
    sae, features = SAE(inner), [5, 0, 63, 17, 40, 22]
    rows, h = sae.rows(features), HIDDEN.view(4, 10, 32)
    kth = sae.kth(h)
    assert (kth is None) == (architecture != "topk")
    got = ablate_features(h, *rows, kth=kth)
    double = inner.double()
    with torch.no_grad():
        codes = double.encode(h.double())
        rest = codes.clone()
        rest[..., features] = 0
        wanted = h.double() - double.decode(codes) + double.decode(rest)
    assert (wanted - h).abs().max() > 0.1
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_exactly_the_kept_latents_reach_the_kth_value() -> None:
    inner = tiny_sae("topk", d_sae=200)
    sae = SAE(inner)
    rows, kth = sae.rows(range(200)), sae.kth(HIDDEN)
    assert kth is not None
    reached = (HIDDEN @ rows.encoder.T + rows.bias) >= kth[:, None]
    assert (reached.sum(1) == 6).all()
    every = SAE(tiny_sae("topk", d_sae=8, k=8)).kth(HIDDEN[:0])
    assert every is not None
    assert every.shape == (0,)
    whole = SAE(tiny_sae("topk", d_sae=8, k=8)).kth(HIDDEN)
    assert whole is not None
    assert (whole == -torch.inf).all()


@pytest.mark.parametrize("architecture", ["gated", "abstopk", "matching_pursuit", "transcoder"])
def test_rows_that_would_not_be_exact_are_refused(architecture: str) -> None:
    with pytest.raises(AnatomyError, match=f"'{architecture}'; latents can be taken out .* standard, jumprelu, topk"):
        SAE(tiny_sae(architecture)).rows([1])
    with pytest.raises(AnatomyError, match="scales every token by its own size"):
        SAE(tiny_sae("standard", normalize_activations="layer_norm")).rows([1])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_a_latent_taken_out_reads_0_when_encoded_again(architecture: str) -> None:
    """Where encoder and decoder rows are the same orthonormal vectors; all else in the hidden state stays."""
    inner = tiny_sae(architecture, d_sae=24)
    with torch.no_grad():
        vectors = torch.linalg.qr(torch.randn(32, 24, generator=torch.Generator().manual_seed(3)))[0].T
        inner.W_dec.copy_(vectors)
        inner.W_enc.copy_(vectors.T)
    sae, features = SAE(inner), [2, 3, 11]
    before = sae.encode(HIDDEN)
    kth = sae.kth(HIDDEN) if architecture == "topk" else None
    edited = ablate_features(HIDDEN, *sae.rows(features), kth=kth)
    after = sae.encode(edited)
    assert (before[:, features] > 0.1).any(dim=0).all()
    fired = before[:, features] > 0
    assert after[:, features][fired].max() <= 1e-5
    # What is orthogonal to the three decoder rows is as it was.
    rest = torch.eye(32) - vectors[features].T @ vectors[features]
    torch.testing.assert_close(edited @ rest, HIDDEN @ rest, rtol=1e-5, atol=1e-5)
    if architecture != "topk":  # there the places that are left free go to others
        others = [i for i in range(24) if i not in features]
        torch.testing.assert_close(after[:, others], before[:, others], rtol=1e-4, atol=1e-5)
