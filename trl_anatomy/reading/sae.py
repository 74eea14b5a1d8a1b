"""Sparse autoencoders of sae-lens behind one small surface, checked against the model they are to read."""

import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import AnatomyError, require
from ..ops.span_harvest import span_harvest, span_harvest_threshold, span_harvest_topk
from .fingerprint import hash_json, hash_tensors
from .locate import decoder_layers, hidden_size, layer_of_hook, normalises_by_layer_norm
from .sae_card import reads_centred
from .storage import is_url

# Activations of these depend on each latent alone, so single latents need not be encoded with all others.
_SEPARATE = ("standard", "jumprelu")
_CHUNK_BYTES = 64 << 20  # dense activations held at a time where all latents have to be encoded
# These rescale each token before encoding and need no constant beside the weights.
_PER_TOKEN_NORMS = ("none", "layer_norm", "constant_norm_rescale", "constant_scalar_rescale")
_SPARSIFY_FILES = ("cfg.json", "sae.safetensors")
_SPARSIFY_WEIGHTS = ("W_dec", "b_dec", "encoder.bias", "encoder.weight")
_L0_FACTOR = 3  # an L0 further than this from the published one is told


class Rows(NamedTuple):
    """Some latents as `ops.ablate_features` takes them: for hidden states h, ``z = h @ encoder.T + bias``.

    Attributes:
        encoder: (u, d_in) float32.
        bias: (u,) float32, input centring folded in.
        threshold: (u,) float32: the latent fires where ``z`` is larger (and among the k largest, see `SAE.kth`).
        decoder: (u, d_in) float32: what one unit of ``z`` adds to the hidden state.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor


class SAE:
    """A frozen sparse autoencoder in float32.

    Args:
        inner: a sae-lens SAE.
        source: where it was loaded from, for records.
        card_l0: latents that fire per token, as published; None if unknown.
        config: its configuration as it was stored, where that may hold more than sae-lens keeps.

    Attributes:
        d_in: width of the hidden states it reads.
        d_sae: number of latents.
        architecture: sae-lens' name, such as ``"topk"`` or ``"jumprelu"`` (BatchTopK is saved as JumpReLU).
        hook_name: where it was trained, if its metadata says so.
        layer: the model layer `hook_name` means, counted from 0; None if unknown.
        prepend_bos: whether its training text began with BOS, if its metadata says so.
        card_l0: as given.
        centred: whether it was trained on a stream without its mean over the width. That mean is then taken from what
            it reads; hidden states are given to it as the model makes them.
        fingerprint: hash of its weights and settings.

    Raises:
        AnatomyError: the SAE reads whole sequences, expects activations scaled by a constant it does not carry, was
            trained on activations preprocessed in an unknown way, or has weights that are not finite.
    """

    def __init__(
        self,
        inner: Any,
        source: Mapping[str, str] | None = None,
        *,
        card_l0: float | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.card_l0 = card_l0
        self.source = dict(source or {"memory": type(inner).__name__})
        self.architecture = str(inner.cfg.architecture())
        normalization = str(inner.cfg.normalize_activations)
        if self.architecture == "temporal":
            raise AnatomyError(
                f"The SAE at {self._place} is of the architecture 'temporal', which encodes a token from the tokens "
                "before it; only SAEs that encode token by token can be used."
            )
        if normalization not in _PER_TOKEN_NORMS:
            raise AnatomyError(
                f"The SAE at {self._place} expects activations normalised by {normalization!r} with constants that it "
                "does not carry: fold them into its weights (sae-lens: fold_activation_norm_scaling_factor or "
                "fold_activation_whitening) and save it again."
            )
        self._inner = inner.to(dtype=torch.float32).eval().requires_grad_(False)
        bad = [name for name, weights in inner.named_parameters() if not torch.isfinite(weights).all()]
        if bad:
            raise AnatomyError(f"The SAE at {self._place} holds NaN or infinity in {bad[0]}: load or train it again.")
        self.d_in = int(inner.cfg.d_in)
        self.d_sae = int(inner.cfg.d_sae)
        self.normalization = normalization
        hook = inner.cfg.metadata.hook_name
        self.hook_name: str | None = None if hook is None else str(hook)
        self.prepend_bos: bool | None = inner.cfg.metadata.prepend_bos
        metadata = {key: value for key, value in inner.cfg.metadata.items() if value is not None}
        self.centred = reads_centred({**(config or {}), **inner.cfg.to_dict(), **metadata}, self._place)
        settings = {
            key: value for key, value in inner.cfg.to_dict().items() if key not in ("metadata", "device", "dtype")
        }
        read_as = [{"centred": True}] if self.centred else []
        self.fingerprint = hash_json([settings, hash_tensors(inner.named_parameters()), *read_as])

    @property
    def _place(self) -> str:
        return repr(":".join(self.source.values()))

    @property
    def layer(self) -> int | None:
        """Layer of the model that `hook_name` means; raises AnatomyError where it is not the residual stream."""
        return None if self.hook_name is None else layer_of_hook(self.hook_name)

    @property
    def excluded_tokens(self) -> bool | list[int]:
        """Token ids that it was not trained on, or True for all special ones; False where its metadata name none."""
        said = self._inner.cfg.metadata.exclude_special_tokens
        return [int(token) for token in said] if isinstance(said, list | tuple) else bool(said)

    @property
    def neuronpedia_id(self) -> str | None:
        """Its name on Neuronpedia, such as ``"gemma-2-2b/12-gemmascope-res-16k"``; None where it carries none."""
        name = self._inner.cfg.metadata.neuronpedia_id
        return str(name) if name else None

    def l0_note(self, measured: float) -> str | None:
        """What to tell about the mean number of latents firing per token: None unless far from the published one."""
        card = self.card_l0
        if card is None or card / _L0_FACTOR <= measured <= card * _L0_FACTOR:
            return None
        return (
            f"The SAE at {self._place} fires on {measured:.1f} latents per token here, but {card:g} are published for "
            "it: it may have been loaded or scaled wrongly, or be far from the text and the model it was trained on."
        )

    @torch.no_grad()
    def encode(self, h: Tensor) -> Tensor:
        """Activations of all latents.

        Args:
            h: (n_tokens, d_in) hidden states.

        Returns:
            (n_tokens, d_sae) float32; zero where a latent does not fire, negative only for ``abstopk``.
        """
        if self.architecture in _SEPARATE:
            return self._encode_separately(h, slice(None))
        return self._inner.encode(self.centre(h))

    def centre(self, h: Tensor) -> Tensor:
        """(n, d_in) float32 as it was in training: for a `centred` SAE without the mean of each token."""
        h = h.float()
        return h - h.mean(dim=-1, keepdim=True) if self.centred else h

    def _prepare(self, h: Tensor) -> Tensor:
        return self._inner.process_sae_in(self.centre(h))

    def _encode_separately(self, h: Tensor, index: Any) -> Tensor:
        # relu(pre) * (pre > threshold) without sae-lens' three copies of the largest tensor; NaN stays NaN.
        inner = self._inner
        pre = torch.addmm(inner.b_enc[index], self._prepare(h), inner.W_enc[:, index])
        return pre.masked_fill_(pre <= self._floor(index), 0)

    @torch.no_grad()
    def encode_features(self, h: Tensor, features: Sequence[int]) -> Tensor:
        """Activations of some latents, (n_tokens, len(features)) float32: `encode` at those columns."""
        index = torch.as_tensor(features, device=h.device)
        if self.architecture in _SEPARATE:
            return self._encode_separately(h, index)
        step = max(1, _CHUNK_BYTES // (4 * self.d_sae))
        parts = [self.encode(part).index_select(1, index) for part in h.split(step)]
        return torch.cat(parts) if parts else h.new_zeros(0, len(index), dtype=torch.float32)

    @property
    def place(self) -> str:
        """Where it was loaded from, quoted."""
        return self._place

    @property
    def b_dec(self) -> Tensor:
        """(d_in,) float32: what is decoded where no latent fires."""
        return self._inner.b_dec

    @property
    def k(self) -> int | None:
        """Latents that fire per token, of a TopK SAE; None for others."""
        return int(self._inner.cfg.k) if self.architecture == "topk" else None

    @torch.no_grad()
    def reconstruct(self, h: Tensor) -> Tensor:
        """What the SAE makes of hidden states (n_tokens, d_in): decoded activations, (n_tokens, d_in) float32.

        A normalisation per token keeps state between encoding and decoding, so both happen here. What `centred` takes
        from a token is put back.
        """
        return self._inner.decode(self.encode(h)) + (h.float() - self.centre(h))

    @torch.no_grad()
    def decoder_rows(self, features: Sequence[int]) -> Tensor:
        """What one unit of each latent adds to the reconstruction, (len(features), d_out) float32.

        Decoder-norm rescaling is folded in. With a normalisation per token (`layer_norm`, ...) the rows live in the
        normalised space: their direction holds, their length is scaled token by token. `centred` changes nothing here:
        what a row adds to all dimensions alike is lost on a model that normalises by LayerNorm.
        """
        rows = self._inner.W_dec[torch.as_tensor(features, device=self._inner.W_dec.device)].clone()
        if self._rescales:
            rows /= rows.norm(dim=-1, keepdim=True)
        return rows

    @torch.no_grad()
    def pool_spans(self, h: Tensor, bounds: Sequence[int], chunk_bytes: int) -> tuple[Tensor, Tensor]:
        """Largest activation (n_spans, d_sae) float32 and firing tokens (n_spans, d_sae) int32 of every latent.

        The firing set is that of `encode`, but for pre-activations equal to the threshold up to rounding: tiles of
        another shape sum in another order. (`b_dec` is taken from the tokens, as in `encode`, and not folded.)

        Args:
            h: (n_tokens, d_in) hidden states, spans end to end.
            bounds: n_spans + 1 ascending offsets into `h`; spans may be empty.
            chunk_bytes: limit on the dense activations held at a time, where they have to be made.
        """
        inner = self._inner
        if self.architecture in _SEPARATE:
            every = slice(None)
            return span_harvest_threshold(
                h, inner.W_enc, inner.b_enc, self._floor(every), bounds, prepare=self._prepare
            )
        if self.architecture == "topk":
            return span_harvest_topk(h, self._before_topk, inner.cfg.k, bounds)
        return span_harvest(h, self.encode, bounds, chunk_bytes)

    @torch.no_grad()
    def rows(self, features: Sequence[int]) -> Rows:
        """Encoder and decoder of some latents in the space of the hidden states, all scalings folded in.

        Folding the input centring into the bias can flip a firing that sits on its threshold by rounding. For a
        `centred` SAE the encoder's rows sum to zero over the width, so that they pass over the mean of a token, and so
        does their gradient.

        Raises:
            AnatomyError: an SAE for which no such rows are exact: one that scales every token by its own size, a gated
                one, a transcoder, or one whose codes are signed or found step by step.
        """
        if self.architecture not in (*_SEPARATE, "topk"):
            raise AnatomyError(
                f"The SAE at {self._place} is of the architecture {self.architecture!r}; latents can be taken out of "
                f"hidden states for {', '.join((*_SEPARATE, 'topk'))} only (BatchTopK is saved as jumprelu)."
            )
        if self.normalization != "none":
            raise AnatomyError(
                f"The SAE at {self._place} scales every token by its own size ({self.normalization!r}), so its latents "
                "cannot be taken out of hidden states exactly: use an SAE without this normalisation."
            )
        inner = self._inner
        index = torch.as_tensor(features, device=inner.W_enc.device)
        encoder, bias = inner.W_enc[:, index].T.double(), inner.b_enc[index].double()
        if inner.cfg.apply_b_dec_to_input:
            bias = bias - encoder @ inner.b_dec.double()
        if self.centred:
            encoder = encoder - encoder.mean(dim=1, keepdim=True)
        if self._rescales:
            norm = inner.W_dec[index].double().norm(dim=-1)
            encoder, bias = encoder * norm[:, None], bias * norm
        return Rows(encoder.float().contiguous(), bias.float(), self._floor(index), self.decoder_rows(features))

    @torch.no_grad()
    def kth(self, h: Tensor) -> Tensor | None:
        """Per token a bound that exactly the latents kept by a TopK SAE reach; None for other SAEs.

        The bound lies midway between the k-th and the next pre-activation, so that rounding elsewhere flips neither;
        where both are equal, both reach it.

        Args:
            h: (..., d_in) hidden states.

        Returns:
            (...,) float32, on the scale of `rows`.
        """
        if self.architecture != "topk":
            return None
        flat, k = h.reshape(-1, self.d_in), self._inner.cfg.k
        bound = torch.full((len(flat),), -torch.inf, device=h.device)
        if k < self.d_sae:
            step = max(1, _CHUNK_BYTES // (4 * self.d_sae))
            for start in range(0, len(flat), step):
                rows = slice(start, start + step)
                bound[rows] = self._before_topk(flat[rows]).topk(k + 1).values[:, k - 1 :].mean(dim=1)
        return bound.view(h.shape[:-1])

    def _before_topk(self, h: Tensor) -> Tensor:
        inner = self._inner
        pre = torch.addmm(inner.b_enc, self._prepare(h), inner.W_enc)
        return pre.mul_(inner.W_dec.norm(dim=-1)) if self._rescales else pre

    @property
    def _rescales(self) -> bool:
        return bool(getattr(self._inner.cfg, "rescale_acts_by_decoder_norm", False))

    def _floor(self, index: Any) -> Tensor:
        if self.architecture == "jumprelu":
            return self._inner.threshold[index].clamp(min=0)
        return torch.zeros_like(self._inner.b_enc[index])

    def to(self, device: torch.device | str) -> "SAE":
        """Move the weights; returns self."""
        self._inner.to(device=str(device))
        return self


def load_sae(source: str | Path | Mapping[str, str], *, device: torch.device | str = "cpu") -> SAE:
    """Load an SAE from a folder written by sae-lens or by EleutherAI's sparsify, or from a release.

    A release is one that sae-lens knows by name (Gemma-Scope, Llama-Scope, Qwen-Scope, Goodfire, ...), or a repository
    of the hub (``"EleutherAI/sae-llama-3-8b-32x:layers.10"``) with folders as above.

    Args:
        source: a folder, ``"RELEASE:ID"``, ``{"path": folder}`` or ``{"release": ..., "id": ...}``.
        device: where its weights go.

    Returns:
        The SAE in float32. Weights are read as safetensors, or by torch as weights only: nothing in them is executed.

    Raises:
        AnatomyError: nothing there, a URL, unreadable, an architecture or a preprocessing that cannot be used, a
            release out of reach, or torch set to unpickle without restriction.
    """
    with warnings.catch_warnings():  # sae-lens would have the model loaded in another way; see `SAE.centred`
        warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs", UserWarning)
        return _load(source, device)


def _load(source: str | Path | Mapping[str, str], device: torch.device | str) -> SAE:
    place = source.get("path", "") if isinstance(source, Mapping) else source
    if is_url(place):
        raise AnatomyError(f"sae: found {str(place)!r}, allowed: a folder of this machine, or 'RELEASE:ID' on the hub.")
    if isinstance(source, Mapping):
        if set(source) == {"path"}:
            return _from_folder(Path(source["path"]), str(device))
        if set(source) == {"release", "id"}:
            return _from_release(source["release"], source["id"], str(device))
        raise AnatomyError(f"sae: found the keys {sorted(source)}; give 'path', or 'release' and 'id'.")
    if os.path.exists(source):
        return _from_folder(Path(source), str(device))
    release, colon, sae_id = str(source).partition(":")
    if not colon or not sae_id:
        raise AnatomyError(
            f"No SAE at {str(source)!r}: there is no such folder, and a release is written 'RELEASE:ID' (for example "
            "'gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical')."
        )
    return _from_release(release, sae_id, str(device))


def _from_folder(path: Path, device: str) -> SAE:
    if all(os.path.isfile(path / name) for name in _SPARSIFY_FILES):
        return SAE(_sparsify(path.resolve(), device), {"path": str(path.resolve())})
    missing = [name for name in ("cfg.json", "sae_weights.safetensors") if not os.path.isfile(path / name)]
    if missing:
        raise AnatomyError(
            f"{str(path)!r} is not an SAE saved by sae-lens: {' and '.join(missing)} not found there. Save it with "
            "sae.save_inference_model(folder)."
        )
    require("sae_lens")
    from sae_lens import SAE as LensSAE
    from sae_lens import TrainingSAE
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    try:
        config = json.loads((path / "cfg.json").read_text())
        architecture = config.get("architecture", "standard")
        if architecture in SAE_CLASS_REGISTRY:
            inner: Any = LensSAE.load_from_disk(path, device=device)
        elif architecture in SAE_TRAINING_CLASS_REGISTRY:
            # A training-only architecture saved as it was trained: its inference form is what its own class says.
            training = TrainingSAE.load_from_disk(path, device=device)
            inner = _inference_form(training)
        else:
            raise AnatomyError(
                f"The SAE at {str(path)!r} is of the architecture {architecture!r}; known to this version of sae-lens: "
                f"{', '.join(sorted({*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY}))}."
            )
    except AnatomyError:
        raise
    except Exception as error:  # sae-lens reports bad files by whatever its parts raise
        raise AnatomyError(f"The SAE at {str(path)!r} cannot be read: {error}") from error
    scaler = path / "activation_scaler.json"
    if inner.cfg.normalize_activations == "expected_average_only_in" and scaler.is_file():
        inner.fold_activation_norm_scaling_factor(float(json.loads(scaler.read_text())["scaling_factor"]))
    # Absolute, so that an audit finds its SAE again from another working directory.
    return SAE(inner, {"path": str(path.resolve())}, config=config)


def _inference_form(training: Any) -> Any:
    from sae_lens import SAE as LensSAE

    config = training.cfg.get_inference_sae_cfg_dict()
    state = training.state_dict()
    training.process_state_dict_for_saving_inference(state)
    inner: Any = LensSAE.from_dict(config)
    inner.process_state_dict_for_loading(state)
    inner.load_state_dict(state)
    return inner


def _sparsify(path: Path, device: str) -> Any:
    require("sae_lens")
    # sae-lens' own converter transposes today's decoders, and leaves b_dec out where the decoder was normalised.
    from sae_lens import SAE as LensSAE
    from safetensors.torch import load_file

    place = f"The SAE at {str(path)!r}, saved by sparsify,"
    try:
        config = json.loads((path / "cfg.json").read_text())
        weights = {name: tensor.float() for name, tensor in load_file(path / "sae.safetensors", device=device).items()}
        width = int(config["d_in"])
        settings: dict[str, Any] = {
            "architecture": "abstopk" if config.get("signed") else "topk",
            "d_in": width,
            "d_sae": int(config.get("num_latents") or width * config["expansion_factor"]),
            "k": int(config["k"]),
            "apply_b_dec_to_input": True,
            "device": device,
            "metadata": {"hook_name": re.sub(r"^layers_", "layers.", path.name)},
        }
    except Exception as error:  # safetensors raises its own
        raise AnatomyError(f"{place} cannot be read: {type(error).__name__}: {error}.") from error
    if config.get("transcode") or config.get("skip_connection"):
        raise AnatomyError(f"{place} is a transcoder; only SAEs of the residual stream can be used.")
    if config.get("activation", "topk") != "topk":
        raise AnatomyError(f"{place} has the activation {config['activation']!r}; only 'topk' can be used.")
    if sorted(weights) != sorted(_SPARSIFY_WEIGHTS):
        raise AnatomyError(f"{place} holds {sorted(weights)}, but {sorted(_SPARSIFY_WEIGHTS)} are expected.")
    inner: Any = LensSAE.from_dict(settings)
    state = {
        "W_enc": weights["encoder.weight"].T.contiguous(),
        "b_enc": weights["encoder.bias"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    try:
        inner.load_state_dict(state)
    except RuntimeError as error:
        raise AnatomyError(f"{place} has weights of other shapes than its cfg.json says: {error}") from error
    return inner


def _sparsify_folder(repo: str, sae_id: str) -> Path | None:
    """The local copy of a folder of the hub, if sparsify wrote it."""
    from huggingface_hub import hf_hub_download

    folder = Path(hf_hub_download(repo, f"{sae_id}/cfg.json")).parent
    config = json.loads((folder / "cfg.json").read_text())
    if "k" not in config or {"architecture", "d_sae"} & set(config):
        return None
    hf_hub_download(repo, f"{sae_id}/sae.safetensors")
    return folder


@contextmanager
def _shapes_from_files() -> Iterator[None]:
    # sae-lens asks the server for the shapes of Gemma-Scope 2, cached or not; the file, needed anyway, has them too.
    from huggingface_hub import hf_hub_download
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors import safe_open

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(hf_hub_download(repo_id, filename), framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    original = loaders.get_safetensors_tensor_shapes
    loaders.get_safetensors_tensor_shapes = shapes
    try:
        yield
    finally:
        loaders.get_safetensors_tensor_shapes = original


def _card_l0(entry: Any, sae_id: str) -> float | None:
    # Gemma-Scope says it in the path alone where the id is "canonical".
    named = re.search(r"average_l0_(\d+)", entry.saes_map[sae_id])
    return entry.expected_l0.get(sae_id) or (float(named[1]) if named else None)


def _from_release(release: str, sae_id: str, device: str) -> SAE:
    require("sae_lens")
    from sae_lens import SAE as LensSAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    place = f"The SAE {release}:{sae_id}"
    entry = get_pretrained_saes_directory().get(release)
    if entry is None and "/" not in release:
        raise AnatomyError(f"sae-lens knows no SAE {release}:{sae_id}: it has no release of that name.")
    if entry is not None and sae_id not in entry.saes_map:
        raise AnatomyError(
            f"sae-lens knows no SAE {release}:{sae_id}; the release has {len(entry.saes_map)}, such as "
            f"{', '.join(list(entry.saes_map)[:3])}."
        )
    # sae-lens leaves it to torch's default whether a .pt file may run code.
    if os.getenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise AnatomyError(
            f"{place} is not loaded while TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets downloaded files run "
            "code: unset it."
        )
    source = {"release": release, "id": sae_id}
    try:
        folder = _sparsify_folder(release, sae_id) if entry is None else None
        if folder is not None:
            return SAE(_sparsify(folder, device), source)
        with _shapes_from_files():
            inner = LensSAE.from_pretrained(release, sae_id, device=device)
    except AnatomyError:
        raise
    except pickle.UnpicklingError as error:
        raise AnatomyError(
            f"{place} is stored as a pickle with more in it than weights, which is not opened since it could run code."
        ) from error
    except Exception as error:  # sae-lens and the hub client raise many kinds
        layout = (KeyError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError)
        if isinstance(error, layout) and not isinstance(error, OSError):
            raise AnatomyError(
                f"{place} is not in the layout that sae-lens reads: {type(error).__name__}: {error}"
            ) from error
        raise AnatomyError(
            f"{place} could not be fetched ({type(error).__name__}): connect once so that it is cached, or give the "
            "folder of an SAE on disk."
        ) from error
    if entry is None:
        return SAE(inner, source)
    if not inner.cfg.metadata.neuronpedia_id:  # sae-lens passes its own on to old configurations only
        inner.cfg.metadata.neuronpedia_id = entry.neuronpedia_id.get(sae_id)
    return SAE(inner, source, card_l0=_card_l0(entry, sae_id))


def check_sae(sae: SAE, model: Any, layer: int | None = None) -> int:
    """Check that an SAE fits a model, before any long work.

    Args:
        sae: the SAE.
        model: a supported model.
        layer: the layer to read, from 0; None takes it from the SAE's hook name.

    Returns:
        The layer whose output the SAE reads.

    Raises:
        AnatomyError: widths differ, the layer is out of range, unknown or not the one the SAE was trained on, or the
            SAE reads something else than the residual stream, or a centred one of a model that feels its mean.
    """
    width = hidden_size(model)
    if sae.d_in != width:
        raise AnatomyError(
            f"The SAE at {sae._place} reads hidden states of width {sae.d_in}, the model's have width {width}: use an "
            "SAE trained on this model."
        )
    if sae.centred and not normalises_by_layer_norm(model):
        raise AnatomyError(
            f"The card of the SAE at {sae._place} says center_writing_weights, which is done to models with LayerNorm "
            "alone, and this one has RMSNorm: use an SAE of this model, or take the key out of its cfg.json if the "
            "SAE was trained on this model."
        )
    trained = sae.layer
    if layer is None and trained is None:
        raise AnatomyError(f"The SAE at {sae._place} does not say which layer it was trained on: give layer.")
    if layer is not None and trained is not None and layer != trained:
        raise AnatomyError(
            f"layer is {layer}, but the SAE at {sae._place} was trained on {sae.hook_name!r}, the output of layer "
            f"{trained}: leave layer out or set it to {trained}."
        )
    chosen = trained if layer is None else layer
    assert chosen is not None
    n_layers = len(decoder_layers(model))
    if not 0 <= chosen < n_layers:
        raise AnatomyError(f"Layer {chosen} is out of range: the model has {n_layers} layers, 0 to {n_layers - 1}.")
    return chosen
