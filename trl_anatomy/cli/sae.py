"""`trl-anatomy sae`."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from .commands import COMMANDS
from .options import SAEFlags, strict_parse


def run(argv: list[str]) -> int:
    from trl import TrlParser

    from ..audit.make_sae import SAEConfig, check_saes, make_sae
    from ..reading.files import without_nan

    parser = TrlParser(
        (SAEConfig, SAEFlags),
        prog="trl-anatomy sae",
        description=COMMANDS["sae"],
        epilog="example: trl-anatomy sae --model M --dataset D --minutes 20 --out saes/run1\n"
        "by the recipe of a training, into the folder that its `sae` names: trl-anatomy sae --config recipe.yaml",
    )
    config, flags = strict_parse(parser, argv, {"sae": "out"})
    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        fits = make_sae(config) if config.check is None else {Path(config.check): check_saes(config)}
    if flags.json:
        found = {str(path): None if fit is None else dataclasses.asdict(fit) for path, fit in fits.items()}
        print(json.dumps(without_nan(found), indent=2))
        return 0
    for path, fit in fits.items():
        print(f"{path}: trained." if fit is None else f"{path}: {fit.verdict}: {fit.reason}.")
    return 0
