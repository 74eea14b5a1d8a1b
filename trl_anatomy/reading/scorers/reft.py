"""A rank-r edit of hidden states that makes a concept likelier: ReFT in its variant NoDi, for steering only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import AnatomyError
from ..forward import TEXT, each_in_halves, frozen, token_batches
from ..locate import decoder, layer_module
from ..logprobs import language_head
from ..progress import Progress
from ..removal import output_hook
from .hidden import HiddenScorer

RANK = 8
ENDS = 11
_EPOCHS = 3
_LEAST_STEPS = 100  # W2 starts at 0: three passes over a few texts would hardly leave it

Where = Callable[[Tensor], Tensor]
"""Hidden states (rows, tokens, d_model) -> (rows, tokens) bool: the positions that are edited."""


class ReftScorer(HiddenScorer):
    """h ← h + W2(W1·h + b) at several layers, on the first and last tokens of a response. It gives no score.

    The edit of a layer sees what the edits below have made of h, as it did when it was fitted.

    Args:
        w1: (n_layers, rank, d_model).
        b: (n_layers, rank).
        w2: (n_layers, d_model, rank).
        layers: the layers edited, rising, from 0.
        ends: how many tokens at the beginning of a response, and at its end, are edited.
        card: what is known of it; `edited_layers` and `ends` are noted there.

    Raises:
        AnatomyError: shapes that do not belong together, or a number that is not finite.

    Source: method.md section 9.
    """

    kind = "reft"
    names = ("w1", "b", "w2")

    def __init__(
        self,
        w1: Tensor,
        b: Tensor,
        w2: Tensor,
        layers: Sequence[int],
        ends: int = ENDS,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        noted = {**(card or {}), "edited_layers": [int(layer) for layer in layers], "ends": int(ends)}
        tensors = {"w1": w1.float(), "b": b.float(), "w2": w2.float()}
        super().__init__(tensors, max(layers, default=0), card=noted)
        self._check_parts()

    @classmethod
    def _restored(cls, tensors: dict[str, Tensor], card: dict[str, Any], reduce: str, **more: Any) -> "ReftScorer":
        scorer = super()._restored(tensors, card, reduce)
        scorer._check_parts()
        return scorer

    def _check_parts(self) -> None:
        layers, ends = self.card.get("edited_layers"), self.card.get("ends")
        if (
            not isinstance(layers, list)
            or not layers
            or not all(isinstance(layer, int) for layer in layers)
            or layers != sorted(set(layers))
            or layers[-1] != self.layer
            or layers[0] < 0
        ):
            raise AnatomyError(
                f"The {self.label} edits the layers {layers}; they are a rising list that ends at {self.layer}."
            )
        if not isinstance(ends, int) or ends < 1:
            raise AnatomyError(f"The {self.label} has ends {ends!r}; allowed: a whole number above 0.")
        shapes = [tuple(self.tensors[name].shape) for name in self.names]
        n, rank, width = shapes[0] if len(shapes[0]) == 3 else (0, 0, 0)
        if n != len(layers) or shapes[1] != (n, rank) or shapes[2] != (n, width, rank):
            raise AnatomyError(
                f"The {self.label} on {len(layers)} layers has tensors of the shapes {shapes}; they are (n_layers, "
                "rank, d_model), (n_layers, rank) and (n_layers, d_model, rank)."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers edited, rising."""
        return tuple(self.card["edited_layers"])

    @property
    def ends(self) -> int:
        """Tokens edited at the beginning of a response, and at its end."""
        return int(self.card["ends"])

    def key(self) -> dict[str, Any]:
        """As `HiddenScorer.key`, with where the edit acts."""
        return super().key() | {"edited_layers": list(self.layers), "ends": self.ends}

    def score_tokens(self, hidden: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
        """Raises AnatomyError: an edit says nothing of how far a text shows the concept."""
        raise AnatomyError("a concept of the scorer reft gives no score: it is for steering.")

    def shift(self, layer: int, hidden: Tensor) -> Tensor:
        """W2(W1·h + b) of one of its layers: (..., d_model) -> the same, in float32 or the wider type of `hidden`."""
        at = self.layers.index(layer)
        return low_rank(hidden, *(self.tensors[name][at] for name in self.names))

    @contextmanager
    def generating(self, model: nn.Module, strength: float) -> Iterator[None]:
        """Edits, times `strength`, every token that the model generates.

        A token that is being generated is the last of the response so far, so it is among the last `ends` of them;
        the prompt is left alone. A response longer than 2 · `ends` is edited at more tokens than when this was fitted.

        Raises:
            AnatomyError: the model runs without a cache, so that its prompt and what it generates look alike.
        """
        reads_prompt = True

        def begin(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal reads_prompt
            reads_prompt = cached_tokens(kwargs) == 0

        def where(h: Tensor) -> Tensor:
            return torch.full(h.shape[:2], not reads_prompt, device=h.device)

        handle = decoder(model).register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with edited(model, self.layers, self.tensors, where, strength=strength):
                yield
        finally:
            handle.remove()

    @classmethod
    def fit(  # noqa: PLR0913
        cls,
        model: nn.Module,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        *,
        layers: Sequence[int],
        pad_token_id: int,
        rank: int = RANK,
        ends: int = ENDS,
        dropout: float = 0.05,
        lr: float = 9e-4,
        epochs: int | None = None,
        batch_size: int = 16,
        batch_tokens: int = 8192,
        seed: int = 0,
        progress: bool = True,
    ) -> "ReftScorer":
        """Maximise the likelihood of responses that show the concept; nothing but the edit is trained.

        W2 starts at zero, so that training starts at the model as it is. Mean loss per response token, AdamW without
        weight decay, the rate falling linearly to zero. No global generator is touched, and the model is left in its
        modes, its parameters without a gradient.

        Args:
            model: the frozen start model, with a language-model head.
            sequences: token ids, prompt and response; each shows the concept.
            spans: (start, stop) of the response in each.
            layers: layers to edit, from 0.
            pad_token_id: for padding a batch.
            rank, ends: of the edit.
            dropout: of the numbers of an edit, while it is fitted.
            lr: of AdamW.
            epochs: passes; None means 3, or as many as make 100 steps.
            batch_size: texts of one step.
            batch_tokens: padded tokens of one forward pass; a step may take several.
            seed: of W1, of the order and of the dropout.
            progress: show a progress bar.

        Raises:
            AnatomyError: a layer the model lacks, no language-model head, no response token.
        """
        chosen = sorted(set(layers))
        for layer in chosen:
            layer_module(model, layer)
        language_head(model)
        if not any(predicted(span) for span in spans):
            raise AnatomyError("The responses to fit on hold no token.")
        device = next(model.parameters()).device
        width = int(decoder(model).config.hidden_size)  # type: ignore[union-attr, arg-type]
        generator = torch.Generator().manual_seed(seed)
        w1 = (2 * torch.rand(len(chosen), rank, width, generator=generator) - 1) / width**0.5
        start = (w1, torch.zeros(len(chosen), rank), torch.zeros(len(chosen), width, rank))
        learned = {name: part.to(device).requires_grad_() for name, part in zip(cls.names, start, strict=True)}
        optimiser = torch.optim.AdamW(learned.values(), lr=lr, weight_decay=0.0)
        per_epoch = -(-len(sequences) // batch_size)
        n_epochs = max(_EPOCHS, -(-_LEAST_STEPS // per_epoch)) if epochs is None else epochs
        steps = n_epochs * per_epoch
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=max(1, steps))
        rng = np.random.default_rng(seed)
        lengths = np.array([len(ids) for ids in sequences])
        cuda = [device] if device.type == "cuda" else []
        with (
            _untrained(model),
            torch.random.fork_rng(devices=cuda),
            Progress(steps, "Fitting the edit", "steps", show=progress) as bar,
        ):
            torch.manual_seed(seed)
            for _ in range(n_epochs):
                order = rng.permutation(len(sequences))
                for first in range(0, len(order), batch_size):
                    texts = order[first : first + batch_size].tolist()
                    count = max(1, sum(predicted(spans[i]) for i in texts))
                    for batch in token_batches(lengths, texts, batch_tokens):
                        with torch.enable_grad():
                            told = surprise(
                                model,
                                [sequences[i] for i in batch],
                                [spans[i] for i in batch],
                                pad_token_id=pad_token_id,
                                edit=(chosen, learned, ends, dropout),
                            )
                            (told.sum() / count).backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    schedule.step()
                    bar.update()
        return cls(learned["w1"], learned["b"], learned["w2"], chosen, ends)

    def nats(
        self,
        model: nn.Module,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        *,
        pad_token_id: int,
        batch_tokens: int = 8192,
    ) -> tuple[float, float]:
        """Mean −log π per response token of some texts, of the model as it is and with the edit."""
        edit = (self.layers, self.tensors, self.ends, 0.0)
        totals = [0.0, 0.0]
        lengths = np.array([len(ids) for ids in sequences])

        def read(batch: list[int]) -> list[float]:
            texts, where = [sequences[i] for i in batch], [spans[i] for i in batch]
            told = (surprise(model, texts, where, pad_token_id=pad_token_id, edit=how) for how in (None, edit))
            return [float(nats.double().sum()) for nats in told]

        with frozen(model):
            batches = token_batches(lengths, range(len(sequences)), batch_tokens)
            for _, told in each_in_halves(batches, read, one=TEXT):
                totals = [total + more for total, more in zip(totals, told, strict=True)]
        count = max(1, sum(map(predicted, spans)))
        return totals[0] / count, totals[1] / count


Edit = tuple[Sequence[int], Mapping[str, Tensor], int, float]
"""Layers, tensors (as in a `ReftScorer`), ends and dropout of an edit."""


def cached_tokens(kwargs: Mapping[str, Any]) -> int:
    """Tokens that stand before those of a decoder's call, by the cache that it is given.

    The cache is known by its type: its name changes (`past_key_values` until transformers 5.23, then `cache`).

    Raises:
        AnatomyError: there is no cache.
    """
    from transformers import Cache

    for value in kwargs.values():
        if isinstance(value, Cache):
            return int(value.get_seq_length())
    raise AnatomyError("A low-rank edit cannot tell a prompt from what follows it without a cache: use use_cache=True.")


def low_rank(hidden: Tensor, w1: Tensor, b: Tensor, w2: Tensor) -> Tensor:
    """W2(W1·h + b) in float32, or the wider type of `hidden`.

    Args:
        hidden: (..., d_model).
        w1: (rank, d_model).
        b: (rank,).
        w2: (d_model, rank).

    >>> low_rank(torch.tensor([1.0, 2.0]), torch.ones(1, 2), torch.ones(1), torch.tensor([[0.5], [0.0]]))
    tensor([2., 0.])
    """
    work = torch.promote_types(hidden.dtype, torch.float32)
    w1, b, w2 = (part.to(hidden.device, work) for part in (w1, b, w2))
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(F.linear(hidden.to(work), w1, b), w2)


def ends_of(starts: Tensor, stops: Tensor, width: int, ends: int) -> Tensor:
    """(rows, width) bool: the first and the last `ends` tokens of the responses that lie at [start, stop) of each row.

    >>> ends_of(torch.tensor([1]), torch.tensor([6]), 7, 2).int().tolist()
    [[0, 1, 1, 0, 1, 1, 0]]
    """
    position = torch.arange(width, device=starts.device)
    starts, stops = starts[:, None], stops[:, None]
    inside = (position >= starts) & (position < stops)
    return inside & ((position < starts + ends) | (position >= stops - ends))


@contextmanager
def edited(
    model: nn.Module,
    layers: Sequence[int],
    tensors: Mapping[str, Tensor],
    where: Where,
    *,
    strength: float = 1.0,
    dropout: float = 0.0,
) -> Iterator[None]:
    """While it lasts, h ← h + strength · dropout(W2(W1·h + b)) at some layers, where `where` says."""

    def hook(at: int) -> Any:
        def edit(h: Tensor) -> Tensor:
            moved = low_rank(h, *(tensors[name][at] for name in ReftScorer.names))
            moved = strength * F.dropout(moved, dropout, training=dropout > 0)
            return h + torch.where(where(h)[..., None], moved, 0.0).to(h.dtype)

        return output_hook(edit)

    handles = [layer_module(model, layer).register_forward_hook(hook(at)) for at, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def predicted(span: tuple[int, int]) -> int:
    """Tokens of a span that something stands before."""
    return max(0, span[1] - max(1, span[0]))


def surprise(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    *,
    pad_token_id: int,
    edit: Edit | None = None,
) -> Tensor:
    """−log π of every response token of one batch of texts, end to end.

    Args:
        model: a causal language model.
        sequences: token ids, prompt and response.
        spans: (start, stop) of the response in each; a first token that nothing stands before is left out.
        pad_token_id: for padding.
        edit: acts on the responses; None leaves the model as it is.

    Returns:
        (n_tokens,) float32, or the float64 of such a model; differentiable in the tensors of `edit`.
    """
    head, softcap = language_head(model)
    device = next(model.parameters()).device
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = ids.to(device)
    inputs = {"input_ids": ids, "attention_mask": mask.to(device), "use_cache": False}
    starts, stops = torch.tensor(spans).T
    if edit is None:
        hidden = decoder(model)(**inputs).last_hidden_state
    else:
        layers, tensors, ends, dropout = edit
        acts = ends_of(starts, stops, width, ends).to(device)
        with edited(model, layers, tensors, lambda h: acts.to(h.device), dropout=dropout):
            hidden = decoder(model)(**inputs).last_hidden_state
    position = torch.arange(1, width)
    asked = ((position >= starts[:, None]) & (position < stops[:, None])).to(device)
    logits = head(hidden[:, :-1][asked.to(hidden.device)])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, ids[:, 1:][asked].to(logits.device), reduction="none")


@contextmanager
def _untrained(model: nn.Module) -> Iterator[None]:
    """The model frozen, and its parameters outside the graph, so that a backward pass keeps nothing for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with frozen(model):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
