"""`trl-anatomy demo`."""

from __future__ import annotations

from pathlib import Path

from ..errors import AnatomyError
from .options import plain_parser, whole


def run(argv: list[str]) -> int:
    parser = plain_parser("demo", "trl-anatomy demo --out anatomy-demo")
    parser.add_argument("--out", default="anatomy-demo", help="folder for the model, the data, the audit and the page")
    parser.add_argument("--seed", type=whole(0), default=0)
    args = parser.parse_args(argv)

    from ..reading.storage import is_url
    from ..testbed.demo import run_demo

    if is_url(args.out):
        raise AnatomyError(f"--out is {args.out}; the demo is made in a folder of this machine.")
    run_demo(Path(args.out), seed=args.seed)
    return 0
