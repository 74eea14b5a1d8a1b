"""Run an audit: pairs, frozen pass, communities, tests, folder, page."""

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from ..errors import AnatomyError, require
from ..reading.clock import dated, template_now
from ..reading.habits import read_habits
from ..reading.processing import lengthen_embeddings, load_processing_class, set_chat_template
from ..reading.remote_code import load_config, why_not_loaded
from ..reading.sae_list import published_sae
from ..reading.storage import is_url, local
from . import stats
from .choice import choice_of
from .communities import find_communities
from .concept_labels import label_concepts
from .config import NO_SAE, AuditConfig
from .counted import Counted
from .find_sae import AUTO, find_sae, model_names
from .finding_list import Line, Shown, habit_lines, list_findings
from .findings import Findings, few_prompts, one_blas_thread, shared_prompts, timed
from .folder import Audit, load_audit, pairs_table, write_audit
from .habit_table import habit_table, habit_values, habits_to_count, texts_of, tokens_of
from .habits_by_prompt import Asked, cluster_members, habits_by_prompt, properties, shapes
from .improbable import improbable_labels
from .judge_sae import fit_notes, fit_record, judged, pairs_to_judge, refuse_unfit
from .labels import distinctive_terms, group_terms, own_words, prompt_names
from .maps import map_places
from .predict import RESPONSE_GEOMETRY, concept_table
from .problems import count_problems, eval_prompts, find_problems, looked_for, with_improbable
from .prompt_rules import rules_of_pairs
from .prompt_view import PromptView, prompt_view
from .samples import sample_rows, sample_table
from .ties import can_tell_ties
from .views import FeatureView, feature_view, first_of

if TYPE_CHECKING:
    from datasets import Dataset

    from ..reading.copies import Copies
    from ..reading.harvest import Harvest
    from ..reading.sae import SAE
    from ..reading.sae_check import SAEFit
    from ..reading.spans import Pairs

# Pairs whose text is read for labels.
LABEL_PAIRS = 20_000
# Words of a context that those it is called by are taken from.
CONTEXT_TERMS = 10
# Pairs of a prompt context whose text is read in any case.
LABEL_MEMBERS = 30

_PACKAGES = ("trl", "transformers", "torch", "sae-lens", "datasets", "numpy", "scipy", "scikit-learn", "scikit-network")


def load_dataset(config: AuditConfig) -> "Dataset":
    """The raw preference data: a file, a folder, a URL, a name on the hub, or a mixture of those.

    Raises:
        AnatomyError: as `reading.dataset.load_rows`.
    """
    from ..reading.dataset import load_mixture, load_rows

    if config.datasets:
        return load_mixture(config.datasets)
    if not config.dataset:
        raise AnatomyError("audit setting dataset: none given; name a dataset, a folder, or a file.")
    return load_rows(config.dataset, subset=config.dataset_subset, split=config.dataset_split)


def load_tokenizer(name: str, config: AuditConfig | None = None) -> Any:
    """The tokenizer or processor of a model; as TRL loads it, with the template of an audit.

    Args:
        name: folder or hub name of the model.
        config: the audit whose rows it makes tokens of: as the trainer of its `truncation`, with its template. Its
            revision, and leave to run remote code, are those of its own model alone.
    """
    if config is None:
        return load_processing_class(name)
    loaded = load_processing_class(name, reward=config.truncation == "drop", **version_of(name, config))
    if config.chat_template_path is not None:
        set_chat_template(loaded, config.chat_template_path)
    return loaded


def version_of(name: str, config: AuditConfig | None) -> dict[str, Any]:
    """The revision of a model and leave to run its code, as arguments: an audit's for its own model, none for others.

    `main` and no setting are the same to the hub.
    """
    if config is None or not config.model or name != config.model:
        return {"revision": None, "trust_remote_code": None}
    return {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}


def empty_model(name: str, config: AuditConfig | None = None) -> Any:
    """A causal language model without its weights: whether it can be loaded at all.

    Args:
        name: folder or hub name.
        config: the audit, if it is the audited model; without, no remote code runs.
    """
    import torch

    version = version_of(name, config)
    auto, shape = auto_class(name, **version)
    try:
        with torch.device("meta"):
            return auto.from_config(shape, trust_remote_code=bool(version["trust_remote_code"]))
    except Exception as error:
        reason = why_not_loaded(error, settable=version["trust_remote_code"] is not None)
        raise AnatomyError(f"model {name}: cannot be loaded ({reason}).") from error


def load_model(config: AuditConfig) -> Any:
    """The start model in evaluation mode on its device; without remote code, unless the settings trust it."""
    device = _device(config)
    trusted = config.trust_remote_code
    auto, _ = auto_class(config.model, revision=config.model_revision, trust_remote_code=trusted)
    try:
        model = auto.from_pretrained(
            config.model, dtype=config.dtype, revision=config.model_revision, trust_remote_code=bool(trusted)
        )
    except Exception as error:
        reason = why_not_loaded(error, settable=trusted is not None)
        raise AnatomyError(f"model {config.model}: cannot be loaded ({reason}).") from error
    if config.chat_template_path is not None:
        lengthen_embeddings(model, load_tokenizer(config.model, config))
    return model.to(device).eval()


def auto_class(name: str, *, revision: str | None = None, trust_remote_code: bool | None = None) -> tuple[Any, Any]:
    """What loads a model, and its configuration: a model of text and images is read where it is no language model.

    Args:
        name, revision, trust_remote_code: as of `reading.remote_code.load_config`.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    causal = type(config) in known or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText, config


def shape_of(config: AuditConfig) -> Any:
    """The transformers configuration of the start model.

    Raises:
        AnatomyError: as `reading.remote_code.load_config`.
    """
    return load_config(config.model, **version_of(config.model, config))


def _device(config: AuditConfig) -> str:
    """Where the model goes.

    Raises:
        AnatomyError: there is no such device.
    """
    import torch

    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise AnatomyError(
            f"audit setting device: found {device!r}, which cannot be used here ({why_not_loaded(error)}); allowed: "
            "auto, cpu, or a device that torch finds, such as cuda."
        ) from error
    return device


def _require(config: AuditConfig, model: Any, dataset: Any, sae: Any = None) -> None:
    if config.sae == NO_SAE:
        raise AnatomyError("audit setting sae: none counts habits alone; call run_text_audit with sae left empty.")
    missing = [name for name, given in (("model", model), ("dataset", dataset), ("sae", sae)) if given is None]
    missing = [name for name in missing if not (config.data_name if name == "dataset" else getattr(config, name))]
    if missing:
        raise AnatomyError(f"audit: no {' and no '.join(missing)} given.")
    require("sae_lens", "sknetwork", "plotly")
    if model is None:
        _device(config)


def tokenizer_of(config: AuditConfig, model: Any, tokenizer: Any) -> Any:
    """The tokenizer or processor of an audit: the one given, else the model's, with the audit's template."""
    if tokenizer is not None:
        if config.chat_template_path is not None:
            tokenizer = copy.deepcopy(tokenizer)
            set_chat_template(tokenizer, config.chat_template_path)
        return tokenizer
    name = config.model or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise AnatomyError("audit: a model in memory needs its tokenizer beside it.")
    return load_tokenizer(name, config)


def _date(config: AuditConfig) -> str:
    """The date that templates write: of the harvest that a run before this one began in the folder, else today's."""
    from ..reading.harvest import harvest_date

    return harvest_date(local(config.out) / "harvest") or template_now()


def dry_run(config: AuditConfig, *, model: Any = None, tokenizer: Any = None, dataset: Any = None) -> dict[str, Any]:
    """What `run_audit` would do, without weights and without the pass: everything is checked that can be.

    Returns:
        JSON-able: pairs, left_out, notes (on columns that nothing reads, on rows longer than the model was trained on),
        tokens (a span each, after truncation), longest (tokens of the longest pair), shards and shards_done,
        batch_tokens, judged_on (pairs by which the SAE is judged first), sae, layer, d_sae (None for an SAE that is
        found or trained first), contexts, out. Of pairs also longest_row (its row, its tokens a span, and how its
        responses end as they are cut) and problems (rows of each kind).
    Raises:
        AnatomyError: as `run_audit` would, but for what only weights tell: that a harvest in the folder is of another
            model of the same shape.
    """
    from ..reading.capacity import check_pairs_fit
    from ..reading.columns import column_notes, prompt_column, unread_columns
    from ..reading.harvest import shards_done
    from ..reading.locate import decoder_layers
    from ..reading.sae import check_sae, load_sae
    from ..reading.sae_training import default_layer
    from ..reading.sft import read_rows
    from .region_view import region_rows

    _require(config, model, dataset)
    evaluated = eval_prompts(config)
    raw = load_dataset(config) if dataset is None else dataset
    pairs = read_rows(
        raw,
        dated(tokenizer_of(config, model, tokenizer), _date(config)),
        data_kind=config.data_kind,
        max_length=config.max_length,
        truncation=config.truncation,
        pool_special_tokens=config.pool_special_tokens,
    )
    if config.region is not None:
        region_rows(pairs, config.region)
    shape = empty_model(config.model, config) if model is None else model
    unfit = check_pairs_fit(pairs, shape.config, grows=config.chat_template_path is not None)
    if config.sae == AUTO:
        n_layers = len(decoder_layers(shape))
        listed = published_sae(model_names(config.model), n_layers)
        layer, d_sae, done = default_layer(n_layers) if listed is None else listed.layer, None, 0
        origin = "one trained on these pairs" if listed is None else listed.source
    else:
        sae = load_sae(config.sae)
        layer, d_sae, origin = check_sae(sae, shape, config.layer), sae.d_sae, config.sae
        done = shards_done(
            local(config.out) / "harvest", pairs, sae, layer=layer, shard_pairs=config.shard_pairs, model=model
        )
    tokens = np.array([[len(part) for part in pairs.tokens(i)] for i in range(len(pairs))])
    shards = -(-len(pairs) // config.shard_pairs)
    active = int(len(pairs) * (1 - config.silent_percentile / 100))
    return {
        "pairs": len(pairs),
        "left_out": dict(pairs.left_out),
        "notes": [*column_notes(unread_columns(raw, config.data_kind), prompt_column(raw)), *unfit],
        "tokens": {
            "prompt": int(tokens[:, 0].sum()),
            "chosen": int(tokens[:, 1].sum()),
            "rejected": int(tokens[:, 3].sum()),
        },
        "longest": int(tokens[:, [0, 1, 3]].sum(axis=1).max()),
        **(_data_shown(raw, pairs, tokens, evaluated) if config.data_kind == "pairs" else {}),
        "shards": shards,
        "shards_done": done,
        "batch_tokens": config.batch_tokens,
        "judged_on": min(len(pairs), pairs_to_judge(len(pairs))),
        "sae": origin,
        "layer": layer,
        "d_sae": d_sae,
        "contexts": max(1, min(config.n_contexts, active // (2 * config.min_context))),
        "out": str(config.out),
    }


def _data_shown(
    raw: "Dataset", pairs: "Pairs", tokens: np.ndarray, evaluated: frozenset[int] | None, n_end: int = 60
) -> dict[str, Any]:
    """The longest row as it is cut, and the problems of the data, for `dry_run`.

    Args:
        tokens: (n, >= 4) tokens of prompt, chosen and, fourth, rejected.
        n_end: characters shown of the end of a response.
    """
    i = int(tokens[:, [0, 1, 3]].sum(axis=1).argmax())
    _, chosen, rejected = pairs.texts(i)
    kinds = looked_for(True, evaluated is not None, can_tell_ties(raw))
    return {
        "longest_row": {
            "row": int(pairs.rows[i]),
            **dict(zip(("prompt", "chosen", "rejected"), tokens[i, [0, 1, 3]].tolist(), strict=True)),
            "chosen_ends": chosen[-n_end:],
            "rejected_ends": rejected[-n_end:],
        },
        "problems": count_problems(find_problems(raw, pairs=pairs, evaluated=evaluated), kinds),
    }


def run_audit(
    config: AuditConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    dataset: Any = None,
    sae: "SAE | None" = None,
    progress: bool = True,
) -> Audit:
    """Audit a preference dataset with the frozen start model and an SAE, and write the audit folder.

    Global random state is left alone. An interrupted run resumes with the shards it has; a finished one is computed
    again from its harvest. Where torchrun or accelerate started several processes, all call this: they share the
    shards of the harvest, the main one does the rest while the others wait, and all return the same audit.

    Args:
        config: what to audit and how.
        model, tokenizer, dataset, sae: in memory, instead of being loaded as `config` says.
    Raises:
        AnatomyError: bad input, before the pass; a harvest of something else in the folder.
    """
    from ..reading.capacity import check_pairs_fit
    from ..reading.harvest import harvest
    from ..reading.ranks import Ranks
    from ..reading.sae import check_sae, load_sae
    from ..reading.sft import read_rows
    from .region_view import region_rows

    timings: dict[str, float] = {}
    ranks = Ranks.current()
    _require(config, model, dataset, sae)
    if config.habits is not None:  # bad ones are told before the pass
        read_habits(config.habits)
    evaluated = eval_prompts(config)
    out = local(config.out)  # refuses a URL that fsspec cannot read
    with timed(timings, "load"):
        raw = load_dataset(config) if dataset is None else dataset
        date = ranks.in_main(lambda: _date(config))
        tokenizer = dated(tokenizer_of(config, model, tokenizer), date)
        pairs = read_rows(
            raw,
            tokenizer,
            data_kind=config.data_kind,
            max_length=config.max_length,
            truncation=config.truncation,
            pool_special_tokens=config.pool_special_tokens,
        )
        if config.region is not None:  # a bad one is told before the pass
            region_rows(pairs, config.region)
        shape = shape_of(config) if model is None else model.config
        check_pairs_fit(pairs, shape, grows=config.chat_template_path is not None)
        if sae is None and config.sae != AUTO:
            sae = load_sae(config.sae)
        model = load_model(config) if model is None else model
        fit, origin = None, ""
        if sae is None:
            if ranks.size > 1 or is_url(config.out):
                raise AnatomyError(
                    "--sae auto works in one process and in a folder of this machine: make the SAE first, with "
                    "`trl-anatomy sae`."
                )
            sae, fit, origin = find_sae(config, model, pairs, out, progress=progress)
        layer = check_sae(sae, model, config.layer)
    with timed(timings, "judging"):
        if fit is None:
            sae.to(next(model.parameters()).device)
            fit = ranks.in_main(lambda: _judged(config, model, sae, pairs, layer, out, progress))
        assert fit is not None
        refuse_unfit(fit, sae, config)
    with timed(timings, "harvest"):
        read = harvest(
            model,
            sae,
            pairs,
            out / "harvest",
            layer=layer,
            batch_tokens=config.batch_tokens,
            shard_pairs=config.shard_pairs,
            progress=progress,
            ranks=ranks,
            codes=config.data_kind == "pairs",
        )
    ranks.in_main(
        lambda: _conclude(
            config, read, pairs, raw, tokenizer, model, sae, layer, timings, progress, fit, origin, evaluated
        )
    )
    return load_audit(config.out)


def _judged(
    config: AuditConfig, model: Any, sae: "SAE", pairs: "Pairs", layer: int, out: Path, progress: bool
) -> "SAEFit":
    """The verdict on the SAE, where the folder is free for this audit."""
    from ..reading.harvest import shards_done

    shards_done(out / "harvest", pairs, sae, layer=layer, shard_pairs=config.shard_pairs, model=model)
    return judged(model, sae, pairs, layer, out, progress=progress)


def _conclude(  # noqa: PLR0913, PLR0915
    config: AuditConfig,
    read: "Harvest",
    pairs: "Pairs",
    raw: "Dataset",
    tokenizer: Any,
    model: Any,
    sae: "SAE",
    layer: int,
    timings: dict[str, float],
    progress: bool,
    fit: "SAEFit",
    origin: str = "",
    evaluated: frozenset[int] | None = None,
) -> None:
    """From a harvest to the audit folder."""
    from ..reading.capacity import check_pairs_fit
    from ..reading.columns import column_notes, prompt_column, unread_columns
    from ..reading.fingerprint import layer_weights, model_fingerprint
    from .labelling import label_audit
    from .region_view import analyse_regions
    from .report import write_report

    samples, habits, problems, counted, listed, kinds = None, None, None, None, None, []
    by_prompt = None
    if config.data_kind == "sft":
        findings = analyse_regions(read, config, pairs)
    else:
        with timed(timings, "habits"):
            texts, names = texts_of(pairs), habits_to_count(config.habits, tokens=True)
            values = habit_values(texts, names, tokens_of(pairs), progress=progress)
            counted = Counted(values, names, pairs.prompt_groups)
            habits = habit_table(
                texts, names, groups=counted.groups, rows=pairs.rows, alpha=config.alpha, values=values
            )
        with timed(timings, "problems"):
            problems = find_problems(raw, pairs=pairs, evaluated=evaluated)
        with timed(timings, "prompt_rules"):
            asked = Asked.of(rules_of_pairs(pairs))
        with timed(timings, "habit_lines"):
            lines = habit_lines(counted, config.seed)
        findings = analyse(
            read, config, pairs.texts, pairs.prompt_groups, pairs.copies, pairs.cut, counted, lines, asked
        )
        with timed(timings, "by_prompt"):
            terms = [of["terms"] for name, of in findings.info["contexts"].items() if name.startswith("A")]
            by_prompt = habits_by_prompt(
                counted,
                asked.with_clusters(cluster_members(findings.pairs, len(terms)), terms),
                alpha=config.alpha,
                least=config.min_context,
                copies=pairs.copies.group,
            )
        kinds = looked_for(True, evaluated is not None, can_tell_ties(raw), findings.improbable is not None)
        with timed(timings, "samples"):
            table = findings.concepts
            of = dict(zip(table["concept"].to_pylist(), map(np.asarray, table["features"].to_pylist()), strict=True))
            samples = sample_table(
                sample_rows(table, findings.hypotheses, findings.pairs),
                of,
                model,
                sae,
                pairs,
                tokenizer,
                layer=layer,
                batch_tokens=config.batch_tokens,
                progress=progress,
                codes=read.codes,
            )
    with timed(timings, "concept_labels"):
        responses = ("chosen",) if config.data_kind == "sft" else ("chosen", "rejected")
        known = habits_to_count(config.habits, tokens=True) if counted is None else counted.habits
        labelled = label_concepts(
            findings.concepts,
            read,
            pairs,
            model=model,
            sae=sae,
            tokenizer=tokenizer,
            layer=layer,
            habits=known,
            values=None if counted is None else counted.values,
            tau=config.tau if findings.levels is None else findings.levels,
            sides=responses,
            batch_tokens=config.batch_tokens,
            seed=config.seed,
            progress=progress,
        )
        findings = replace(findings, concepts=labelled)
    if counted is not None:
        assert problems is not None
        labels = dict(zip(*(findings.concepts[name].to_pylist() for name in ("concept", "label")), strict=True))
        improbable = None if findings.improbable is None else findings.improbable.called(labels)
        problems = with_improbable(problems, improbable, pairs.rows, raw)
        with timed(timings, "findings"):
            shown = None if findings.shown is None else Shown.of(findings.concepts, findings.shown)
            listed, findings.info["findings"] = list_findings(counted, pairs.rows, shown, lines=lines, seed=config.seed)
    sides = np.diff(pairs.response_bounds).reshape(-1, 2).sum(axis=0)
    prompts = pairs.packed_lengths.sum() - sides.sum()
    tokens = {"prompt": int(prompts), "chosen": int(sides[0]), "rejected": int(sides[1])}
    first = next(read.shards())  # enough to tell how many latents fire per token
    l0 = float(first.count("chosen").sum(dtype=np.int64) / max(1, first.lengths["chosen"].sum(dtype=np.int64)))
    if note := sae.l0_note(l0):
        findings.info["notes"].append(note)
    unread, prompt = unread_columns(raw, config.data_kind), prompt_column(raw)
    unfit = check_pairs_fit(pairs, model.config, grows=config.chat_template_path is not None)
    about_sae = [*([origin] if origin else []), *fit_notes(fit, sae, config)]
    findings.info["notes"][:0] = [*column_notes(unread, prompt), *unfit, *about_sae]
    info = {
        "versions": versions(),
        "model": {
            "name": config.model or _name(model),
            "fingerprint": model_fingerprint(model),
            "layer_weights": layer_weights(model, layer),
        },
        "sae": {
            "source": dict(sae.source),
            "fingerprint": sae.fingerprint,
            "layer": layer,
            "d_sae": sae.d_sae,
            "architecture": sae.architecture,
            "neuronpedia_id": sae.neuronpedia_id,
            "l0": l0,
            "card_l0": sae.card_l0,
            "fit": fit_record(fit),
        },
        "data": {
            "name": config.data_name or "dataset in memory",
            "fingerprint": pairs.fingerprint,
            "n_rows": len(raw),
            "n_pairs": len(pairs),
            "left_out": dict(pairs.left_out),
            "tokens": tokens,
            "unread_columns": unread,
            "looks_like_prompt": prompt,
            "date": pairs.date,
            "chat_template": tokenizer.chat_template,
            "cut": {side: int(cut.sum()) for side, cut in pairs.cut.items()},
        },
        "settings": config.settings(),
        **findings.info,
        **({} if problems is None else {"problems": count_problems(problems, kinds)}),
        "timings": {**timings, **findings.timings},
    }
    audit = write_audit(
        config.out,
        info,
        findings.hypotheses,
        findings.concepts,
        findings.pairs,
        samples,
        habits,
        problems,
        listed,
        findings.levels,
        by_prompt,
    )
    label_audit(audit, pairs.texts)
    write_report(audit, pairs)


@one_blas_thread
def analyse(  # noqa: PLR0913
    read: "Harvest",
    config: AuditConfig,
    texts: Callable[[int], tuple[str, str, str]],
    prompt_groups: np.ndarray | None = None,
    copies: "Copies | None" = None,
    cut: Mapping[str, np.ndarray] | None = None,
    counted: Counted | None = None,
    lines: Sequence[Line] | None = None,
    asked: Asked | None = None,
) -> Findings:
    """Communities, contexts, tests and predicted shifts of a harvest. Needs no model.

    Args:
        texts: index of a pair -> its prompt, chosen and rejected text, for labels.
        prompt_groups: (n_pairs,) int64, the same number for pairs of one prompt; default every pair its own.
        copies: which pairs are copies of others; they share a prompt group. Default: none.
        cut: "chosen" and "rejected" -> (n_pairs,) bool, responses that truncation cut short; default none.
        counted: named habits of both sides, to tell what the choice is made of and what hypotheses say beyond them;
            without them neither is known.
        lines: `habit_lines(counted, config.seed)`, where they are known already.
        asked: what prompts ask for, to call contexts by.
    """
    timings: dict[str, float] = {}
    groups, note = shared_prompts(prompt_groups)
    repeat = copies.group if copies is not None and copies.n_distinct < read.n_pairs else None
    gaps = None if counted is None else counted.gaps()
    with timed(timings, "communities"):
        found = find_communities(read, config, None if repeat is None else first_of(repeat), groups)
        communities, sizes = found.features, found.sizes
    with timed(timings, "view"):
        how: dict[str, Any] = {"min_concept": sizes.min_concept, "groups": groups, "copies": repeat, "habits": gaps}
        view = feature_view(read, communities, config, tau=found.tau(config), **how)
    with timed(timings, "prompt_view"):
        prompts = prompt_view(read, config, groups, repeat, gaps)
    with timed(timings, "labels"):
        terms, response_terms, contexts = _describe(texts, view, prompts, config.seed, counted, asked, groups)
    with timed(timings, "predict"):
        responses = prompts.geometry.responses
        evidence: dict[str, Any] = {"groups": groups, "copies": repeat, "cut": cut}
        concepts = [
            concept_table(view.activity, communities, config, terms=terms, **evidence),
            concept_table(prompts.scores, responses, config, terms=response_terms, kind=RESPONSE_GEOMETRY, **evidence),
        ]
    with timed(timings, "maps"):
        places = map_places(view, prompts)
    choice, improbable = {}, None
    if counted is not None:
        with timed(timings, "choice"):
            choice = {"choice": choice_of(counted, view.activity.u, config.seed, lines)}
            names = concepts[0]["concept"].to_pylist()
            improbable = improbable_labels(counted, choice["choice"], view.activity.u, names, config.seed)
    return Findings(
        hypotheses=pa.concat_tables([view.hypotheses, prompts.hypotheses]),
        concepts=pa.concat_tables(concepts),
        pairs=pairs_table(view.activity, view.contexts, prompts.members, prompt_groups),
        info={
            "settings_used": {
                **found.used(),
                **view.settings_used,
                **prompts.settings_used,
            },
            "notes": [*found.notes, *view.notes, *prompts.notes, *note],
            "too_few_prompts": few_prompts(groups, read.n_pairs),
            "copies": None if copies is None else copies.counts(),
            "contexts": contexts,
            "maps": places,
            **choice,
            "length": length_of_sides(read.lengths["chosen"], read.lengths["rejected"], groups),
            "counts": {
                "n_prompts": read.n_pairs if prompt_groups is None else len(np.unique(prompt_groups)),
                "n_live": found.n_live,
                "n_features_in_concepts": sum(map(len, communities)),
            },
        },
        timings=timings,
        improbable=improbable,
        shown=view.activity.shown,
        levels=found.levels,
    )


def length_of_sides(chosen: np.ndarray, rejected: np.ndarray, groups: np.ndarray | None) -> dict[str, float | None]:
    """How long both sides are: what a reader should know before any concept.

    Args:
        chosen, rejected: (n,) tokens of each response.
        groups: (n,) prompt of each pair; None where none repeats.
    Returns:
        `chosen`, `rejected`: mean tokens; `chosen_longer`, `rejected_longer`: shares of the pairs; `p` of the t-test
        that the logarithm of the ratio is 0 on average (robust to shared prompts; None where nothing varies).
    """
    ratio = np.log(np.maximum(chosen, 1) / np.maximum(rejected, 1))
    _, _, (p,) = stats.mean_test(ratio[:, None], groups)
    return {
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "chosen_longer": float((chosen > rejected).mean()),
        "rejected_longer": float((rejected > chosen).mean()),
        "p": None if np.isnan(p) else float(p),
    }


def _describe(
    texts: Callable[[int], tuple[str, str, str]],
    view: FeatureView,
    prompts: PromptView,
    seed: int,
    counted: Counted | None = None,
    asked: Asked | None = None,
    groups: np.ndarray | None = None,
) -> tuple[list[list[str]], list[list[str]], dict[str, dict[str, Any]]]:
    """Distinctive terms of every concept and response cluster; size, prompt terms and features of every context."""
    n = len(view.contexts)
    drawn = np.arange(n)
    if n > LABEL_PAIRS:
        rng = np.random.default_rng(seed)
        # Prompt contexts are small: a draw of all pairs would miss most of them.
        about = [rng.permutation(prompts.members[[k]].indices)[:LABEL_MEMBERS] for k in range(prompts.members.shape[0])]
        drawn = np.unique(np.concatenate([rng.choice(n, LABEL_PAIRS, replace=False), *about]))
    prompt, chosen, rejected = zip(*(texts(int(i)) for i in drawn), strict=True)
    size = np.bincount(view.contexts)
    terms = group_terms(prompt, view.contexts[drawn], len(size), n_terms=CONTEXT_TERMS)
    contexts: dict[str, dict[str, Any]] = {f"B{k}": {"pairs": int(n), "terms": terms[k]} for k, n in enumerate(size)}
    called = prompt_names(prompt, sparse.csr_array(prompts.members[:, drawn]), n_words=CONTEXT_TERMS)
    for k, (features, own) in enumerate(zip(prompts.geometry.prompts, called, strict=True)):
        rows = prompts.members.indices[prompts.members.indptr[k] : prompts.members.indptr[k + 1]]
        contexts[f"A{k + 1}"] = {
            "pairs": len(rows),
            "terms": own.words,
            "prompts": len(rows if groups is None else np.unique(groups[rows])),
            "example": own.example,
            "features": features.tolist(),
        }
    # Data contexts are pairs that show alike concepts, so what responses have may name them too.
    named = shapes(stats.one_hot(view.contexts, len(size)), *properties(counted, asked))
    named += shapes(prompts.members, *properties(None, asked))
    for entry, shape in zip(contexts.values(), named, strict=True):
        entry["terms"] = [*([shape] if shape else []), *entry["terms"]]
    for name, words in own_words({name: entry["terms"] for name, entry in contexts.items()}).items():
        contexts[name]["terms"] = words
    return (
        distinctive_terms(chosen, rejected, view.activity.u[drawn]),
        distinctive_terms(chosen, rejected, _clear(prompts.scores.u[drawn])),
        contexts,
    )


def _clear(u: np.ndarray) -> np.ndarray:
    """Scores with those below a concept's own standard deviation set to 0: nearly every pair moves a little."""
    return np.where(np.abs(u) >= u.std(axis=0), u, 0.0)


def versions() -> dict[str, str]:
    from .. import __version__

    found = {"trl_anatomy": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _name(model: Any) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
