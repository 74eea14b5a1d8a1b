"""Short hashes that say whether two things are the same: a model, an SAE, settings."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .locate import decoder, decoder_layers, layer_module

_SAMPLE = 1024  # values read of each tensor: training moves all of them, so a sample tells two models apart


def hash_json(value: Any) -> str:
    """Hash of anything JSON can hold, independent of key order.

    >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], through: torch.dtype = torch.float32) -> str:
    """Hash of named tensors: names, shapes and an evenly strided sample of up to 1024 values of each.

    The values are rounded to `through`: bfloat16 gives weights one hash in every precision that may hold them.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", through).float().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's configuration and of a sample of its weights, adapters included.

    The same weights have the same fingerprint wherever they lie and in whatever precision holds them; a training step
    changes it, and so does switching an adapter on or off.
    """
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    # Where the model came from, and what a trainer writes into it, change nothing that is computed here.
    for key in ("_name_or_path", "transformers_version", "pad_token_id", "use_cache", "dtype", "torch_dtype"):
        settings.pop(key, None)
    return hash_json([settings, _switches(model), hash_tensors(model.named_parameters())])


def _switches(model: nn.Module) -> list[Any]:
    """Which adapters are on."""
    return sorted(
        {
            (tuple(module.active_adapters), module.disable_adapters)
            for module in cast(Iterable[Any], model.modules())
            if isinstance(getattr(module, "disable_adapters", None), bool)
        }
    )


def layer_fingerprint(model: nn.Module, layer: int) -> str:
    """Hash of what the output of a layer is computed from: settings, embeddings and the layers up to it.

    Language model and reward model on one backbone have one fingerprint, in whatever precision; another layer has
    another.

    Raises:
        AnatomyError: an unknown architecture, or no such layer.
    """
    layer_module(model, layer)
    base: Any = decoder(model)
    inputs = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    read = {id(p) for module in [*inputs, *decoder_layers(model)[: layer + 1]] for p in module.parameters()}
    used = [(name, p) for name, p in base.named_parameters() if id(p) in read]
    common = set(PretrainedConfig().to_dict())  # kind of head, number of labels, where it came from
    settings = {
        key: value
        for key, value in base.config.to_dict().items()
        if key not in common and not key.endswith("token_id") and key not in ("use_cache", "vocab_size")
    }
    return hash_json([settings, base.config.model_type, layer, _switches(base), hash_tensors(used, torch.bfloat16)])


def layer_weights(model: nn.Module, layer: int) -> str | None:
    """Hash of the weights of a model's layers up to one: where two differ, the models are not the same.

    It says less than `layer_fingerprint`, so that it does not tell apart what reads alike: settings change with the
    release of transformers, embeddings grow by a padding token.

    Returns:
        The hash, in float32 and bfloat16 alike; None where weights tell nothing: beside adapters, quantised, or in
        float16, which rounds small numbers otherwise than bfloat16.

    Raises:
        AnatomyError: an unknown architecture, or no such layer.
    """
    layer_module(model, layer)
    read = [(f"{i}.{name}", p) for i in range(layer + 1) for name, p in decoder_layers(model)[i].named_parameters()]
    told = {torch.float32, torch.float64, torch.bfloat16}
    if _switches(model) or getattr(model, "is_quantized", False) or {p.dtype for _, p in read} - told:
        return None
    return hash_tensors(read, torch.bfloat16)


def model_key(model: nn.Module) -> dict[str, str]:
    """What activations of a model depend on, for caches: its fingerprint and its precision."""
    return {"model": model_fingerprint(model), "dtype": str(next(model.parameters()).dtype)}
