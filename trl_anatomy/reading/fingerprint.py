"""Short hashes that say whether two things are the same: a model, an SAE, settings."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

_SAMPLE = 1024  # values read of each tensor: training moves all of them, so a sample tells two models apart


def hash_json(value: Any) -> str:
    """Hash of anything JSON can hold, independent of key order.

    >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors: names, shapes and an evenly strided sample of up to 1024 values of each."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float32).contiguous()
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
    switches = {
        (tuple(module.active_adapters), module.disable_adapters)
        for module in cast(Iterable[Any], model.modules())
        if isinstance(getattr(module, "disable_adapters", None), bool)
    }
    return hash_json([settings, sorted(switches), hash_tensors(model.named_parameters())])


def model_key(model: nn.Module) -> dict[str, str]:
    """What activations of a model depend on, for caches: its fingerprint and its precision."""
    return {"model": model_fingerprint(model), "dtype": str(next(model.parameters()).dtype)}
