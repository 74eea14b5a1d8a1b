"""`trl-anatomy audit`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from typing import Any

from ..audit.config import NO_SAE, AuditConfig
from ..errors import AnatomyError
from .labeller import check_labeller, name_concepts
from .options import DATA, MODEL, AuditFlags, strict_parse, trl_parser
from .shown_audit import dry_run_table, print_audit, print_habits, print_regions


def arguments(argv: list[str]) -> tuple[Any, ...]:
    """The settings of the audit, and the flags beside them. A recipe's `audit` names the folder."""
    parser = trl_parser(
        "audit",
        (AuditConfig, AuditFlags),
        f"trl-anatomy audit {MODEL} {DATA} --output_dir audits/run1",
        f"trl-anatomy audit {DATA}",
        required=("dataset",),
        common=("model", "sae", "out", "dataset_split", "max_length", "dry_run", "json"),
    )
    return strict_parse(parser, argv, {"audit": "out"})


def run(argv: list[str]) -> int:
    from ..audit.find_sae import AUTO
    from ..audit.run import dry_run, run_audit
    from ..reading.ranks import is_main_process

    config, flags = arguments(argv)
    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        check_labeller(flags)
        config = _against(config, flags)
    if config.sae == NO_SAE or not (config.sae or config.model):
        config.sae = ""
        return _audit_text(config, flags)
    config.sae = config.sae or AUTO
    with redirect_stdout(sys.stderr):
        summary = dry_run(config) if flags.dry_run else None
        audit = None if flags.dry_run else run_audit(config)
        if audit is not None and is_main_process() and flags.label_model is not None:
            name_concepts(audit, flags)
    if audit is None:
        print(json.dumps(summary, indent=2) if flags.json else dry_run_table(summary or {}))
    elif not is_main_process():
        pass
    elif flags.json:
        print(json.dumps(audit.info, indent=2))
    elif config.data_kind == "sft":
        print_regions(audit)
    else:
        print_audit(audit)
    return 0


def _against(config: AuditConfig, flags: Any) -> AuditConfig:
    """The audit that --against asks for, of pairs whose other side the start model has written."""
    if flags.against is None:
        return config
    from ..checking.against import against_model

    if flags.against != "model":
        raise AnatomyError(f"--against: found {flags.against!r}, allowed: model.")
    if flags.dry_run or "RANK" in os.environ:
        what = "--dry_run samples nothing" if flags.dry_run else "it samples in one process"
        raise AnatomyError(f"--against: {what}; leave one of the two out.")
    return against_model(config, flags.n_prompts, flags.max_new_tokens, flags.sample_batch_size)


def _audit_text(config: AuditConfig, flags: Any) -> int:
    """Count habits alone, without an SAE."""
    from ..audit.text_audit import run_text_audit
    from ..reading.files import without_nan
    from ..reading.ranks import is_main_process

    if flags.label_model is not None or flags.dry_run:
        what = "--dry_run" if flags.label_model is None else "--label_model"
        raise AnatomyError(
            f"{what} goes with --model and an SAE; without, an audit counts habits, which takes seconds."
        )
    if not is_main_process():
        return 0
    with redirect_stdout(sys.stderr):  # as in _audit
        audit = run_text_audit(config)
    if flags.json:
        habits = audit.habits.drop_columns(["snippets"]).to_pylist()
        print(json.dumps(without_nan({**audit.info, "habits": habits}), indent=2))
    else:
        print_habits(audit)
    return 0
