"""Shared fixtures: a tiny Llama with a tokenizer built on the spot, and small preference sets. No network."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small gain nothing from a second thread, and on a busy machine threads that wait for each other lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tqdm.std import tqdm

# tqdm's own lock is shared between processes: one that is killed while it draws a bar keeps it, and every other waits
# for ever. Set here, before any subclass of tqdm makes one for itself, this one is theirs too.
tqdm.set_lock(threading.RLock())

# `accelerate launch` with two processes of a CPU: its own `--cpu` starts one, and `--multi_gpu` asks for no GPU where
# ACCELERATE_USE_CPU is set. Port 0 is a free one.
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch"]
TWO_PROCESSES += ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
TWO_PROCESSES += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking through it at every collection took a fifth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what is never collected is reported as leaked at the end


WORDS = [f"w{i}" for i in range(40)] + ["**bold**", "-", "yes", "no"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_tokenizer() -> Any:
    """A word-level tokenizer over WORDS with a chat template and no BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = ["<pad>", "</s>", "<unk>", "<system>", "<user>", "<assistant>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_tiny_model(path: Path) -> Path:
    """A random two-layer Llama (width 16) and its tokenizer, as `from_pretrained` reads them, in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,  # large enough that losses differ from pair to pair
    )
    model = LlamaForCausalLM(config)
    torch.set_rng_state(state)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def preference_rows(n: int, seed: int = 0, *, conversational: bool = False) -> list[dict[str, Any]]:
    """`n` pairs with an explicit prompt; `**bold**` stands in most chosen and few rejected responses."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[str]:
        return [rng.choice(WORDS[:40]) for _ in range(rng.randint(low, high))]

    rows = []
    for _ in range(n):
        prompt, chosen, rejected = words(3, 6), words(2, 8), words(2, 8)
        if rng.random() < 0.7:
            chosen.insert(rng.randrange(len(chosen)), "**bold**")
        if rng.random() < 0.3:
            rejected.insert(rng.randrange(len(rejected)), "**bold**")
        if conversational:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": " ".join(prompt)}],
                    "chosen": [{"role": "assistant", "content": " ".join(chosen)}],
                    "rejected": [{"role": "assistant", "content": " ".join(rejected)}],
                }
            )
        else:
            rows.append(
                {
                    "prompt": " ".join(prompt),
                    "chosen": " " + " ".join(chosen) + " ",
                    "rejected": " " + " ".join(rejected) + " ",
                }
            )
    return rows
