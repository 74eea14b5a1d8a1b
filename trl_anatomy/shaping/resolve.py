"""A policy meets the model, the SAEs, the audit and the dataset: its scorers, and all that does not fit."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import AnatomyError
from .interventions import Inoculate, MaskTokens, Residualize, ReweightPairs
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
        columns: columns of the dataset; None skips the checks of `column`.

    Raises:
        PolicyError: all problems at once: a layer the model lacks, an SAE of another width, a feature the SAE lacks, a
            cluster or context that is not in the audit, a column that is not in the dataset, a file that is not there.
    """
    scorers, problems = resolve_scorers(policy, audit, model_config=model_config)
    for i, rule in enumerate(policy.rules):
        if isinstance(rule, ReweightPairs) and rule.column is not None and columns and rule.column not in columns:
            problems.append(_no_column(policy, f"rules[{i}].column", rule.column, columns))
        if rule.concept in scorers:
            problems += _rule_problems(policy, i, scorers[rule.concept])
        if rule.where is not None:
            problems += _gate_problems(policy, f"rules[{i}].where", rule.where, audit, columns)
    if problems:
        raise PolicyError(problems)


def _no_column(policy: ConceptPolicy, path: str, name: str, columns: Collection[str]) -> str:
    close = did_you_mean(name, columns)
    return f"{policy.place(path)}: found {name!r}, allowed: {', '.join(columns)}, the columns of the dataset.{close}"


def _rule_problems(policy: ConceptPolicy, i: int, scorer: "Scorer") -> list[str]:
    """What a rule asks of a scorer that cannot give it."""
    from ..reading.scorers import shown_above

    rule = policy.rules[i]
    text = rule.concept is not None and policy.concepts[rule.concept].scorer == "text"
    if isinstance(rule, MaskTokens):
        if text and rule.threshold is not None:
            place = policy.place(f"rules[{i}].threshold")
            return [f"{place}: found {rule.threshold:g} for a text rule, allowed: no threshold; what it matches goes."]
        if rule.threshold is None and shown_above(scorer, token=True) is None:
            place = policy.place(f"rules[{i}]")
            return [
                f"{place}: found no threshold, and the scorer of {rule.concept!r} says none for tokens; give a number."
            ]
    if isinstance(rule, Residualize) and rule.steer is not None:
        kind = "text" if rule.concept is None else policy.concepts[rule.concept].scorer
        if kind in ("text", "attention_probe"):  # reft is refused when the policy is read
            place = policy.place(f"rules[{i}].steer")
            return [
                f"{place}: found a concept of the scorer {kind}, allowed: direction, probe or features, which have a "
                "vector; or instruction."
            ]
    if isinstance(rule, Inoculate) and rule.above is None and shown_above(scorer) is None:
        place = policy.place(f"rules[{i}]")
        return [f"{place}: found no key 'above', and the scorer of {rule.concept!r} says no threshold; give a number."]
    return []


def _gate_problems(
    policy: ConceptPolicy, path: str, where: Where, audit: "Audit | None", columns: Collection[str] | None
) -> list[str]:
    if where.column is not None and columns is not None and where.column not in columns:
        return [_no_column(policy, f"{path}.column", where.column, columns)]
    for key, context in (("data", where.data), ("prompts", where.prompts)):
        if context is None:
            continue
        place = policy.place(f"{path}.{key}")
        if audit is None:
            return [f"{place}: found {context!r}, a context of an audit, but no audit was given."]
        try:
            audit.rows_in(context)
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
                    if spec.cluster is not None:
                        loaded.audit(spec.audit).check_model(model)
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

    def sae_of(self, audit: "Audit") -> "SAE":
        """The SAE of an audit, which it checks to be the one that it was made with."""
        key = f"{audit.info['sae']['source']} {audit.info['sae']['fingerprint']}"
        if key not in self._saes:
            self._saes[key] = audit.load_sae(self.device)
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
        sae = loaded.sae_of(audit)
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
