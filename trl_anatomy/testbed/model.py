"""The testbed's start model: a small Llama trained from scratch on texts at base rates."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reading.progress import Progress
from .language import value_tokens

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

IGNORE = -100


def make_model(tokenizer: PreTrainedTokenizerBase, *, n_layers: int, width: int, seed: int) -> LlamaForCausalLM:
    """An untrained float32 Llama with tied embeddings, heads of 32 dimensions and MLPs twice as wide as the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=max(1, width // 32),
        num_key_value_heads=max(1, width // 32),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # The default of 0.02 is meant for wider models; at this width it only delays learning.
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.float()


@dataclass(frozen=True)
class EncodedText:
    """Token ids of BOS, prompt, response, EOS, as TRL's DPO preparation makes them, and how many the prompt has."""

    ids: list[int]
    n_prompt: int


def encode_texts(texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[EncodedText]:
    """Tokenises (prompt, response) texts."""
    prompts = tokenizer([prompt for prompt, _ in texts]).input_ids
    whole = tokenizer([prompt + response for prompt, response in texts]).input_ids
    return [
        EncodedText([*ids, tokenizer.eos_token_id], len(prompt)) for ids, prompt in zip(whole, prompts, strict=True)
    ]


def length_batches(texts: list[EncodedText], batch_size: int, pad: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the texts in shuffled batches of similar length.

    Yields:
        (input_ids, labels), both (batch, length) int64, padded on the right; prompt and padding have label -100.
    """
    ids = [text.ids for text in texts]
    rng = random.Random(seed)
    order = list(range(len(ids)))
    rng.shuffle(order)
    # Sorted within windows of 16 batches: little padding, and still a different order in every pass.
    window = 16 * batch_size
    batches = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda i: len(ids[i]))
        batches += [near[j : j + batch_size] for j in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    for batch in batches:
        longest = max(len(ids[i]) for i in batch)
        input_ids = torch.full((len(batch), longest), pad)
        labels = torch.full((len(batch), longest), IGNORE)
        for row, i in enumerate(batch):
            input_ids[row, : len(ids[i])] = torch.tensor(ids[i])
            labels[row, texts[i].n_prompt : len(ids[i])] = torch.tensor(ids[i][texts[i].n_prompt :])
        yield input_ids, labels


def train_model(
    model: LlamaForCausalLM,
    texts: list[EncodedText],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    batch_size: int = 32,
    lr: float = 3e-3,
    value_weight: float = 5.0,
) -> list[float]:
    """Trains in place on every response token of the texts, once over: AdamW, a short warm-up, a cosine to zero.

    The tokens that state a value weigh `value_weight` times as much as the others: they are one in forty, and at equal
    weight the facts are learnt long after everything else. The weight depends on the position alone (nothing but a
    value can stand there), so the minimum of the loss is still the texts' own distribution.

    Returns:
        The weighted loss (nats per token) of each step.
    """
    steps = math.ceil(len(texts) / batch_size)
    weight = torch.ones(len(tokenizer))
    weight[tokenizer.convert_tokens_to_ids(sorted(value_tokens()))] = value_weight
    pad = tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    losses = []
    model.train()
    with Progress(steps, "Training the start model", "steps") as bar:
        for input_ids, labels in length_batches(texts, batch_size, pad, seed):
            # No attention mask: with padding on the right, no real token attends to it.
            hidden = model.model(input_ids).last_hidden_state[:, :-1]
            target = labels[:, 1:]
            real = target != IGNORE
            each = torch.nn.functional.cross_entropy(model.lm_head(hidden[real]), target[real], reduction="none")
            loss = (each * weight[target[real]]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
    model.eval()
    return losses
