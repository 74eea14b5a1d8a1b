"""Read what a preference dataset teaches, and decide what the model may learn: a plugin for TRL.

Names are imported when they are first used, so that `import trl_anatomy` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audit.config import AuditConfig
    from .audit.folder import Audit, load_audit
    from .audit.look import Finding, Table
    from .audit.make_sae import SAEConfig, make_sae
    from .audit.report import write_report
    from .audit.run import dry_run, run_audit
    from .audit.text_audit import run_text_audit
    from .audit.text_folder import TextAudit
    from .checking.compare import compare
    from .checking.prediction import predict
    from .errors import AnatomyError
    from .reading.fit import fit_concept
    from .reading.removal import attach_edits
    from .reading.sae import load_sae
    from .shaping.located import PolicyError
    from .shaping.plan import PolicyPlan
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
    "Finding": "audit.look",
    "Table": "audit.look",
    "TextAudit": "audit.text_folder",
    "run_text_audit": "audit.text_audit",
    "dry_run": "audit.run",
    "write_report": "audit.report",
    "SAEConfig": "audit.make_sae",
    "make_sae": "audit.make_sae",
    "load_sae": "reading.sae",
    "fit_concept": "reading.fit",
    "PolicyPlan": "shaping.plan",
    "PolicyError": "shaping.located",
    "predict": "checking.prediction",
    "compare": "checking.compare",
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
    "Finding",
    "PolicyError",
    "PolicyPlan",
    "SAEConfig",
    "Table",
    "TextAudit",
    "attach_edits",
    "compare",
    "dry_run",
    "fit_concept",
    "load_audit",
    "load_sae",
    "make_sae",
    "predict",
    "run_audit",
    "run_text_audit",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
