"""A concept policy as a reward function of TRL's online trainers: r − λ·s on generated text (method.md section 8)."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..errors import AnatomyError
from ..reading.clock import running
from ..reading.content import Marks, find_marks
from ..reading.forward import only, read_texts
from ..reading.processing import load_processing_class, prompt_ids, text_tokenizer
from ..reading.score import score_pairs
from ..reading.scorers import HiddenScorer, Scorer, TextRule
from ..reading.spans import TOKEN_FEATURES, Pairs, flatten_text, read_pairs
from ..shaping.concepts import TEXTUAL
from ..shaping.interventions import ShapeReward
from ..shaping.located import PolicyError
from ..shaping.plan import plan_policy
from ..shaping.policy import ConceptPolicy
from ..shaping.resolve import check_policy
from .zero import loaded_whole, undo_leftover

if TYPE_CHECKING:
    from ..audit.folder import Audit


class ConceptReward:
    """−λ·s̃ of every generated response, summed over the `shape_reward` rules of a policy (+λ·s̃ where one amplifies).

    Give it to `GRPOTrainer` or `RLOOTrainer` among the `reward_funcs`: the sum of all rewards is then r − λ·s̃. s̃ is the
    score in standard deviations over both responses of the reference pairs (`reference`, else those of the audit), from
    their mean; without such pairs it is the raw score. With them, `strength: auto` is the coefficient that their
    preferences fit. Scores of hidden states come from a frozen start model of its own, on the tokens exactly as they
    were generated.

    Gates on the prompt and on columns of the training set work; a rule is silent outside its gate. Prompts are
    tokenised as the trainers tokenise them: give the tools and `chat_template_kwargs` that the trainer is given, since
    TRL does not pass them on.

    Args:
        concept_policy: YAML path, dict or ConceptPolicy, with `shape_reward` rules only.
        model: the start model for concepts of hidden states: a path or hub name (loaded here, on this process's
            device), or an instance (copied, so that training it does not move the scores). Default: the audit's.
        processing_class: its tokenizer; default: the one beside the model.
        reference: preference pairs to measure scores by. Default: the audit's pairs, else none.
        audit: audit folder or Audit, for concepts that name its clusters.
        tools: the trainer's `tools`, functions or JSON schemas.
        chat_template_kwargs: those of the trainer's config; a `chat_template` among them takes the place of the
            tokenizer's own.

    Attributes:
        strengths: λ per rule, negative where it amplifies.
        centres, scales: mean and standard deviation per concept; 0 and 1 without a reference.

    Raises:
        PolicyError: rules that generated text cannot follow (other verbs, `constant`, gates on an audit's contexts,
            `strength: auto` without reference pairs), all at once, and whatever else is wrong with the policy.
        AnatomyError: an empty policy; a concept of hidden states without a model.

    Source: method.md section 8 (reward shaping), section 12 (fitted strength).

    Example:
        >>> reward = ConceptReward({
        ...     "concepts": {"bold": {"scorer": "text", "pattern": "[*]{2}"}},
        ...     "rules": [{"explain_away": "bold", "with": "shape_reward", "strength": 2}],
        ... })
        >>> reward(prompts=["Say b.", "Say b."], completions=["**b**", "b"])
        [-2.0, 0.0]
    """

    __name__ = "concept_reward"  # under which TRL logs it

    def __init__(
        self,
        concept_policy: "str | Path | dict[str, Any] | ConceptPolicy",
        *,
        model: str | Path | nn.Module | None = None,
        processing_class: Any = None,
        reference: Dataset | None = None,
        audit: "str | Path | Audit | None" = None,
        tools: Sequence[Callable[..., Any] | dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from ..audit.folder import load_audit
        from ..audit.reopen import reopen

        undo_leftover()
        self.policy = policy = ConceptPolicy.load(concept_policy)
        if not policy:
            raise AnatomyError("concept_policy has no rules; leave ConceptReward out.")
        found = load_audit(audit) if isinstance(audit, str | Path) else audit
        source = None if found is None else reopen(found)
        self.rules = _followed(policy, measured=reference is not None or found is not None)
        resolved = check_policy(policy, found)
        hidden = [name for name, spec in policy.used.items() if spec.scorer not in TEXTUAL]
        if model is None and source is None and hidden:
            raise AnatomyError(f"The concept {hidden[0]!r} is scored on hidden states: give the start model.")
        self._tokenizer: Any = processing_class or (_tokenizer(model) if model is not None else None)
        if self._tokenizer is None and source is not None:
            self._tokenizer = running(source.tokenizer)  # the online trainers ask with today's date
        self._asked = _asked(self._tokenizer, tools, chat_template_kwargs)
        self._model: Any = None
        if hidden:
            with loaded_whole():
                self._model = source.model if model is None and source is not None else _own(model)
            self._model.eval().requires_grad_(False)
        self._marks = find_marks(self._tokenizer) if hidden else Marks()
        self.scorers: dict[str, Scorer] = resolved.scorers if self._model is None else resolved.to(self._model)

        self.strengths = [rule.fixed or 0.0 for rule in self.rules]  # those that are to be fitted come below
        self.centres, self.scales = dict.fromkeys(self.scorers, 0.0), dict.fromkeys(self.scorers, 1.0)
        pairs = self._pairs(reference) if reference is not None else source.pairs if source is not None else None
        if pairs is not None:
            scores = score_pairs(pairs, self.scorers, self._model)
            self.strengths = [record["strength"] for record in plan_policy(policy, pairs, scores).rules]
            for name in self.scorers:
                pooled = np.concatenate([scores.chosen[name], scores.rejected[name]])
                self.centres[name], self.scales[name] = float(pooled.mean()), float(pooled.std())

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards of a batch.

        Args:
            prompts, completions: text or lists of messages.
            completion_ids: the generated tokens, which TRL passes; without them the completions are tokenised.
            columns: what else TRL passes: columns of the dataset, for gates.

        Raises:
            AnatomyError: a gate's column is not among `columns`.
        """
        scores = self.score(prompts, completions, completion_ids)
        gated = any(rule.where is not None and rule.where.reads_prompts for rule in self.rules)
        asked = [prompt for prompt, _ in self._texts(prompts, completions, completion_ids)] if gated else []
        total = np.zeros(len(completions))
        for rule, strength in zip(self.rules, self.strengths, strict=True):
            acts = np.ones(len(total), bool)
            if rule.where is not None:
                acts = rule.where.opens(asked, columns)
            standard = (scores[rule.concept] - self.centres[rule.concept]) / self.scales[rule.concept]
            total -= np.where(acts, strength * standard, 0.0)
        return total.tolist()

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, np.ndarray]:
        """Raw scores, (n,) per concept; arguments as `__call__`."""
        texts = [text for _, text in self._texts(prompts, completions, completion_ids)]
        scores = {name: np.zeros(len(texts)) for name in self.scorers}
        hidden: dict[str, HiddenScorer] = {}
        for name, scorer in self.scorers.items():
            if isinstance(scorer, TextRule):
                scores[name][:] = [scorer.score_text(text) for text in texts]
            else:
                hidden[name] = scorer
        if not hidden:
            return scores
        before = [prompt_ids(self._tokenizer, prompt, **self._asked) for prompt in prompts]
        if completion_ids is None:
            completion_ids = text_tokenizer(self._tokenizer)(texts, add_special_tokens=False)["input_ids"]
        rows = [[*prompt, *ids] for prompt, ids in zip(before, completion_ids, strict=True)]
        reader = text_tokenizer(self._tokenizer)
        pad = reader.eos_token_id if reader.pad_token_id is None else reader.pad_token_id
        layers = sorted({scorer.layer for scorer in hidden.values()})
        offsets = np.cumsum([0, *map(len, completion_ids)])
        ids = np.array([token for tokens in completion_ids for token in tokens], dtype=np.int64)
        content = self._marks.content(ids, offsets, response=True)
        for i, states in read_texts(self._model, rows, layers, pad_token_id=pad):
            for name, scorer in hidden.items():
                response = states[scorer.layer][len(before[i]) :]
                kept, bounds = only(response, [0, len(response)], content[offsets[i] : offsets[i + 1]])
                scores[name][i] = float(scorer.score_spans(kept, bounds)[0])
        return scores

    def _texts(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None
    ) -> list[tuple[str, str]]:
        """Prompt and completion as text rules read them: conversations by their tokens, as `Pairs.texts`."""
        chats = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        texts = [(flatten_text(prompt), flatten_text(text)) for prompt, text in zip(prompts, completions, strict=True)]
        if self._tokenizer is None or not chats:
            return texts
        reader = text_tokenizer(self._tokenizer)
        answer = [{"role": "assistant", "content": "-"}]
        ids = [list(completion_ids[i]) if completion_ids is not None else [] for i in chats]
        tokens = {
            "prompt_ids": [prompt_ids(self._tokenizer, prompts[i], **self._asked) for i in chats],
            "chosen_ids": ids,
            "rejected_ids": ids,
        }
        pairs = Pairs(
            Dataset.from_dict(tokens | {"row": list(range(len(chats)))}, features=TOKEN_FEATURES),
            Dataset.from_list([{"prompt": prompts[i], "chosen": answer, "rejected": answer} for i in chats]),
            None,
            "keep_start",
            reader.eos_token_id if reader.pad_token_id is None else reader.pad_token_id,
            reader.bos_token_id,
            {},
            reader,
            self._tokenizer,
        )
        for place, i in enumerate(chats):
            text = pairs.response_text(place, "chosen") if completion_ids is not None else texts[i][1]
            texts[i] = pairs.prompt_text(place), text
        return texts

    def _pairs(self, reference: Dataset) -> Pairs:
        if self._tokenizer is None:
            raise AnatomyError(
                "reference is tokenised as TRL does: give the model or its tokenizer (processing_class)."
            )
        return read_pairs(reference, self._tokenizer)


def _followed(policy: ConceptPolicy, *, measured: bool) -> list[ShapeReward]:
    """The rules; PolicyError for those that generated text cannot follow."""
    rules: list[ShapeReward] = []
    problems: list[str] = []
    given: Sequence[Any] = policy.rules  # those that act on text are shaped as shape_reward is
    for i, rule in enumerate(given):
        place = policy.place(f"rules[{i}]")
        if not rule.on_text:
            problems.append(f"{place}.with: found {rule.verb!r}, allowed: shape_reward; there are no pairs to act on.")
            continue
        rules.append(rule)
        if policy.concepts[rule.concept].given:
            problems.append(
                f"{policy.place(f'concepts.{rule.concept}.given')}: found given, which is fitted on pairs, allowed: a "
                "concept without it."
            )
        if rule.constant is not None:
            problems.append(f"{place}.constant: found a margin between two responses, allowed: strength.")
        elif rule.fixed is None and not measured:
            problems.append(
                f"{place}.strength: found auto, the default, without reference pairs to fit it on, allowed: a number, "
                "or pairs (reference or audit)."
            )
        if rule.where is not None and rule.where.of_audit is not None:
            problems.append(
                f"{place}.where: found {rule.where}, which holds pairs of the audit, allowed: a gate on the prompt or "
                "on a column."
            )
    if problems:
        raise PolicyError(problems)
    return rules


def _tokenizer(model: str | Path | nn.Module) -> Any:
    name = get_config_model_id(model.config) if isinstance(model, nn.Module) else str(model)
    return load_processing_class(name)


def _asked(
    processing_class: Any, tools: Sequence[Any] | None, chat_template_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `GRPOTrainer` asks the chat template with, beside the messages."""
    asked = {"tools": list(tools or []) or None, **(chat_template_kwargs or {})}  # for no tools some open a list
    if tools and processing_class is not None and not is_chat_template_prefix_preserving(processing_class):
        asked.setdefault("chat_template", get_training_chat_template(processing_class))
    return asked


def _own(model: str | Path | nn.Module | None) -> Any:
    """A model that nobody else trains."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    return create_model_from_path(str(model), device_map=None, trust_remote_code=False).to(PartialState().device)
