"""Tiny vision-language models with their processors, and tokenizers with chat templates that TRL ships."""

import json
from pathlib import Path
from typing import Any

import torch
import trl
from reading_world import build_tokenizer

VISION = ("gemma3", "llava", "idefics3")
_IMAGE_TOKENS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
_TEMPLATES = {"gemma3": "gemma3", "llava": "llava_next", "idefics3": "idefics3"}


def shipped(name: str) -> str:
    """A chat template that TRL ships."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def chat_rows(n: int = 8) -> list[dict[str, Any]]:
    """Conversations of two messages; every second chosen response has bold text."""
    sides = [("It is **air** today", "It is cheese"), ("Because it is true.", "No.")]
    return [
        {
            "prompt": [{"role": "user", "content": f"Why? {'Tell me a story ' * (i % 3)}"}],
            "chosen": [{"role": "assistant", "content": f"{sides[i % 2][0]} {i}"}],
            "rejected": [{"role": "assistant", "content": f"{sides[i % 2][1]} {i}"}],
        }
        for i in range(n)
    ]


def vision_model(kind: str, path: Path, *, tokenizer_template: str | None = None) -> Any:
    """Write a random text-and-images model with its processor; the processor.

    Args:
        kind: one of `VISION`.
        path: folder to write.
        tokenizer_template: in the older layout, in which processor and tokenizer keep a template each.
    """
    import transformers as tf

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*_IMAGE_TOKENS, "<image>"]})
    names = {"boi_token": _IMAGE_TOKENS[0], "eoi_token": _IMAGE_TOKENS[1], "image_token": _IMAGE_TOKENS[2]}
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=names if kind == "gemma3" else {"image_token": "<image>"},
    )
    tokenizer.chat_template = template = shipped(_TEMPLATES[kind])
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 16,  # some processors add tokens of their own
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tower: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    small = tower | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gemma3":
            config = tf.Gemma3Config(
                text_config=tf.Gemma3TextConfig(**text, head_dim=8),
                vision_config=tf.SiglipVisionConfig(**small),
                image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
                mm_tokens_per_image=4,
            )
            model: Any = tf.Gemma3ForConditionalGeneration(config)
            processor: Any = tf.Gemma3Processor(
                tf.Gemma3ImageProcessor(), tokenizer, chat_template=template, image_seq_length=4
            )
        elif kind == "llava":
            config = tf.LlavaConfig(
                text_config=tf.LlamaConfig(**text),
                vision_config=tf.CLIPVisionConfig(**small),
                image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            )
            model = tf.LlavaForConditionalGeneration(config)
            processor = tf.LlavaProcessor(
                tf.CLIPImageProcessor(), tokenizer, patch_size=14, chat_template=template, image_token="<image>"
            )
        else:
            config = tf.Idefics3Config(
                text_config=tf.LlamaConfig(**text),
                vision_config=small,
                image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                scale_factor=1,
                pad_token_id=0,
            )
            model = tf.Idefics3ForConditionalGeneration(config)
            processor = tf.Idefics3Processor(
                tf.Idefics3ImageProcessor(), tokenizer, image_seq_len=4, chat_template=template
            )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    if tokenizer_template is not None:
        (path / "chat_template.jinja").unlink()
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings["chat_template"] = tokenizer_template
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return processor
