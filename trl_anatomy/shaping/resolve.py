"""A policy meets the model, the SAEs, the audit and the dataset: its scorers, and all that does not fit."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import AnatomyError
from .located import PolicyError, did_you_mean
from .policy import ConceptPolicy, ConceptSpec
from .where import Where

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.sae import SAE
    from ..reading.scorers import Scorer


def check_policy(
    policy: ConceptPolicy,
    audit: "Audit | None" = None,
    model_config: Any = None,
    columns: Collection[str] | None = None,
) -> None:
    """Check a policy against what it is going to meet. Loads SAEs, directions and audits that its rules name.

    Args:
        policy: the policy.
        audit: the audit in use.
        model_config: the start model's transformers config, for layers and width; None skips those checks.
        columns: columns of the dataset; None skips the check of `where: {column: ...}`.

    Raises:
        PolicyError: all problems at once: a layer the model lacks, an SAE of another width, a feature the SAE lacks, a
            cluster or context that is not in the audit, a column that is not in the dataset, a file that is not there.
    """
    _, problems = resolve_scorers(policy, audit, model_config=model_config)
    for i, rule in enumerate(policy.rules):
        if rule.where is not None:
            problems += _gate_problems(policy, f"rules[{i}].where", rule.where, audit, columns)
    if problems:
        raise PolicyError(problems)


def _gate_problems(
    policy: ConceptPolicy, path: str, where: Where, audit: "Audit | None", columns: Collection[str] | None
) -> list[str]:
    if where.column is not None and columns is not None and where.column not in columns:
        close = did_you_mean(where.column, columns)
        return [
            f"{policy.place(f'{path}.column')}: found {where.column!r}, allowed: {', '.join(columns)}, the columns of "
            f"the dataset.{close}"
        ]
    if where.data is not None:
        place = policy.place(f"{path}.data")
        if audit is None:
            return [f"{place}: found {where.data!r}, a context of an audit, but no audit was given."]
        try:
            audit.rows_in(where.data)
        except AnatomyError as error:
            return [f"{place}: {error}"]
    return []


def resolve_scorers(
    policy: ConceptPolicy, audit: "Audit | None" = None, *, model: Any = None, model_config: Any = None
) -> "tuple[dict[str, Scorer], list[str]]":
    """Scorers of the concepts that a rule acts on, and what is wrong with those that cannot be built.

    Args:
        policy: the policy.
        audit: the audit in use.
        model: the start model, against which each scorer checks itself; SAEs go to its device.
        model_config: instead of the model, for checks of layers and width without its weights.
    """
    scorers: dict[str, Scorer] = {}
    problems: list[str] = []
    loaded = _Loaded(audit, "cpu" if model is None else model.device)
    for name, spec in policy.used.items():
        try:
            scorer = _scorer(spec, loaded)
            if spec.scorer != "text":
                _check_config(scorer, model_config)
                if model is not None:
                    scorer.check(model)
            scorers[name] = scorer
        except _Mismatch as error:
            problems.append(f"{policy.place(f'concepts.{name}.{error.key}')}: {error}")
        except AnatomyError as error:
            problems.append(f"{policy.place(f'concepts.{name}')}: {error}")
    return scorers, problems


class _Mismatch(Exception):
    """A concept that does not fit; carries the key it is about."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


class _Loaded:
    """SAEs and audits, each read once."""

    def __init__(self, audit: "Audit | None", device: Any) -> None:
        self.audit_in_use, self.device = audit, device
        self._saes: dict[str, SAE] = {}
        self._audits: dict[str, Audit] = {}

    def sae(self, source: str | Mapping[str, str]) -> "SAE":
        from ..reading.sae import load_sae

        key = str(source)
        if key not in self._saes:
            self._saes[key] = load_sae(source, device=self.device)
        return self._saes[key]

    def audit(self, path: str | None) -> "Audit":
        if path is None:
            if self.audit_in_use is None:
                raise _Mismatch("cluster", "found a cluster, but no audit was given; add audit: FOLDER.")
            return self.audit_in_use
        from ..audit.folder import load_audit

        if path not in self._audits:
            self._audits[path] = load_audit(path)
        return self._audits[path]


def _scorer(spec: ConceptSpec, loaded: _Loaded) -> Any:
    if spec.scorer == "text":
        from ..reading.scorers.text import TextScorer

        return TextScorer(str(spec.pattern))
    if spec.path is not None:
        from ..reading.fit import KINDS

        return KINDS[spec.scorer].load(spec.path, layer=spec.layer, reduce=spec.reduce)
    from ..reading.scorers.features import FeaturesScorer

    if spec.cluster is not None:
        audit = loaded.audit(spec.audit)
        features, layer = audit.features(spec.cluster).tolist(), audit.info["sae"]["layer"]
        sae = loaded.sae(audit.info["sae"]["source"])
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
