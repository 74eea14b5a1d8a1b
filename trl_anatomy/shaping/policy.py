"""YAML -> ConceptPolicy, with every problem of a policy named at once: file, line, key, what was found and is allowed.

Reading a policy looks at nothing but the policy; what needs model, SAE, audit or dataset is checked in `resolve`.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import AnatomyError
from ..reading.storage import joined, local, url_of
from .concepts import FEATURE_WAYS, SCORERS, UNSCORED, ConceptSpec
from .fields import NAMES, TEXT, Field, found, name_like
from .interventions import VERBS, Intervention
from .located import Located, PolicyError, Problems, from_python, read_file
from .where import FIELDS as WHERE_FIELDS
from .where import LATER as WHERE_LATER
from .where import WAYS, Where, surely_overlap

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.scorers import Scorer

VERSION = 1
SIGNS = ("explain_away", "amplify")

_NAME = name_like(r"[\w][\w.\- ]{0,99}", "a name of letters, digits, blanks, '_', '-' and '.'")


@dataclass(frozen=True)
class ConceptPolicy:
    """What the model may learn: concepts, and rules that act on them.

    Attributes:
        concepts: name -> how it is scored.
        rules: interventions in the order of the policy.
        source: the policy's file, or "policy" for one given in Python.
        places: key path -> "policy.yaml:12", for errors that are found later.
        text: the policy as YAML, for the record: the file as it stood, or a dict written out; "" for the empty policy.

    Example:
        >>> policy = ConceptPolicy.load({
        ...     "concepts": {"em_dash": {"scorer": "text", "pattern": "—"}},
        ...     "rules": [{"explain_away": "em_dash", "with": "filter_pairs", "fraction": 0.03}],
        ... })
        >>> policy.rules[0].fraction, bool(policy), bool(ConceptPolicy.load(None))
        (0.03, True, False)
    """

    concepts: Mapping[str, ConceptSpec] = field(default_factory=dict)
    rules: tuple[Intervention, ...] = ()
    source: str = "policy"
    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    text: str = field(default="", repr=False, compare=False)

    @classmethod
    def load(cls, source: "str | Path | Mapping[str, Any] | ConceptPolicy | None") -> "ConceptPolicy":
        """Read a policy.

        Args:
            source: path or URL of a YAML file, a dict of the same form, a ConceptPolicy (returned as it is), or None
                for the empty policy. YAML text is not taken as a string: a string is always a path.

        Returns:
            The policy; falsy when it has no rules. Relative paths in a file are resolved against its folder.

        Raises:
            PolicyError: everything that is wrong with it, at once.
            AnatomyError: no such file.
        """
        if isinstance(source, ConceptPolicy):
            return source
        if source is None:
            return cls()
        if isinstance(source, str | Path):
            path = local(os.path.expanduser(source))
            problems = Problems(str(source))
            url = url_of(path)
            folder = path.parent if url is None else url.rpartition("/")[0]
            root = read_file(path, problems)
        elif isinstance(source, Mapping):
            problems, folder = Problems("policy"), Path()
            root = from_python(source, problems)
        else:
            raise AnatomyError(
                f"concept_policy is a {type(source).__name__}; give the path of a YAML file, a dict or a ConceptPolicy."
            )
        policy = (
            cls(source=problems.source) if root is None or root.value is None else _Reader(problems, folder).read(root)
        )
        problems.raise_if_any()
        return replace(policy, text=_yaml_text(source))

    def __bool__(self) -> bool:
        return bool(self.rules)

    @property
    def used(self) -> dict[str, ConceptSpec]:
        """The concepts that a rule acts on or holds, and those they are given, in the order of the policy."""
        named = {rule.concept for rule in self.rules} | {name for rule in self.rules for name in self.held(rule)}
        named |= {other for name in named if name is not None for other in self.concepts[name].given}
        return {name: spec for name, spec in self.concepts.items() if name in named}

    def held(self, rule: Intervention) -> tuple[str, ...]:
        """The concepts whose mean gap a `reweight_pairs` rule leaves as it is; empty for other rules."""
        return rule.held([name for name, spec in self.concepts.items() if spec.scorer not in UNSCORED], self.rules)

    def place(self, path: str) -> str:
        """Where a key stands (or what holds it, if it is not written), as errors begin: `policy.yaml:12: rules[0]`."""
        holder = path
        while holder not in self.places and "." in holder:
            holder = holder.rpartition(".")[0]
        return f"{self.places.get(holder, self.source)}: {path}"

    def rule_place(self, i: int) -> Callable[[str], str]:
        """A key of rule `i` ("" for the rule) -> where it stands."""
        return lambda key: self.place(f"rules[{i}]{f'.{key}' if key else ''}")

    def scorers(self, *, audit: "Audit | None" = None, model: Any = None) -> "dict[str, Scorer]":
        """The scorers of the concepts that a rule acts on.

        Args:
            audit: the audit in use, for concepts that name a `cluster` and no audit folder of their own.
            model: the start model; where given, layers and widths are checked against it.

        Returns:
            concept name -> scorer of `trl_anatomy.reading.scorers`.

        Raises:
            PolicyError: all concepts that cannot be scored, at once.
        """
        from .resolve import resolve

        resolved, problems = resolve(self, audit)
        if model is not None:
            return resolved.to(model, problems)
        if problems:
            raise PolicyError(problems)
        return resolved.scorers


class _Reader:
    """Turns located values into a ConceptPolicy; what does not fit is noted and left out."""

    def __init__(self, problems: Problems, folder: Path | str) -> None:
        self.problems, self.folder = problems, folder
        self.places: dict[str, str] = {}

    def read(self, root: Located) -> ConceptPolicy:
        entries = self.problems.mapping(root, "", "a mapping with the keys version, concepts and rules")
        if entries is None:
            return ConceptPolicy(source=self.problems.source)
        self.known(entries, "", ("version", "concepts", "rules"))
        version = entries.get("version", Located(VERSION))
        if version.value != VERSION or isinstance(version.value, bool):
            self.problems.add(version.line, "version", f"found {found(version.value)}, allowed: {VERSION}.")
        concepts: dict[str, ConceptSpec | None] = {}
        given = entries.get("concepts", Located(None))
        if given.value is not None:
            allowed = "a mapping of concept names to {scorer: ...}"
            named = self.problems.mapping(given, "concepts", allowed) or {}
            for name, value in named.items():
                self.problems.read(Located(name, value.key_line), "concepts", _NAME)
                concepts[name] = self.concept(name, value)
            for name, value in named.items():
                self.given(name, value, concepts)
        rules: list[tuple[int, Located, Intervention]] = []
        listed = entries.get("rules", Located(None))
        if isinstance(listed.value, list):
            for i, item in enumerate(listed.value):
                rule = self.rule(item, f"rules[{i}]", concepts)
                if rule is not None:
                    rules.append((i, item, rule))
        elif listed.value is not None:
            self.problems.add(
                listed.line, "rules", f"found {found(listed.value)}, allowed: a list of rules, each on a line with '-'."
            )
        self.fights(rules)
        return ConceptPolicy(
            concepts={name: spec for name, spec in concepts.items() if spec is not None},
            rules=tuple(rule for _, _, rule in rules),
            source=self.problems.source,
            places=self.places,
        )

    def known(
        self, entries: Mapping[str, Located], path: str, allowed: Collection[str], later: Collection[str] = ()
    ) -> None:
        """Note keys that are not allowed here."""
        for key, value in entries.items():
            here = f"{path}.{key}" if path else key
            line = value.key_line
            self.places[here] = self.problems.place(line)
            if key in later:
                self.problems.add(
                    line, here[:200], f"not available in this version; allowed: {', '.join(map(str, allowed))}."
                )
            elif key not in allowed:
                self.problems.unknown(line, path, key, allowed, "the key ")

    def values(self, entries: Mapping[str, Located], path: str, rules: Mapping[str, Field]) -> dict[str, Any]:
        """The entries that `rules` knows, read."""
        return {key: self.problems.read(entries[key], f"{path}.{key}", rules[key]) for key in rules if key in entries}

    def resolved(self, path: str) -> str:
        """A path of the policy, relative ones seen from the policy file's folder."""
        return joined(self.folder, path)

    def concept(self, name: str, value: Located) -> ConceptSpec | None:  # noqa: C901, PLR0912
        path = f"concepts.{name[:100]}"
        self.places[path] = self.problems.place(value.key_line)
        before = len(self.problems.entries)
        entries = self.problems.mapping(value, path, "a mapping {scorer: ..., ...}")
        if entries is None:
            return None
        scorer = entries.get("scorer")
        if scorer is None:
            self.problems.add(value.line, path, f"found no key 'scorer', allowed: {', '.join(SCORERS)}.")
            return None
        if not isinstance(scorer.value, str) or scorer.value not in SCORERS:
            self.problems.unknown(scorer.line, f"{path}.scorer", scorer.plain(), SCORERS)
            return None
        allowed = SCORERS[scorer.value]
        if scorer.value not in UNSCORED:
            allowed = {**allowed, "given": NAMES}
        self.known(entries, path, ["scorer", *allowed])
        values = self.values(entries, path, allowed)
        if "sae" in entries:
            values["sae"] = self.sae(entries["sae"], f"{path}.sae")
        needed = {"text": ["pattern"], "habit": ["name"]}.get(scorer.value, ["path"])
        if scorer.value == "features" and "path" not in entries:
            needed = ["cluster"] if "cluster" in entries or "audit" in entries else ["features", "sae"]
        if scorer.value == "features":
            brings = {"path": ("features", "sae", "cluster", "audit"), "cluster": ("features", "sae", "layer")}
            for key in brings.get(needed[0], ()):
                if key in entries:
                    text = f"found beside {needed[0]}, which brings its own, allowed: {FEATURE_WAYS}."
                    self.problems.add(entries[key].key_line, f"{path}.{key}", text)
        for key in needed:
            if key not in entries:
                self.problems.add(value.line, path, f"found no key {key!r}, allowed: {allowed[key].allowed}.")
        if len(self.problems.entries) > before:
            return None
        for key in ("audit", "path"):
            if values.get(key) is not None:
                values[key] = self.resolved(values[key])
        if scorer.value == "habit":
            values["habit"] = values.pop("name")
        return ConceptSpec(name=name, scorer=scorer.value, **values)

    def given(self, name: str, value: Located, concepts: Mapping[str, ConceptSpec | None]) -> None:
        """Note concepts that one is given and that are not there, or are the concept itself."""
        spec = concepts[name]
        path = f"concepts.{name[:100]}.given"
        for other in () if spec is None else spec.given:
            line = value.value["given"].line
            if other == name:
                self.problems.add(line, path, f"found {other!r}, the concept itself, allowed: other concepts.")
            elif other not in concepts:
                self.problems.unknown(line, path, other, concepts, "the concept ")
            else:
                self.scored(line, path, concepts[other])

    def scored(self, line: int | None, path: str, spec: ConceptSpec | None) -> None:
        """Note a concept that a score is asked of and that has none."""
        if spec is not None and spec.scorer in UNSCORED:
            allowed = ", ".join(name for name in SCORERS if name not in UNSCORED)
            self.problems.add(
                line,
                path,
                f"found {spec.name!r}, a concept of the scorer {spec.scorer!r}, which gives no score, allowed: "
                f"concepts of the scorers {allowed}.",
            )

    def sae(self, value: Located, path: str) -> dict[str, str] | None:
        allowed = SCORERS["features"]["sae"].allowed
        entries = self.problems.mapping(value, path, allowed)
        if entries is None:
            return None
        self.known(entries, path, ("path", "release", "id"))
        if set(entries) & {"path", "release", "id"} not in ({"path"}, {"release", "id"}):
            keys = ", ".join(entries) or "no key"
            self.problems.add(value.line, path, f"found {keys[:100]}, allowed: {allowed}.")
        values = self.values(entries, path, {"path": TEXT, "release": TEXT, "id": TEXT})
        if values.get("path") is not None:
            values["path"] = self.resolved(values["path"])
        return values

    def rule(self, value: Located, path: str, concepts: Mapping[str, ConceptSpec | None]) -> Intervention | None:  # noqa: C901, PLR0912
        problems, before = self.problems, len(self.problems.entries)
        entries = problems.mapping(value, path, "a mapping such as {explain_away: CONCEPT, with: VERB}")
        if entries is None:
            return None
        self.places[path] = problems.place(value.line)
        signs = [key for key in SIGNS if key in entries]
        verb = entries.get("with", Located(None))
        cls = VERBS.get(verb.value) if isinstance(verb.value, str) else None
        instead = cls is not None and cls.instead != "" and cls.instead in entries and not signs
        if len(signs) != 1 and not instead:
            what = "both explain_away and amplify" if signs else "neither explain_away nor amplify"
            problems.add(value.line, path, f"found {what}, allowed: one of them, with the name of a concept.")
        for sign in signs:
            name = entries[sign]
            if not isinstance(name.value, str) or name.value not in concepts:
                problems.unknown(name.line, f"{path}.{sign}", name.plain(), concepts, "the concept ")
        if "with" not in entries:
            problems.add(value.line, path, f"found no key 'with', allowed: {', '.join(VERBS)}.")
        elif cls is None:
            problems.unknown(verb.line, f"{path}.with", verb.plain(), VERBS)
        where = self.where(entries["where"], f"{path}.where") if "where" in entries else None
        if cls is None:
            return None
        self.known(entries, path, [*SIGNS, "with", *cls.keys, "where"])
        concept = entries[signs[0]].value if len(signs) == 1 else None
        spec = concepts.get(concept) if isinstance(concept, str) else None
        scorers = cls.scorers or [name for name in SCORERS if name not in UNSCORED]
        if spec is not None and spec.scorer not in scorers:
            text = f"found {spec.name!r}, a concept of the scorer {spec.scorer!r}, allowed with {verb.value}: "
            problems.add(entries[signs[0]].line, f"{path}.{signs[0]}", f"{text}{', '.join(scorers)}.")
        elif "fraction" in entries:
            self.scored(entries["fraction"].line, f"{path}.fraction", spec)
        values = self.values(entries, path, cls.keys)
        for part in fields(cls):
            if part.name in cls.keys and part.name not in entries and part.default is MISSING:
                problems.add(value.line, path, f"found no key {part.name!r}, allowed: {cls.keys[part.name].allowed}.")
        for name in values.get("hold") or ():
            if name not in concepts:
                problems.unknown(entries["hold"].line, f"{path}.hold", name, concepts, "the concept ")
            else:
                self.scored(entries["hold"].line, f"{path}.hold", concepts[name])
        if len(problems.entries) > before:
            return None
        if signs:
            values |= {"concept": entries[signs[0]].value, "sign": signs[0]}
        try:
            named = {f"{key}_" if iskeyword(key) else key: held for key, held in values.items()}
            return cls(where=where, **named)
        except AnatomyError as error:  # keys that are right one by one and wrong together
            key = next((key for key in cls.keys if key in entries), next(iter(cls.keys)))
            problems.add(entries[key].line if key in entries else value.line, f"{path}.{key}", str(error))
            return None

    def where(self, value: Located, path: str) -> Where | None:
        before = len(self.problems.entries)
        entries = self.problems.mapping(value, path, WAYS)
        if entries is None:
            return None
        self.known(entries, path, tuple(WHERE_FIELDS), WHERE_LATER)
        given = set(entries) & set(WHERE_FIELDS)
        ways = ({"column", "equals"}, {"column", "in"}, {"data"}, {"prompts"}, {"prompt"}, {"asks"}, {"problem"})
        if given not in ways and not set(entries) & set(WHERE_LATER):
            self.problems.add(value.line, path, f"found {', '.join(sorted(given)) or 'no gate'}, allowed: {WAYS}.")
        values = self.values(entries, path, WHERE_FIELDS)
        if len(self.problems.entries) > before:
            return None
        held = (values["equals"],) if "equals" in values else values.get("in", ())
        gate = {key: value for key, value in values.items() if key not in ("equals", "in")}
        return Where(values=held, **gate)

    def fights(self, rules: list[tuple[int, Located, Intervention]]) -> None:
        """Note pairs of rules that pull one concept both ways for the same pairs."""
        first: dict[str, list[tuple[int, Intervention]]] = {}
        for i, item, rule in rules:
            if rule.concept is None:
                continue
            for j, other in first.setdefault(rule.concept, []):
                if rule.sign != other.sign and surely_overlap(rule.where, other.where):
                    self.problems.add(
                        item.line,
                        f"rules[{i}]",
                        f"found {rule.sign}: {rule.concept}, but rules[{j}] says {other.sign} for some of the same "
                        "pairs, allowed: one of the two, or gates (where) that share no pair.",
                    )
                    break
            first[rule.concept].append((i, rule))


def _yaml_text(source: str | Path | Mapping[str, Any]) -> str:
    if isinstance(source, Mapping):  # by way of JSON, which knows no paths, tuples or numpy's numbers
        return yaml.safe_dump(json.loads(json.dumps(dict(source), default=str)), sort_keys=False, allow_unicode=True)
    return local(os.path.expanduser(source)).read_text(encoding="utf-8", errors="replace")
