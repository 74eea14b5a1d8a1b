"""ablate_features and project_out: loss and gradient of both trainers against an explicit forward in float64."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_world import make_audit, make_world
from conftest import build_tokenizer, preference_rows
from datasets import Dataset
from explicit_dpo import EPSILON, TAU, dpo, lora
from hidden_world import (
    DIRECTIONS,
    FEATURES,
    D,
    assert_step,
    conversations,
    dpo_loss,
    on_rows,
    policy,
    reward,
    reward_loss,
    rule,
    stepped,
    vector,
    without_features,
    without_span,
    write_concepts,
)
from peft import LoraConfig
from reading_world import FAMILIES, tiny_model, tiny_sae
from torch import Tensor
from transformers import AutoModelForCausalLM

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.fingerprint import layer_fingerprint, layer_weights
from trl_anatomy.reading.locate import hidden_size, layer_module, residual_dimension
from trl_anatomy.reading.removal import Removal
from trl_anatomy.reading.sae import SAE, load_sae
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.hidden import GradientProjection, Projection, Steering, orthonormal
from trl_anatomy.shaping.plan import plan_report
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import settle_policy
from trl_anatomy.trainers.hidden import HiddenEdits, projected_parameters
from trl_anatomy.trainers.loss_support import LOSSES
from trl_anatomy.trainers.seams import START, STEERING

ALL_OF_F = dict.fromkeys(FEATURES["f"], 1.0)


def at(wanted: int, edit: Any) -> Any:
    return lambda layer, h: edit(h) if layer == wanted else h


# name -> (rules, architecture of the SAE, the edit)
CASES: dict[str, tuple[list[dict[str, Any]], str, Any]] = {
    "ablate": ([rule("f", "ablate_features")], "jumprelu", at(0, lambda h: without_features(h, ALL_OF_F))),
    "ablate, standard": (
        [rule("f", "ablate_features")],
        "standard",
        at(0, lambda h: without_features(h, ALL_OF_F, "standard")),
    ),
    "ablate, topk": ([rule("f", "ablate_features")], "topk", at(0, lambda h: without_features(h, ALL_OF_F, "topk"))),
    "ablate, two rules on one latent": (
        [rule("f", "ablate_features"), rule("g", "ablate_features", strength=0.25)],
        "jumprelu",
        at(0, lambda h: without_features(h, {**ALL_OF_F, 5: 0.25})),
    ),
    "project": ([rule("w", "project_out")], "jumprelu", at(1, lambda h: without_span(h, "w"))),
    "project, the span of two": (
        [rule("v", "project_out"), rule("u", "project_out")],
        "jumprelu",
        at(0, lambda h: without_span(h, "v", "u")),
    ),
    "all at one layer, in an order of their own": (
        [
            rule("v", "project_out"),
            rule("u", "steer", strength=2.0, side="both"),
            rule("f", "ablate_features", strength=0.5),
        ],
        "jumprelu",
        at(0, lambda h: without_span(without_features(h, dict.fromkeys(FEATURES["f"], 0.5)) + 2.0 * vector(3), "v")),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_dpo(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rules, architecture, edit = CASES[name]
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        preference_rows(6),
        policy=policy(tmp_path, *rules, architecture=architecture),
        dtype=torch.float64,
        other_reference=True,
    )

    def expected(batch: dict[str, Any]) -> Tensor:
        assert abs(dpo_loss(trainer, batch, edit) - dpo_loss(trainer, batch, None)) > 1e-3
        return dpo_loss(trainer, batch, edit)

    assert_step(trainer, expected)


@pytest.mark.parametrize("name", list(CASES))
def test_reward(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rules, architecture, edit = CASES[name]
    trainer = reward(tiny_model_dir, tmp_path, preference_rows(6), policy(tmp_path, *rules, architecture=architecture))

    def expected(batch: dict[str, Any]) -> Tensor:
        assert abs(reward_loss(trainer, batch, edit) - reward_loss(trainer, batch, None)) > 1e-4
        return reward_loss(trainer, batch, edit)

    assert_step(trainer, expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"peft_config": lora()},
    "lora, precomputed": {"peft_config": lora(), "precompute_ref_log_probs": True},
    "lora, checkpointing, reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "peft_config": lora()},
    "checkpointing, reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "other_reference": True},
    "checkpointing, not reentrant": {
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "other_reference": True,
    },
    **{name: {"loss_type": name, "other_reference": True} for name in LOSSES if not name.startswith("aot")},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_gates_under_options(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Three gated rules: some rows with one edit, some with another, some with both, some with none."""
    rows = conversations(8)
    gates = {"v": {"column": "topic", "equals": "x"}, "f": {"prompt": "w6"}, "u": {"prompt": "w1 w2 w3"}}
    rules = [
        rule("v", "project_out", where=gates["v"]),
        rule("f", "ablate_features", where=gates["f"]),
        rule("u", "project_out", where=gates["u"]),
    ]
    loss_type = OPTIONS[name].get("loss_type", "sigmoid")
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        rows,
        policy=policy(tmp_path, *rules),
        dtype=torch.float64,
        gradient_checkpointing="checkpointing" in name,
        label_smoothing=EPSILON if loss_type in ("exo_pair", "robust") else 0.0,
        discopop_tau=TAU,
        **OPTIONS[name],
    )
    texts = [" ".join(message["content"] for message in row["prompt"]) for row in rows]
    acts = {
        "v": torch.tensor([row["topic"] == "x" for row in rows] * 2),
        "f": torch.tensor(["w6" in text for text in texts] * 2),
        "u": torch.tensor(["w1 w2 w3" in text for text in texts] * 2),
    }
    assert len({tuple(bool(a[i]) for a in acts.values()) for i in range(8)}) > 3

    def edit(layer: int, h: Tensor) -> Tensor:
        if layer:
            return h
        h = on_rows(acts["f"], without_features(h, ALL_OF_F), h)
        only_v, only_u = acts["v"] & ~acts["u"], acts["u"] & ~acts["v"]
        projected = on_rows(only_v, without_span(h, "v"), on_rows(only_u, without_span(h, "u"), h))
        return on_rows(acts["v"] & acts["u"], without_span(h, "v", "u"), projected)

    assert_step(
        trainer, lambda batch: dpo_loss(trainer, batch, edit, loss_type), atol=1e-5 if name == "discopop" else 1e-6
    )


# --- from the gradient ---


def projected(gradient: Tensor, dimension: int, *names: str) -> Tensor:
    return without_span(gradient.T, *names).T if dimension == 0 else without_span(gradient, *names)


GRADIENTS: dict[str, tuple[dict[str, Any], str, dict[str, int]]] = {
    "writers": (
        {"other_reference": True},
        r"layers\.1\..*(o_proj|down_proj)",
        {"model.layers.1.self_attn.o_proj.weight": 0, "model.layers.1.mlp.down_proj.weight": 0},
    ),
    "readers, norms left alone": (
        {"other_reference": True, "gradient_checkpointing": True},
        r"layers\.0\.(self_attn\.q|mlp\.up|input_layernorm)|lm_head|embed",
        {
            "model.layers.0.self_attn.q_proj.weight": 1,
            "model.layers.0.mlp.up_proj.weight": 1,
            "lm_head.weight": 1,
            "model.embed_tokens.weight": 1,
        },
    ),
    "lora": (
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)},
        r"layers\.1\.",
        {
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight": 1,
            "base_model.model.model.layers.1.self_attn.o_proj.lora_B.default.weight": 0,
        },
    ),
}


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_gradient_projection(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options, weights, dimensions = GRADIENTS[name]
    rules = [rule(c, "project_out", **{"from": "gradient", "weights": weights}) for c in ("v", "u")]
    trainer = dpo(
        tiny_model_dir, tmp_path, preference_rows(6), policy=policy(tmp_path, *rules), dtype=torch.float64, **options
    )

    def change(parameter: str, gradient: Tensor) -> Tensor:
        if parameter not in dimensions:
            return gradient
        changed = projected(gradient, dimensions[parameter], "v", "u")
        assert (changed - gradient).norm() > 1e-3 * gradient.norm()
        return changed

    assert_step(trainer, lambda batch: dpo_loss(trainer, batch, None), change)


def test_gradient_projection_of_a_reward_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    rules = [rule("v", "project_out", **{"from": "gradient", "weights": "down_proj|score"})]
    trainer = reward(tiny_model_dir, tmp_path, preference_rows(6), policy(tmp_path, *rules))
    sides = {"down_proj.weight": 0, "score.weight": 1}

    def change(parameter: str, gradient: Tensor) -> Tensor:
        side = next((side for end, side in sides.items() if parameter.endswith(end)), None)
        return gradient if side is None else projected(gradient, side, "v")

    assert_step(trainer, lambda batch: reward_loss(trainer, batch, None), change)


def test_under_sgd_the_weights_stay_where_they_were_along_the_span(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Exact over accumulation and clipping; only an optimizer that scales each number by itself can bring it back."""
    rules = [rule("v", "project_out", **{"from": "gradient", "weights": "down_proj"})]
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        preference_rows(12),
        policy=policy(tmp_path, *rules),
        dtype=torch.float64,
        optim="sgd",
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1.0,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}
    for name in [name for name in moved if "down_proj" in name]:
        assert (vector(1) @ moved[name]).norm() < 1e-6 * moved[name].norm()
    assert (vector(1) @ moved["model.layers.0.self_attn.o_proj.weight"]).norm() > 1e-3
    assert not any(p._backward_hooks for p in trainer.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_side_of_every_weight(family: str) -> None:
    """By changing the stream: what a layer reads moves with it; what it writes is what its output can show."""
    model = tiny_model(family)
    width, met = hidden_size(model), 0
    for name, parameter in model.named_parameters():
        dimension = residual_dimension(name)
        if dimension is None:
            assert parameter.dim() < 2, name
            continue
        assert parameter.shape[dimension] == width, name
        met += 1
        if name.endswith("bias") or "emb" in name or "wte" in name or "wpe" in name or "head" in name:
            continue
        # A writer with one input: its output is that column (or row), which lies along dimension `dimension`
        module = model.get_submodule(name.rpartition(".")[0])
        rows = parameter.shape[1 - dimension]
        if re.search(r"o_proj|down_proj|c_proj|dense$|dense_4h_to_h", module_name(name)):
            out = module(torch.eye(rows)) - module(torch.zeros(1, rows))
            torch.testing.assert_close(out, parameter.movedim(dimension, 1).detach())
        else:
            out = module(torch.eye(width)) - module(torch.zeros(1, width))
            torch.testing.assert_close(out, parameter.movedim(dimension, 0).detach())
    assert met >= 4 * 4


def module_name(parameter: str) -> str:
    return parameter.split(".")[-2]


# --- what is left ---


def test_nothing_is_left_along_the_span() -> None:
    h = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    span = torch.stack([vector(DIRECTIONS[name][0]) for name in ("v", "u", "w")])
    removal = Removal(basis=orthonormal(span).float())
    left = removal.project(h).double() @ span.T
    assert left.norm(dim=1).max() < 1e-5 * h.norm(dim=1).min()
    assert len(orthonormal(torch.cat([span, span[:1] + span[1:2]]))) == 3  # a rank, not a count


def test_an_ablated_latent_reads_0_where_the_sae_allows_it() -> None:
    """Orthonormal decoder rows that are also the encoder's: nothing else can set the latent off again."""
    inner = tiny_sae("jumprelu", d_in=D, d_sae=D)
    rows = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    inner.W_dec.data, inner.W_enc.data = rows, rows.T.contiguous()
    inner.b_enc.data.zero_()
    inner.b_dec.data.zero_()
    sae = SAE(inner)
    h = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    assert (sae.encode_features(h, [2, 5]) > 0).any()
    after = Removal(rows=sae.rows([2, 5])).ablate(h)
    assert sae.encode_features(after, [2, 5]).abs().max() < 1e-6
    others = [i for i in range(D) if i not in (2, 5)]
    torch.testing.assert_close(sae.encode_features(after, others), sae.encode_features(h, others))
    across = torch.eye(D) - rows[[2, 5]].T @ rows[[2, 5]]
    torch.testing.assert_close(after @ across, h @ across, rtol=1e-5, atol=1e-6)


# --- refused ---

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "keep in DPO": (rule("v", "project_out", keep=True), {}, "keep: true, which is for reward models"),
    "compiled": (rule("v", "steer", strength=1.0), {"torch_compile": True}, "torch_compile is set together with steer"),
    "amplify ablation": (rule("f", "ablate_features", "amplify"), {}, "found amplify with ablate_features"),
    "amplify projection": (rule("v", "project_out", "amplify"), {}, "found amplify with project_out"),
    "text": (rule("t", "steer", strength=1.0), {}, "'text', allowed with steer: features, direction"),
    "direction": (rule("v", "ablate_features"), {}, "'direction', allowed with ablate_features: features"),
    "no strength": (rule("v", "steer"), {}, "found no key 'strength'"),
    "strength above 1": (rule("f", "ablate_features", strength=1.5), {}, "a number above 0 and at most 1"),
    "gate and keep": (rule("v", "project_out", keep=True, where={"prompt": "a"}), {}, "found keep with a gate"),
    "weights without from": (rule("v", "project_out", weights="o_proj"), {}, "from: hidden with weights"),
    "from without weights": (rule("v", "project_out", **{"from": "gradient"}), {}, "from: gradient without weights"),
    "gate and gradient": (
        rule("v", "project_out", **{"from": "gradient", "weights": "o_proj", "where": {"prompt": "a"}}),
        {},
        "found where with from: gradient",
    ),
    "no weight": (
        rule("v", "project_out", **{"from": "gradient", "weights": "layernorm"}),
        {},
        "weights 'layernorm' finds 4 of the 21 trainable parameters, and none of them reads or writes the residual",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    refused, options, sentence = REFUSED[name]
    with pytest.raises(AnatomyError, match=re.escape(sentence)):
        dpo(tiny_model_dir, tmp_path, preference_rows(6), policy=policy(tmp_path, refused), **options)


def test_refused_with_prompt_learning(tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(AnatomyError, match="peft_config is a prompt-learning one together with project_out"):
        dpo(
            tiny_model_dir,
            tmp_path,
            preference_rows(6),
            policy=policy(tmp_path, rule("v", "project_out")),
            peft_config=virtual,
        )


def test_refused_sae_and_span(tiny_model_dir: Path, tmp_path: Path) -> None:
    concepts = policy(tmp_path, architecture="gated")["concepts"]
    wide = {**concepts["f"], "features": list(range(40))}
    rules = [rule("f", "ablate_features"), rule("wide", "project_out")]
    with pytest.raises(AnatomyError) as error:
        dpo(
            tiny_model_dir,
            tmp_path,
            preference_rows(6),
            policy={"version": 1, "concepts": {**concepts, "wide": wide}, "rules": rules},
        )
    assert re.search(r"rules\[0\]: The SAE .* 'gated'; latents can be taken out", str(error.value))
    assert "rules[1]: the 40 directions of 'wide' span all 16 dimensions" in str(error.value)


@pytest.mark.parametrize("kind", ["stored", "cluster"])
def test_a_concept_of_another_model_is_refused(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Also where no score of it is read: edits along what another model means by it would be noise."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    concepts = write_concepts(tmp_path)

    def of(said: dict[str, str | None]) -> dict[str, Any]:
        """A policy whose concept says of which weights it is."""
        if kind == "stored":
            DirectionScorer(vector(1), 0, card={"model_fingerprint": said["stored"]}).save(tmp_path / "v")
            return {"concepts": {"x": concepts["v"]}, "rules": [rule("x", "project_out")]}
        audit = make_audit(tmp_path / "audit", make_world(600))
        tiny_sae(d_in=D, d_sae=audit.info["sae"]["d_sae"], hook="model.layers.0").save_model(tmp_path / "wide")
        sae = load_sae(tmp_path / "wide")
        audit.info["sae"] |= {"source": sae.source, "fingerprint": sae.fingerprint, "layer": 0}
        audit.info["model"]["layer_weights"] = said["cluster"]
        (audit.path / "audit.json").write_text(json.dumps(audit.info))
        cluster = {"scorer": "features", "audit": str(audit.path), "cluster": "T1"}
        return {"concepts": {"x": cluster}, "rules": [rule("x", "ablate_features")]}

    other = "0" * 32
    with pytest.raises(AnatomyError, match=r"another model|the audit read models/start, and the weights"):
        dpo(tiny_model_dir, tmp_path / "out", preference_rows(6), policy=of({"stored": other, "cluster": other}))
    own = of({"stored": layer_fingerprint(model, 0), "cluster": layer_weights(model, 0)})
    dpo(tiny_model_dir, tmp_path / "out", preference_rows(6), policy=own, peft_config=lora())


def test_one_sae_per_layer(tiny_model_dir: Path, tmp_path: Path) -> None:
    concepts = policy(tmp_path)["concepts"]
    (tmp_path / "two").mkdir()
    tiny_sae("standard", d_in=D, d_sae=48, hook="blocks.0.hook_resid_post").save_model(tmp_path / "two" / "sae")
    other = {**concepts["g"], "sae": {"path": str(tmp_path / "two" / "sae")}}
    rules = [rule("f", "ablate_features"), rule("other", "ablate_features")]
    with pytest.raises(AnatomyError, match=r"rules\[1\]: found a second SAE at layer 0"):
        dpo(
            tiny_model_dir,
            tmp_path,
            preference_rows(6),
            policy={"version": 1, "concepts": {**concepts, "other": other}, "rules": rules},
        )


def test_fsdp_is_refused_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from trl_anatomy.shaping.interventions import ProjectOut
    from trl_anatomy.trainers.hidden import check_hidden

    gradient = ProjectOut("v", "explain_away", from_="gradient", weights="o_proj")
    fsdp = SimpleNamespace(torch_compile=False, fsdp="full_shard")
    with pytest.raises(AnatomyError, match="cannot act under FSDP"):
        check_hidden([gradient], fsdp, None)
    check_hidden([ProjectOut("v", "explain_away")], fsdp, None)
    check_hidden([gradient], SimpleNamespace(torch_compile=False), None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what accelerate's launcher sets; the config says nothing then
    with pytest.raises(AnatomyError, match="cannot act under FSDP"):
        check_hidden([gradient], SimpleNamespace(torch_compile=False), None)


def test_parameters_of_a_quantised_base_are_not_touched() -> None:
    """Packed weights do not train; only what trains can have its gradient projected."""
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(AnatomyError, match="finds 0 of the 0 trainable"):
        projected_parameters(model, [GradientProjection("o_proj", vector(1)[None])])


def test_a_step_leaves_no_hook_behind(tiny_model_dir: Path, tmp_path: Path) -> None:
    rules = [rule("v", "project_out"), rule("f", "ablate_features"), rule("w", "steer", strength=1.0)]
    trainer = dpo(tiny_model_dir, tmp_path, preference_rows(6), policy=policy(tmp_path, *rules))
    stepped(trainer)
    assert not any(module._forward_hooks for module in trainer.model.modules())
    trainer.data_collator = lambda rows: {}
    with pytest.raises(KeyError):
        stepped(trainer)
    assert not any(module._forward_hooks for module in trainer.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(family: str) -> None:
    """Each family's layers give what is edited; the layer after reads it."""
    model = tiny_model(family).eval()
    v = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    edits = HiddenEdits(model, [Steering(1, v[0]), Projection(2, v[1:].double(), keep=False)])
    ids = torch.arange(5, 17).view(2, 6)

    def read_by_the_next(layer: int) -> Tensor:
        found = []
        handle = layer_module(model, layer + 1).register_forward_pre_hook(
            lambda module, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model(ids)
        handle.remove()
        return found[0]

    plain = [read_by_the_next(layer) for layer in (1, 2)]
    with edits.step(model):
        edits.see({STEERING: torch.tensor([[3.0, 0.0, 0.0, 1.0]]), START: torch.tensor([4, 0])})
        steered, projected = read_by_the_next(1), read_by_the_next(2)
        with edits.paused():
            assert torch.equal(read_by_the_next(2), plain[1])
    wanted = plain[0].clone()
    wanted[0, 4:] += 3.0 * v[0]
    torch.testing.assert_close(steered, wanted)
    u = v[1] / v[1].norm()
    assert (projected[1] @ u).abs().max() < 1e-5 * plain[1][1].norm()
    assert (projected[0] @ u).abs().max() > 1e-2
    assert torch.equal(read_by_the_next(2), plain[1])


def test_biases_of_writers_are_projected() -> None:
    model = tiny_model("gpt2")
    found = projected_parameters(model, [GradientProjection(r"h\.0\.mlp\.c_proj", torch.ones(1, 32).double())])
    shapes = {tuple(parameter.shape): edit(torch.randn_like(parameter)) for parameter, edit in found}
    assert shapes[(32,)].sum().abs() < 1e-5
    [weight] = [gradient for shape, gradient in shapes.items() if len(shape) == 2]  # (in, out), as GPT-2 keeps it
    assert weight.sum(1).abs().max() < 1e-4 < weight.sum(0).abs().max()


def test_the_start_model_is_read_only_for_scores(tmp_path: Path) -> None:
    pairs = read_pairs(Dataset.from_list(conversations(6)), build_tokenizer())

    def no_model() -> Any:
        raise AssertionError("loaded")

    rules = [rule("v", "project_out"), rule("f", "ablate_features"), rule("w", "steer", strength=1.0)]
    plan = settle_policy(ConceptPolicy.load(policy(tmp_path, *rules)), pairs, no_model)
    assert [type(edit).__name__ for edit in plan.hidden] == ["Projection", "Ablation", "Steering"]
    assert "rule 1: edits the step of pairs that carry 100% of the gradient." in plan_report(plan)
    asks = rule("w", "steer", "amplify", strength=1.0, fraction=0.5, where={"prompt": "w6"})
    with pytest.raises(AssertionError, match="loaded"):
        settle_policy(ConceptPolicy.load(policy(tmp_path, asks)), pairs, no_model)
