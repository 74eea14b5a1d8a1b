"""Sampled responses of a model to a list of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from ..reading.processing import text_tokenizer
from ..reading.prompts import Prompt, encode_prompt

__all__ = ["Response", "encode_prompt", "rollouts", "stop_ids"]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..reading.unfinished import Parts


_ONE = "response: lower max_new_tokens, or free memory"


class Response(str):
    """The text of a sampled response, without special tokens, and the tokens as they were sampled.

    Attributes:
        ids: what the model wrote, with its end token where it wrote one.
        prompt_ids: what it was given before.
        finished: whether it ended by itself; False where it was cut at `max_new_tokens`.
    """

    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finished: bool

    def __new__(cls, text: str, ids: Sequence[int] = (), prompt_ids: Sequence[int] = (), finished: bool = True) -> Self:
        made = super().__new__(cls, text)
        made.ids, made.prompt_ids, made.finished = tuple(ids), tuple(prompt_ids), finished
        return made


@torch.no_grad()
def rollouts(  # noqa: C901, PLR0913, PLR0915
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    n_per_prompt: int = 1,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    seed: int = 0,
    temperature: float = 1.0,
    kept: Parts | None = None,
    progress: bool = True,
) -> list[list[Response]]:
    """Samples `n_per_prompt` responses to each prompt.

    Only the temperature shapes the samples: of the generation settings stored with the model nothing counts but its end
    tokens, so that rates of different models can be compared. Prompts are tokenised as training
    tokenises them (`encode_prompt`). The caller's random state and the model's mode are left as they were found.

    Where the device runs out of memory, the batch is sampled in halves, and so are those after it. What had been drawn
    for it is drawn again, so the same batch running out in the same place gives the same responses; but each batch goes
    on in one stream of random numbers, so they are others than with enough memory, as they are with another
    `batch_size` (greedy ones are the same up to rounding).

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer or processor. Its padding side does not matter: the padding is done here, on the left.
        prompts: Texts to continue, or conversations (lists of messages) to answer; a `ChatPrompt` brings tools.
        n_per_prompt: Responses per prompt.
        max_new_tokens: Longest response in tokens.
        batch_size: Responses sampled at once.
        seed: The same seed, model and arguments give the same responses.
        temperature: 1 samples from the model's own distribution; 0 decodes greedily.
        kept: Takes each batch as it is finished, with the random state after it; those that it has are not sampled
            again, and the responses are the same.
        progress: Show a progress bar.

    Returns:
        For each prompt, in the order given, its `n_per_prompt` responses.

    Raises:
        AnatomyError: there is not enough memory for a single response, or a prompt that the model cannot read.
    """
    from transformers import StoppingCriteriaList

    from ..reading.capacity import check_prompts_fit
    from ..reading.forward import each_in_halves
    from ..reading.progress import Progress
    from ..reading.unfinished import keep_part

    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    jobs = [i for i in range(len(prompts)) for _ in range(n_per_prompt)]
    jobs.sort(key=lambda i: len(encoded[i]))
    reader = text_tokenizer(tokenizer)
    pad = reader.pad_token_id if reader.pad_token_id is not None else reader.eos_token_id
    check_prompts_fit(encoded, max_new_tokens, model.config, pad_token_id=pad)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    responses: list[list[Response]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    ends = stop_ids(model, tokenizer)

    def sample(batch: list[int]) -> list[Response]:
        longest = max(len(encoded[i]) for i in batch)
        rows = [[pad] * (longest - len(encoded[i])) + encoded[i] for i in batch]
        mask = [[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in batch]
        states, ticks = random_states(), 0

        def tick(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            nonlocal ticks
            ticks += 1
            bar.begun(len(batch))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        try:
            output = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                top_k=0,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=ends,
                stopping_criteria=StoppingCriteriaList([tick]),
                **sampling,
            )
        except torch.OutOfMemoryError:  # after as many draws as it had memory for
            set_random_states(states)
            bar.begun(-ticks * len(batch))
            raise
        bar.update(len(batch), work=(max_new_tokens - ticks) * len(batch))
        if kept is not None:
            rows_written.extend(output[:, longest:].tolist())
        return answers(batch, output[:, longest:])

    def answers(batch: list[int], written: torch.Tensor) -> list[Response]:
        texts = reader.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [
            _response(text, ids, encoded[i], ends or [])
            for i, text, ids in zip(batch, texts, written.tolist(), strict=True)
        ]

    def random_states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]

    def set_random_states(states: Sequence[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def put(batch: list[int], said: list[Response]) -> None:
        for i, response in zip(batch, said, strict=True):
            responses[i].append(response)

    rows_written: list[list[int]] = []  # of batches that are not kept yet
    work = float(len(jobs) * max_new_tokens)
    bar = Progress(len(jobs), "Sampling responses", "responses", work=work, show=progress)
    try:
        with bar, torch.random.fork_rng(devices=devices), _without_settings(model):
            torch.manual_seed(seed)
            done = 0
            for part in kept.stored() if kept is not None else ():
                states = [torch.from_numpy(part[name]) for name in sorted(part) if name.startswith("state")]
                batch = jobs[done : done + batch_size]
                if part["start"].item() != done or len(states) != 1 + len(devices):
                    continue  # after one that is damaged, or of another machine
                put(batch, answers(batch, torch.from_numpy(part["written"])))
                bar.update(len(batch), work=len(batch) * max_new_tokens, skipped=True)
                set_random_states(states)
                done += len(batch)
            batches = (jobs[start : start + batch_size] for start in range(done, len(jobs), batch_size))
            for batch, said in each_in_halves(batches, sample, one=_ONE):
                put(batch, said)
                done += len(batch)
                if kept is not None and (done % batch_size == 0 or done == len(jobs)):
                    width = max(map(len, rows_written))
                    padded = np.array([row + [pad] * (width - len(row)) for row in rows_written], np.int64)
                    after = {f"state{n}": state.numpy() for n, state in enumerate(random_states())}
                    start = np.array(done - len(rows_written))
                    keep_part(kept, {"start": start, "written": padded, **after})
                    rows_written.clear()
    finally:
        model.train(was_training)
    return responses


def _response(text: str, ids: list[int], prompt_ids: list[int], ends: Sequence[int]) -> Response:
    """A response without the padding that follows its end."""
    stop = next((n for n, token in enumerate(ids) if token in ends), None)
    return Response(text, ids if stop is None else ids[: stop + 1], prompt_ids, stop is not None)


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """Put the generation settings stored with a model aside: `generate` takes from them whatever no argument sets."""
    from transformers import GenerationConfig

    held = [part for part in {id(m): m for m in (model, _base(model))}.values() if "generation_config" in vars(part)]
    stored = [part.generation_config for part in held]
    for part in held:
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for part, settings in zip(held, stored, strict=True):
            part.generation_config = settings


def _base(model: Any) -> Any:
    """The model of transformers below PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """End tokens of the tokenizer and of the model's generation settings together (chat models stop on several)."""
    stored = model.generation_config.eos_token_id
    own = text_tokenizer(tokenizer).eos_token_id
    ids = {*(stored if isinstance(stored, list) else [stored]), own} - {None}
    return sorted(ids) or None
