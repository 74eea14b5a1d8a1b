"""Read what a preference dataset teaches, and decide what the model may learn: a plugin for TRL.

Names are imported when they are first used, so that `import trl_anatomy` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audit.config import AuditConfig
    from .audit.folder import Audit, load_audit
    from .audit.run import run_audit
    from .errors import AnatomyError
    from .reading.removal import attach_edits
    from .shaping.policy import ConceptPolicy
    from .trainers.callback import AuditCallback
    from .trainers.concept_reward import ConceptReward
    from .trainers.dpo import AnatomyDPOTrainer
    from .trainers.reward import AnatomyRewardTrainer
    from .trainers.sft import AnatomySFTTrainer

__version__ = "0.1.0"

_HOME = {
    "AnatomyDPOTrainer": "trainers.dpo",
    "AnatomyRewardTrainer": "trainers.reward",
    "AnatomySFTTrainer": "trainers.sft",
    "AuditCallback": "trainers.callback",
    "AuditConfig": "audit.config",
    "Audit": "audit.folder",
    "load_audit": "audit.folder",
    "run_audit": "audit.run",
    "ConceptPolicy": "shaping.policy",
    "ConceptReward": "trainers.concept_reward",
    "AnatomyError": "errors",
    "attach_edits": "reading.removal",
}

__all__ = [
    "AnatomyDPOTrainer",
    "AnatomyError",
    "AnatomyRewardTrainer",
    "AnatomySFTTrainer",
    "Audit",
    "AuditCallback",
    "AuditConfig",
    "ConceptPolicy",
    "ConceptReward",
    "attach_edits",
    "load_audit",
    "run_audit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
