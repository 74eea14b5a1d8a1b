"""What this package rests on in trl, transformers, peft and sae-lens: one list of names, signatures and source lines.

Read by the check at run time (`trl_anatomy.versions`), by the contract tests, and by `benchmarks/canary.py`, which
looks the places up in the sources of each release. That one loads this file by itself, so it imports the standard
library alone. Names that the package only imports stand in its own import statements, where the canary reads them.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Seam:
    """A place in another package.

    Attributes:
        name: ``module:qualified.name``, or ``module`` alone.
        ours: our file that rests on it.
        takes: parameters that a function is called with by name; with `exactly`, all that it has, in order. None for
            what is no call.
        exactly: see `takes`.
        says: pieces of its source, which follow each other in this order. Blanks do not count.
        since, before: the releases of its package that it serves: from `since` on, up to and without `before`.
    """

    name: str
    ours: str
    takes: tuple[str, ...] | None = None
    exactly: bool = False
    says: tuple[str, ...] = ()
    since: tuple[int, ...] = ()
    before: tuple[int, ...] = (9999,)

    @property
    def package(self) -> str:
        """The package by the name that Python imports."""
        return self.name.split(".")[0].split(":")[0]

    def serves(self, release: tuple[int, ...]) -> bool:
        """Whether a release of the package has it."""
        return self.since <= release < self.before


def release_of(version: str) -> tuple[int, ...]:
    """The numbers of a version: ``1.16.0.dev0`` -> (1, 16, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def seams_of(package: str, version: str) -> Iterator[Seam]:
    """The seams that a version of a package must have."""
    release = release_of(version)
    return (seam for seam in SEAMS if seam.package == package and seam.serves(release))


FUSED_HEAD = (1, 15)  # trl: DPO's policy outputs hold log-probabilities; before, logits
SHARED_PREFIX = (1, 14)  # trl: DPO's rows are cut where prompt and whole row diverge; before, after the prompt's tokens

_DPO, _REWARD, _SFT = "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer", "trl.trainer.sft_trainer"
_BATCH = ("self", "model", "inputs")
_ROWS = ("self", "dataset", "processing_class", "args", "dataset_name")
_COLUMNS = "trl_anatomy/trainers/seams.py"
_DPO_FILE, _REWARD_FILE = "trl_anatomy/trainers/dpo.py", "trl_anatomy/trainers/reward.py"
_PREPARE, _TOKENS = "trl_anatomy/trainers/prepare.py", "trl_anatomy/reading/preparation.py"
_ONLINE = "trl_anatomy/trainers/concept_reward.py"
_CHECKPOINTS = "trl_anatomy/trainers/checkpoints.py"
_CONSTRUCTOR = (
    "model",
    "args",
    "data_collator",
    "train_dataset",
    "processing_class",
    "callbacks",
    "quantization_config",
)

_TRL = (
    # the loss
    Seam(f"{_DPO}:DPOTrainer.compute_ref_log_probs", _DPO_FILE, _BATCH, exactly=True, since=(1, 9)),
    Seam(
        f"{_DPO}:DPOTrainer._compute_loss",
        _DPO_FILE,
        (*_BATCH, "return_outputs"),
        exactly=True,
        says=(
            "self.precompute_ref_logps",
            'inputs["ref_chosen_logps"]',
            'inputs["ref_rejected_logps"]',
            "Unknown loss type",
        ),
    ),
    Seam(
        f"{_DPO}:DPOTrainer._compute_loss",
        _DPO_FILE,
        says=("labels=labels, fused_lm_head=True", "outputs.log_probs"),
        since=FUSED_HEAD,
    ),
    Seam(
        f"{_DPO}:DPOTrainer.compute_ref_log_probs",
        _DPO_FILE,
        says=("fused_lm_head=True).log_probs",),
        since=FUSED_HEAD,
    ),
    Seam(
        f"{_DPO}:DPOTrainer._compute_loss",
        _DPO_FILE,
        says=("outputs = model(**model_kwargs)", "shift_logits = outputs.logits[..., :-1, :]"),
        before=FUSED_HEAD,
    ),
    *(
        Seam(f"{_DPO}:DPOTrainer._compute_loss", _DPO_FILE, says=(f'self._metrics[mode]["rewards/{name}"].append(',))
        for name in ("chosen", "rejected", "accuracies", "margins")
    ),
    Seam(
        f"{_REWARD}:RewardTrainer.compute_loss", _REWARD_FILE, (*_BATCH, "return_outputs", "num_items_in_batch"), True
    ),
    Seam(f"{_REWARD}:RewardTrainer.compute_loss", _REWARD_FILE, says=('if "margin" in inputs:', 'inputs["margin"]')),
    # the step and the columns
    *(
        Seam(f"{module}:{trainer}.training_step", _COLUMNS, ("self", "args", "kwargs"), exactly=True)
        for module, trainer in ((_DPO, "DPOTrainer"), (_REWARD, "RewardTrainer"))
    ),
    *(
        Seam(
            f"{module}:{trainer}._set_signature_columns_if_needed",
            _COLUMNS,
            ("self",),
            True,
            ("self._signature_columns",),
        )
        for module, trainer in ((_DPO, "DPOTrainer"), (_REWARD, "RewardTrainer"))
    ),
    Seam(
        f"{_DPO}:DPOTrainer._precompute_ref_logps", _DPO_FILE, ("self", "dataset", "name", "batch_size"), exactly=True
    ),
    Seam(
        f"{_DPO}:DataCollatorForPreference",
        _COLUMNS,
        says=("max_length", "truncation_mode", '"prompt_ids"', '"chosen_ids"', "ref_chosen_logps"),
    ),
    # rows and tokens
    *(
        Seam(f"{module}:{trainer}._prepare_dataset", _TOKENS, _ROWS, True, ("is_conversational(",))
        for module, trainer in ((_DPO, "DPOTrainer"), (_REWARD, "RewardTrainer"))
    ),
    Seam(
        f"{_DPO}:DPOTrainer._prepare_dataset",
        _TOKENS,
        says=("prompt_len = min(", "prompt_ids[:prompt_len]", "prompt_chosen_ids[prompt_len:]"),
        since=SHARED_PREFIX,
    ),
    Seam(
        f"{_DPO}:DPOTrainer._prepare_dataset",
        _TOKENS,
        says=('output["prompt_ids"] = prompt_ids', "prompt_chosen_ids[len(prompt_ids) :]"),
        before=SHARED_PREFIX,
    ),
    Seam(
        f"{_SFT}:SFTTrainer._prepare_dataset",
        "trl_anatomy/reading/sft.py",
        ("self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
        exactly=True,
    ),
    *(Seam(f"{module}:is_conversational", _TOKENS, ("example",), exactly=True) for module in (_DPO, _REWARD)),
    Seam("trl.data_utils:_tokenize", "trl_anatomy/reading/processing.py", ("processing_class", "input")),
    Seam(
        "trl.chat_template_utils:clone_chat_template",
        "trl_anatomy/reading/processing.py",
        ("model", "tokenizer", "source_tokenizer_path"),
    ),
    # construction
    *(
        Seam(f"{module}:{trainer}.__init__", _PREPARE, _CONSTRUCTOR)
        for module, trainer in ((_DPO, "DPOTrainer"), (_REWARD, "RewardTrainer"))
    ),
    *(
        Seam(f"trl.trainer.dpo_config:DPOConfig.{name}", _PREPARE)
        for name in (
            *("max_length", "truncation_mode", "loss_type", "f_divergence_type", "beta", "model_init_kwargs"),
            *("dataset_num_proc", "trust_remote_code", "pad_token", "precompute_ref_log_probs", "use_liger_kernel"),
        )
    ),
    *(
        Seam(f"trl.trainer.reward_config:RewardConfig.{name}", _PREPARE)
        for name in ("max_length", "model_init_kwargs", "eos_token", "chat_template_path")
    ),
    # online trainers
    *(
        Seam(f"trl.trainer.{module}", _ONLINE, says=("completion_ids=completion_ids_list, **reward_kwargs",))
        for module in ("grpo_trainer", "rloo_trainer")
    ),
    Seam(
        "trl.chat_template_utils:get_training_chat_template", _ONLINE, ("processing_class", "tokenizer"), exactly=True
    ),
    Seam("trl.chat_template_utils:is_chat_template_prefix_preserving", _ONLINE, ("processing_class",), exactly=True),
)

_TRAINER = "transformers.trainer:Trainer"
_LOCATE, _FORWARD = "trl_anatomy/reading/locate.py", "trl_anatomy/reading/forward.py"
_FORWARDS = ("input_ids", "attention_mask", "position_ids", "use_cache")
_AUTO = "transformers.models.auto"

_TRANSFORMERS = (
    Seam(f"{_TRAINER}.__init__", _COLUMNS, says=("self.data_collator = ",)),
    Seam(
        f"{_TRAINER}.training_step",
        _COLUMNS,
        ("self", "model", "inputs", "num_items_in_batch"),
        exactly=True,
        says=("self.accelerator.backward(",),
    ),
    Seam(f"{_TRAINER}._prepare_inputs", _COLUMNS, ("self", "inputs"), exactly=True),
    Seam(f"{_TRAINER}.save_model", _REWARD_FILE, says=("self._save(",)),
    Seam(f"{_TRAINER}._save", _REWARD_FILE, ("self", "output_dir", "state_dict"), exactly=True),
    Seam(f"{_TRAINER}.train", _CHECKPOINTS, ("resume_from_checkpoint",)),
    Seam(
        f"{_TRAINER}._save_checkpoint",
        _CHECKPOINTS,
        ("self", "model", "trial"),
        exactly=True,
        says=(
            "self.save_model(",
            "self._save_optimizer_and_scheduler(",
            "self._save_scaler(",
            "self._save_rng_state(",
            "self.state.save_to_json(",
        ),
    ),
    Seam(f"{_TRAINER}._save_rng_state", _CHECKPOINTS, ("self", "output_dir"), exactly=True),
    Seam(f"{_TRAINER}._get_output_dir", _CHECKPOINTS, ("self", "trial"), exactly=True),
    *(
        Seam(f"transformers.trainer_callback:TrainerCallback.{name}", "trl_anatomy/trainers/callback.py", takes)
        for name, takes in (
            ("on_train_begin", ("args", "state", "control")),
            ("on_log", ("args", "state", "control")),
        )
    ),
    *(
        Seam(f"{_AUTO}.{name}", "trl_anatomy/reading/processing.py")
        for name in (
            "modeling_auto:AutoModelForCausalLM.from_config",
            "modeling_auto:AutoModelForCausalLM.from_pretrained",
            "configuration_auto:AutoConfig.from_pretrained",
            "tokenization_auto:AutoTokenizer.from_pretrained",
            "processing_auto:AutoProcessor.from_pretrained",
        )
    ),
    Seam("transformers.processing_utils:ProcessorMixin", _PREPARE),
    Seam(
        "transformers.tokenization_utils_base:PreTrainedTokenizerBase.apply_chat_template",
        "trl_anatomy/reading/chat.py",
        ("conversation", "add_generation_prompt"),
    ),
    Seam("transformers.utils.chat_template_utils", "trl_anatomy/reading/clock.py", says=("datetime.now()",)),
    Seam("transformers.configuration_utils:PretrainedConfig.get_text_config", _LOCATE, ()),
    Seam("transformers.modeling_utils:PreTrainedModel.get_output_embeddings", "trl_anatomy/reading/logprobs.py", ()),
    Seam("transformers.modeling_utils:PreTrainedModel.base_model_prefix", _LOCATE),
    Seam(
        "transformers.modeling_utils:PreTrainedModel.save_pretrained",
        "trl_anatomy/testbed/world.py",
        ("save_directory",),
    ),
    *(
        Seam(f"transformers.models.{name}Model.forward", _FORWARD, _FORWARDS)
        for name in (
            "llama.modeling_llama:Llama",
            "qwen3.modeling_qwen3:Qwen3",
            "gemma2.modeling_gemma2:Gemma2",
            "gpt2.modeling_gpt2:GPT2",
            "gpt_neox.modeling_gpt_neox:GPTNeoX",
        )
    ),
    *(
        Seam(f"transformers.integrations.deepspeed:{name}", "trl_anatomy/trainers/zero.py")
        for name in ("_hf_deepspeed_config_weak_ref", "set_hf_deepspeed_config", "unset_hf_deepspeed_config")
    ),
)

_ADAPTERS = "trl_anatomy/reading/fingerprint.py"

_PEFT = (
    Seam("peft.peft_model:PeftModel.get_base_model", _LOCATE, ()),
    Seam("peft.peft_model:PeftModel.disable_adapter", _DPO_FILE, ()),
    Seam("peft.tuners.tuners_utils:BaseTunerLayer.active_adapters", _ADAPTERS),
    Seam("peft.tuners.tuners_utils:BaseTunerLayer.disable_adapters", _ADAPTERS),
    Seam("peft.config:PromptLearningConfig.is_prompt_learning", _LOCATE),
)

_SAE = "trl_anatomy/reading/sae.py"

_SAE_LENS = (
    *(
        Seam(f"sae_lens.saes.sae:{name}", _SAE, takes)
        for name, takes in (
            ("SAE.load_from_disk", ("path", "device")),
            ("SAE.from_dict", ("config_dict",)),
            ("SAE.encode", ("x",)),
            ("SAE.decode", ("feature_acts",)),
            ("SAE.process_sae_in", ("sae_in",)),
            ("SAE.process_state_dict_for_loading", ("state_dict",)),
            ("SAE.fold_activation_norm_scaling_factor", ("scaling_factor",)),
            ("SAE.save_model", ("path",)),
            ("TrainingSAE.load_from_disk", ("path", "device")),
            ("SAEConfig.apply_b_dec_to_input", None),
            ("SAEConfig.normalize_activations", None),
            ("SAEConfig.architecture", ()),
        )
    ),
    Seam("sae_lens.saes.topk_sae:TopKSAEConfig.k", _SAE),
    Seam("sae_lens.saes.topk_sae:TopKSAEConfig.rescale_acts_by_decoder_norm", _SAE),
    Seam("sae_lens.registry:SAE_CLASS_REGISTRY", _SAE),
    Seam("sae_lens.registry:SAE_TRAINING_CLASS_REGISTRY", _SAE),
    Seam(
        "sae_lens.loading.pretrained_saes_directory:get_pretrained_saes_directory",
        "trl_anatomy/reading/sae_list.py",
        (),
    ),
    Seam("sae_lens.loading.pretrained_sae_loaders:get_safetensors_tensor_shapes", _SAE, ("repo_id", "filename")),
)

SEAMS: tuple[Seam, ...] = (*_TRL, *_TRANSFORMERS, *_PEFT, *_SAE_LENS)
