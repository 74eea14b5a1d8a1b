"""`trl-anatomy plan`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

from .. import recipe
from .options import ours, plain_parser


def run(argv: list[str]) -> int:
    parser = plain_parser("plan", "trl-anatomy plan --audit audits/run1 --policy policy.yaml")
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
    args, training = recipe.parse_plain(parser, argv, ours=ours())

    from ..audit.folder import load_audit
    from ..audit.reopen import reopen
    from ..shaping.plan import plan_json, plan_report
    from ..shaping.policy import ConceptPolicy
    from ..shaping.resolve import check_policy
    from ..shaping.settle import settle_policy

    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        audit = load_audit(args.audit)
        audit.check_kind("plan")
        recipe.check_audited(training, audit.info["settings"], audit.name, ours())
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
