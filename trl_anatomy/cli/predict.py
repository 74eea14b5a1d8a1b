"""`trl-anatomy predict`."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from .. import recipe
from ..errors import AnatomyError
from .options import DATA, MODEL, PolicyArguments, PredictArguments, strict_parse, trl_parser
from .training import NEEDED, USUAL, check_named, our_files, remote_code_named, replaced_name, script_types


def arguments(argv: list[str]) -> tuple[Any, ...]:
    """Options of TRL's script, and ours."""
    recipe.refuse_reward(argv)
    parser = trl_parser(
        "predict",
        (PolicyArguments, PredictArguments),
        f"trl-anatomy predict {MODEL} {DATA} --output_dir runs/dpo --audit audits/run1 --concept_policy policy.yaml",
        required=("audit", *NEEDED),
        common=("concept_policy", "prompts", "n_prompts", "budget", "prediction", "json", *USUAL),
        theirs=script_types("dpo"),
    )
    return strict_parse(parser, argv)


def run(argv: list[str]) -> int:
    """Build the trainer of a `dpo` recipe, record its first step, and train a pilot of it."""
    script = import_module("trl.scripts.dpo")
    script_args, training, model_args, *rest = arguments(argv)
    *other, policy, flags = rest
    if policy.audit is None:
        raise AnatomyError("predict needs the audit of the training set: --audit.")
    check_named("predict", script_args, training, model_args, *other)
    for name in ("n_prompts", "n_per_prompt", "max_new_tokens", "sample_batch_size", "n_pairs"):
        if getattr(flags, name) < 1:
            raise AnatomyError(f"--{name} is {getattr(flags, name)}; give a whole number above 0.")
    if training.world_size > 1:  # before responses are sampled
        raise AnatomyError("predict runs in one process: start it without a launcher.")

    from ..audit.folder import load_audit
    from ..checking.prediction import FOLDER, PLAIN, POLICY, predict, prediction_report
    from ..checking.responses import prompts_for
    from ..reading.storage import local

    with redirect_stdout(sys.stderr):  # as in plan
        audit = load_audit(policy.audit)
        audit.check_kind("predict")
        recipe.check_version(audit, model_args, training)
        prompts = prompts_for(audit, flags.prompts, flags.n_prompts, training.seed)
        training.report_to, training.save_strategy, training.push_to_hub = [], "no", False
        training.eval_strategy = type(training.eval_strategy)("no")
        if not (model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit):
            model_args.dtype = "float32"  # a small step would be lost in the rounding of trained weights
        given = (script_args, training, model_args, *other)
        made = {PLAIN: lambda: _trainer_of(script, given, None, policy.audit)}
        if policy.concept_policy is not None:
            made[POLICY] = lambda: _trainer_of(script, given, policy.concept_policy, policy.audit)
        result = predict(
            audit,
            model_args.model_name_or_path,
            made,
            prompts,
            out=local(flags.prediction) if flags.prediction else audit.path / FOLDER,
            policy=policy.concept_policy,
            n_per_prompt=flags.n_per_prompt,
            max_new_tokens=flags.max_new_tokens,
            batch_size=flags.sample_batch_size,
            seed=training.seed,
            n_pairs=flags.n_pairs,
            budget=flags.budget,
            null_drift=flags.null_drift,
        )
    print(json.dumps(result, indent=2) if flags.json else prediction_report(result))
    return 0


class _Made(Exception):
    """Carries a trainer out of TRL's script, which would go on to train it."""


def _trainer_of(script: Any, arguments: Sequence[Any], concept_policy: Any, audit: Any) -> Any:
    """The trainer that TRL's script makes of its arguments, before it begins."""
    from ..trainers.dpo import AnatomyDPOTrainer

    def build(*args: Any, **kwargs: Any) -> Any:
        raise _Made(AnatomyDPOTrainer(*args, concept_policy=concept_policy, audit=audit, **kwargs))

    replaced = replaced_name(import_module("trl"), "DPOTrainer", build)
    with replaced, our_files(*arguments), remote_code_named(arguments[2]):
        try:
            script.main(*map(copy.deepcopy, arguments))
        except _Made as made:
            return made.args[0]
    raise RuntimeError("TRL's script made no trainer.")
