"""An SAE trained on a centred stream reads and edits that stream: against models with centred weights, in float64."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae
from sae_lens.saes.sae import SAEMetadata
from test_sae import naive_encode
from torch import Tensor
from torch.func import functional_call

from trl_anatomy.errors import AnatomyError
from trl_anatomy.ops.project_out import project_out
from trl_anatomy.reading.forward import read_spans
from trl_anatomy.reading.locate import layer_module
from trl_anatomy.reading.removal import Removal, attach_edits, output_hook, save_edits
from trl_anatomy.reading.sae import SAE, check_sae, load_sae
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.reading.spans import read_pairs

LAYER = 1
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": True, "dtype": "float32"}}
IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(0))
FEATURES = [3, 11, 20, 41]


def uncentred(family: str) -> Any:
    """A float64 model whose stream has a mean over the width, its head not tied to its embeddings."""
    model = tiny_model(family).double()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        model.get_input_embeddings().weight += 0.7
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def centred_weights(model: Any) -> dict[str, Tensor]:
    """The model's parameters, those that write the stream without their mean over the width."""
    made = {}
    for name, parameter in model.named_parameters():
        width = None
        if re.search(r"(wte|wpe|embed_in)\.weight$|c_proj\.(weight|bias)$|(dense|dense_4h_to_h)\.bias$", name):
            width = -1
        elif re.search(r"(dense|dense_4h_to_h)\.weight$", name):
            width = 0
        made[name] = parameter if width is None else parameter - parameter.mean(dim=width, keepdim=True)
    return made


def centred_sae(architecture: str, card: dict[str, Any] = CENTRED, **changes: Any) -> Any:
    inner = tiny_sae(architecture, hook=f"blocks.{LAYER}.hook_resid_post", **changes)
    for key, value in card.items():
        inner.cfg.metadata[key] = value
    return inner


def stream(model: Any, weights: dict[str, Tensor] | None = None) -> Tensor:
    """(rows, tokens, d) output of the layer."""
    kept: list[Tensor] = []
    handle = layer_module(model, LAYER).register_forward_hook(output_hook(lambda h: kept.append(h) or h))
    try:
        functional_call(model, weights or {}, (IDS,))
    finally:
        handle.remove()
    return kept[0].detach()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_what_is_read_is_what_the_centred_model_gives(family: str, architecture: str, tmp_path: Path) -> None:
    model = uncentred(family)
    plain, wanted = stream(model), stream(model, centred_weights(model))
    assert plain.mean(-1).abs().min() > 0.05
    torch.testing.assert_close(wanted.mean(-1), torch.zeros(wanted.shape[:-1], dtype=wanted.dtype))
    inner = centred_sae(architecture)
    inner.save_model(tmp_path)
    sae = load_sae(tmp_path)
    assert sae.centred
    assert check_sae(sae, model) == LAYER
    codes = naive_encode(inner, wanted.flatten(0, 1)).detach()
    assert ((naive_encode(inner, plain.flatten(0, 1)) > 0) != (codes > 0)).float().mean() > 0.02
    h = plain.flatten(0, 1).float()
    torch.testing.assert_close(sae.encode(h).double(), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.encode_features(h, FEATURES).double(), codes[:, FEATURES], rtol=1e-4, atol=1e-5)
    maximum, count = sae.pool_spans(h, [0, 5, 5, 36], 1 << 20)
    torch.testing.assert_close(maximum[2].double(), codes[5:].amax(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(count[0], (codes[:5] > 0).sum(0).int())
    scores = FeaturesScorer(sae, FEATURES).score_tokens(h)
    torch.testing.assert_close(scores.double(), codes[:, FEATURES].sum(1), rtol=1e-4, atol=1e-5)


def edits(kind: str, sae: SAE, inner: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What the package does to the plain stream, and what is meant on the centred one."""
    weights = {name: value.detach().double() for name, value in inner.named_parameters()}
    row = weights["W_dec"][FEATURES]
    row = row - row.mean(1, keepdim=True)
    if kind == "project":
        basis = torch.linalg.qr(row.T)[0].T
        rows = FeaturesScorer(sae, FEATURES).directions()
        ours = torch.linalg.qr(rows.T)[0].T
        return lambda h: project_out(h, ours), lambda h: h - h @ basis.T @ basis
    if kind == "steer":
        unit = row.sum(0) / row.sum(0).norm()
        ours = FeaturesScorer(sae, FEATURES).unit_direction()
        return lambda h: h + 3 * ours.to(h.dtype), lambda h: h + 3 * unit
    rows = sae.rows(FEATURES)
    removal = Removal(rows, sae if sae.architecture == "topk" else None, FEATURES)

    def meant(h: Tensor) -> Tensor:
        fires = naive_encode(inner, h.detach().flatten(0, 1)).view(*h.shape[:-1], -1) > 0
        pre = (h - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        kept = (pre * fires)[..., FEATURES]
        assert kept.abs().sum() > 1
        return h - kept @ weights["W_dec"][FEATURES]

    return removal.ablate, meant


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "project", "steer"])
def test_logits_and_gradients_of_edits_are_those_of_the_centred_model(family: str, kind: str) -> None:
    model = uncentred(family)
    inner = centred_sae(kind if kind in ("standard", "jumprelu", "topk") else "standard")
    ours, meant = edits(kind, SAE(inner), inner)

    def read(weights: dict[str, Tensor], edit: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        handle = layer_module(model, LAYER).register_forward_hook(output_hook(edit)) if edit is not None else None
        logits = functional_call(model, weights, (IDS,)).logits
        if handle is not None:
            handle.remove()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        return logits.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    got, wanted, unedited = read({}, ours), read(centred_weights(model), meant), read({}, None)
    assert (unedited[0] - wanted[0]).abs().max() > 0.05
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_kept_edits_of_a_topk_sae_are_attached_as_they_were(tmp_path: Path) -> None:
    model = uncentred("gpt2")
    centred_sae("topk").save_model(tmp_path / "sae")
    sae = load_sae(tmp_path / "sae")
    removal = Removal(sae.rows(FEATURES), sae, FEATURES)
    handle = layer_module(model, LAYER).register_forward_hook(output_hook(removal.ablate))
    wanted = model(IDS).logits
    handle.remove()
    save_edits({LAYER: removal}, tmp_path)
    attach_edits(model, tmp_path)
    assert torch.equal(model(IDS).logits, wanted)


def test_spans_of_pairs_are_read_centred() -> None:
    tokenizer = build_tokenizer()
    model = uncentred("gpt2").float()
    pairs = read_pairs(dataset(), tokenizer)
    read = read_spans(model, pairs, [0, 1, 2], [LAYER])
    h = read.hidden[LAYER]
    inner = centred_sae("jumprelu")
    maximum, _ = SAE(inner).pool_spans(h, read.bounds, 1 << 20)
    codes = naive_encode(inner, (h - h.mean(-1, keepdim=True)).double())
    wanted = torch.stack([codes[a:b].amax(0) for a, b in zip(read.bounds, read.bounds[1:], strict=False)])
    torch.testing.assert_close(maximum.double(), wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_model_with_rms_norm_has_no_centred_stream(family: str) -> None:
    with pytest.raises(AnatomyError, match=r"says center_writing_weights.*RMSNorm: use an SAE of this model"):
        check_sae(SAE(centred_sae("topk")), tiny_model(family))


HARMLESS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "no arguments": {"model_from_pretrained_kwargs": None},
    "written out": {"model_from_pretrained_kwargs": {"center_writing_weights": False}},
    "equal functions": {
        "model_from_pretrained_kwargs": {
            "fold_ln": True,
            "center_unembed": True,
            "fold_value_biases": True,
            "refactor_factored_attn_matrices": True,
        }
    },
    "other keys": {
        "context_size": 128,
        "seqpos_slice": [None],
        "dataset_path": "a/b",
        "prepend_bos": True,
        "hook_head_index": None,
        "training_architecture_details": {"lp_norm": 1.0},
        "author": "somebody",
        "finetuning_scaling_factor": False,
        "wandb_project": "a",
        "max_grad_norm": 1.0,
        "transformer_lens_version": "2.0",
        "mse_loss_normalization": "dense_batch",
        "scale_sparsity_penalty_by_decoder_norm": True,
        "activation_fn": "relu",
        "activation_fn_kwargs": {"k": 3},
        "act_store_device": "cpu",
    },
}


@pytest.mark.parametrize("name", list(HARMLESS))
def test_what_changes_nothing_is_read_as_before(name: str, tmp_path: Path) -> None:
    centred_sae("jumprelu", HARMLESS[name]).save_model(tmp_path)
    sae = load_sae(tmp_path)
    assert not sae.centred
    assert sae.fingerprint == SAE(tiny_sae("jumprelu")).fingerprint
    for family in ("llama", "gpt2"):
        assert check_sae(sae, tiny_model(family)) == LAYER


def test_another_stream_is_another_fingerprint() -> None:
    assert SAE(centred_sae("topk")).fingerprint != SAE(tiny_sae("topk")).fingerprint


@pytest.mark.parametrize(
    ("card", "key"),
    [
        (
            {"model_from_pretrained_kwargs": {"subtract_positional_mean": True}},
            "model_from_pretrained_kwargs.subtract_p",
        ),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": "yes"}}, "kwargs.center_writing_weights: 'yes'"),
        ({"model_from_pretrained_kwargs": "all"}, "model_from_pretrained_kwargs: 'all'"),
        ({"hook_head_index": 0}, "hook_head_index: '0'"),
        ({"norm_scaling_factor": 2.0}, "norm_scaling_factor: '2.0'"),
        ({"resid_mean": [0.1]}, "resid_mean: "),
        ({"rescale_input": True}, "rescale_input: 'True'"),
        ({"activation_scale": 11.3}, "activation_scale: '11.3'"),
        ({"apply_to": "ln_final"}, "apply_to: 'ln_final'"),
        ({"input_mean": [0.1, 0.2]}, "input_mean: "),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor: 'True'"),
    ],
)
def test_other_preprocessing_is_refused_by_its_key(card: dict[str, Any], key: str, tmp_path: Path) -> None:
    centred_sae("standard", card).save_model(tmp_path)
    with pytest.raises(AnatomyError, match=f"{re.escape(key)}.*preprocessing.*not known here: fold it"):
        load_sae(tmp_path)


def test_a_key_beside_those_that_sae_lens_keeps_is_refused_too(tmp_path: Path) -> None:
    import json

    tiny_sae("standard", hook="blocks.1.hook_resid_post").save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"activation_scaling_factor": 0.3}))
    with pytest.raises(AnatomyError, match=r"activation_scaling_factor: '0.3'"):
        load_sae(tmp_path)


def test_the_public_release_of_gpt2_says_so() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry: Any = get_pretrained_saes_directory()["gpt2-small-res-jb"]
    inner = tiny_sae("standard")
    inner.cfg.metadata = SAEMetadata(hook_name="blocks.8.hook_resid_pre", **entry.config_overrides)
    assert SAE(inner).centred
