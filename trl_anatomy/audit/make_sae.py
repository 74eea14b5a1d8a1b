"""`trl-anatomy sae`: an SAE for a model that has none, from the pairs that it is to be trained on."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AnatomyError
from .config import WRITTEN, AuditConfig, named
from .run import load_dataset, load_model, load_tokenizer, shape_of

if TYPE_CHECKING:
    from ..reading.sae import SAE
    from ..reading.sae_check import SAEFit
    from ..reading.sae_training import SAERecipe, Sequences
    from ..reading.spans import Pairs


def _as_audited(name: str) -> Any:
    """A setting of an audit as a field here: one default, one help text, one set of names."""
    setting = AuditConfig.__dataclass_fields__[name]
    return field(default=setting.default, metadata=setting.metadata)


@dataclass
class SAEConfig:
    """Settings of `trl-anatomy sae`."""

    model: str = _as_audited("model")
    dataset: str = field(
        default="",
        metadata=named("dataset", "Preference dataset, as for audit: its prompts and both responses are learned."),
    )
    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Further texts: files or datasets with a column 'text', one or several."},
    )
    layer: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Decoder layers whose output is learned, one or several in one pass. Default: at two thirds of the "
            "depth."
        },
    )
    out: str = field(
        default="saes/run", metadata={"help": "Folder to write; an interrupted training goes on.", **WRITTEN}
    )
    tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of training. Default: twice those of the data, 300,000 to 3,000,000."},
    )
    minutes: float | None = field(
        default=None, metadata={"help": "Instead of tokens: minutes, at the speed found here."}
    )
    init: str | None = field(
        default=None,
        metadata={
            "help": "SAE to go on from (folder or RELEASE:ID), such as the base model's: latents keep their numbers."
        },
    )
    architecture: str = field(default="batchtopk", metadata={"help": "batchtopk, topk, jumprelu or matryoshka."})
    latents: int | None = field(default=None, metadata={"help": "Number of latents. Default: by rule from the width."})
    k: int | None = field(default=None, metadata={"help": "Latents that fire per token. Default: by rule."})
    lr: float | None = field(default=None, metadata={"help": "Peak learning rate. Default: by rule."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and order."})
    dataset_split: str = _as_audited("dataset_split")
    dataset_subset: str | None = _as_audited("dataset_subset")
    datasets: list[dict[str, Any]] | None = _as_audited("datasets")  # noqa: RUF009 (a field, made there)
    model_revision: str = _as_audited("model_revision")
    trust_remote_code: bool | None = _as_audited("trust_remote_code")
    max_length: int | None = _as_audited("max_length")
    truncation: str = _as_audited("truncation")
    chat_template_path: str | None = _as_audited("chat_template_path")
    dtype: str = field(
        default="auto",
        metadata={
            "help": "auto (as stored; float32 is read in bfloat16 on CPUs that compute in it), float32, bfloat16 or "
            "float16."
        },
    )
    device: str = _as_audited("device")
    batch_tokens: int = _as_audited("batch_tokens")
    check: str | None = field(
        default=None, metadata={"help": "Train nothing: judge this SAE (folder or RELEASE:ID) on the pairs."}
    )

    def audit(self) -> AuditConfig:
        """The settings that an audit of the same data and model has."""
        shared = {of.name for of in fields(AuditConfig)} & {of.name for of in fields(self)} - {"layer", "out"}
        return AuditConfig(**{name: getattr(self, name) for name in shared})


def make_sae(config: SAEConfig, *, progress: bool = True) -> "dict[Path, SAEFit | None]":  # noqa: PLR0915
    """Train the SAEs that `config` asks for and judge each on the pairs.

    Returns:
        folder -> how well its SAE fits; None where there are no pairs to judge it on.

    Raises:
        AnatomyError: bad input, before the pass; several processes.
    """
    from ..reading.files import write_atomically
    from ..reading.locate import decoder_layers, hidden_size
    from ..reading.processing import text_tokenizer
    from ..reading.ranks import Ranks
    from ..reading.sae import check_sae, load_sae
    from ..reading.sae_check import check_fit
    from ..reading.sae_training import (
        continued_lr,
        default_layer,
        default_tokens,
        recipe,
        sequences_of,
        stored_tokens,
        train_saes,
    )

    if not config.model:
        raise AnatomyError("sae: no model given.")
    audit = config.audit()
    if not audit.data_name and not config.text:
        raise AnatomyError("sae: no dataset and no text given; an SAE is trained on the data it is to read.")
    if config.tokens is not None and config.minutes is not None:
        raise AnatomyError("sae: give tokens or minutes, not both.")
    if Ranks.current().size > 1:
        raise AnatomyError("sae trains in one process: start it without a launcher.")
    tokenizer = load_tokenizer(config.model, audit)
    pairs = _pairs(audit, tokenizer) if audit.data_name else None
    reader = text_tokenizer(tokenizer)
    pad = reader.pad_token_id
    texts = [ids for name in config.text for ids in _text_tokens(audit, name, reader)]
    sequences = sequences_of(pairs, texts, reader.eos_token_id if pad is None else pad)
    model = load_model(audit)
    rounded = config.dtype == "auto" and _faster_in_bfloat16(model)
    if rounded:
        del model
        model = load_model(replace(audit, dtype="bfloat16"))
    layers = config.layer or [default_layer(len(decoder_layers(model)))]
    named: dict[str, Any] = {
        "architecture": config.architecture,
        "d_sae": config.latents,
        "k": config.k,
        "lr": config.lr,
    }
    init = None
    if config.init is not None:
        init = load_sae(config.init, device=model.device)
        layers = [check_sae(init, model, config.layer[0] if len(config.layer) == 1 else None)]
        named["d_sae"] = config.latents or init.d_sae
        named["lr"] = config.lr or continued_lr(init.d_sae)
        named["k"] = config.k or init.k or _l0(init, model, sequences, layers[0], config.batch_tokens)
        if init.k is not None:
            named["architecture"] = "topk"
    n_learned = int(sequences.n_learned.sum())
    tokens = config.tokens or default_tokens(n_learned)
    if config.minutes is not None:
        probe = recipe(hidden_size(model), default_tokens(n_learned), **named)
        begun = stored_tokens(Path(config.out))
        tokens = _affordable(model, sequences, layers, probe, config) if begun is None else begun
    settings = recipe(hidden_size(model), tokens, seed=config.seed, **named)
    folders = train_saes(
        model,
        sequences,
        layers,
        settings,
        Path(config.out),
        init=init,
        model_name=config.model,
        batch_tokens=config.batch_tokens,
        progress=progress,
    )
    precision, device = str(model.dtype).removeprefix("torch."), model.device
    if rounded and pairs is not None:  # judged as audits read it
        del model
        model = load_model(audit)
    fits: dict[Path, SAEFit | None] = {}
    for layer, folder in folders.items():
        sae = load_sae(folder, device=device)
        fits[folder] = None if pairs is None else check_fit(model, sae, pairs, layer, progress=progress)
        write_atomically(
            folder / "README.md", _card(config, layer, settings, n_learned, precision, fits[folder]).encode()
        )
    return fits


def _l0(sae: "SAE", model: Any, sequences: "Sequences", layer: int, batch_tokens: int) -> int:
    """Latents of an SAE that fire per token of some sequences, 1 at least."""
    from ..reading.forward import read_texts

    some = [ids.tolist() for ids in sequences.ids[:16]]
    fired = n = 0
    for _, hidden in read_texts(model, some, [layer], pad_token_id=sequences.pad_token_id, batch_tokens=batch_tokens):
        codes = sae.encode(hidden[layer][1:])
        fired, n = fired + int((codes > 0).sum()), n + len(codes)
    return max(1, round(fired / max(1, n)))


def check_saes(config: SAEConfig) -> "SAEFit":
    """Judge the SAE `config.check` on the pairs.

    Raises:
        AnatomyError: no pairs, an SAE or a model that cannot be loaded or that do not fit together.
    """
    from ..reading.sae import check_sae, load_sae
    from ..reading.sae_check import check_fit

    audit = config.audit()
    missing = [name for name, given in (("model", audit.model), ("dataset", audit.data_name)) if not given]
    if missing or config.check is None:
        raise AnatomyError(f"sae --check: no {' and no '.join(missing or ['SAE'])} given.")
    sae = load_sae(config.check)
    pairs = _pairs(audit, load_tokenizer(config.model, audit))
    model = load_model(audit)
    layer = check_sae(sae.to(model.device), model, config.layer[0] if config.layer else None)
    return check_fit(model, sae, pairs, layer)


def _pairs(config: AuditConfig, tokenizer: Any) -> "Pairs":
    from ..reading.capacity import check_pairs_fit
    from ..reading.spans import read_pairs

    pairs = read_pairs(load_dataset(config), tokenizer, max_length=config.max_length, truncation=config.truncation)
    check_pairs_fit(pairs, shape_of(config), grows=config.chat_template_path is not None)
    return pairs


def _text_tokens(config: AuditConfig, name: str, tokenizer: Any) -> list[list[int]]:
    """Tokens of a dataset's column 'text', in pieces of `max_length`."""
    rows = load_dataset(replace(config, dataset=name, dataset_split="train", dataset_subset=None, datasets=None))
    if "text" not in rows.column_names:
        raise AnatomyError(f"text {name}: it has the columns {', '.join(rows.column_names)}; 'text' is needed.")
    pieces: list[list[int]] = []
    size = config.max_length or 1024
    for batch in rows.select_columns(["text"]).iter(batch_size=256):
        for ids in tokenizer([text for text in batch["text"] if text], truncation=False)["input_ids"]:
            pieces += [ids[start : start + size] for start in range(0, len(ids), size)]
    return pieces


def _affordable(model: Any, sequences: "Sequences", layers: list[int], probe: "SAERecipe", config: SAEConfig) -> int:
    """Tokens of training that fit into the minutes, at the speed of a few forwards and steps."""
    from ..reading.sae_training import BATCH, SHORTEST, seconds_per_token

    read, step = seconds_per_token(model, sequences, layers, probe, batch_tokens=config.batch_tokens)
    tokens = int(60 * (config.minutes or 0.0) / (read + step))
    if tokens < SHORTEST * BATCH:
        raise AnatomyError(
            f"{config.minutes:g} minutes are enough for {tokens} tokens at the speed found here; an SAE needs "
            f"{SHORTEST * BATCH}: allow {SHORTEST * BATCH * (read + step) / 60:.1f} minutes or more."
        )
    return tokens


def _faster_in_bfloat16(model: Any) -> bool:
    """Whether a model lies in float32 on a CPU that computes in bfloat16: the forward takes half as long there.

    What the SAE learns of is the same: the rounding is far below what an SAE leaves unexplained.
    """
    import torch

    can = torch.cpu.get_capabilities()
    return bool(
        model.device.type == "cpu" and model.dtype == torch.float32 and (can.get("avx512_bf16") or can.get("amx_bf16"))
    )


def _card(
    config: SAEConfig, layer: int, settings: "SAERecipe", n_tokens: int, precision: str, fit: "SAEFit | None"
) -> str:
    data = config.audit().data_name or ", ".join(config.text)
    lines = [
        f"# SAE of layer {layer} of {config.model}",
        "",
        f"Trained with `trl-anatomy sae` on {data}: {settings.tokens} tokens of "
        f"training on {n_tokens} tokens of data; {settings.architecture}, {settings.d_sae} latents, k {settings.k}, "
        f"peak learning rate {settings.lr:.2g}, seed {settings.seed}. It reads the output of layer {layer}, counted "
        f"from 0, and learned it in {precision}; the first token of each sequence and tokens of more than six mean "
        "norms were left out.",
    ]
    if fit is not None:
        lines += ["", f"On these pairs: **{fit.verdict}**: {fit.reason}.", "", "| measure | value |", "|---|---|"]
        lines += [
            f"| variance explained, {span} | {value:.3f} |"
            for span, value in fit.variance_explained.items()
            if value is not None
        ]
        lines += [
            f"| latents per token | {fit.l0:.1f} |",
            f"| latents that fire on none of {fit.n_tokens} tokens | {fit.silent_latents:.3f} |",
            f"| tokens left out as outliers | {fit.outlier_tokens:.4f} |",
        ]
        if fit.loss_lost is not None:
            lines.append(
                f"| cross-entropy lost, as share of what deleting the layer's output loses | {fit.loss_lost:.3f} |"
            )
    return "\n".join(lines) + "\n"
