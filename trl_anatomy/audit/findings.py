"""What an audit says, and what both kinds of data (pairs, SFT rows) need to say it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from ..reading.progress import Progress

# The last digits of a product depend on how many threads share it, and torchrun leaves one to each process: with one
# in any case, the number of processes changes nothing in an audit.
one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")

# Steps that count nothing, as their reader is told of them.
_STEPS = {
    "regions": "Finding regions",
    "communities": "Finding communities of latents",
    "view": "Testing contexts",
    "prompt_view": "Testing prompts",
    "labels": "Reading terms",
    "predict": "Estimating shifts",
}

# With fewer prompts, errors between prompts can not be estimated.
MIN_PROMPTS = 20


@dataclass(frozen=True)
class Findings:
    """What an audit says about a harvest.

    Attributes:
        hypotheses, concepts, pairs: the tables of the audit folder.
        info: settings_used, notes, contexts and counts of `audit.json`; of pairs also maps and length.
        timings: seconds of each step.
    """

    hypotheses: pa.Table
    concepts: pa.Table
    pairs: pa.Table
    info: dict[str, Any]
    timings: dict[str, float]


def shared_prompts(prompt_groups: np.ndarray | None, what: str = "pair") -> tuple[np.ndarray | None, list[str]]:
    """Groups of pairs to be taken together: None where no prompt repeats; and what to tell the reader.

    Args:
        what: what a row is called, "pair" or "row".
    """
    n_prompts = 0 if prompt_groups is None else len(np.unique(prompt_groups))
    if prompt_groups is None or n_prompts == len(prompt_groups):
        return None, []
    shared = f"{len(prompt_groups)} {what}s share {'one prompt' if n_prompts == 1 else f'{n_prompts} prompts'}"
    if n_prompts < MIN_PROMPTS:
        return None, [
            f"{shared}, too few to tell how much depends on the prompt: intervals and tests take every {what} by "
            f"itself and hold for {'this prompt' if n_prompts == 1 else 'these prompts'} only."
        ]
    return prompt_groups, [f"{shared}: intervals and tests take the {what}s of a prompt together."]


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Write the seconds of a step into `timings`; after two seconds a step without a bar says that it runs."""
    start = time.perf_counter()
    with Progress(None, _STEPS.get(name, ""), show=name in _STEPS):
        yield
    timings[name] = round(time.perf_counter() - start, 3)
