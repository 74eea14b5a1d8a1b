"""`trl-anatomy sae`."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .options import DATA, MODEL, SAEFlags, strict_parse, trl_parser


def arguments(argv: list[str]) -> tuple[Any, ...]:
    """The settings of the training, and the flags beside them. A recipe's `sae` names the folder."""
    from ..audit.make_sae import SAEConfig

    parser = trl_parser(
        "sae",
        (SAEConfig, SAEFlags),
        f"trl-anatomy sae {MODEL} {DATA} --minutes 20 --output_dir saes/run1",
        required=("model", "dataset"),
        common=("out", "minutes", "tokens", "layer", "check", "dataset_split", "max_length", "json"),
    )
    return strict_parse(parser, argv, {"sae": "out"})


def run(argv: list[str]) -> int:
    from ..audit.make_sae import check_saes, make_sae
    from ..reading.files import without_nan

    config, flags = arguments(argv)
    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        fits = make_sae(config) if config.check is None else {Path(config.check): check_saes(config)}
    if flags.json:
        found = {str(path): None if fit is None else dataclasses.asdict(fit) for path, fit in fits.items()}
        print(json.dumps(without_nan(found), indent=2))
        return 0
    for path, fit in fits.items():
        print(f"{path}: trained." if fit is None else f"{path}: {fit.verdict}: {fit.reason}.")
    return 0
