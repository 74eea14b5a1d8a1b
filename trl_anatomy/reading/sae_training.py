"""Train SAEs on a model's own activations: one pass over the model for all layers, in rounds that can be resumed.

A round reads whole sequences, drawn in a seeded order, until its buffer is full, then trains on their shuffled tokens.
sae-lens trains; what is here is the data, the schedule, the state on disk and the threshold of the saved SAE.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..errors import AnatomyError, require
from .files import check_writable, make_folder, remove_partial, sealed, unsealed, without_nan, write_atomically
from .fingerprint import model_key
from .forward import read_texts
from .locate import decoder_layers, hidden_size
from .progress import Progress
from .sae import SAE, load_sae
from .spans import Pairs

ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "matryoshka")
DEPTH = 2 / 3  # of the model: where concepts of responses are read best
LEAST_TOKENS, MOST_TOKENS = 300_000, 3_000_000
OUTLIER = 6.0  # tokens whose norm exceeds this many mean norms are left out, as published (method.md section 2)
BATCH = 1024  # tokens of one step
BUFFER_BYTES = 512 << 20
HELD_OUT_TOKENS = 16_384
KEPT = 0.9  # cosine of a decoder row above which a latent is called the same
# Of JumpReLU: how near to its threshold an activation moves it (decoder rows begin at norm 1, tokens have sqrt(d_in)),
# and by what share of L0's distance from k all thresholds are scaled after a step.
BANDWIDTH, STEERING = 1.0, 0.03
SHORTEST = 32  # steps below which nothing is learned
STATE, SETTINGS = "state.safetensors", "training.json"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_PART = 8192  # rows of the buffer that are copied at a time
_ADAM = ("exp_avg", "exp_avg_sq", "step")
_COUNTERS = ("act_freq_scores", "n_forward_passes_since_fired")
_SAVE_SECONDS = 60.0
_SAVE_SHARE = 20  # saving takes at most one part in so many of the time


@dataclass(frozen=True)
class Sequences:
    """Token sequences to train on, and which of their tokens are activations to learn.

    Attributes:
        ids: (n,) of (n_tokens,) int32.
        learn_from: (n,) first token that is learned from: never 0, since the first token's norm dwarfs all others.
        pad_token_id: for batches.
    """

    ids: list[np.ndarray]
    learn_from: np.ndarray
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_learned(self) -> np.ndarray:
        """(n,) tokens of each sequence that are learned from."""
        return np.maximum(0, np.array([len(ids) for ids in self.ids], np.int64) - self.learn_from)

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens, and of which are learned from."""
        digest = hashlib.sha256(self.learn_from.tobytes())
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()[:32]

    def select(self, indices: Sequence[int]) -> "Sequences":
        """Those sequences, in this order."""
        return Sequences([self.ids[i] for i in indices], self.learn_from[list(indices)], self.pad_token_id)


def sequences_of(pairs: Pairs | None, texts: Sequence[Sequence[int]], pad_token_id: int) -> Sequences:
    """The tokens that TRL trains on, each prompt once, and those of further texts.

    Args:
        pairs: prompt and both responses of every pair are read as they are trained on; None for texts alone.
        texts: tokens of further texts.
        pad_token_id: for batches.

    Raises:
        AnatomyError: no token to learn from.
    """
    ids: list[np.ndarray] = []
    first: list[int] = []
    for i in range(0 if pairs is None else len(pairs)):
        assert pairs is not None
        prompt, chosen, other, rejected = pairs.arrays(i)
        for before, response, seen in ((prompt, chosen, 1), (other, rejected, len(other))):
            if len(response):
                ids.append(np.concatenate([before, response]).astype(np.int32))
                first.append(max(1, seen))
    for text in texts:
        ids.append(np.asarray(text, np.int32))
        first.append(1)
    found = Sequences(ids, np.asarray(first, np.int64), pad_token_id)
    if not found.n_learned.sum():
        raise AnatomyError("There is no token to train an SAE on: the dataset and the texts are empty.")
    return found


@dataclass(frozen=True)
class SAERecipe:
    """How an SAE is trained. `recipe` fills in what is not given from width and token budget.

    Attributes:
        architecture: ``batchtopk`` or ``matryoshka`` (both saved as JumpReLU), ``jumprelu`` or ``topk``.
        d_sae: number of latents.
        k: latents that fire per token; on average, but for ``topk``. A ``jumprelu`` SAE learns a threshold
            for each latent under the penalty 2/k · (L0 - k)² of each token. Since tokens on which many latents fire
            weigh most in that, every step also scales all thresholds by 1 + 0.03 · (L0 / k - 1), and saving by the
            factor at which k latents fire per held-out token.
        lr: peak learning rate, after a warm-up of 5 % and before a linear decay over the last third.
        tokens: tokens of training, repeated ones included.
        seed: of weights and order.
    """

    architecture: str
    d_sae: int
    k: int
    lr: float
    tokens: int
    seed: int = 0


def recipe(
    d_in: int,
    tokens: int,
    *,
    architecture: str = "batchtopk",
    d_sae: int | None = None,
    k: int | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> SAERecipe:
    """Settings by rule, from width and token budget.

    Latents: 8 times the width, 16 times from 100 million tokens on. k: twice the square root of the width, 48 at 576
    and, as published, 128 at 4,096. Learning rate: 2e-4 · sqrt(16,384 / latents), the usual scaling, and 2.5 times that
    below 20 million tokens, where few steps have to do.

    Args:
        d_in: width of the model; tokens: budget; others: instead of the rule.

    Raises:
        AnatomyError: an unknown architecture, no latent, k above their number, a rate that is none, too few steps.

    >>> recipe(576, 3_000_000).d_sae, recipe(576, 3_000_000).k, recipe(4096, 10**9).d_sae, recipe(4096, 10**9).k
    (4608, 48, 65536, 128)
    """
    if architecture not in ARCHITECTURES:
        raise AnatomyError(f"architecture is {architecture!r}; allowed: {', '.join(ARCHITECTURES)}.")
    if tokens < SHORTEST * BATCH:
        raise AnatomyError(
            f"{tokens} tokens are {tokens // BATCH} steps of {BATCH}; an SAE needs {SHORTEST} at least: allow "
            f"{SHORTEST * BATCH} tokens or more."
        )
    d_sae = d_in * (8 if tokens < 100_000_000 else 16) if d_sae is None else d_sae
    if d_sae < 1:
        raise AnatomyError(f"The number of latents is {d_sae}; allowed: 1 or more.")
    if architecture == "matryoshka" and d_sae < 16:
        raise AnatomyError(f"The number of latents is {d_sae}; matryoshka needs 16 or more, for levels of a 16th.")
    if k is None:
        k = min(d_sae, round(2 * math.sqrt(d_in)))
    if not 0 < k <= d_sae:
        raise AnatomyError(f"k is {k}; allowed: 1 to {d_sae}, the number of latents.")
    if lr is None:
        lr = continued_lr(d_sae) * (2.5 if tokens < 20_000_000 else 1.0)
    if not 0 < lr < math.inf:
        raise AnatomyError(f"lr is {lr}; allowed: a number above 0.")
    return SAERecipe(architecture, d_sae, k, lr, tokens, seed)


def default_layer(n_layers: int) -> int:
    """The layer, from 0, at two thirds of the depth."""
    return max(0, round(DEPTH * n_layers) - 1)


def default_tokens(n_learned: int) -> int:
    """Tokens of training for data of so many: twice, within bounds."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, 2 * n_learned))


def continued_lr(d_sae: int) -> float:
    """Peak learning rate by width alone: for long trainings, and for SAEs that are gone on from."""
    return 2e-4 * math.sqrt(16_384 / d_sae)


def train_saes(  # noqa: PLR0913
    model: nn.Module,
    sequences: Sequences,
    layers: Sequence[int],
    settings: SAERecipe,
    out: Path,
    *,
    init: SAE | None = None,
    model_name: str = "",
    batch_tokens: int = 8192,
    buffer_bytes: int = BUFFER_BYTES,
    progress: bool = True,
) -> dict[int, Path]:
    """Train an SAE at each layer, all on the same forward passes, and save them in the format of sae-lens.

    The state is kept about every minute: a killed run that is started again ends in the same weights, on the same
    machine; it reads the activations again of the round in which it was killed. Memory beside the model: the buffer,
    and four times the weights of each SAE. Data that fit into the buffer are read once, however often they are trained
    on.

    Args:
        model: the frozen start model.
        sequences: what to train on; `HELD_OUT_TOKENS` of them, at most a tenth, are held out.
        layers: layers whose output is learned, from 0.
        settings: see `recipe`.
        out: folder; the SAE of a single layer lies in it, those of several in ``layer_N`` below it.
        init: an SAE to go on from, of one layer; latents keep their numbers, and ``latents.parquet`` says for each the
            cosine of its decoder row before and after.
        model_name: for the card.
        batch_tokens: padded tokens of one forward pass.
        buffer_bytes: activations of one round, in the model's precision, all layers together.
        progress: show a progress bar.

    Returns:
        layer -> folder of its SAE.

    Raises:
        AnatomyError: a layer that is not there, activations that are not finite, too little data, an SAE that cannot be
            gone on from, a folder that holds another training or cannot be written.
    """
    layers = sorted(set(layers))
    n_layers = len(decoder_layers(model))
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise AnatomyError(f"Layer {layer} is out of range: the model has {n_layers} layers, 0 to {n_layers - 1}.")
    folders = {layer: out if len(layers) == 1 else out / f"layer_{layer}" for layer in layers}
    check_writable(out)
    for folder in {out, *folders.values()}:
        remove_partial(folder)
    made_from = {
        "recipe": asdict(settings),
        "layers": layers,
        "data": sequences.fingerprint,
        "model": model_key(model),
        "buffer_bytes": buffer_bytes,
    }
    if init is not None:
        made_from["init"] = init.fingerprint
        _check_init(init, settings, layers)
    if _finished(out, made_from):
        (out / STATE).unlink(missing_ok=True)  # of a process that was killed as it finished
        return folders
    run = _Run(model, sequences, layers, settings, out / STATE, batch_tokens, buffer_bytes, init)
    # Only what can be trained is written down: a folder of input that was refused stays free for better input.
    write_atomically(out / SETTINGS, json.dumps(made_from, indent=2).encode())
    run.train(progress)
    figures = {layer: run.save(layer, folder, model_name) for layer, folder in folders.items()}
    write_atomically(out / SETTINGS, json.dumps(without_nan({**made_from, "figures": figures}), indent=2).encode())
    (out / STATE).unlink(missing_ok=True)
    return folders


def _check_init(init: SAE, settings: SAERecipe, layers: Sequence[int]) -> None:
    init.rows([0])  # raises for one whose latents are not exact
    problem = None
    if len(layers) > 1:
        problem = f"layers {', '.join(map(str, layers))} are asked for, and an SAE to go on from is of one"
    elif init.centred:
        problem = "it reads a centred stream, on which training is not supported"
    elif init.d_sae != settings.d_sae or settings.architecture == "matryoshka":
        problem = f"it has {init.d_sae} latents in one level; leave latents out, and choose batchtopk, topk or jumprelu"
    if problem is not None:
        raise AnatomyError(f"The SAE at {init.place} cannot be gone on from: {problem}.")


def _finished(out: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether this very training has ended in `out`.

    Raises:
        AnatomyError: the folder holds another training.
    """
    found = _stored(out)
    if found is None:
        return False
    differs = [name for name, value in made_from.items() if found.get(name) != value]
    if differs:
        raise AnatomyError(
            f"{out}: this folder holds another training of an SAE ({', '.join(differs)} differ): name another folder."
        )
    return "figures" in found


def _stored(out: Path) -> dict[str, Any] | None:
    """What a training wrote down of itself in `out`; None where none began."""
    file = out / SETTINGS
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def stored_tokens(out: Path) -> int | None:
    """Tokens of the training that began in `out`, so that one bounded by minutes goes on as it began; None without."""
    tokens = ((_stored(out) or {}).get("recipe") or {}).get("tokens")
    return tokens if isinstance(tokens, int) else None


def rounds(n_learned: np.ndarray, most: int, seed: int) -> Iterator[list[int]]:
    """The sequences of each round, ascending, for ever: all in a seeded order, then all in another.

    Args:
        n_learned: (n,) tokens of each sequence.
        most: tokens of a round, unless a single sequence has more.
        seed: of the orders.
    """
    total = int(n_learned.sum())
    target = -(-total // -(-total // most))  # rounds of one length, so that none is a small rest
    epoch = 0
    while True:
        batch: list[int] = []
        tokens = 0
        for i in np.random.default_rng([seed, epoch]).permutation(len(n_learned)).tolist():
            if batch and tokens + n_learned[i] > most:
                yield sorted(batch)
                batch, tokens = [], 0
            batch.append(i)
            tokens += int(n_learned[i])
            if tokens >= target:
                yield sorted(batch)
                batch, tokens = [], 0
        if batch:
            yield sorted(batch)
        epoch += 1


def _only(rows: Tensor, keep: Tensor) -> Tensor:
    """The rows (n, d) that are kept, moved together in their own memory: there may be no room for a copy."""
    if keep.all():
        return rows
    n = 0
    for part, kept in zip(rows.split(_PART), keep.split(_PART), strict=True):
        some = part[kept]
        rows[n : n + len(some)] = some
        n += len(some)
    return rows[:n]


class _Run:
    """One training: the activations of each round, a sae-lens trainer a layer, and their state on disk."""

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        sequences: Sequences,
        layers: Sequence[int],
        settings: SAERecipe,
        state: Path,
        batch_tokens: int,
        buffer_bytes: int,
        init: SAE | None = None,
    ) -> None:
        self._init = init
        self._model, self._layers, self._settings, self._state = model, list(layers), settings, state
        self._batch_tokens, self._d_in = batch_tokens, hidden_size(model)
        order = np.random.default_rng(settings.seed).permutation(len(sequences)).tolist()
        tokens = sequences.n_learned[order].cumsum()
        n_held_out = 1 + int(np.searchsorted(tokens, min(HELD_OUT_TOKENS, int(tokens[-1]) // 10)))
        self._held_out, self._sequences = sequences.select(order[:n_held_out]), sequences.select(order[n_held_out:])
        n_tokens, needed = int(self._sequences.n_learned.sum()), SHORTEST * BATCH // 4
        if n_tokens < needed:
            raise AnatomyError(
                f"There are {n_tokens} tokens to train an SAE on, and it needs {needed} at least: give more pairs, or "
                "texts (--text)."
            )
        itemsize = next(model.parameters()).element_size()
        self._most = max(4 * BATCH, buffer_bytes // (self._d_in * itemsize * len(self._layers)))
        self._mean_norms: dict[int, float] = {}
        self._trainers: dict[int, Any] = {}
        self._steps = 0  # taken
        self._explained = dict.fromkeys(self._layers, 0.0)  # share of the last batch's variance
        self._l0 = dict.fromkeys(self._layers, 0.0)  # latents per token of it

    @property
    def _n_steps(self) -> int:
        return self._settings.tokens // BATCH

    def train(self, progress: bool) -> None:
        """Train to the end, from where the state on disk stands."""
        at, first_step = self._resume()
        if self._steps == self._n_steps:
            return
        steps, saved, cost = self._steps, time.monotonic(), 0.0
        held: list[int] = []
        activations: dict[int, Tensor] = {}
        with Progress(self._n_steps * BATCH, "Training SAE", "tokens", show=progress) as bar:
            bar.update(steps * BATCH, skipped=True)
            for number, batch in enumerate(rounds(self._sequences.n_learned, self._most, self._settings.seed)):
                if number < at:
                    continue
                if batch != held:
                    activations.clear()  # before the next are read
                    activations = self._read(self._sequences.select(batch), progress)
                    held = batch
                if not self._trainers:
                    self._begin(activations)
                orders = {layer: self._order(number, len(activations[layer])) for layer in self._layers}
                for step in range(first_step, min(map(len, activations.values())) // BATCH):
                    if self._steps == self._n_steps:
                        return
                    for layer in self._layers:
                        rows = orders[layer][step * BATCH : (step + 1) * BATCH]
                        self._step(layer, activations[layer][rows])
                    self._steps += 1
                    bar.note = self._progress()
                    bar.update(BATCH)
                    if time.monotonic() - saved > max(_SAVE_SECONDS, _SAVE_SHARE * cost):
                        start = time.monotonic()
                        self._keep(number, step + 1)
                        saved = time.monotonic()
                        cost = saved - start
                first_step = 0

    def _read(self, sequences: Sequences, progress: bool = False) -> dict[int, Tensor]:
        """layer -> (n_tokens, d_in) activations in the model's precision, without first tokens and outliers."""
        n_learned = sequences.n_learned
        starts = np.concatenate([[0], n_learned.cumsum()])
        dtype = next(self._model.parameters()).dtype
        found = {layer: torch.empty(int(starts[-1]), self._d_in, dtype=dtype) for layer in self._layers}
        texts = [ids.tolist() for ids in sequences.ids]
        with Progress(int(starts[-1]), "Reading activations", "tokens", show=progress) as bar:
            for i, hidden in read_texts(
                self._model, texts, self._layers, pad_token_id=sequences.pad_token_id, batch_tokens=self._batch_tokens
            ):
                for layer, states in hidden.items():
                    found[layer][starts[i] : starts[i + 1]] = states[sequences.learn_from[i] :].cpu()
                bar.update(int(n_learned[i]))
        for layer in self._layers:
            norms = torch.cat([part.float().norm(dim=1) for part in found[layer].split(_PART)])
            if not torch.isfinite(norms).all():
                raise AnatomyError(
                    f"The activations of layer {layer} are not finite: check the model's weights, or load it in "
                    "bfloat16 or float32."
                )
            mean = self._mean_norms.setdefault(layer, float(norms.mean()))
            found[layer] = _only(found[layer], norms <= OUTLIER * mean)
        return found

    def _begin(self, activations: Mapping[int, Tensor]) -> None:
        """Make the SAEs: decoder biases at the mean of the first activations, so that no latent has to learn it."""
        for layer in self._layers:
            mean = activations[layer].mean(0, dtype=torch.float32)
            self._trainers[layer] = self._trainer(layer)
            sae, scale = self._trainers[layer].sae, self._scale(layer)
            if self._init is not None:
                self._take_over(sae, scale)
            else:
                sae.b_dec.data = mean * scale
            if self._learns_thresholds and not sae.threshold.any():
                some = activations[layer][: 16 * BATCH].to(sae.W_dec.device).float() * scale
                with torch.no_grad():
                    sae.threshold.fill_(self._smallest_kept(sae, some))

    @torch.no_grad()
    def _take_over(self, sae: Any, scale: float) -> None:
        """Begin at the weights of `init`: its latents and their order.

        Decoder rows get the norm 1 before scaling; after it where thresholds are learned, whose steps are of that size.
        """
        assert self._init is not None
        rows, b_dec = self._init.rows(range(self._init.d_sae)), self._init.b_dec
        norm = rows.decoder.norm(dim=1).clamp(min=1e-8)
        if self._learns_thresholds:
            norm *= scale
            sae.threshold.copy_(rows.threshold * norm)
        encoder = rows.encoder * norm[:, None]
        sae.W_enc.copy_(encoder.T / scale)
        sae.b_enc.copy_(rows.bias * norm + encoder @ b_dec)
        sae.W_dec.copy_(rows.decoder / norm[:, None] * scale)
        sae.b_dec.copy_(b_dec * scale)

    def _scale(self, layer: int) -> float:
        """Factor that brings activations to the norm sqrt(d_in), for which learning rates are meant."""
        return math.sqrt(self._d_in) / self._mean_norms[layer]

    def _trainer(self, layer: int) -> Any:
        os.environ.setdefault("WANDB_MODE", "offline")  # sae-lens imports it
        require("sae_lens")
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.sae import SAEMetadata
        from sae_lens.training.sae_trainer import SAETrainer

        settings, device = self._settings, str(next(self._model.parameters()).device)
        common: dict[str, Any] = {
            "d_in": self._d_in,
            "d_sae": settings.d_sae,
            "device": device,
            "metadata": SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post"),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            sae: Any
            if settings.architecture == "jumprelu":
                common["target_l0"], common["jumprelu_sparsity_loss_mode"] = float(settings.k), "quadratic"
                common["jumprelu_bandwidth"], common["jumprelu_init_threshold"] = BANDWIDTH, 0.0
                sae = sae_lens.JumpReLUTrainingSAE(sae_lens.JumpReLUTrainingSAEConfig(**common, decoder_init_norm=1.0))
            elif settings.architecture == "topk":
                sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**common, k=settings.k))
            elif settings.architecture == "batchtopk":
                sae = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**common, k=settings.k))
            else:
                common["k"] = settings.k
                widths = [settings.d_sae // 16, settings.d_sae // 4, settings.d_sae]
                config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**common, matryoshka_widths=widths)
                sae = sae_lens.MatryoshkaBatchTopKTrainingSAE(config)
        schedule = SAETrainerConfig(
            total_training_samples=self._n_steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=settings.lr,
            lr_warm_up_steps=max(2, self._n_steps // 20),
            lr_decay_steps=self._n_steps // 3,
            lr_end=settings.lr,  # of the constant part; the decay after it ends at 0
            device=device,
            dead_feature_window=max(16, min(1000, self._n_steps // 10)),
            feature_sampling_window=self._n_steps + 1,
        )
        trainer = SAETrainer(schedule, sae, data_provider=iter(()))
        trainer.activation_scaler.scaling_factor = self._scale(layer)
        return trainer

    def _step(self, layer: int, batch: Tensor) -> None:
        """One step on some tokens (n, d_in)."""
        trainer = self._trainers[layer]
        made = trainer.step(batch.float())
        trainer.n_training_steps += 1
        with torch.no_grad():
            error, spread = (made.sae_in - made.sae_out).pow(2).sum(), (made.sae_in - made.sae_in.mean(0)).pow(2).sum()
            self._explained[layer] = float(1 - error / spread)
            self._l0[layer] = float((made.feature_acts > 0).sum() / len(batch))
            if self._learns_thresholds:
                trainer.sae.threshold *= 1 + STEERING * min(1.0, self._l0[layer] / self._settings.k - 1)

    def _order(self, number: int, n: int) -> Tensor:
        """(n,) seeded order of the tokens of a round."""
        seed = int(np.random.SeedSequence([self._settings.seed, number]).generate_state(1)[0])
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

    def _progress(self) -> str:
        parts = []
        for layer, trainer in self._trainers.items():
            dead = float(trainer.dead_neurons.float().mean())
            parts.append(
                f"layer {layer}: {self._explained[layer]:.1%} of the variance, {self._l0[layer]:.1f} latents a token, "
                f"{dead:.1%} dead latents"
            )
        return ", ".join(parts)

    def _keep(self, number: int, step: int) -> None:
        """Write down all that the next step depends on."""
        tensors: dict[str, np.ndarray] = {"at": np.array([number, step, self._steps])}
        for layer, trainer in self._trainers.items():
            tensors[f"{layer}.mean_norm"] = np.array([self._mean_norms[layer]])
            for name, value in trainer.sae.state_dict().items():
                tensors[f"{layer}.sae.{name}"] = value.cpu().numpy()
            for name, parameter in trainer.sae.named_parameters():
                for key, value in trainer.optimizer.state[parameter].items():
                    tensors[f"{layer}.adam.{name}.{key}"] = value.cpu().numpy()
            for name in _COUNTERS:
                tensors[f"{layer}.{name}"] = getattr(trainer, name).cpu().numpy()
        write_atomically(self._state, sealed(tensors))

    def _resume(self) -> tuple[int, int]:
        """Take the state on disk, if there is one: the round and the step in it to go on with."""
        found = unsealed(self._state)
        if found is None:
            return 0, 0
        number, step, self._steps = found["at"].tolist()
        for layer in self._layers:
            self._mean_norms[layer] = float(found[f"{layer}.mean_norm"][0])
            trainer = self._trainers[layer] = self._trainer(layer)
            device = trainer.sae.W_dec.device
            there = {key: torch.from_numpy(value).to(device) for key, value in found.items()}
            trainer.sae.load_state_dict({name: there[f"{layer}.sae.{name}"] for name in trainer.sae.state_dict()})
            for name, parameter in trainer.sae.named_parameters():
                trainer.optimizer.state[parameter] = {key: there[f"{layer}.adam.{name}.{key}"] for key in _ADAM}
            for name in _COUNTERS:
                setattr(trainer, name, there[f"{layer}.{name}"])
            trainer.n_training_steps = self._steps
            trainer.n_training_samples = trainer.n_frac_active_samples = self._steps * BATCH
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch expects the optimizer to step first
                for _ in range(self._steps):
                    trainer.lr_scheduler.step()
                    for scheduler in trainer.coefficient_schedulers.values():
                        scheduler.step()
        return number, step

    @torch.no_grad()
    def save(self, layer: int, folder: Path, model_name: str) -> dict[str, float]:
        """Write an SAE as sae-lens reads it; what the held-out tokens say of it."""
        trainer = self._trainers[layer]
        sae = trainer.sae.eval()
        sae.fold_activation_norm_scaling_factor(self._scale(layer))
        hidden = self._read(self._held_out)[layer].to(sae.W_dec.device).float()
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = self._smallest_kept(sae, hidden).to(sae.topk_threshold)
        elif self._learns_thresholds:
            thresholds = sae.threshold.clamp(min=1e-6)
            sae.threshold.copy_(thresholds * self._smallest_kept(sae, hidden, thresholds))
        sae.cfg.metadata.model_name = model_name
        # As sae-lens' save_inference_model, but whole or not at all; the settings last: without them it is no SAE.
        weights = sae.state_dict()
        sae.process_state_dict_for_saving_inference(weights)
        make_folder(folder)
        write_atomically(folder / WEIGHTS, save_tensors(weights))
        write_atomically(folder / CONFIG, json.dumps(sae.cfg.get_inference_sae_cfg_dict()).encode())
        saved = load_sae(folder, device=sae.W_dec.device)  # what is judged is what a user loads
        error, fired, dead = 0.0, 0, torch.ones(saved.d_sae, dtype=torch.bool, device=hidden.device)
        for part in hidden.split(BATCH):
            codes = saved.encode(part)
            error += float((saved.reconstruct(part) - part).pow(2).sum(dtype=torch.float64))
            fired += int((codes > 0).sum())
            dead &= ~(codes > 0).any(dim=0)
        changed = {} if self._init is None else self._changed(saved, folder)
        return {
            **changed,
            "variance_explained": 1 - error / float((hidden - hidden.mean(0)).pow(2).sum(dtype=torch.float64)),
            "l0": fired / len(hidden),
            "silent_latents": float(dead.float().mean()),
            "held_out_tokens": float(len(hidden)),
        }

    def _changed(self, saved: SAE, folder: Path) -> dict[str, float]:
        """Write down what became of each latent of `init`; the mean, and the share that kept its direction."""
        assert self._init is not None
        every = range(saved.d_sae)
        before, after = self._init.decoder_rows(every).cpu(), saved.decoder_rows(every).cpu()
        cosine = torch.nn.functional.cosine_similarity(before, after).numpy()
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"feature": pa.array(every, pa.int32()), "cosine": cosine}), buffer)
        write_atomically(folder / "latents.parquet", buffer.getvalue().to_pybytes())
        return {"mean_cosine": float(cosine.mean()), "kept_latents": float((cosine > KEPT).mean())}

    @property
    def _learns_thresholds(self) -> bool:
        return self._settings.architecture == "jumprelu"

    def _smallest_kept(self, sae: Any, hidden: Tensor, units: Tensor | None = None) -> Tensor:
        """() activation from which on k latents fire per token, on average over tokens.

        sae-lens keeps a moving average of the smallest activation in a batch, which starts at 0 and lags in short runs.

        Args:
            sae: that of sae-lens.
            hidden: (n, d_in) float32, scaled as the SAE reads it.
            units: (d_sae,) what each latent's activation is counted in, instead of 1.
        """
        kept = int(self._settings.k * len(hidden))
        largest = torch.empty(0, device=hidden.device)
        for part in hidden.split(BATCH):
            pre = sae.process_sae_in(part) @ sae.W_enc + sae.b_enc
            if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
                pre = pre * sae.W_dec.norm(dim=-1)
            if units is not None:
                pre = pre / units
            largest = torch.cat([largest, pre[pre > 0]])
            if len(largest) > kept:
                largest = largest.topk(kept).values
        return largest.min() if len(largest) else torch.zeros(())


def seconds_per_token(
    model: nn.Module, sequences: Sequences, layers: Sequence[int], settings: SAERecipe, *, batch_tokens: int = 8192
) -> tuple[float, float]:
    """Seconds that reading, and that training, takes per token here: of some 2,000 tokens and of three steps.

    Arguments as for `train_saes`.
    """
    n_read = 1 + int(np.searchsorted(np.cumsum([len(ids) for ids in sequences.ids]), 2 * BATCH))
    some = sequences.select(range(min(n_read, len(sequences))))
    run = _Run(model, sequences, layers, settings, Path(), batch_tokens, BUFFER_BYTES)
    run._read(some)  # the first forward is slower
    start = time.perf_counter()
    found = run._read(some)
    read = (time.perf_counter() - start) / max(1, min(map(len, found.values())))
    run._begin(found)
    start = time.perf_counter()
    for _ in range(3):
        for layer in run._layers:
            run._trainers[layer].step(found[layer][torch.arange(BATCH) % len(found[layer])].float())
    return read, (time.perf_counter() - start) / (3 * BATCH)
