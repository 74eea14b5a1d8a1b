"""`trl-anatomy demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import recipe
from ..errors import AnatomyError
from .options import plain_parser, whole


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = plain_parser("demo", "trl-anatomy demo --output_dir anatomy-demo", common=("out", "real"))
    parser.add_argument(
        "--real",
        action="store_true",
        help="on a real chat model, SmolLM2-135M-Instruct, and a hidden preference: about 25 minutes of CPU time",
    )
    parser.add_argument(
        "--output_dir",
        "--out",
        dest="out",
        help="folder for all that it makes (default anatomy-demo, with --real anatomy-demo-real)",
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    return recipe.parse_line(parser, argv)


def run(argv: list[str]) -> int:
    args = arguments(argv)

    from ..reading.storage import is_url

    out = args.out or ("anatomy-demo-real" if args.real else "anatomy-demo")
    if is_url(out):
        raise AnatomyError(f"--out is {out}; the demo is made in a folder of this machine.")
    if args.real:
        from ..testbed.real_demo import run_real_demo

        run_real_demo(Path(out), seed=args.seed)
    else:
        from ..testbed.demo import run_demo

        run_demo(Path(out), seed=args.seed)
    return 0
