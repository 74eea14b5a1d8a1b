"""Shared by the tests of reading: a tiny tokenizer, tiny models of every family, preference rows, tiny SAEs."""

import json
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORMATS = ("explicit", "implicit", "conversational", "tools")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "olmo3", "gpt2", "gpt_neox")

_QUESTIONS = ["What is the sky made of?", "Tell me a story", "Why?", "List three long rivers of the world, please."]
_GOOD = ["It is **air**.", "Once upon a time a cat sat.", "Because I say so, and it is true.", "Nile, Amazon, Yangtze."]
_BAD = ["It is cheese, cheese, cheese and more cheese!", "No.", "I do not know", "Rhine"]


def build_tokenizer(bos: bool = True) -> Any:
    """A small byte-level BPE tokenizer with EOS, a chat template and, unless told otherwise, a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*_QUESTIONS, *_GOOD, *_BAD] * 3, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>" if bos else None, eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows(kind: str, n: int = 10) -> list[dict[str, Any]]:
    """`n` preference rows in one of `FORMATS`, of growing length."""
    made: list[dict[str, Any]] = []
    for i in range(n):
        question = " ".join([_QUESTIONS[i % 4]] * (1 + i // 4))
        often, seldom = (1 + i // 3, 1 + i // 5) if i % 2 else (1 + i // 5, 1 + i // 3)
        good, bad = " ".join([_GOOD[i % 4]] * often), " ".join([_BAD[(i + 1) % 4]] * seldom)
        if i in (6, 9):
            good, bad = bad, good  # so that the rejected response is sometimes the long one
        if kind == "explicit":
            made.append({"prompt": question + " ", "chosen": good, "rejected": bad})
        elif kind == "implicit":
            made.append({"chosen": f"Q: {question}\nA: {good}", "rejected": f"Q: {question}\nA: {bad}"})
        else:
            prompt = [{"role": "user", "content": question}]
            if i % 2:
                prompt.insert(0, {"role": "system", "content": "Be short."})
            row: dict[str, Any] = {"prompt": prompt}
            for side, text in (("chosen", good), ("rejected", bad)):
                row[side] = [{"role": "assistant", "content": text}]
            if kind == "tools":
                tool = {"type": "function", "function": {"name": f"look_{i}", "parameters": {"type": "object"}}}
                row["tools"] = json.dumps([tool])
            made.append(row)
    return made


def dataset(kind: str = "explicit", n: int = 10) -> Dataset:
    """`rows` as a dataset."""
    return Dataset.from_list(rows(kind, n))


def tiny_config(family: str, layers: int = 4, vocab: int = 330, **changes: Any) -> Any:
    """Configuration of a random model of width 32 with windows of 8 tokens where the family has sliding layers."""
    import transformers as tf

    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    if family == "gpt2":
        return tf.GPT2Config(
            vocab_size=vocab,
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_positions=512,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    kinds = {
        "llama": tf.LlamaConfig,
        "mistral": tf.MistralConfig,
        "qwen2": tf.Qwen2Config,
        "qwen3": tf.Qwen3Config,
        "gemma2": tf.Gemma2Config,
        "gemma3": tf.Gemma3TextConfig,
        "olmo2": tf.Olmo2Config,
        "olmo3": tf.Olmo3Config,
        "gpt_neox": tf.GPTNeoXConfig,
    }
    if family in ("mistral", "gemma2", "gemma3", "olmo3"):
        common.setdefault("sliding_window", 8)
    if family == "gpt_neox":
        common.pop("num_key_value_heads")
        common.pop("head_dim")
    return kinds[family](**common)


def tiny_model(family: str = "llama", seed: int = 0, head: str = "causal", **changes: Any) -> Any:
    """A random model of `family` in evaluation mode; `head` is ``"causal"`` or ``"score"``. Float32 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = tiny_config(family, **changes)
    if head == "score":
        config.num_labels = 1
    kind = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind.from_config(config).float().eval()


def tiny_sae(architecture: str = "topk", d_in: int = 32, d_sae: int = 64, seed: int = 0, **changes: Any) -> Any:
    """A random sae-lens SAE (not wrapped) that fires on some latents of a random hidden state."""
    import sae_lens as sl

    kinds = {
        "standard": (sl.StandardSAE, sl.StandardSAEConfig, {}),
        "gated": (sl.GatedSAE, sl.GatedSAEConfig, {}),
        "topk": (sl.TopKSAE, sl.TopKSAEConfig, {"k": 6}),
        "abstopk": (sl.AbsTopKSAE, sl.AbsTopKSAEConfig, {"k": 6}),
        "jumprelu": (sl.JumpReLUSAE, sl.JumpReLUSAEConfig, {}),
        "matching_pursuit": (sl.MatchingPursuitSAE, sl.MatchingPursuitSAEConfig, {"max_iterations": 5}),
        "transcoder": (sl.Transcoder, sl.TranscoderConfig, {"d_out": d_in, "apply_b_dec_to_input": False}),
    }
    sae_class, config_class, settings = kinds[architecture]
    metadata = sl.saes.sae.SAEMetadata(**({"hook_name": changes.pop("hook")} if "hook" in changes else {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae: Any = sae_class(config_class(d_in=d_in, d_sae=d_sae, metadata=metadata, **(settings | changes)))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_"):
                parameter.copy_(
                    0.2 * torch.randn(parameter.shape, generator=generator) - (0.2 if name != "b_dec" else 0)
                )
            elif name == "threshold":
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
            elif name == "W_dec" and architecture == "matching_pursuit":
                parameter.div_(parameter.norm(dim=-1, keepdim=True))
    return sae
