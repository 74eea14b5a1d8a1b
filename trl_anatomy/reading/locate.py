"""Model and layer -> the module whose output is read or edited, for every supported architecture."""

import re
from typing import Any

from torch import nn

from ..errors import AnatomyError

# model_type of the text model -> name of its list of layers. Each row is tested on a small random model.
_LAYER_LISTS = {
    "llama": "layers",
    "mistral": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
    "gemma2": "layers",
    "gemma3_text": "layers",
    "olmo2": "layers",
    "olmo3": "layers",
    "gpt2": "h",
    "gpt_neox": "layers",
}
# Of these, the ones in which all that reads the residual stream first takes its mean over the width away.
_LAYER_NORM = ("gpt2", "gpt_neox")
_TEXT_PARTS = ("language_model", "text_model")  # of models of text and images
# Modules by what their weight does with the residual stream; the names of all architectures above.
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in")
_WRITERS = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h")
_READERS = (
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc", "query_key_value", "dense_h_to_4h"),
    *("lm_head", "embed_out", "score"),
)
_CONV1D = ("c_proj", "c_attn", "c_fc")  # GPT-2 keeps these weights as (in, out), all others as (out, in)
# What computes attention from the mask it is given, so that several sequences may share one row.
_MASKED_ATTENTION = ("eager", "sdpa")


def _unwrap(model: Any) -> Any:
    """The plain transformers model below DDP and PEFT wrappers; adapters live inside it and stay as they are."""
    while True:
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if any(config.is_prompt_learning for config in model.peft_config.values()):
                raise AnatomyError(
                    "The model has a prompt-learning adapter, whose virtual tokens belong to no span: use LoRA or the "
                    "model itself."
                )
            model = model.get_base_model()
        elif not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def decoder(model: Any) -> nn.Module:
    """The text decoder of a model: token embeddings, layers and last norm, without a head.

    Args:
        model: a transformers model (bare, with a language-model or a sequence-classification head, or one of text and
            images), wrapped by PEFT or not.

    Raises:
        AnatomyError: the architecture is not supported.
    """
    model = _unwrap(model)
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    model_type = getattr(text_config, "model_type", type(model).__name__)
    if model_type not in _LAYER_LISTS:
        raise AnatomyError(
            f"The architecture {model_type!r} is not supported; supported: {', '.join(sorted(_LAYER_LISTS))}."
        )
    base = getattr(model, model.base_model_prefix, model)
    base = next((part for name in _TEXT_PARTS if (part := getattr(base, name, None)) is not None), base)
    if not isinstance(getattr(base, _LAYER_LISTS[model_type], None), nn.ModuleList):
        raise AnatomyError(
            f"{type(model).__name__} keeps its layers in an unknown place (expected {_LAYER_LISTS[model_type]!r} in "
            f"{type(base).__name__}); use the causal-LM or the sequence-classification model of transformers."
        )
    return base


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a model, first to last. Raises AnatomyError for an unknown architecture."""
    base: Any = decoder(model)
    return getattr(base, _LAYER_LISTS[base.config.model_type])


def layer_module(model: Any, layer: int) -> nn.Module:
    """The module whose output is the residual stream after layer `layer` (counted from 0).

    Raises:
        AnatomyError: there is no such layer.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise AnatomyError(
            f"Layer {layer} is out of range: the model has {len(layers)} layers, 0 to {len(layers) - 1}."
        )
    return layers[layer]


def hidden_size(model: Any) -> int:
    """Width of the residual stream, d_model."""
    base: Any = decoder(model)
    return int(base.config.hidden_size)


def normalises_by_layer_norm(model: Any) -> bool:
    """Whether nothing in the model feels the mean of the residual stream over its width: LayerNorm before every use."""
    base: Any = decoder(model)
    return base.config.model_type in _LAYER_NORM


def residual_dimension(name: str) -> int | None:
    """Dimension, of width d_model, with which a parameter meets the residual stream; None where it does not.

    A weight that writes the stream (attention and MLP output, embeddings) meets it with its output side, also where
    its input side has the same width; every other one that is fed from the stream with its input side. Of LoRA's two
    factors one side meets it: B of a writer, A of a reader. Norm gains and biases of readers do not meet it. Between
    stream and weight there may be a norm, whose gain is not counted in.

    >>> names = ("layers.0.self_attn.o_proj.weight", "layers.0.self_attn.q_proj.weight")
    >>> [residual_dimension(name) for name in names], residual_dimension("layers.0.q_proj.lora_B.default.weight")
    ([0, 1], None)
    """
    parts = name.split(".")
    roles = [part for part in parts if part in (*_EMBEDDINGS, *_WRITERS, *_READERS)]
    if not roles:
        return None
    role = roles[-1]
    adapter = next((part for part in parts if part.startswith("lora_")), None)
    if adapter is not None:
        if role in _EMBEDDINGS:
            return 0 if adapter == "lora_embedding_B" else None
        sides = {"lora_B": 0} if role in _WRITERS else {"lora_A": 1}
        return sides.get(adapter) if parts[-1] == "weight" else None
    if parts[-1] == "bias":
        return 0 if role in _WRITERS else None
    if parts[-1] != "weight":
        return None
    return int((role in _WRITERS) == (role in _CONV1D))


def layer_of_hook(hook_name: str) -> int:
    """Layer whose output an SAE's hook name means.

    ``blocks.N.hook_resid_post`` is the output of layer N, ``blocks.N.hook_resid_pre`` that of layer N-1; a module path
    such as ``model.layers.N`` is layer N.

    Raises:
        AnatomyError: the hook is not the residual stream between two layers.

    >>> [layer_of_hook(name) for name in ("blocks.3.hook_resid_post", "blocks.3.hook_resid_pre", "model.layers.3")]
    [3, 2, 3]
    """
    lens = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    if lens:
        layer = int(lens[1]) - (lens[2] == "pre")
        if layer < 0:
            raise AnatomyError(f"The SAE reads {hook_name!r}, the embeddings; only outputs of layers can be read.")
        return layer
    path = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d+)", hook_name)
    if path:
        return int(path[1])
    raise AnatomyError(
        f"The SAE reads {hook_name!r}; only the residual stream can be read: blocks.N.hook_resid_post, "
        "blocks.N.hook_resid_pre or a module path such as model.layers.N."
    )


def shares_prompt(model: Any) -> bool:
    """Whether both responses of a pair may be read in one row after one prompt, kept apart by the attention mask.

    True where attention follows a given mask (eager, sdpa); rows longer than `attention_window` still go one by one.
    """
    base: Any = decoder(model)
    return base.config._attn_implementation in _MASKED_ATTENTION


def attention_window(model: Any) -> int | None:
    """Longest sequence, in tokens, on which every layer attends in full; None where there is no sliding window."""
    config: Any = decoder(model).config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)
