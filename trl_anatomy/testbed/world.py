"""One call that builds the whole testbed in a folder: corpus, start model, SAE, preference pairs, held-out prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .language import HABITS, Habit, held_out_prompts, is_correct, make_corpus, make_pairs, make_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

# Raised by hand when a change of the code makes stages built earlier stale.
_VERSION = 2


@dataclass(frozen=True)
class Size:
    """How large a world is."""

    n_corpus: int  # texts that the start model is trained on, once each
    n_layers: int
    width: int
    d_sae: int
    k: int  # latents active at a token
    n_sae_texts: int  # fresh texts whose residual stream the SAE is trained on
    sae_tokens: int
    n_pairs: int
    n_prompts: int  # held-out prompts
    n_per_prompt: int  # rollouts of each
    batch_size: int = 16
    lr: float = 3e-3
    asking: float = 0.0  # share of the corpus whose prompts ask for a habit, for rules that give instructions
    forbidden: str | None = None  # topic in which the start model refuses, and elsewhere seldom; see `make_corpus`

    @property
    def layer(self) -> int:
        """The middle layer, which the SAE reads."""
        return self.n_layers // 2


TINY = Size(
    n_corpus=1_600,
    n_layers=2,
    width=32,
    d_sae=64,
    k=4,
    n_sae_texts=100,
    sae_tokens=20_000,
    n_pairs=64,
    n_prompts=16,
    n_per_prompt=1,
    lr=1e-2,
)
DEMO = Size(
    n_corpus=24_000,
    n_layers=3,
    width=96,
    d_sae=512,
    k=4,
    n_sae_texts=4_000,
    sae_tokens=800_000,
    n_pairs=3_000,
    n_prompts=500,
    n_per_prompt=4,
)
LARGE = Size(
    n_corpus=80_000,
    n_layers=4,
    width=192,
    d_sae=2_048,
    k=16,
    n_sae_texts=20_000,
    sae_tokens=4_000_000,
    n_pairs=10_000,
    n_prompts=560,
    n_per_prompt=8,
)
SIZES = {"tiny": TINY, "demo": DEMO, "large": LARGE}


@dataclass(frozen=True)
class World:
    """A built testbed. The model folder holds model and tokenizer; the SAE folder is read by sae-lens."""

    path: Path
    size: Size
    seed: int
    model_path: Path
    sae_path: Path
    layer: int
    dataset: Dataset
    prompts: list[str]
    habits: tuple[Habit, ...] = HABITS

    @staticmethod
    def is_correct(prompt: str, response: str) -> bool:
        """The true quality signal of a response."""
        return is_correct(prompt, response)


def build_world(out: Path, size: Size = DEMO, seed: int = 0, *, say: Callable[[str], None] = print) -> World:
    """Builds the testbed, or what of it is missing.

    Args:
        out: Folder for `model/`, `sae/`, `pairs.parquet` and `prompts.json`.
        size: One of TINY, DEMO, LARGE, or another `Size`.
        seed: Of texts, weights and orders. The same size and seed give the same world on the same machine.
        say: Takes progress messages.

    Returns:
        The world. A stage whose result is in the folder under the same key (code version, size, seed) is not run again.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model_path, sae_path = out / "model", out / "sae"
    settings = dataclasses.asdict(size)
    language = [dataclasses.asdict(habit) for habit in HABITS]
    # A setting that came later is in the key only where it is used: worlds without it are found again.
    later = ("forbidden",) if size.forbidden else ()
    model_names = ("n_corpus", "n_layers", "width", "batch_size", "lr", "asking", *later)
    model_key = _key(language, {name: settings[name] for name in model_names}, seed)
    sae_names = ("d_sae", "k", "n_sae_texts", "sae_tokens")
    sae_key = _key(model_key, {name: settings[name] for name in sae_names})

    _stage(model_path, model_key, "start model", lambda at: _build_model(at, size, seed), say)
    _stage(sae_path, sae_key, "SAE", lambda at: _build_sae(at, model_path, size, seed), say)
    dataset = make_pairs(size.n_pairs, seed, forbidden=size.forbidden)
    dataset.to_parquet(out / "pairs.parquet")
    prompts = held_out_prompts(size.n_prompts, seed)
    (out / "prompts.json").write_text(json.dumps(prompts))
    return World(out, size, seed, model_path, sae_path, size.layer, dataset, prompts)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts], sort_keys=True).encode()).hexdigest()[:16]


def _stage(folder: Path, key: str, name: str, build: Callable[[Path], str], say: Callable[[str], None]) -> None:
    done = folder / "testbed.json"
    if done.is_file() and json.loads(done.read_text()).get("key") == key:
        say(f"{name}: found in {folder}")
        return
    # Built beside and renamed, so that an interrupted build is never taken for a finished one.
    building = folder.with_name(folder.name + ".building")
    for stale in (folder, building):
        shutil.rmtree(stale, ignore_errors=True)
    building.mkdir(parents=True)
    say(f"{name}: training")
    start = time.perf_counter()
    told = build(building)
    (building / "testbed.json").write_text(json.dumps({"key": key}))
    building.rename(folder)
    say(f"{name}: {told}, {time.perf_counter() - start:.0f} s")


def _build_model(out: Path, size: Size, seed: int) -> str:
    from .model import encode_texts, make_model, train_model

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, n_layers=size.n_layers, width=size.width, seed=seed)
    texts = encode_texts(make_corpus(size.n_corpus, seed, asking=size.asking, forbidden=size.forbidden), tokenizer)
    losses = train_model(model, texts, tokenizer, seed=seed, batch_size=size.batch_size, lr=size.lr)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return f"{model.num_parameters():,} parameters, {size.n_corpus:,} texts, last loss {losses[-1]:.3f}"


def _build_sae(out: Path, model_path: Path, size: Size, seed: int) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .model import encode_texts
    from .sae import residual_stream, save_sae, train_sae, unexplained_variance

    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, trust_remote_code=False)
    # Texts of another seed than the start model's: the SAE is to read the model, not its training texts.
    texts = encode_texts(make_corpus(size.n_sae_texts, seed + 1000, forbidden=size.forbidden), tokenizer)
    hidden = residual_stream(model, texts, layer=size.layer, pad=tokenizer.pad_token_id)
    sae = train_sae(
        hidden,
        d_sae=size.d_sae,
        k=size.k,
        layer=size.layer,
        model_name=str(model_path),
        seed=seed,
        tokens=size.sae_tokens,
    )
    save_sae(sae, out)
    left = unexplained_variance(sae, hidden[:20_000])
    return f"{size.d_sae} latents on layer {size.layer}, {100 * left:.1f} % of the variance unexplained"
