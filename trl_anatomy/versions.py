"""Which releases this package can be exact with: the check of the installed TRL, and what differs between its releases.

Whatever depends on a release of TRL is decided here, by `upstream.py`'s list; all other files ask these functions.
"""

import inspect
import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType
from typing import Any

from .errors import AnatomyError
from .upstream import FUSED_HEAD, SHARED_PREFIX, Seam, release_of, seams_of

OLDEST_TRL = (1, 9)  # before, `DPOTrainer.compute_ref_log_probs` takes no model


def check_trl() -> None:
    """Refuse a TRL on which policies or tokens would not be exact, before anything is scored.

    Only places in modules of TRL that are imported already are looked at: a policy of DPO rests on no online trainer.

    Raises:
        AnatomyError: naming the version and the place that is not what it was.
    """
    found = version("trl")
    if release_of(found) < OLDEST_TRL:
        place = "DPOTrainer.compute_ref_log_probs"
        raise AnatomyError(f"trl {found} is installed, whose {place} takes no model: install trl{_admitted()}.")
    loaded = tuple(sorted(name for name in sys.modules if name.startswith("trl.")))
    moved = _moved(found, loaded)
    if moved:
        raise AnatomyError(f"trl {found} is installed, in which {moved}: install trl{_admitted()}.")


def fused_head() -> bool:
    """Whether the outputs of DPO's policy hold log-probabilities; else logits, of which Liger's loss reads neither."""
    return release_of(version("trl")) >= FUSED_HEAD


def shared_prefix() -> bool:
    """Whether DPO's rows are cut where prompt and whole row diverge; else the prompt's own tokens stand in front."""
    return release_of(version("trl")) >= SHARED_PREFIX


def why_moved(seam: Seam, place: Any) -> str:
    """What of an imported place is not as `seam` says; empty where all is.

    Example:
        >>> def loss(self, model): ...
        >>> why_moved(Seam("trl.trainer:loss", "dpo.py", ("model", "inputs")), loss)
        'trl.trainer:loss no longer takes inputs'
    """
    if seam.takes is not None:
        has = list(inspect.signature(place).parameters)
        missing = [name for name in seam.takes if name not in has]
        if missing:
            return f"{seam.name} no longer takes {', '.join(missing)}"
        if seam.exactly and has != list(seam.takes):
            return f"{seam.name} takes {', '.join(has)}"
    if seam.says:
        text, at = "".join(inspect.getsource(place).split()), 0
        for piece in seam.says:
            at = text.find("".join(piece.split()), at) + 1
            if not at:
                return f"{seam.name} no longer says {piece!r}"
    return ""


def place_of(seam: Seam, module: ModuleType) -> Any:
    """What a seam names inside its imported module: through classes, and fields of dataclasses.

    Raises:
        AttributeError: there is no such name.
    """
    place: Any = module
    for part in seam.name.partition(":")[2].split(".") if ":" in seam.name else ():
        fields = getattr(place, "__dataclass_fields__", {})
        place = fields[part] if part in fields and not hasattr(place, part) else getattr(place, part)
    return place


@cache
def _moved(found: str, loaded: tuple[str, ...]) -> str:
    for seam in seams_of("trl", found):
        module = seam.name.partition(":")[0]
        if module not in loaded:
            continue
        try:
            wrong = why_moved(seam, place_of(seam, sys.modules[module]))
        except AttributeError:
            wrong = f"there is no {seam.name}"
        except OSError:  # an installation without sources: signatures are all that can be seen
            continue
        if wrong:
            return f"{wrong} ({seam.ours} rests on it)"
    return ""


def _admitted() -> str:
    """The versions of TRL that this package admits, as an installer reads them."""
    try:
        entries = requires("trl-anatomy") or []
    except PackageNotFoundError:
        entries = []
    found = next((entry for entry in entries if re.match(r"trl\b(?!-)", entry)), "trl")
    return found.partition(";")[0].removeprefix("trl").strip()
