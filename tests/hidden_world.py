"""What the tests of rules on hidden states share: concepts on disk, and the edits written out in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import preference_rows
from explicit_dpo import assert_same_step, formula, gradients
from parity import EXACT, fresh
from reading_world import tiny_sae
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from trl_anatomy import AnatomyRewardTrainer
from trl_anatomy.reading.scorers.direction import DirectionScorer

D = 16  # width of the tiny model
Edit = Callable[[int, Tensor], Tensor]  # layer, (rows, tokens, D) -> the same, edited


def vector(seed: int) -> Tensor:
    """(D,) unit vector, float64 of a float32 one."""
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (v / v.norm()).float().double()


FEATURES = {"f": [3, 11, 20], "g": [20, 5]}
DIRECTIONS = {"v": (1, 0), "w": (2, 1), "u": (3, 0)}  # name -> (seed, layer)


def write_concepts(folder: Path, architecture: str = "jumprelu") -> dict[str, Any]:
    """Concepts of a policy: directions v and u at layer 0, w at layer 1, SAE features f and g at layer 0, text t."""
    if not (folder / "sae").exists():
        tiny_sae(architecture, d_in=D, d_sae=48, hook="blocks.0.hook_resid_post").save_model(folder / "sae")
    concepts: dict[str, Any] = {"t": {"scorer": "text", "pattern": "bold"}}
    for name, (seed, layer) in DIRECTIONS.items():
        DirectionScorer(vector(seed), layer).save(folder / name)
        concepts[name] = {"scorer": "direction", "path": str(folder / name)}
    for name, features in FEATURES.items():
        concepts[name] = {"scorer": "features", "features": features, "sae": {"path": str(folder / "sae")}}
    return concepts


def policy(folder: Path, *rules: dict[str, Any], architecture: str = "jumprelu") -> dict[str, Any]:
    return {"version": 1, "concepts": write_concepts(folder, architecture), "rules": list(rules)}


def rule(concept: str, verb: str, sign: str = "explain_away", **keys: Any) -> dict[str, Any]:
    return {sign: concept, "with": verb, **keys}


# --- the edits, written out ---


def without_span(h: Tensor, *names: str) -> Tensor:
    """h minus its projection on the span, by least squares."""
    span = torch.stack([vector(DIRECTIONS[name][0]) for name in names], dim=1)  # (D, k)
    return h - h @ span @ torch.linalg.inv(span.T @ span) @ span.T


def without_features(h: Tensor, features: dict[int, float], architecture: str = "jumprelu") -> Tensor:
    """h minus the decoded activations of some latents, latent -> share; by the SAE's own weights."""
    sae = tiny_sae(architecture, d_in=D, d_sae=48).double()
    weights = {name: value.detach() for name, value in sae.named_parameters()}
    pre = (h - weights["b_dec"] if sae.cfg.apply_b_dec_to_input else h) @ weights["W_enc"] + weights["b_enc"]
    if architecture == "topk":
        fires = torch.zeros_like(pre).scatter_(-1, pre.topk(sae.cfg.k, dim=-1).indices, 1.0).bool() & (pre > 0)
    else:
        fires = pre > weights.get("threshold", torch.zeros(())).clamp(min=0)
    share = torch.zeros(pre.shape[-1], dtype=torch.float64)
    for feature, strength in features.items():
        share[feature] = strength
    return h - (pre * fires * share) @ weights["W_dec"]


def on_rows(rows: Tensor, edited: Tensor, h: Tensor) -> Tensor:
    """The edited hidden states on some rows (bool), the others as they are."""
    return torch.where(rows[:, None, None], edited, h)


def decoded(model: torch.nn.Module, ids: Tensor, mask: Tensor, edit: Edit | None) -> Tensor:
    """(rows, tokens, D) after the last norm, layer by layer, without any hook."""
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    base = base.model
    h = base.embed_tokens(ids)
    length = ids.shape[1]
    allowed = torch.ones(length, length).tril().bool() & mask.bool()[:, None, :] | torch.eye(length).bool()
    additive = torch.zeros(allowed.shape, dtype=h.dtype).masked_fill_(~allowed, torch.finfo(h.dtype).min)[:, None]
    positions = torch.arange(length)[None]
    rotary = base.rotary_emb(h, positions)
    for layer, module in enumerate(base.layers):
        h = module(h, attention_mask=additive, position_ids=positions, position_embeddings=rotary)
        h = h if edit is None else edit(layer, h)
    return base.norm(h)


def log_probability(model: torch.nn.Module, batch: dict[str, Tensor], edit: Edit | None) -> Tensor:
    """(2, batch) summed log-probability of the completions."""
    head: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    logits = head.lm_head(decoded(model, batch["input_ids"], batch["attention_mask"], edit))
    picked = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (picked * batch["completion_mask"][:, 1:]).sum(1).view(2, -1)


def rewards(model: torch.nn.Module, batch: dict[str, Tensor], edit: Edit | None) -> Tensor:
    """(2, batch) score of the last token of every row."""
    head: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    last = batch["attention_mask"].sum(1) - 1
    h = decoded(model, batch["input_ids"], batch["attention_mask"], edit)
    return head.score(h[torch.arange(len(h)), last]).view(2, -1)


def whole_batch(trainer: Any) -> dict[str, Any]:
    """All training rows as one batch, in order."""
    trainer._set_signature_columns_if_needed()
    dataset = trainer._remove_unused_columns(trainer.train_dataset)
    return trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in range(len(dataset))]))


def stepped(trainer: Any, *, batch: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step on all rows."""
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, batch or whole_batch(trainer))
    return loss, gradients(trainer.model)


def assert_step(
    trainer: Any,
    expected_of: Callable[[dict[str, Any]], Tensor],
    change: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient,
    atol: float = 1e-6,
) -> None:
    """Loss and gradient (changed as a rule says) of a training step against an explicit loss."""
    batch = whole_batch(trainer)
    loss, got = stepped(trainer)
    trainer.model.gradient_checkpointing_disable()
    expected = expected_of(batch)
    expected.backward()
    wanted = {name: change(name, gradient) for name, gradient in gradients(trainer.model).items()}
    assert_same_step(loss, got, expected, wanted, atol)


def dpo_loss(trainer: Any, batch: dict[str, Any], edit: Edit | None, loss_type: str = "sigmoid") -> Tensor:
    """() the loss of method.md section 8 with the policy edited and the reference not."""
    with torch.no_grad():
        if trainer.ref_model is not None:
            reference = log_probability(trainer.ref_model, batch, None)
        else:
            with trainer.model.disable_adapter():
                reference = log_probability(trainer.model, batch, None)
    logps = log_probability(trainer.model, batch, edit)
    length = batch["completion_mask"].sum(1).view(2, -1).double()
    return formula(loss_type, logps - reference, torch.zeros_like(logps), length, logps).mean()


def reward_loss(trainer: Any, batch: dict[str, Any], edit: Edit | None) -> Tensor:
    r = rewards(trainer.model, batch, edit)
    return -F.logsigmoid(r[0] - r[1]).mean()


def conversations(n: int) -> list[dict[str, Any]]:
    """Rows of one or three turns, some with a system prompt, and a column `topic`."""
    made = preference_rows(n, conversational=True)
    for i, row in enumerate(made):
        if i % 3 == 1:
            row["prompt"].insert(0, {"role": "user", "content": "w1 w2 w3"})
            row["prompt"].insert(1, {"role": "assistant", "content": "w4 w5"})
        if i % 2:
            row["prompt"].insert(0, {"role": "system", "content": "w6"})
        row["topic"] = "x" if i % 4 < 2 else "y"
    return made


def reward(model_dir: Path, out: Path, rows: list[dict[str, Any]], rules: Any = None, **options: Any) -> Any:
    """A float64 reward trainer; TRL's own without `rules`."""
    extra = {} if rules is None else {"concept_policy": rules}
    extra |= {name: options.pop(name) for name in ("peft_config",) if name in options}
    options = {"model_init_kwargs": {"dtype": torch.float64}, "gradient_checkpointing": False, **options}
    args = RewardConfig(output_dir=str(out), **{**EXACT, **options})
    cls = RewardTrainer if rules is None else AnatomyRewardTrainer
    model = str(options.pop("model", model_dir))
    return cls(model=model, args=args, train_dataset=fresh(rows), **extra)
