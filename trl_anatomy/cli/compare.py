"""`trl-anatomy compare`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from .. import recipe
from .options import MODEL, add_audited, audited, ours, plain_parser, whole

_AUDITED = ("dataset", "dataset_split", "dataset_subset", "max_length", "truncation")


def arguments(argv: list[str]) -> tuple[argparse.Namespace, recipe.Recipe | None]:
    """The options, and the recipe that they were read from."""
    parser = plain_parser(
        "compare",
        f"trl-anatomy compare --audit audits/run1 {MODEL} --output_dir runs/dpo",
        common=("prompts", "n_prompts", "n_per_prompt", "max_new_tokens", "out", "json", "config"),
    )
    parser.add_argument("--audit", required=True, help="audit folder (or its URL) of the dataset that was trained on")
    parser.add_argument(
        *("--before", "--model_name_or_path", "--model"),
        required=True,
        help="the start model (the one that was audited)",
    )
    parser.add_argument(
        *("--after", "--output_dir"),
        required=True,
        nargs="+",
        help="trained model(s); recovery is counted against the first",
    )
    parser.add_argument("--prompts", help="file with a 'prompt' column; default: the audited prompts")
    parser.add_argument("--n_prompts", type=whole(1), default=1000, help="at most so many prompts (default 1000)")
    parser.add_argument(
        "--n_per_prompt",
        type=whole(1),
        default=1,
        help="responses to each prompt (default 1); with 4 or more the tilt of the start model predicts better",
    )
    parser.add_argument("--max_new_tokens", type=whole(1), default=256, help="length of a rollout (default 256)")
    parser.add_argument("--batch_size", type=whole(1), default=64, help="rollouts at a time (default 64)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument(
        "--likelihood",
        action="store_true",
        help="add a baseline: how likely the start model finds the audited pairs (reads up to 2000 of them, once)",
    )
    parser.add_argument("--prediction", help="what predict wrote (default: AUDIT/prediction, if there is one)")
    parser.add_argument("--out", help="folder (or URL) for rollouts and compare.json (default: AUDIT/compare)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    trained = {"model": "before", "model_name_or_path": "before", "output_dir": "after"}
    add_audited(parser, *_AUDITED)
    return recipe.parse_plain(parser, argv, ours=ours(), places=trained)


def run(argv: list[str]) -> int:
    args, training = arguments(argv)

    from ..audit.folder import load_audit
    from ..checking.compare import compare, comparison_report, names_of
    from ..checking.prediction import FILE, FOLDER, load_prediction
    from ..checking.responses import prompts_for
    from ..reading.storage import fetch, local, shown

    after = names_of(args.after)
    with redirect_stdout(sys.stderr):  # as in plan
        audit = load_audit(args.audit)
        audit.check_kind("compare")
        recipe.check_audited(training, audit.info["settings"], audit.name, ours(), audited(args, *_AUDITED))
        prompts = prompts_for(audit, args.prompts, args.n_prompts, args.seed) * args.n_per_prompt
        out = local(args.out) if args.out else audit.path / "compare"
        foretold = args.prediction or str(audit.path / FOLDER)
        prediction = load_prediction(foretold, audit) if args.prediction or fetch(local(foretold) / FILE) else None
        comparison = compare(
            audit,
            args.before,
            after,
            prompts,
            out=out,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=args.seed,
            prediction=prediction,
            likelihood=args.likelihood,
        )
    print(json.dumps(comparison, indent=2) if args.json else comparison_report(comparison))
    if not args.json:
        print(f"\nPage: {shown(out / 'compare.html')}")
    return 0
