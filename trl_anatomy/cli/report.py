"""`trl-anatomy report`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import redirect_stdout

from .. import recipe
from .labeller import check_labeller, name_concepts
from .options import AuditFlags, plain_parser


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = plain_parser("report", "trl-anatomy report --audit audits/run1 --open", common=("open",))
    parser.add_argument("--audit", required=True, help="audit folder, or its URL")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    for field in dataclasses.fields(AuditFlags):
        if field.name.startswith("label_"):
            parser.add_argument(f"--{field.name}", help=field.metadata["help"])
    return recipe.parse_line(parser, argv)


def run(argv: list[str]) -> int:
    args = arguments(argv)

    from ..audit.folder import REPORT, load_audit
    from ..audit.reopen import reopen
    from ..audit.report import write_report
    from ..audit.text_folder import TextAudit
    from ..reading.storage import shown

    with redirect_stdout(sys.stderr):  # as in plan
        check_labeller(args)
        audit = load_audit(args.audit)
        if args.label_model is not None:
            name_concepts(audit, args)
            page = audit.path / REPORT
        else:
            page = write_report(audit, None if isinstance(audit, TextAudit) else reopen(audit).pairs)
    print(shown(page))
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0
