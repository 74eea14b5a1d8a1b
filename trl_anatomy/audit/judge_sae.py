"""The verdict on an audit's SAE before the long pass: found once, kept in the folder, and heeded."""

import json
import shlex
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AnatomyError
from ..reading.storage import fetch

if TYPE_CHECKING:
    from ..reading.sae import SAE
    from ..reading.sae_check import SAEFit
    from ..reading.spans import Pairs
    from .config import AuditConfig

FILE = "sae_fit.json"
# Verdicts of `reading.sae_check`, which knows torch, as `audit.json` has them.
NEVER, GO_ON = "do not use", "continue training it"
UNTRAINED = "But the model predicts these texts no better than chance: it has learned nothing that an SAE could show."
# Of `sae.fit` in audit.json, which earlier versions wrote with less, or not at all.
FIT_SHAPE = {
    "verdict": str,
    "reason": str,
    "variance_explained": {},
    "l0": float,
    "silent_latents": float,
    "outlier_tokens": float,
    "n_tokens": int,
}
_FORMAT = 1  # of the check: raise it where the same inputs give other figures
_SAME = (
    *("dataset_split", "dataset_subset", "max_length", "truncation", "chat_template_path", "dtype", "device"),
    *("model_revision", "trust_remote_code"),
)


def pairs_to_judge(n_pairs: int) -> int:
    """Pairs that an audit judges its SAE by: an eighth of them, 4 to 64 (cost: docs/reference/sae-verdict.md).

    >>> [pairs_to_judge(n) for n in (3, 30, 450, 20_000)]
    [4, 4, 56, 64]
    """
    from ..reading.sae_check import CHECK_PAIRS

    return max(4, min(CHECK_PAIRS, n_pairs // 8))


def judged(model: Any, sae: "SAE", pairs: "Pairs", layer: int, out: Path, *, progress: bool = True) -> "SAEFit":
    """How well the SAE fits the pairs: as a run before this one found in the folder `out`, else found now and kept.

    Args:
        model, sae, pairs, layer: as for `reading.sae_check.check_fit`.
        out: the audit's folder, or the mirror of its URL.
        progress: show how far it has come.
    """
    from .. import __version__
    from ..reading.files import make_folder, write_atomically
    from ..reading.fingerprint import hash_json, model_key
    from ..reading.sae_check import SAEFit, check_fit

    made_from = [_FORMAT, __version__, model_key(model), sae.fingerprint, sae.card_l0, layer, pairs.fingerprint]
    key, known = hash_json(made_from), _known(out / FILE)
    with suppress(KeyError, TypeError):  # of another run, or damaged: it is found again
        return SAEFit(**known[key])
    fit = check_fit(model, sae, pairs, layer, n_pairs=pairs_to_judge(len(pairs)), progress=progress)
    make_folder(out)
    write_atomically(out / FILE, json.dumps({**known, key: asdict(fit)}, indent=1).encode())
    return fit


def _known(file: Path) -> dict[str, Any]:
    """Verdicts that were found before in this folder, by what they were made from."""
    if not fetch(file):
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_unfit(fit: "SAEFit", sae: "SAE", config: "AuditConfig") -> None:
    """Stop an audit whose SAE is not to be used, unless it is forced or its model has learned nothing to read.

    Raises:
        AnatomyError: says why, and what to do.
    """
    if fit.verdict != NEVER or config.force or fit.untrained:
        return
    raise AnatomyError(
        f"The SAE at {sae.place} is not for this model, layer and data: on {fit.n_pairs} of the pairs {fit.reason}. "
        f"Name another, train one with `{sae_command(config)}`, or audit with it all the same: --force."
    )


def fit_record(fit: "SAEFit") -> dict[str, Any]:
    """`sae.fit` of audit.json."""
    return {**asdict(fit), "untrained": fit.untrained}


def fit_notes(fit: "SAEFit", sae: "SAE", config: "AuditConfig") -> list[str]:
    """What the notes of an audit say about an SAE that fits badly; nothing about one that fits."""
    if fit.verdict == NEVER:
        return [
            f"The SAE does not fit: {fit.reason}. {UNTRAINED}"
            if fit.untrained
            else f"This audit was forced with an SAE that does not fit: {fit.reason}."
        ]
    if fit.verdict == GO_ON:
        command = sae_command(config, init=":".join(sae.source.values()))
        return [f"The SAE should be trained on: {fit.reason}. `{command}` does so."]
    return []


def sae_command(config: "AuditConfig", *, layer: int | None = None, init: str | None = None) -> str:
    """The command that trains the SAE of an audit, or continues one, on the same tokens."""
    words: dict[str, Any] = {"model": config.model or "M"}
    if config.dataset or not config.data_name:
        words["text" if config.data_kind == "sft" else "dataset"] = config.dataset or "D"
    else:  # a mixture is written in a file
        words["config"] = "RECIPE"
    words |= {"layer": layer} if layer is not None else {}
    words |= {"init": init} if init is not None else {}
    words["out"] = "saes/run1"
    usual = {field.name: field.default for field in fields(config)}
    words |= {name: getattr(config, name) for name in _SAME if getattr(config, name) != usual[name]}
    return shlex.join(["trl-anatomy", "sae", *(str(w) for name, value in words.items() for w in (f"--{name}", value))])
