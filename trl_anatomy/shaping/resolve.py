"""A policy meets the model, the SAEs, the audit and the dataset: its scorers, and all that does not fit."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AnatomyError
from .concepts import TEXTUAL, ConceptSpec
from .located import PolicyError, no_column
from .stages import STAGES, Unbound
from .where import Where

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.sae import SAE
    from ..reading.scorers import Scorer
    from .policy import ConceptPolicy


def check_policy(
    policy: "ConceptPolicy",
    audit: "Audit | None" = None,
    model_config: Any = None,
    columns: Collection[str] | None = None,
    loaded: "Loaded | None" = None,
) -> "Resolved":
    """Check a policy against what it is going to meet. Loads SAEs, directions and audits that its rules name.

    Args:
        policy: the policy.
        audit: the audit in use.
        model_config: the start model's transformers config, for layers and width; None skips those checks.
        columns: columns of the dataset; None skips the checks of `column`.
        loaded: SAEs and audits that were read already.

    Returns:
        The scorers that were built for it; pass them on, so that no SAE is loaded twice.

    Raises:
        PolicyError: all problems at once: a layer the model lacks, an SAE of another width, a feature the SAE lacks, a
            cluster or context that is not in the audit, a column that is not in the dataset, a file that is not there.
    """
    resolved, problems = resolve(policy, audit, model_config=model_config, loaded=loaded)
    scorers = resolved.scorers
    for i, rule in enumerate(policy.rules):
        name = rule.concept or ""
        met = Unbound(rule, policy.concepts.get(name), scorers.get(name), columns, policy.rule_place(i))
        problems += STAGES[rule.stage].check(met)
        if rule.where is not None:
            problems += _gate_problems(policy, f"rules[{i}].where", rule.where, audit, columns)
    if problems:
        raise PolicyError(problems)
    return resolved


def _gate_problems(
    policy: "ConceptPolicy", path: str, where: Where, audit: "Audit | None", columns: Collection[str] | None
) -> list[str]:
    if where.column is not None and columns is not None and where.column not in columns:
        return [no_column(policy.place(f"{path}.column"), where.column, columns)]
    if where.of_audit is None:
        return []
    key, what = where.of_audit
    place = policy.place(f"{path}.{key}")
    if audit is None:
        kind = "problem" if key == "problem" else "context"
        return [f"{place}: found {what!r}, a {kind} of an audit, but no audit was given."]
    try:
        where.rows(audit)
    except AnatomyError as error:
        return [f"{place}: {error}"]
    return []


@dataclass(frozen=True, eq=False)
class Resolved:
    """The scorers of the concepts that a policy's rules act on, built once.

    Attributes:
        policy: the policy.
        scorers: concept -> scorer, with its SAE on the CPU until `to`.
        audits: concept -> the audit that its cluster belongs to.
    """

    policy: "ConceptPolicy"
    scorers: "dict[str, Scorer]"
    audits: "dict[str, Audit]" = field(default_factory=dict)

    def to(self, model: Any, problems: Sequence[str] = ()) -> "dict[str, Scorer]":
        """Check the scorers against the start model, and move their SAEs to its device.

        Args:
            model: the start model.
            problems: what else is wrong with the policy.

        Raises:
            PolicyError: those, and all scorers that do not fit the model.
        """
        problems = list(problems)
        for name, scorer in self.scorers.items():
            try:
                if self.policy.concepts[name].scorer not in TEXTUAL:
                    scorer.check(model)  # type: ignore[union-attr]
                if name in self.audits:
                    self.audits[name].check_model(model)
            except AnatomyError as error:
                problems.append(f"{self.policy.place(f'concepts.{name}')}: {error}")
        if problems:
            raise PolicyError(problems)
        for scorer in self.scorers.values():
            if hasattr(scorer, "sae"):
                scorer.sae.to(model.device)
        return self.scorers


def resolve(
    policy: "ConceptPolicy",
    audit: "Audit | None" = None,
    *,
    model_config: Any = None,
    loaded: "Loaded | None" = None,
) -> tuple[Resolved, list[str]]:
    """Scorers of the concepts that a rule acts on, and what is wrong with those that cannot be built.

    Args:
        policy: the policy.
        audit: the audit in use.
        model_config: for checks of layers and width without the model's weights.
        loaded: SAEs and audits that were read already.
    """
    resolved, problems = Resolved(policy, {}), []
    loaded = loaded or Loaded()
    for name, spec in policy.used.items():
        try:
            source = loaded.audit(spec.audit, audit) if spec.cluster is not None else None
            scorer = _scorer(spec, source, loaded)
            if spec.scorer not in TEXTUAL:
                _check_config(scorer, model_config)
            resolved.scorers[name] = scorer
            if source is not None:
                resolved.audits[name] = source
        except _Mismatch as error:
            problems.append(f"{policy.place(f'concepts.{name}.{error.key}')}: {error}")
        except AnatomyError as error:
            problems.append(f"{policy.place(f'concepts.{name}')}: {error}")
    return resolved, problems


class _Mismatch(Exception):
    """A concept that does not fit; carries the key it is about."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


class Loaded:
    """SAEs and audits, each read once."""

    def __init__(self) -> None:
        self._saes: dict[str, SAE] = {}
        self._audits: dict[str, Audit] = {}

    def sae(self, source: str | Path | Mapping[str, str]) -> "SAE":
        """The SAE of a folder or release, however it is written; arguments and errors as `load_sae`."""
        from ..reading.sae import load_sae

        named = source if isinstance(source, Mapping) else {"path": str(source)}
        key = named["path"] if "path" in named else ":".join(map(str, (named.get("release"), named.get("id"))))
        if os.path.exists(key):
            key = os.path.realpath(key)
        if key not in self._saes:
            self._saes[key] = load_sae(source)
        return self._saes[key]

    def audit(self, path: str | None, in_use: "Audit | None") -> "Audit":
        """The audit of a folder; the one in use where `path` is None."""
        if path is None:
            if in_use is None:
                raise _Mismatch("cluster", "found a cluster, but no audit was given; add audit: FOLDER.")
            return in_use
        from ..audit.folder import load_audit

        if path not in self._audits:
            self._audits[path] = load_audit(path)
        return self._audits[path]


def _scorer(spec: ConceptSpec, audit: "Audit | None", loaded: Loaded) -> Any:
    if spec.scorer == "text":
        from ..reading.scorers.text import TextScorer

        return TextScorer(str(spec.pattern))
    if spec.scorer == "habit":
        from ..reading.scorers.habit import HabitScorer

        return HabitScorer(str(spec.habit))
    if spec.path is not None:
        from ..reading.fit import KINDS

        more = {"load": loaded.sae} if spec.scorer == "features" else {}
        return KINDS[spec.scorer].load(spec.path, layer=spec.layer, reduce=spec.reduce, **more)
    from ..reading.scorers.features import FeaturesScorer

    if audit is not None:
        features, layer = audit.features(str(spec.cluster)).tolist(), audit.info["sae"]["layer"]
        sae = audit.load_sae(load=loaded.sae)
    else:
        features, sae, layer = list(spec.features or ()), loaded.sae(spec.sae or {}), spec.layer
        if layer is not None and sae.layer is not None and layer != sae.layer:
            raise _Mismatch("layer", f"found {layer}, allowed: {sae.layer}, the layer this SAE was trained on.")
    return FeaturesScorer(sae, features, layer, spec.reduce or "max")


def _check_config(scorer: Any, config: Any) -> None:
    """Layer and width of a hidden-state scorer against a transformers config, without the model's weights."""
    if config is None:
        return
    text = config.get_text_config()
    if not scorer.layer < text.num_hidden_layers:
        raise _Mismatch(
            "layer", f"found {scorer.layer}, allowed: 0 to {text.num_hidden_layers - 1}, the layers of the model."
        )
    if scorer.d_model != text.hidden_size:
        raise _Mismatch(
            "sae" if scorer.kind == "features" else "path",
            f"found width {scorer.d_model}, allowed: {text.hidden_size}, the width of the model's hidden states. Use "
            f"{'an SAE' if scorer.kind == 'features' else 'a ' + scorer.label} made for this model.",
        )
