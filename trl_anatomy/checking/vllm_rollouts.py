"""Rollouts through vLLM, where it is installed: the same responses to sort, sooner."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import AnatomyError
from .rollouts import Response


@dataclass(frozen=True)
class VllmRollouts:
    """Answers conversations with vLLM, for `persona_rows(generate=...)`.

    It is given tokens, those that `persona_rows` makes, and renders nothing itself. The engine lives for one call, so
    that the memory of the GPU is free again for what reads hidden states.

    Args:
        model: folder or hub name of the start model; vLLM loads it itself.
        dtype: as vLLM knows it.

    Raises:
        AnatomyError: vLLM is not installed.
    """

    model: str
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if find_spec("vllm") is None:
            raise AnatomyError(
                "vLLM is not installed: install it (pip install vllm), or sample with transformers, the default."
            )

    def __call__(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        *,
        n_per_prompt: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Response]]:
        """`n_per_prompt` responses to each conversation; only the temperature shapes the samples.

        Args:
            conversations: each a `ChatPrompt` with its tokens.

        Raises:
            AnatomyError: one without tokens.
        """
        import torch

        prompts = [ids for conversation in conversations if (ids := getattr(conversation, "ids", None)) is not None]
        if len(prompts) < len(conversations):
            raise AnatomyError("vLLM is given tokens: make each conversation a ChatPrompt with ids (encode_prompt).")
        vllm = import_module("vllm")
        sampling = vllm.SamplingParams(n=n_per_prompt, temperature=temperature, max_tokens=max_new_tokens, seed=seed)
        engine = vllm.LLM(model=self.model, dtype=self.dtype, seed=seed, trust_remote_code=False)
        try:
            answered = engine.generate([{"prompt_token_ids": list(ids)} for ids in prompts], sampling)
            return [
                [Response(of.text, of.token_ids, ids, of.finish_reason == "stop") for of in answer.outputs]
                for answer, ids in zip(answered, prompts, strict=True)
            ]
        finally:
            del engine
            gc.collect()
            torch.cuda.empty_cache()
