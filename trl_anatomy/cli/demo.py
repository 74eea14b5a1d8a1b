"""`trl-anatomy demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import recipe
from ..errors import AnatomyError
from .options import plain_parser, whole


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = plain_parser("demo", "trl-anatomy demo --output_dir anatomy-demo", common=("out",))
    parser.add_argument(
        "--output_dir",
        "--out",
        dest="out",
        default="anatomy-demo",
        help="folder for the model, the data, the audit and the page",
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    return recipe.parse_line(parser, argv)


def run(argv: list[str]) -> int:
    args = arguments(argv)

    from ..reading.storage import is_url
    from ..testbed.demo import run_demo

    if is_url(args.out):
        raise AnatomyError(f"--out is {args.out}; the demo is made in a folder of this machine.")
    run_demo(Path(args.out), seed=args.seed)
    return 0
