"""On which tokens features fire: for the few pairs that a person looks at; a harvest keeps no tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from .forward import in_halves, length_sorted_batches, read_spans
from .progress import Progress
from .spans import SPANS
from .token_codes import encoded
from .token_text import pieces

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .sae import SAE
    from .spans import Pairs
    from .token_codes import TokenCodes


def token_firings(  # noqa: PLR0913
    model: nn.Module,
    sae: SAE,
    pairs: Pairs,
    wanted: Mapping[int, Sequence[np.ndarray]],
    *,
    layer: int,
    batch_tokens: int = 8192,
    progress: bool = True,
    codes: TokenCodes | None = None,
) -> dict[int, dict[str, np.ndarray]]:
    """Share of each group's features that fire on each token of some pairs.

    Args:
        model: the frozen start model.
        sae: its SAE, on the model's device.
        pairs: tokenised pairs.
        wanted: index of a pair -> groups of feature ids.
        layer: layer to read, from 0.
        batch_tokens: padded tokens of one forward pass.
        progress: show a progress bar.
        codes: what a harvest of these pairs has kept; the model reads only pairs that are not among it.

    Returns:
        Index of a pair -> span -> (n_tokens, n_groups) float32 in [0, 1], for the tokens of `span_tokens`; 0 on tokens
        that are not pooled.
    """
    found: dict[int, dict[str, np.ndarray]] = {}
    pairs = pairs.pooled_as(sae.excluded_tokens)

    def share(pair: int, activations: Callable[[list[int]], np.ndarray]) -> np.ndarray:
        """(n_tokens, n_groups), from activations of some features on the pair's tokens."""
        tokens = span_tokens(pairs, pair)
        groups = [np.asarray(group, dtype=np.int64) for group in wanted[pair]]
        features = np.unique(np.concatenate([*groups, np.zeros(0, dtype=np.int64)]))
        fires = (activations(features.tolist()) != 0).astype(np.float32)
        at = [np.searchsorted(features, group) for group in groups]
        shares = np.stack([fires[:, columns].mean(axis=1) for columns in at], axis=1) if at else fires[:, :0]
        bos = len(pairs.content(pair, "prompt")) - len(tokens["prompt"])
        content = [pairs.content(pair, span)[bos if span == "prompt" else 0 :] for span in SPANS]
        shares[~np.concatenate(content)] = 0.0
        return shares

    def fire(batch: list[int]) -> None:
        read = read_spans(model, pairs, batch, [layer])
        for j, pair in enumerate(batch):
            bounds = read.bounds[len(SPANS) * j : len(SPANS) * (j + 1) + 1]
            hidden = read.hidden[layer][bounds[0] : bounds[-1]]

            def activations(features: list[int], hidden: Tensor = hidden) -> np.ndarray:
                if not len(hidden) or not features:
                    return np.zeros((len(hidden), len(features)), np.float32)
                return sae.encode_features(hidden, features).cpu().numpy()

            cuts = [bound - bounds[0] for bound in bounds[1:-1]]
            found[pair] = dict(zip(SPANS, np.split(share(pair, activations), cuts), strict=True))
        bar.update(len(batch), work=pairs.packed_lengths[batch].sum())

    if codes is not None and codes.fits(sae, layer, model):
        for pair in sorted(pair for pair in wanted if codes.has([pair])):  # by shard
            each = share(pair, partial(codes.of, pair))
            found[pair] = dict(zip(SPANS, np.split(each, codes.bounds(pair)[1:-1]), strict=True))
    rest = [pair for pair in wanted if pair not in found]
    work = float(pairs.packed_lengths[rest].sum()) if rest else 0.0
    with Progress(len(rest), "Reading pairs to show", "pairs", work=work, show=progress) as bar:
        in_halves(length_sorted_batches(pairs, rest, batch_tokens), fire)
    return found


def token_activations(  # noqa: PLR0913
    model: nn.Module,
    sae: SAE,
    pairs: Pairs,
    wanted: Sequence[int],
    *,
    layer: int,
    batch_tokens: int = 8192,
    progress: bool = True,
    codes: TokenCodes | None = None,
) -> Iterator[tuple[int, dict[str, sp.csr_array]]]:
    """Activation of every latent on each token of some pairs, pair by pair.

    Args:
        model, sae, pairs, layer, batch_tokens, progress, codes: as `token_firings`.
        wanted: indices of pairs, each once.

    Yields:
        Index of a pair, and span -> (n_tokens, d_sae) float32 for the tokens of `span_tokens`; tokens that are not
        pooled have none.
    """
    pairs = pairs.pooled_as(sae.excluded_tokens)

    def spans(pair: int, matrix: sp.csr_array, cuts: Sequence[int]) -> tuple[int, dict[str, sp.csr_array]]:
        found = {}
        for span, start, stop in zip(SPANS, cuts[:-1], cuts[1:], strict=True):
            content = pairs.content(pair, span)
            content = content[len(content) - (stop - start) :]  # a leading BOS is not read
            keep = sp.diags_array(content.astype(np.float32))
            found[span] = sp.csr_array(keep @ matrix[start:stop])
        return pair, found

    kept = codes is not None and codes.fits(sae, layer, model)
    known = [pair for pair in sorted(wanted) if kept and codes is not None and codes.has([pair])]
    for pair in known:
        assert codes is not None
        yield spans(pair, codes.matrix(pair), codes.bounds(pair))
    rest = [pair for pair in wanted if pair not in set(known)]
    work = float(pairs.packed_lengths[rest].sum()) if rest else 0.0
    with Progress(len(rest), "Reading pairs for labels", "pairs", work=work, show=progress) as bar:
        for batch in length_sorted_batches(pairs, rest, batch_tokens):
            found: list[tuple[int, dict[str, sp.csr_array]]] = []

            def read(part: list[int], found: list[Any] = found) -> None:
                of = read_spans(model, pairs, part, [layer])
                for j, pair in enumerate(part):
                    bounds = of.bounds[len(SPANS) * j : len(SPANS) * (j + 1) + 1]
                    hidden = of.hidden[layer][bounds[0] : bounds[-1]]
                    found.append(spans(pair, encoded(sae, hidden), [bound - bounds[0] for bound in bounds]))
                bar.update(len(part), work=pairs.packed_lengths[part].sum())

            in_halves([batch], read)
            yield from found


def span_tokens(pairs: Pairs, i: int) -> dict[str, list[int]]:
    """Span -> token ids of pair `i` that are read: after truncation, without a leading BOS."""
    prompt, chosen, _, rejected = pairs.tokens(i)
    if prompt and prompt[0] == pairs.bos_token_id:
        prompt = prompt[1:]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, special tokens too; end to end they are the text of all.

    A token that ends inside a character adds nothing, and the one that completes it adds what they hold together.
    """
    backend = tokenizer.backend_tokenizer
    text, bounds = pieces(ids, lambda part: backend.decode(part, skip_special_tokens=False))
    ends = np.append(bounds[1:, 0], len(text))  # of what comes before the next token's characters
    return [text[begin:end] if end <= after else "" for (begin, end), after in zip(bounds, ends, strict=False)]
