"""`trl-anatomy plan`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from .. import recipe
from .options import add_audited, audited, ours, plain_parser

_AUDITED = ("model", "dataset", "dataset_split", "dataset_subset", "max_length", "truncation")


def arguments(argv: list[str]) -> tuple[argparse.Namespace, recipe.Recipe | None]:
    """The options, and the recipe that they were read from."""
    parser = plain_parser(
        "plan", "trl-anatomy plan --audit audits/run1 --concept_policy policy.yaml", common=("json", "config")
    )
    parser.add_argument(
        "--audit", required=True, help="audit folder (or its URL) of the dataset that will be trained on"
    )
    parser.add_argument(
        "--policy", "--concept_policy", dest="policy", required=True, help="concept policy (YAML; path or URL)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that the files of the audited model bring"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_audited(parser, *_AUDITED)
    return recipe.parse_plain(parser, argv, ours=ours())


def run(argv: list[str]) -> int:
    args, training = arguments(argv)

    from ..audit.folder import load_audit
    from ..audit.reopen import reopen
    from ..shaping.plan import plan_json, plan_report
    from ..shaping.policy import ConceptPolicy
    from ..shaping.resolve import check_policy
    from ..shaping.settle import settle_policy

    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        audit = load_audit(args.audit)
        if not audit.has_concepts:
            audit.check_kind("plan")
        recipe.check_audited(training, audit.info["settings"], audit.name, ours(), audited(args, *_AUDITED))
        policy = ConceptPolicy.load(args.policy)
        audit.check_harvest()
        source = reopen(audit, trust_remote_code=args.trust_remote_code)
        resolved = check_policy(policy, audit, source.model_config, source.pairs.raw.column_names)
        scores = audit.path / "scores"
        plan = settle_policy(
            policy,
            source.trained,
            lambda: source.model,
            audit=audit,
            cache_dir=scores,
            resolved=resolved,
        )
    print(json.dumps(plan_json(plan), indent=2) if args.json else plan_report(plan))
    return 0
