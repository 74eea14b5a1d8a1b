"""The places where this package reaches into transformers, peft and sae-lens. A failure names the seam that moved.

TRL's are in `test_trl_contract.py`.
"""

import inspect
import types
from importlib import import_module
from typing import Any, Generic, TypeVar

import pytest

# Package -> dotted name of what is used -> parameters it is called with by name; None where it is no call.
SEAMS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "transformers": {
        "AutoModelForCausalLM.from_config": None,
        "AutoModelForCausalLM.from_pretrained": None,
        "AutoConfig.from_pretrained": None,
        "AutoTokenizer.from_pretrained": None,
        "AutoProcessor.from_pretrained": None,
        "PretrainedConfig.get_text_config": (),
        "PreTrainedModel.get_output_embeddings": (),
        "PreTrainedModel.base_model_prefix": None,
        "PreTrainedModel.save_pretrained": ("save_directory",),
        "PreTrainedTokenizerBase.apply_chat_template": ("conversation", "add_generation_prompt"),
        "ProcessorMixin": None,
        "utils.chat_template_utils.datetime.now": None,
        "Trainer.training_step": ("model", "inputs", "num_items_in_batch"),
        "Trainer._prepare_inputs": ("inputs",),
        "integrations.deepspeed._hf_deepspeed_config_weak_ref": None,
        "integrations.deepspeed.set_hf_deepspeed_config": (),
        "integrations.deepspeed.unset_hf_deepspeed_config": (),
        "TrainerCallback.on_train_begin": ("args", "state", "control"),
        "TrainerCallback.on_log": ("args", "state", "control"),
        "LlamaModel.forward": ("input_ids", "attention_mask", "position_ids", "use_cache"),
        "Qwen3Model.forward": ("input_ids", "attention_mask", "position_ids", "use_cache"),
        "Gemma2Model.forward": ("input_ids", "attention_mask", "position_ids", "use_cache"),
        "GPT2Model.forward": ("input_ids", "attention_mask", "position_ids", "use_cache"),
        "GPTNeoXModel.forward": ("input_ids", "attention_mask", "position_ids", "use_cache"),
    },
    "peft": {
        "PeftModel.get_base_model": (),
        "PeftModel.disable_adapter": (),
        "tuners.tuners_utils.BaseTunerLayer.active_adapters": None,
        "tuners.tuners_utils.BaseTunerLayer.disable_adapters": None,
        "PromptLearningConfig.is_prompt_learning": None,
    },
    "sae_lens": {
        "SAE.load_from_disk": ("path", "device"),
        "SAE.from_dict": ("config_dict",),
        "SAE.encode": ("x",),
        "SAE.decode": ("feature_acts",),
        "SAE.process_sae_in": ("sae_in",),
        "SAE.process_state_dict_for_loading": ("state_dict",),
        "SAE.fold_activation_norm_scaling_factor": ("scaling_factor",),
        "SAE.save_model": ("path",),
        "TrainingSAE.load_from_disk": ("path", "device"),
        "TopKSAEConfig.k": None,
        "TopKSAEConfig.rescale_acts_by_decoder_norm": None,
        "SAEConfig.apply_b_dec_to_input": None,
        "SAEConfig.normalize_activations": None,
        "SAEConfig.architecture": (),
        "registry.SAE_CLASS_REGISTRY": None,
        "registry.SAE_TRAINING_CLASS_REGISTRY": None,
        "loading.pretrained_saes_directory.get_pretrained_saes_directory": (),
        "loading.pretrained_sae_loaders.get_safetensors_tensor_shapes": ("repo_id", "filename"),
    },
}


def found(package: str, name: str) -> Any:
    """What `package.name` is: through modules, classes, and fields of dataclasses."""
    place: Any = import_module(package)
    for part in name.split("."):
        if hasattr(place, part):
            place = getattr(place, part)
        elif part in getattr(place, "__dataclass_fields__", {}):
            place = place.__dataclass_fields__[part]
        else:
            try:
                place = import_module(f"{place.__name__}.{part}")
            except ImportError:
                pytest.fail(f"{package} moved the seam {name}: {place.__name__} has no {part!r}")
    return place


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in SEAMS for name in SEAMS[package]])
def test_seams_are_where_they_were(package: str, name: str) -> None:
    seam, wanted = found(package, name), SEAMS[package][name]
    if wanted is None:
        return
    parameters = inspect.signature(seam).parameters
    missing = [one for one in wanted if one not in parameters]
    assert not missing, f"{package} moved the seam {name}: it no longer takes {', '.join(missing)}"


def test_a_moved_seam_is_named() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"transformers moved the seam Trainer\.no_such_step"):
        found("transformers", "Trainer.no_such_step")


def test_models_are_loaded_whole_though_zero3_is_on() -> None:
    """transformers asks `is_deepspeed_zero3_enabled`; afterwards it hears what it heard before."""
    from transformers.integrations import deepspeed as glue

    from trl_anatomy.trainers.zero import loaded_whole

    class Settings:
        def is_zero3(self) -> bool:
            return True

    with loaded_whole():
        pass
    assert not glue.is_deepspeed_zero3_enabled()
    settings = Settings()  # transformers holds it weakly
    glue.set_hf_deepspeed_config(settings)
    try:
        with loaded_whole():
            assert not glue.is_deepspeed_zero3_enabled()
        assert glue.is_deepspeed_zero3_enabled()
    finally:
        glue.unset_hf_deepspeed_config()


def test_what_zero_init_leaves_behind_is_undone() -> None:
    from torch import nn

    from trl_anatomy.trainers.zero import undo_leftover

    of = TypeVar("of")
    undo_leftover()  # finds nothing
    nn.Module.__init_subclass__ = nn.Module.__init_subclass__  # how `deepspeed.zero.Init` ends
    try:
        with pytest.raises(AttributeError, match="__parameters__"):
            types.new_class("Broken", (nn.Module, Generic[of]))[int]
    finally:
        undo_leftover()
    assert "__init_subclass__" not in vars(nn.Module)
    assert types.new_class("Whole", (nn.Module, Generic[of])).__parameters__ == (of,)
