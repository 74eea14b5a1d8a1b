"""What an SAE's card says was done to the hidden states before it read them in training."""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import AnatomyError

_CENTRES = "center_writing_weights"
# Arguments of the models that sae-lens loads to train on, none of which changes the residual stream between two layers:
# other rewritings of weights by TransformerLens (equal functions), and where, how exactly and from where they load.
_HARMLESS_ARGUMENTS = frozenset(
    {
        *("fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices", "default_prepend_bos"),
        *(
            "default_padding_side",
            "checkpoint_index",
            "checkpoint_value",
            "checkpoint_label",
            "first_n_layers",
            "n_ctx",
        ),
        *("device", "n_devices", "device_map", "move_to_device", "max_memory", "offload_folder", "low_cpu_mem_usage"),
        *("dtype", "torch_dtype", "load_in_4bit", "load_in_8bit", "quantization_config", "attn_implementation"),
        *("revision", "subfolder", "variant", "cache_dir", "local_files_only", "force_download", "token"),
        *("use_auth_token", "use_safetensors", "trust_remote_code", "tokenizer", "hf_model", "use_cache"),
    }
)
# sae-lens' own, which say nothing of what was done to the activations, or are judged elsewhere.
_KNOWN = frozenset({"normalize_activations", "rescale_acts_by_decoder_norm", "hook_head_index_out"})
# Keys that say so by themselves, and, of those that speak of activations, those that say what was done to them.
_PREPROCESSING = re.compile(
    r"(?i)cent(er|re|ring)|whiten|standardi[sz]|subtract|preprocess|apply_to|head_index|rotat"
    r"|(scal(e|ing)|norm(ali[sz]ation)?)_factor|^(mean|std|scale|scaling|norm)$"
    r"|^(?=.*(activation|(^|_)acts?(_|$)|input|resid|stream|hidden)).*(norm|scal|(^|_)(mean|std|fold)|transform(?!er))"
)


def reads_centred(card: Mapping[str, Any], place: str) -> bool:
    """Whether an SAE was trained on a residual stream whose mean over the width was taken from every token.

    TransformerLens' `center_writing_weights` does that to models with LayerNorm, which do not feel the difference.

    Args:
        card: an SAE's metadata in sae-lens' names, and what else its configuration holds.
        place: where the SAE lies, for the error.

    Raises:
        AnatomyError: the card tells of a preprocessing that is not known here.

    >>> reads_centred({"model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": True}}, "'a'")
    True
    """
    arguments = card.get("model_from_pretrained_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise _unknown(place, "model_from_pretrained_kwargs", arguments)
    for key, value in arguments.items():
        if key not in (_CENTRES, *_HARMLESS_ARGUMENTS) or (key == _CENTRES and not isinstance(value, bool | None)):
            raise _unknown(place, f"model_from_pretrained_kwargs.{key}", value)
    for key, value in card.items():
        told = key in ("hook_head_index", "reshape_activations") or (key not in _KNOWN and _PREPROCESSING.search(key))
        if told and not (value is None or value is False or value in ("", "none", [], {})):
            raise _unknown(place, key, value)
    return bool(arguments.get(_CENTRES))


def _unknown(place: str, key: str, value: Any) -> AnatomyError:
    return AnatomyError(
        f"The SAE at {place} has {key}: {str(value)[:80]!r} in its card, a preprocessing of the hidden states that is "
        "not known here: fold it into the weights, or take the key out of its cfg.json if it changes nothing."
    )
