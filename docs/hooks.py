"""What the site makes of the program when it is built: a page for each command, from its own help."""

import io
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

from trl_anatomy.cli import COMMANDS, main

MARK = "<!-- commands -->"
# Where TRL's own hundreds of options begin, which its reference has
TRLS = re.compile(r"\noptions of `trl .*?(?=\nexample|\Z)", re.DOTALL)


def help_of(command: str) -> str:
    """What `trl-anatomy COMMAND --help` prints, 100 columns wide."""
    columns, sink = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "100"
    try:
        with redirect_stdout(sink), redirect_stderr(io.StringIO()):
            main([command, "--help"])
    except SystemExit:
        pass
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return sink.getvalue()


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each command."""
    for command, does in COMMANDS.items():
        shown = TRLS.sub(f"\nThen every option of `trl {command}`.\n", help_of(command)).strip()
        text = f"# trl-anatomy {command}\n\n{does}\n\n```text\n{shown}\n```\n"
        name = f"reference/cli-{command}.md"
        files.append(File.generated(config, name, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of commands in its place."""
    rows = [f"| [`{command}`](cli-{command}.md) | {does} |" for command, does in COMMANDS.items()]
    return markdown.replace(MARK, "\n".join(["| command | what it does |", "|---|---|", *rows]))
