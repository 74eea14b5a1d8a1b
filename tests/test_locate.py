"""Layers are found in every family, the pass stops after them, and one shared prompt changes nothing."""

from typing import Any

import pytest
import torch
from reading_world import FAMILIES, build_tokenizer, dataset, tiny_config, tiny_model
from torch import nn

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import forward
from trl_anatomy.reading.forward import frozen, length_sorted_batches, read_layers, read_spans, read_texts
from trl_anatomy.reading.locate import (
    attention_window,
    decoder_layers,
    hidden_size,
    layer_module,
    layer_of_hook,
    shares_prompt,
)
from trl_anatomy.reading.spans import Pairs, read_pairs

IDS = torch.randint(3, 300, (2, 21), generator=torch.Generator().manual_seed(1))


def multimodal_gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=tiny_config("gemma3"), vision_config=vision, mm_tokens_per_image=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).float().eval()


def with_lora(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return adapted.eval()


@torch.no_grad()
def hidden_states(model: Any) -> tuple[torch.Tensor, ...]:
    return model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states


@pytest.mark.parametrize("head", ["causal", "score"])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_of_layer_n_is_hidden_state_n_plus_1(family: str, head: str) -> None:
    model = tiny_model(family, head=head)
    n_layers = len(decoder_layers(model))
    assert (n_layers, hidden_size(model)) == (4, 32)
    read = read_layers(model, range(n_layers), input_ids=IDS, attention_mask=torch.ones_like(IDS))
    states = hidden_states(model)
    for layer in range(n_layers - 1):  # the last hidden state is after the final norm
        torch.testing.assert_close(read[layer], states[layer + 1], rtol=1e-5, atol=1e-5)
    if family != "olmo2":
        assert not torch.allclose(read[n_layers - 1], states[n_layers], atol=1e-2)


@pytest.mark.parametrize("make", [multimodal_gemma3, lambda: with_lora(tiny_model("llama"))])
def test_wrapped_and_multimodal_models(make: Any) -> None:
    model = make()
    read = read_layers(model, [0, 2], input_ids=IDS, attention_mask=torch.ones_like(IDS))
    states = hidden_states(model)
    for layer in (0, 2):
        torch.testing.assert_close(read[layer], states[layer + 1], rtol=1e-5, atol=1e-5)


def test_adapters_act_as_they_are_set() -> None:
    model = with_lora(tiny_model("llama"))
    on = read_layers(model, [2], input_ids=IDS)[2]
    with model.disable_adapter():
        off = read_layers(model, [2], input_ids=IDS)[2]
    torch.testing.assert_close(off, read_layers(tiny_model("llama"), [2], input_ids=IDS)[2])
    assert not torch.allclose(on, off, atol=1e-3)


def test_other_architectures_have_a_clear_error() -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(AnatomyError, match="'bert' is not supported; supported: gemma2, "):
        decoder_layers(bert)
    with pytest.raises(AnatomyError, match="'Linear' is not supported"):
        decoder_layers(nn.Linear(2, 2))
    with pytest.raises(AnatomyError, match="Layer 4 is out of range: the model has 4 layers, 0 to 3"):
        layer_module(tiny_model(), 4)
    prompted = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(AnatomyError, match="prompt-learning"):
        decoder_layers(prompted)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.7.hook_resid_post", 7),
        ("blocks.7.hook_resid_pre", 6),
        ("model.layers.12", 12),
        ("transformer.h.3", 3),
        ("model.language_model.layers.5", 5),
        ("gpt_neox.layers.0", 0),
    ],
)
def test_layer_of_hook(hook: str, layer: int) -> None:
    assert layer_of_hook(hook) == layer


@pytest.mark.parametrize(
    "hook", ["blocks.7.hook_mlp_out", "blocks.0.hook_resid_pre", "model.layers.3.mlp", "blocks.1.attn.hook_z", ""]
)
def test_hooks_outside_the_residual_stream_are_refused(hook: str) -> None:
    with pytest.raises(AnatomyError, match="can be read"):
        layer_of_hook(hook)


def reference(model: Any, pairs: Pairs, layer: int) -> list[torch.Tensor]:
    """Spans one sequence at a time, through transformers' own hidden states."""
    spans = []
    for i in range(len(pairs)):
        prompt, chosen, other, rejected = pairs.tokens(i)
        bos = int(bool(prompt) and prompt[0] == pairs.bos_token_id)
        for before, response in ((prompt, chosen), (other, rejected)):
            with torch.no_grad():
                output = model(input_ids=torch.tensor([before + response]), output_hidden_states=True, use_cache=False)
            states = output.hidden_states[layer + 1][0]
            if response is chosen:
                spans.append(states[bos : len(before)])
            spans.append(states[len(before) :])
    return spans


def assert_spans(model: Any, pairs: Pairs, layer: int, indices: list[int]) -> None:
    read = read_spans(model, pairs, indices, [layer])
    wanted = reference(model, pairs, layer)
    assert len(read.bounds) == 3 * len(indices) + 1
    for j, i in enumerate(indices):
        for span in range(3):
            part = read.hidden[layer][read.bounds[3 * j + span] : read.bounds[3 * j + span + 1]]
            torch.testing.assert_close(part, wanted[3 * i + span], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_read_together_are_those_read_one_by_one(family: str, attention: str) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers runs Gemma 2 with eager attention: its soft cap has no other form")
    model = tiny_model(family, **({} if family == "gpt2" else {"attn_implementation": attention}))
    pairs = read_pairs(dataset("conversational", 7), build_tokenizer(), max_length=90)
    assert_spans(model, pairs, 2, [3, 0, 6, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "mistral"])
def test_packed_is_plain(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is computed once where it can be, with the same result as two plain sequences."""
    model = tiny_model(family, **({} if attention_window(tiny_model(family)) is None else {"sliding_window": 256}))
    pairs = read_pairs(dataset("explicit", 6), build_tokenizer(), max_length=None)
    seen: list[int] = []
    layer_module(model, 0).register_forward_hook(
        lambda module, args, output: seen.append((output[0] if isinstance(output, tuple) else output).shape[0])
    )
    packed = read_spans(model, pairs, range(6), [0, 1])
    monkeypatch.setattr(forward, "shares_prompt", lambda model: False)
    plain = read_spans(model, pairs, range(6), [0, 1])
    assert seen == [6, 12]  # one row a pair, then two
    assert packed.bounds == plain.bounds
    for layer in (0, 1):
        torch.testing.assert_close(packed.hidden[layer], plain.hidden[layer], rtol=1e-5, atol=1e-5)


def test_a_short_window_and_foreign_attention_forbid_the_shared_row() -> None:
    assert attention_window(tiny_model("mistral")) == 8
    assert attention_window(tiny_model("olmo3")) == 8
    assert attention_window(tiny_model("qwen3")) is None
    assert attention_window(tiny_model("llama")) is None
    model = tiny_model("llama")
    assert shares_prompt(model)
    model.config._attn_implementation = "flash_attention_2"
    assert not shares_prompt(model)


def test_keep_end_reads_each_side_after_its_own_prompt() -> None:
    pairs = read_pairs(dataset("explicit", 10), build_tokenizer(), max_length=24, truncation="keep_end")
    prompts = [(p, q) for p, _, q, _ in map(pairs.tokens, range(len(pairs)))]
    assert any(p != q for p, q in prompts)
    assert_spans(tiny_model(), pairs, 1, list(range(10)))


def test_layers_after_the_last_one_read_are_not_run() -> None:
    model = tiny_model(layers=5)
    calls = [0] * 5
    for n, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda module, args, n=n: calls.__setitem__(n, calls[n] + 1))
    pairs = read_pairs(dataset("explicit", 3), build_tokenizer())
    read_spans(model, pairs, [0, 1, 2], [0, 2])
    assert calls == [1, 1, 1, 0, 0]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    pairs = read_pairs(dataset("explicit", 3), build_tokenizer())
    read = read_spans(model, pairs, [0, 1, 2], [1])
    assert not read.hidden[1].requires_grad
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError), frozen(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def test_bos_is_context_and_not_pooled() -> None:
    model = tiny_model()
    with_bos = read_pairs(dataset("explicit", 2), build_tokenizer(), max_length=None)
    prompt = with_bos.tokens(0)[0]
    assert prompt[0] == with_bos.bos_token_id
    assert read_spans(model, with_bos, [0], [0]).bounds[1] == len(prompt) - 1
    without = read_pairs(dataset("explicit", 2), build_tokenizer(bos=False), max_length=None)
    assert read_spans(model, without, [0], [0]).bounds[1] == len(without.tokens(0)[0]) == len(prompt) - 1


def test_batches_are_of_similar_length_and_bounded() -> None:
    pairs = read_pairs(dataset("explicit", 10), build_tokenizer(), max_length=None)
    lengths = pairs.packed_lengths
    batches = list(length_sorted_batches(pairs, range(10), 2 * int(lengths.max()) - 1))
    assert sorted(i for batch in batches for i in batch) == list(range(10))
    assert len(batches[0]) == 1
    assert max(map(len, batches)) > 1
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() < 2 * lengths.max()
    assert list(length_sorted_batches(pairs, [5, 2], 1)) == [[5], [2]]


def test_texts_are_read_in_batches() -> None:
    model = tiny_model("gpt2")
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    found = dict(read_texts(model, texts, [0, 1], pad_token_id=0, batch_tokens=8))
    for i, ids in enumerate(texts):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(found[i][1], states, rtol=1e-5, atol=1e-5)
