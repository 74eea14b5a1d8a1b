"""`--sae auto`: a published SAE of the model or of its base model, else one trained here if that is quick enough."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import AnatomyError
from ..reading.sae_list import published_sae
from .judge_sae import judged, sae_command

if TYPE_CHECKING:
    from ..reading.sae import SAE
    from ..reading.sae_check import SAEFit
    from ..reading.spans import Pairs
    from .config import AuditConfig

AUTO = "auto"
FOLDER = "sae"  # of an SAE trained for an audit, in the audit's folder


def model_names(model: str) -> list[str]:
    """The model's name, and those of the models that its files say it was made from."""
    return list(dict.fromkeys([model, *_bases(Path(model))]))


def _bases(folder: Path) -> Iterator[str]:
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        try:
            base = json.loads((folder / file).read_text()).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(base, str) and base:
            yield base
    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---")
        card = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return
    base = card.get("base_model") if isinstance(card, dict) else None
    yield from (name for name in (base if isinstance(base, list) else [base]) if isinstance(name, str))


def find_sae(
    config: "AuditConfig", model: Any, pairs: "Pairs", out: Path, *, progress: bool = True
) -> "tuple[SAE, SAEFit, str]":
    """The SAE of an audit that names none.

    Args:
        config: the audit; `sae_minutes` is the most that training one may take.
        model: the start model, loaded.
        pairs: the pairs to be audited.
        out: the audit's folder; a trained SAE is kept in ``sae`` below it, and found again by what it was made from.
        progress: show progress bars.

    Returns:
        The SAE, how well it fits these pairs, and one sentence on where it comes from.

    Raises:
        AnatomyError: none is published or within reach, and training one would take longer; says the command.
    """
    from ..reading.locate import decoder_layers, hidden_size
    from ..reading.sae import check_sae, load_sae
    from ..reading.sae_check import REFUSE
    from ..reading.sae_training import (
        SETTINGS,
        default_layer,
        default_tokens,
        recipe,
        seconds_per_token,
        sequences_of,
        train_saes,
    )

    layers, unreached, device = decoder_layers(model), "", next(model.parameters()).device
    listed = published_sae(model_names(config.model), len(layers)) if config.model else None
    if listed is not None:
        try:
            sae = load_sae(listed.source, device=device)
            fit = judged(model, sae, pairs, check_sae(sae, model), out, progress=progress)
            if fit.verdict != REFUSE:
                return sae, fit, _origin(f"The SAE is {listed.source}, published for {listed.of}", fit)
            problem = f"on these pairs, {fit.reason}."
        except AnatomyError as error:
            problem = str(error)
        unreached = f"{listed.source} is published for {listed.of}, but {problem} "
    sequences = sequences_of(pairs, [], pairs.pad_token_id)
    layer = default_layer(len(layers)) if config.layer is None else config.layer
    n_learned = int(sequences.n_learned.sum())
    settings = recipe(hidden_size(model), default_tokens(n_learned), seed=config.seed)
    folder = out / FOLDER
    if not (folder / SETTINGS).is_file():
        read, step = seconds_per_token(model, sequences, [layer], settings, batch_tokens=config.batch_tokens)
        minutes = (step * settings.tokens + read * min(settings.tokens, n_learned)) / 60
        command = sae_command(config, layer=layer)
        if minutes > config.sae_minutes:
            raise AnatomyError(
                f"{unreached}There is no SAE of this model at hand, and training one on {settings.tokens} tokens takes "
                f"about {minutes:.0f} minutes here, more than sae_minutes ({config.sae_minutes:g}): raise that, or run "
                f"`{command}` and give --sae saes/run1. With --sae none habits alone are counted."
            )
        if progress:
            note = f"{unreached}Training an SAE of layer {layer} on these pairs takes about {minutes:.0f} minutes."
            print(note, file=sys.stderr, flush=True)
    train_saes(
        model,
        sequences,
        [layer],
        settings,
        folder,
        model_name=config.model,
        batch_tokens=config.batch_tokens,
        progress=progress,
    )
    sae = load_sae(folder, device=device)
    fit = judged(model, sae, pairs, layer, out, progress=progress)
    return sae, fit, _origin(f"{unreached}The SAE was trained on these pairs", fit)


def _origin(origin: str, fit: "SAEFit") -> str:
    return f"{origin}; its verdict is {fit.verdict}: {fit.reason}."
