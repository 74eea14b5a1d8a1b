"""`trl-anatomy fit`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from .. import recipe
from ..audit.config import AuditConfig
from ..errors import AnatomyError
from .options import MODEL, add_setting, plain_parser, whole

if TYPE_CHECKING:
    from ..checking.persona import EndpointJudge
    from ..checking.persona_file import Persona
    from ..checking.vllm_rollouts import VllmRollouts


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = plain_parser(
        "fit",
        f"trl-anatomy fit {MODEL} --dataset_name refusals.jsonl --output_dir concepts/refusal",
        common=("dataset", "persona", "scorer", "layers", "sae", "dataset_split", "max_length", "json"),
    )
    add_setting(parser, "model", required=True)
    add_setting(
        parser,
        "dataset",
        help="rows with text and label, or prompt, response and label, or chosen (shows the concept) and rejected",
    )
    parser.add_argument(
        "--persona", help="instead of a dataset: YAML with trait, positive, negative and questions, sorted by a judge"
    )
    parser.add_argument("--judge_url", help="judge of a persona: an OpenAI-compatible endpoint, http://HOST:PORT/v1")
    parser.add_argument("--judge_model", help="name of the judge there")
    parser.add_argument("--judge_key_variable", help="environment variable with its key, if it wants one")
    parser.add_argument(
        "--n_per_question", type=whole(1), default=1, help="responses to a question of a persona (default 1)"
    )
    parser.add_argument("--engine", default="transformers", help="what samples them: transformers (default) or vllm")
    add_setting(parser, "dataset_split")
    add_setting(parser, "dataset_subset")
    parser.add_argument("--negatives", help="examples of another concept: its rows with label 1 become negatives")
    parser.add_argument("--scorer", default="probe", help="direction, probe, attention_probe, features or reft")
    parser.add_argument(
        "--layers",
        help="layers to try, such as 8,12,16 (default: up to eight, spread evenly); of reft: to edit (default: all)",
    )
    parser.add_argument("--sae", help="SAE to select features in: folder, or RELEASE:ID")
    parser.add_argument("--tokens", default="response", help="response, or prompt_end: the last token before it")
    parser.add_argument("--reduce", help="tokens to one score: max, mean, sum, last (default: the scorer's)")
    parser.add_argument(
        "--per",
        help="what is fitted on: response (default of a persona), token (of other directions), or pair (probes)",
    )
    parser.add_argument("--ends", type=int, help="of reft: tokens edited at either end of a response (default 11)")
    parser.add_argument("--held_out", type=float, default=0.2, help="share judged; as much again chooses the layer")
    add_setting(parser, "max_length", type=whole(1), help="tokens read of prompt and response")
    add_setting(parser, "dtype")
    add_setting(parser, "device")
    add_setting(parser, "batch_tokens", type=whole(1))
    parser.add_argument(
        "--dose", help="steer by the direction, or by the edit of reft: strengths to try, such as --dose=-8,-4,0,4,8"
    )
    parser.add_argument("--dose_prompts", help="file with a 'prompt' column, for --dose")
    parser.add_argument("--dose_pattern", help="regular expression that tells which steered responses show the concept")
    parser.add_argument(
        "--max_new_tokens", type=whole(1), help="length of a sampled response (default: 64 steered, 256 of a persona)"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument(
        "--output_dir", "--out", dest="out", required=True, help="folder of the stored concept, or its URL"
    )
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    return recipe.parse_line(parser, argv)


def run(argv: list[str]) -> int:
    args = arguments(argv)
    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        card, figures = _fitted(args)
    print(card if args.json else figures, end="")
    return 0


def _fitted(args: argparse.Namespace) -> tuple[str, str]:
    """Fit and store as the arguments say; the card as JSON and the figures as text."""
    import numpy as np

    from ..audit.run import load_dataset, load_model, load_tokenizer
    from ..checking.dose import dose_report, dose_response
    from ..reading.files import check_writable
    from ..reading.fit import KINDS, fit_concept, fit_report, read_examples, split_examples
    from ..reading.prompts import prompt_of
    from ..reading.sae import load_sae
    from ..reading.scorers.direction import DirectionScorer
    from ..reading.scorers.reft import ReftScorer
    from ..reading.storage import local, shown

    if args.scorer not in KINDS:
        raise AnatomyError(
            f"Unknown scorer '{args.scorer}'{recipe.did_you_mean(args.scorer, KINDS)}; allowed: {', '.join(KINDS)}."
        )
    layers = _layers(args.layers)
    settings = {name: value for name in ("reduce", "per") if (value := getattr(args, name)) is not None}
    if args.per is not None and args.scorer == "features":
        raise AnatomyError("--per goes with directions and probes.")
    if args.ends is not None:
        if args.scorer != "reft" or args.ends < 1:
            raise AnatomyError("--ends is a number above 0, and goes with --scorer reft.")
        settings["ends"] = args.ends
    if args.scorer == "reft" and (args.reduce or args.per or args.tokens != "response"):
        raise AnatomyError("--reduce, --per and --tokens do not go with --scorer reft, which gives no score.")
    if (args.scorer == "features") != (args.sae is not None):
        raise AnatomyError("--sae goes with --scorer features, which needs it.")
    folder = local(args.out)  # refuses a URL that fsspec cannot read, before anything is fitted
    dose = _dose_settings(args)
    persona = _persona_settings(args)
    same = ("model", "dataset", "dataset_split", "dataset_subset", "dtype", "device")
    config = AuditConfig(**{name: getattr(args, name) for name in same})
    negatives = None
    if args.negatives is not None:
        split = "train" if os.path.isfile(args.negatives) else args.dataset_split  # a file has no splits
        negatives = load_dataset(
            dataclasses.replace(config, dataset=args.negatives, dataset_split=split, dataset_subset=None)
        )
    tokenizer = load_tokenizer(args.model)
    model, rows = None, None
    if persona is None:
        rows = load_dataset(config)
    check_writable(folder)
    if persona is not None:
        model, rows = _persona_rows(args, config, tokenizer, *persona)
        if args.scorer == "direction":
            settings.setdefault("per", "response")
    examples = read_examples(
        rows,
        tokenizer,
        tokens=args.tokens,
        negatives=negatives,
        max_length=args.max_length,
    )
    split_examples(examples.labels, examples.groups, args.held_out, args.seed)  # refuses before weights are loaded
    if model is None:
        model = load_model(config)
    fitted = fit_concept(
        model,
        examples,
        scorer=args.scorer,
        layers=layers,
        sae=None if args.sae is None else load_sae(args.sae),
        held_out=args.held_out,
        seed=args.seed,
        batch_tokens=args.batch_tokens,
        **settings,
    )
    scorer = fitted.scorer
    if persona is not None:
        scorer.card["persona"] = {"trait": persona[0].trait, "judge": args.judge_model, "engine": args.engine}
    if dose is not None and isinstance(scorer, DirectionScorer | ReftScorer):
        strengths, rule = dose
        prompts = load_dataset(AuditConfig(dataset=args.dose_prompts))
        if "prompt" not in prompts.column_names:
            raise AnatomyError(f"{args.dose_prompts} has no 'prompt' column.")
        scorer.card["dose_response"] = dose_response(
            model,
            tokenizer,
            scorer,
            [prompt_of(row) for row in prompts],
            lambda texts: np.array([rule.search(text) is not None for text in texts]),
            strengths=strengths,
            max_new_tokens=args.max_new_tokens or 64,
            seed=args.seed,
        )
    out = scorer.save(folder)
    figures = fit_report(fitted, out) + dose_report(scorer.card.get("dose_response", []))
    return (out / "card.json").read_text(), shown(figures)


def _persona_settings(args: argparse.Namespace) -> tuple[Persona, EndpointJudge, VllmRollouts | None] | None:
    """Persona, judge and engine; whatever can be wrong with them is refused before anything is sampled."""
    if (args.persona is None) == (args.dataset is None):
        raise AnatomyError("Give --dataset with labelled text, or --persona; one of the two.")
    if args.persona is None:
        if args.judge_url or args.judge_model or args.judge_key_variable or args.engine != "transformers":
            raise AnatomyError("--judge_url, --judge_model, --judge_key_variable and --engine go with --persona.")
        return None
    if not args.judge_url or not args.judge_model:
        raise AnatomyError("--persona needs a judge: --judge_url and --judge_model.")
    if args.engine not in ("transformers", "vllm"):
        raise AnatomyError(f"--engine is '{args.engine}'; allowed: transformers, vllm.")
    if args.tokens != "response":
        raise AnatomyError("--persona is read at the tokens of its responses; leave --tokens out.")

    from ..checking.persona import EndpointJudge
    from ..checking.persona_file import Persona
    from ..checking.vllm_rollouts import VllmRollouts

    persona = Persona.load(args.persona)
    judge = EndpointJudge(args.judge_url, args.judge_model, persona.trait, args.judge_key_variable)
    judge([])  # refuses an address that is none, and a key that is not set
    return persona, judge, VllmRollouts(args.model, args.dtype) if args.engine == "vllm" else None


def _persona_rows(
    args: argparse.Namespace,
    config: AuditConfig,
    tokenizer: Any,
    persona: Persona,
    judge: EndpointJudge,
    generate: VllmRollouts | None,
) -> tuple[Any, Any]:
    """The start model, and labelled responses, which are kept in the folder of the concept."""
    import torch

    from ..audit.run import load_model
    from ..checking.persona import persona_rows
    from ..reading.storage import local

    # vLLM takes most of the GPU for as long as it samples.
    model = load_model(config if generate is None else dataclasses.replace(config, device="cpu"))
    rows = persona_rows(
        model,
        tokenizer,
        persona.positive,
        persona.negative,
        persona.questions,
        judge,
        n_per_question=args.n_per_question,
        max_new_tokens=args.max_new_tokens or 256,
        seed=args.seed,
        generate=generate,
        store=local(args.out),
    )
    if generate is not None:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(automatic if config.device == "auto" else config.device)
    return model, rows


def _dose_settings(args: argparse.Namespace) -> tuple[list[float], re.Pattern[str]] | None:
    given = [value is not None for value in (args.dose, args.dose_prompts, args.dose_pattern)]
    if not any(given):
        return None
    if not all(given) or args.scorer not in ("direction", "reft"):
        raise AnatomyError(
            "--dose, --dose_prompts and --dose_pattern go together, and with --scorer direction or reft."
        )
    try:
        return [float(word) for word in args.dose.split(",")], re.compile(args.dose_pattern)
    except ValueError:
        raise AnatomyError(f"--dose is '{args.dose}'; give numbers, such as --dose=-8,-4,0,4,8.") from None
    except re.error as error:
        raise AnatomyError(f"--dose_pattern is no regular expression: {error}.") from None


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise AnatomyError(f"--layers is '{text}'; give layer numbers from 0, such as 8,12,16.")
    return [int(word) for word in text.split(",")]
