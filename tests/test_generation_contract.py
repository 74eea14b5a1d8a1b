"""What hooks rest on while transformers generates. A failure names what a release has moved."""

from typing import Any

import pytest
import torch
from reading_world import FAMILIES, build_tokenizer, tiny_model
from torch import Tensor, nn
from transformers import Cache

from trl_anatomy.checking.dose import steered
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.locate import decoder, decoder_layers, layer_module
from trl_anatomy.reading.scorers.reft import ReftScorer, cached_tokens

PROMPTS = ["Tell me a story", "Why?"]
NEW = 5


def generate(model: Any, **more: Any) -> Tensor:
    """(2, NEW) tokens, from left-padded prompts of unequal length, without an end."""
    rows = [build_tokenizer()(prompt).input_ids for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    settings = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    model.generation_config.eos_token_id = None
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return model.generate(input_ids=ids, attention_mask=mask, **(settings | more))[:, width:]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_runs_once_for_the_prompt_and_once_for_each_token(family: str) -> None:
    model = tiny_model(family)
    shapes: list[list[tuple[int, ...]]] = [[] for _ in decoder_layers(model)]
    calls: list[tuple[int, int]] = []

    def began(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert sum(isinstance(value, Cache) for value in kwargs.values()) == 1  # by name, whatever the name
        calls.append((kwargs.get("input_ids", *args).shape[1], cached_tokens(kwargs)))

    def ended(at: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            shapes[at].append(tuple((output[0] if isinstance(output, tuple) else output).shape))

        return hook

    decoder(model).register_forward_pre_hook(began, with_kwargs=True)
    for at, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(ended(at))
    generate(model)
    width = max(len(build_tokenizer()(prompt).input_ids) for prompt in PROMPTS)
    # The last token is drawn and not read.
    assert calls == [(width, 0), *((1, width + i) for i in range(NEW - 1))]
    assert shapes == [[(2, width, 32), *[(2, 1, 32)] * (NEW - 1)]] * len(shapes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", [0, 2])
def test_what_a_hook_returns_is_what_goes_on(family: str, at: int) -> None:
    """Greedy tokens with a shift at a layer are those of rows computed anew, where every position is shifted."""
    model = tiny_model(family).double()
    shift = 4 * torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = generate(model)
    prompt = build_tokenizer()(PROMPTS[0]).input_ids
    with steered(model, at, shift):
        moved = generate(model)[0]
    row = list(prompt)

    def from_the_last_prompt_token_on(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[:, len(prompt) - 1 :] += shift
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layer_module(model, at).register_forward_hook(from_the_last_prompt_token_on)
    for _ in range(NEW):
        with torch.no_grad():
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    assert moved.tolist() == row[len(prompt) :]
    assert moved.tolist() != plain[0].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("when", [0, 3])
def test_running_out_of_memory_in_a_layer_reaches_the_caller(family: str, when: int) -> None:
    """As the error itself, not wrapped: in the prompt's pass, and after three tokens."""
    model = tiny_model(family)
    passed: list[int] = []

    def run_out(_module: nn.Module, _args: Any, _output: Any) -> None:
        if len(passed) == when:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        passed.append(1)

    handle = layer_module(model, 1).register_forward_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\.") as caught:
        generate(model)
    assert type(caught.value) is torch.OutOfMemoryError
    handle.remove()
    assert generate(model).shape == (2, NEW)  # nothing is left behind


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_an_edit_that_cannot_find_the_cache_says_so(family: str) -> None:
    model = tiny_model(family)
    w1, w2 = torch.randn(2, 1, 2, 32, generator=torch.Generator().manual_seed(1))
    scorer = ReftScorer(w1, torch.ones(1, 2), w2.mT, [1])
    with scorer.generating(model, 1.0), pytest.raises(AnatomyError, match=r"cannot tell a prompt .* without a cache"):
        generate(model, use_cache=False)
    with scorer.generating(model, 1.0):
        edited = rollouts(model, build_tokenizer(), PROMPTS, max_new_tokens=NEW, temperature=0)
    assert edited != rollouts(model, build_tokenizer(), PROMPTS, max_new_tokens=NEW, temperature=0)
