"""What the lengths of the responses explain, or where they were cut, is no finding; what pairs do teach stays one."""

from typing import Any

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import binom

from trl_anatomy.audit import views
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.predict import concept_table
from trl_anatomy.audit.prompt_view import response_scores

RUNS = 40
# A true rate of 5 % is exceeded once in a hundred times.
MOST = int(binom.ppf(0.99, RUNS, 0.05))
N = 150
CONFIG = AuditConfig(bootstrap=100)
COMMUNITIES = [np.array([0])]
CLAIMS = ("rises", "falls")


class Counted:
    """A harvest of one latent, from its firing tokens and the lengths."""

    def __init__(self, counts: dict[str, np.ndarray], lengths: dict[str, np.ndarray]) -> None:
        self.counts, self.lengths = counts, {**lengths, "prompt": np.full(N, 9)}
        self.rows, self.n_pairs, self.d_sae = np.arange(N), N, 1

    def frequency(self, side: str) -> sparse.csr_array:
        share = self.counts[side].astype(np.float32) / self.lengths[side].astype(np.float32)
        return sparse.csr_array(share[:, None])

    maximum = frequency

    def shards(self) -> Any:
        yield self


def lengths_of(rng: np.random.Generator, short: str = "chosen") -> dict[str, np.ndarray]:
    """One side several times as long as the other, in every pair."""
    other = "rejected" if short == "chosen" else "chosen"
    return {short: rng.integers(30, 60, N), other: rng.integers(110, 160, N)}


def verdict(counts: dict[str, np.ndarray], lengths: dict[str, np.ndarray], **evidence: Any) -> str:
    scores = views.activity(Counted(counts, lengths), COMMUNITIES, CONFIG.tau)
    return concept_table(scores, COMMUNITIES, CONFIG, **evidence)["verdict"][0].as_py()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("short", ["chosen", "rejected"])
def test_what_fires_at_a_fixed_place_is_no_finding(times: int, short: str) -> None:
    """Once a response it is above a hundredth of the tokens of a short one, and below that of a long one."""
    lengths = lengths_of(np.random.default_rng(0), short)
    counts = {side: np.full(N, times) for side in lengths}
    assert verdict(counts, lengths) in ("explained by length", "too few pairs to tell")
    scores = views.activity(Counted(counts, lengths), COMMUNITIES, CONFIG.tau)
    assert times == 2 or abs(scores.u.mean()) == 1  # it is there to be misread
    np.testing.assert_array_equal(scores.by_count, 0)


@pytest.mark.parametrize("law", ["about once a response", "at a constant rate", "at a constant rate in bursts"])
@pytest.mark.parametrize("lengths", ["apart", "alike"])
def test_chance_is_a_finding_in_one_run_of_twenty_at_most(law: str, lengths: str) -> None:
    found = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        tokens = (
            lengths_of(rng) if lengths == "apart" else {s: rng.integers(30, 160, N) for s in ("chosen", "rejected")}
        )
        counts = {}
        for side, length in tokens.items():
            rate = {"about once a response": 1.0}.get(law, 0.012 * length)
            burst = rng.gamma(0.5, 2.0, N) if "bursts" in law else 1.0
            counts[side] = np.minimum(rng.poisson(np.broadcast_to(rate * burst, N)), length)
        found += verdict(counts, tokens) in CLAIMS
    assert found <= MOST


@pytest.mark.parametrize(("chosen", "rejected", "wanted"), [(0.7, 0.3, "rises"), (0.25, 0.6, "falls")])
@pytest.mark.parametrize("short", ["chosen", "rejected", None])
def test_a_habit_of_more_responses_is_found_whatever_their_lengths(
    chosen: float, rejected: float, wanted: str, short: str | None
) -> None:
    """Where it is shown it lights six tokens; the other way of being longer would be an effect of its own."""
    rng = np.random.default_rng(1)
    tokens = {s: rng.integers(40, 80, N) for s in ("chosen", "rejected")}
    if short is not None:
        tokens[short] -= 10
    counts = {s: 6 * (rng.random(N) < rate) for s, rate in (("chosen", chosen), ("rejected", rejected))}
    assert verdict(counts, tokens) == wanted


def cut_pairs(share: float, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A farewell of four tokens at the end of every response; `share` of the rejected ones lost it to max_length."""
    rng = np.random.default_rng(seed)
    cut = {"chosen": np.zeros(N, bool), "rejected": rng.random(N) < share}
    return {side: 4 * ~cut[side] for side in cut}, cut


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_an_end_that_was_cut_off_is_no_less_of_it(share: float) -> None:
    counts, cut = cut_pairs(share)
    tokens = {side: np.full(N, 60) for side in cut}
    assert verdict(counts, tokens) == "rises"
    assert verdict(counts, tokens, cut=cut) == "explained by length"
    turned = {"chosen": counts["rejected"], "rejected": counts["chosen"]}
    other = {"chosen": cut["rejected"], "rejected": cut["chosen"]}
    assert verdict(turned, tokens, cut=other) == "explained by length"


def test_what_the_cut_side_shows_more_of_is_a_finding() -> None:
    """A cut takes text away; it can not explain that more of a concept is left."""
    rng = np.random.default_rng(0)
    _, cut = cut_pairs(1.0)
    tokens = {side: np.full(N, 60) for side in cut}
    counts = {"chosen": 5 * (rng.random(N) < 0.2), "rejected": 5 * (rng.random(N) < 0.6)}
    assert verdict(counts, tokens, cut=cut) == "falls"


def test_a_context_of_short_responses_has_no_more_of_what_fires_once() -> None:
    """In one context chosen responses are short, elsewhere alike: a latent at a fixed place leans nowhere."""
    rng = np.random.default_rng(0)
    context = np.where(np.arange(N) < 60, 1, 2)
    tokens = {"chosen": np.where(context == 1, 50, 140), "rejected": np.full(N, 140)}
    tokens = {side: length + rng.integers(0, 9, N) for side, length in tokens.items()}

    def kept(counts: dict[str, np.ndarray]) -> list[bool]:
        """What differs: of two contexts that are each other's rest, one is folded under the other since."""
        scores = views.activity(Counted(counts, tokens), COMMUNITIES, CONFIG.tau)
        return views.compare_contexts(scores, context, np.array([1]), 1, CONFIG)["differs"].to_pylist()

    assert kept({side: np.ones(N, int) for side in tokens}) == [False, False]
    habit = {side: 6 * (rng.random(N) < 0.3) for side in tokens}
    habit["chosen"] = np.where((context == 1) & (rng.random(N) < 0.8), 6, habit["chosen"])
    assert kept(habit) == [True, True]


def test_response_clusters_are_counted_on_one_length_too() -> None:
    lengths = lengths_of(np.random.default_rng(0))
    scores = response_scores(Counted({side: np.ones(N, int) for side in lengths}, lengths), COMMUNITIES, "freq")
    assert scores.u.mean() > 1
    assert scores.by_count is not None
    np.testing.assert_allclose(scores.by_count, 0, atol=1e-5 * scores.u.max())
    found = concept_table(scores, COMMUNITIES, CONFIG, kind="response-geometry")
    assert found["verdict"].to_pylist() == ["explained by length"]
