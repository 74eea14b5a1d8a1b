"""The testbed's SAE: trained with sae-lens on the start model's residual stream, and matched against the habits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .model import EncodedText, length_batches

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from transformers import LlamaForCausalLM


@torch.no_grad()
def residual_stream(
    model: LlamaForCausalLM, texts: list[EncodedText], *, layer: int, pad: int, batch_size: int = 128
) -> Tensor:
    """Output of decoder layer `layer` at every token of the texts but BOS, whose norm dwarfs all others.

    Returns:
        (n_tokens, d_model) float32, texts in a shuffled order.
    """
    kept: list[Tensor] = []
    here: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        here.append(output)

    handle = model.model.layers[layer].register_forward_hook(keep)
    try:
        for input_ids, _ in length_batches(texts, batch_size, pad, seed=0):
            model.model(input_ids)
            real = input_ids != pad
            real[:, 0] = False
            kept.append(here.pop()[real])
    finally:
        handle.remove()
    return torch.cat(kept)


def train_sae(  # noqa: PLR0913
    hidden: Tensor, *, d_sae: int, k: int, layer: int, model_name: str, seed: int, tokens: int, lr: float = 3e-3
) -> Any:
    """Trains a TopK SAE with sae-lens.

    Args:
        hidden: (n_tokens, d_model) residual stream to train on; passed over again as often as `tokens` asks.
        d_sae: Number of latents.
        k: Latents active at a token.
        layer: Layer that `hidden` is the output of; written into the metadata as `blocks.{layer}.hook_resid_post`.
        model_name: Written into the metadata.
        seed: Of the initial weights and of the order of tokens.
        tokens: Training length.
        lr: Peak learning rate; the last third decays to a tenth.

    Returns:
        The trained `sae_lens.TopKTrainingSAE`.
    """
    os.environ.setdefault("WANDB_MODE", "offline")
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    batch = 512

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(hidden), generator=generator)
            for start in range(0, len(order) - batch + 1, batch):
                yield hidden[order[start : start + batch]]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=hidden.shape[1],
                d_sae=d_sae,
                k=k,
                dtype="float32",
                device="cpu",
                metadata=SAEMetadata(model_name=model_name, hook_name=f"blocks.{layer}.hook_resid_post"),
            )
        )
        # Starting at the mean spares the latents from learning it.
        sae.b_dec.data = hidden.mean(0)
        steps = max(1, tokens // batch)
        config = SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr / 10,
            lr_warm_up_steps=min(50, steps // 4),
            lr_decay_steps=steps // 3,
            dead_feature_window=min(200, max(1, steps // 4)),
            feature_sampling_window=steps + 1,
            logger=LoggingConfig(log_to_wandb=False),
        )
        SAETrainer(config, sae, data_provider=batches()).fit()
    return sae


@torch.no_grad()
def unexplained_variance(sae: Any, hidden: Tensor) -> float:
    """Share of the variance of `hidden` (n_tokens, d_model) that the SAE's reconstruction leaves."""
    error = (sae.decode(sae.encode(hidden)) - hidden).pow(2).sum()
    return float(error / (hidden - hidden.mean(0)).pow(2).sum())


def save_sae(sae: Any, out: Path) -> None:
    """Writes the inference form of a trained SAE to a folder that `sae_lens.SAE.load_from_disk` reads."""
    sae.save_inference_model(str(out))


@dataclass(frozen=True)
class HabitLatent:
    """The latent that tells best whether a response shows a habit: its index and its phi (binary correlation)."""

    habit: str
    feature: int
    phi: float


def habit_latents(fired: csr_array, shows: Mapping[str, np.ndarray]) -> dict[str, HabitLatent]:
    """Matches every habit with its best single latent.

    Args:
        fired: (n_responses, d_sae), non-zero where the latent fires anywhere in the response.
        shows: Habit name -> (n_responses,) bool by the text rule.

    Returns:
        Habit name -> its best latent. Phi is 0 for a habit that all or no responses show.
    """
    from scipy.sparse import csr_array

    binary = csr_array(fired).astype(bool).astype(np.float64)
    rate = np.asarray(binary.mean(axis=0)).ravel()
    best = {}
    for name, flags in shows.items():
        flag = np.asarray(flags, dtype=np.float64)
        joint = np.asarray(binary.T @ flag).ravel() / len(flag)
        spread = np.sqrt(rate * (1 - rate) * flag.mean() * (1 - flag.mean()))
        phi = np.divide(joint - rate * flag.mean(), spread, out=np.zeros_like(rate), where=spread > 0)
        feature = int(phi.argmax())
        best[name] = HabitLatent(name, feature, float(phi[feature]))
    return best
