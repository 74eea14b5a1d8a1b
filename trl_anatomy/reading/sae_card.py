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
# sae-lens' own keys, and those that were left out of its weights' definition by earlier versions.
_KNOWN = frozenset(
    {
        *(
            "model_name",
            "model_class_name",
            "model_from_pretrained_kwargs",
            "hook_name",
            "hook_name_out",
            "hf_hook_name",
        ),
        *(
            "hf_hook_name_out",
            "hook_head_index",
            "hook_head_index_out",
            "normalize_activations",
            "apply_b_dec_to_input",
        ),
        *("reshape_activations", "rescale_acts_by_decoder_norm", "decoder_init_norm", "dec_init_norm"),
        *(
            "normalize_sae_decoder",
            "scale_sparsity_penalty_by_decoder_norm",
            "training_architecture_details",
            "lp_norm",
        ),
        *("mse_loss_normalization", "jumprelu_tanh_scale", "n_batches_for_norm_estimate"),
    }
)
_PREPROCESSING = re.compile(
    r"(?i)norm|scal(e|ing|ar)|cent(er|re|ring)|whiten|standardi[sz]|subtract|(^|_)(mean|std|fold)|transform|preprocess"
    r"|apply_to|rotat|project|head_index|reshape"
)
_NOTHING: tuple[Any, ...] = (None, False, "", "none", "None", (), [], {})


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
    for key in ("hook_head_index", "reshape_activations"):
        if card.get(key) not in _NOTHING:
            raise _unknown(place, key, card[key])
    for key, value in card.items():
        if key not in _KNOWN and _PREPROCESSING.search(key) and value not in _NOTHING:
            raise _unknown(place, key, value)
    return bool(arguments.get(_CENTRES))


def _unknown(place: str, key: str, value: Any) -> AnatomyError:
    return AnatomyError(
        f"The SAE at {place} has {key}: {str(value)[:80]!r} in its card, a preprocessing of the hidden states that is "
        "not known here: fold it into the weights, or take the key out of its cfg.json if it changes nothing."
    )
