"""The published SAE families: each one's files, made small, read by sae-lens' own loaders from a hub cache on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_world import make_audit, make_world
from reading_world import tiny_model, tiny_sae
from safetensors.torch import save_file
from test_audit_folder import word_pairs, write_sae, write_start_model

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.report import render
from trl_anatomy.audit.run import run_audit
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.locate import layer_of_hook
from trl_anatomy.reading.sae import SAE, check_sae, load_sae

D_IN, D_SAE = 32, 64
HIDDEN = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0))
Put = Callable[[str, str], Path]


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Untied random float32 weights: enc and dec (D_SAE, D_IN), b_enc and threshold (D_SAE,), b_dec (D_IN,)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"enc": (D_SAE, D_IN), "dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,), "threshold": (D_SAE,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {"enc": made["enc"] / 4, "b_enc": made["b_enc"] / 5, "threshold": made["threshold"].abs()}


def pre(w: dict[str, torch.Tensor], h: torch.Tensor, *, centred: bool = False) -> torch.Tensor:
    x = h.double() - w["b_dec"].double() if centred else h.double()
    return x @ w["enc"].double().T + w["b_enc"].double()


def keep_top(values: torch.Tensor, k: int) -> torch.Tensor:
    return values * torch.zeros_like(values).scatter_(1, values.topk(k, dim=1).indices, 1.0)


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Where to write a file so that the hub client finds it in its cache, offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def place(repo: str, name: str) -> Path:
        root = tmp_path / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text("0" * 40)
        path = root / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    return place


def register(monkeypatch: pytest.MonkeyPatch, like: str, sae_id: str) -> tuple[str, str]:
    """Makes a release of sae-lens as small as the files here; returns its repository and the path of the SAE."""
    from dataclasses import replace

    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    entry = directory[like]
    small: Any = {"d_in": D_IN, "d_sae": D_SAE}
    monkeypatch.setitem(directory, like, replace(entry, config_overrides={**(entry.config_overrides or {}), **small}))
    return entry.repo_id, entry.saes_map[sae_id]


def check(sae: SAE, wanted: torch.Tensor, layer: int | None, dec: torch.Tensor) -> None:
    assert (sae.d_in, sae.d_sae, sae.layer) == (D_IN, D_SAE, layer)
    codes = sae.encode(HIDDEN)
    assert codes.dtype == torch.float32
    assert 0 < (wanted != 0).double().mean() < 1
    torch.testing.assert_close(codes.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.encode_features(HIDDEN, [5, 0]).double(), wanted[:, [5, 0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decoder_rows(range(D_SAE)), dec)


def test_gemma_scope(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    release, sae_id = "gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical"
    repo, folder = register(monkeypatch, release, sae_id)
    w = weights()
    names = {"w_enc": w["enc"].T, "w_dec": w["dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    arrays: dict[str, Any] = {name: value.numpy() for name, value in (names | {"threshold": w["threshold"]}).items()}
    np.savez(put(repo, f"{folder}/params.npz"), **arrays)
    sae = load_sae(f"{release}:{sae_id}")
    wanted = pre(w, HIDDEN).relu() * (pre(w, HIDDEN) > w["threshold"].double())
    check(sae, wanted, 12, w["dec"])
    assert sae.neuronpedia_id == "gemma-2-2b/12-gemmascope-res-16k"
    assert sae.card_l0 == float(folder.rsplit("_", 1)[1])


def test_gemma_scope_2_is_read_offline(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    ask_server = loaders.get_safetensors_tensor_shapes
    release, entry = next(
        (name, entry)
        for name, entry in get_pretrained_saes_directory().items()
        if entry.conversion_func == "gemma_3" and name.endswith("-res")
    )
    sae_id, folder = next(iter(entry.saes_map.items()))
    w = weights()
    names = {"w_enc": w["enc"].T, "w_dec": w["dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    tensors = {name: value.contiguous() for name, value in (names | {"threshold": w["threshold"]}).items()}
    save_file(tensors, put(entry.repo_id, f"{folder}/params.safetensors"))
    sae = load_sae(f"{release}:{sae_id}")
    wanted = pre(w, HIDDEN).relu() * (pre(w, HIDDEN) > w["threshold"].double())
    check(sae, wanted, int(folder.split("layer_")[1].split("_")[0]), w["dec"])
    assert loaders.get_safetensors_tensor_shapes is ask_server


def test_llama_scope(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is scaled by the norm factor: so its authors have it (SAELens, pull request 483)."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, sae_id = "llama_scope_lxr_8x", "l12r_8x"
    repo, folder = register(monkeypatch, release, sae_id)
    factor = get_pretrained_saes_directory()[release].norm_scaling_factor[sae_id]
    w = weights()
    w["b_enc"] = w["b_enc"] * factor
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "jump_relu_threshold": 0.5,
        "dataset_average_activation_norm": {"in": D_IN**0.5 / factor, "out": 1.0},
        "hook_point_in": "blocks.12.hook_resid_post",
    }
    put(repo, f"{folder}/hyperparams.json").write_text(json.dumps(config))
    tensors = {"encoder.weight": w["enc"], "decoder.weight": w["dec"].T.contiguous()}
    tensors |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    save_file(tensors, put(repo, f"{folder}/checkpoints/final.safetensors"))
    sae = load_sae(f"{release}:{sae_id}")
    values = pre(w, HIDDEN * factor)
    assert torch.equal(sae.encode(HIDDEN) > 0, values > 0.5 * factor)
    torch.testing.assert_close(sae.encode(HIDDEN).double(), values * (values > 0.5 * factor), rtol=1e-4, atol=1e-3)
    assert (sae.layer, sae.d_in, sae.d_sae, sae.card_l0) == (12, D_IN, D_SAE, 50.0)
    torch.testing.assert_close(sae.decoder_rows([3]), w["dec"][[3]] / factor)
    note = sae.l0_note(4000.0)
    assert note is not None
    assert "fires on 4000.0 latents per token here, but 50 are published" in note
    assert sae.l0_note(60.0) is None
    assert sae.l0_note(5.0) is not None


def test_llama_scope_r1_distill(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, sae_id = "llama_scope_r1_distill", "l0r_800m_slimpajama"
    repo, folder = register(monkeypatch, release, sae_id)
    factor = get_pretrained_saes_directory()[release].norm_scaling_factor[sae_id]
    w = weights()
    config = {"d_model": D_IN, "expansion_factor": 2, "hook_point_in": "blocks.0.hook_resid_post"}
    put(repo, f"{folder}/config.json").write_text(json.dumps(config))
    tensors = {"encoder.weight": w["enc"], "decoder.weight": w["dec"].T.contiguous()}
    tensors |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    tensors |= {"log_jumprelu_threshold": (w["threshold"] * factor).log()}
    save_file(tensors, put(repo, f"{folder}/sae_weights.safetensors"))
    values = pre(w, HIDDEN * factor)
    wanted = values.relu() * (values > w["threshold"].double() * factor)
    check(load_sae(f"{release}:{sae_id}"), wanted, 0, w["dec"] / factor)


def test_qwen_scope(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    release, sae_id = "qwen-scope-3-8b-base-w64k-l50", "layer7"
    repo, file = register(monkeypatch, release, sae_id)
    w = weights()
    tensors = {"W_enc": w["enc"], "W_dec": w["dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    torch.save(tensors, put(repo, file))
    sae = load_sae(f"{release}:{sae_id}")
    check(sae, keep_top(pre(w, HIDDEN).relu(), 50), 7, w["dec"])
    assert (sae.architecture, sae.card_l0, sae.neuronpedia_id) == ("topk", 50.0, None)


@pytest.mark.parametrize(
    ("release", "sae_id", "part", "layer"),
    [
        ("goodfire-llama-3.1-8b-instruct", "layer_19", "_linear", 19),
        ("goodfire-llama-3.3-70b-instruct", "layer_50", "_linear", 50),
        ("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post", "", 19),
    ],
)
def test_goodfire_and_qresearch(
    put: Put, monkeypatch: pytest.MonkeyPatch, release: str, sae_id: str, part: str, layer: int
) -> None:
    repo, file = register(monkeypatch, release, sae_id)
    w = weights()
    tensors = {f"encoder{part}.weight": w["enc"], f"decoder{part}.weight": w["dec"].T}
    tensors |= {f"encoder{part}.bias": w["b_enc"], f"decoder{part}.bias": w["b_dec"]}
    torch.save(tensors, put(repo, file))
    check(load_sae(f"{release}:{sae_id}"), pre(w, HIDDEN).relu(), layer, w["dec"])


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"]
)
def test_dictionary_learning(put: Put, kind: str) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, entry = next(
        (name, entry)
        for name, entry in get_pretrained_saes_directory().items()
        if entry.conversion_func == "dictionary_learning_1" and not entry.config_overrides
    )
    sae_id, folder = next(iter(entry.saes_map.items()))
    trainer = {"dict_class": kind, "layer": 2, "k": 6, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "org/m"}
    config = {"trainer": trainer, "buffer": {"ctx_len": 128}}
    put(entry.repo_id, f"{folder}/config.json").write_text(json.dumps(config))
    w = weights()
    plain = {"encoder.weight": w["enc"], "decoder.weight": w["dec"].T, "encoder.bias": w["b_enc"]}
    values = pre(w, HIDDEN, centred=kind != "JumpReluAutoEncoder").relu()
    if kind == "AutoEncoder":
        tensors = plain | {"bias": w["b_dec"]}
    elif kind == "AutoEncoderTopK":
        tensors = plain | {"b_dec": w["b_dec"], "k": torch.tensor(6), "threshold": torch.tensor(0.3)}
        values = keep_top(values, 6)
    elif kind == "BatchTopKSAE":
        tensors = plain | {"b_dec": w["b_dec"], "k": torch.tensor(6), "threshold": torch.tensor(0.7)}
        values = values * (values > 0.7)
    elif kind == "GatedAutoEncoder":
        gate = {"r_mag": w["b_enc"], "gate_bias": w["b_enc"], "mag_bias": w["threshold"], "decoder_bias": w["b_dec"]}
        tensors = {name: plain[name] for name in ("encoder.weight", "decoder.weight")} | gate
        raw = pre(w, HIDDEN, centred=True) - w["b_enc"].double()
        magnitude = (w["b_enc"].double().exp() * raw + w["threshold"].double()).relu()
        values = magnitude * (raw + w["b_enc"].double() > 0)
    else:
        tensors = {"W_enc": w["enc"].T, "W_dec": w["dec"], **{k: w[k] for k in ("b_enc", "b_dec", "threshold")}}
        values = values * (values > w["threshold"].double())
    torch.save(tensors, put(entry.repo_id, f"{folder}/ae.pt"))
    check(load_sae(f"{release}:{sae_id}"), values, 2, w["dec"])


@pytest.mark.parametrize(
    ("release", "sae_id", "d_in", "d_sae", "layer"),
    [
        ("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical", 2304, 16384, 12),
        ("gemma-scope-9b-pt-res-canonical", "layer_20/width_131k/canonical", 3584, 131072, 20),
        ("qwen-scope-3-8b-base-w64k-l50", "layer7", 4096, 65536, 7),
        ("qwen-scope-3.5-27b-w80k-l100", "layer3", 5120, 81920, 3),
        ("goodfire-llama-3.3-70b-instruct", "layer_50", 8192, 65536, 50),
        ("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post", 4096, 65536, 19),
    ],
)
def test_published_widths_that_only_names_tell(release: str, sae_id: str, d_in: int, d_sae: int, layer: int) -> None:
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    config = load_sae_config_from_huggingface(release, sae_id)
    assert (config["d_in"], config["d_sae"]) == (d_in, d_sae)
    assert layer_of_hook(config["metadata"]["hook_name"]) == layer


def sparsify_files(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """What EleutherAI's sparsify saves: the decoder as (d_sae, d_in), whose norm says nothing about b_dec."""
    folder.mkdir(parents=True, exist_ok=True)
    w = weights()
    settings = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": 6, "d_in": D_IN}
    (folder / "cfg.json").write_text(json.dumps(settings | config))
    tensors = {"encoder.weight": w["enc"], "encoder.bias": w["b_enc"], "W_dec": w["dec"], "b_dec": w["b_dec"]}
    save_file(tensors, folder / "sae.safetensors")
    return w


@pytest.mark.parametrize("changes", [{}, {"normalize_decoder": False, "num_latents": D_SAE}, {"signed": True}])
def test_sparsify_folders(tmp_path: Path, changes: dict[str, Any]) -> None:
    w = sparsify_files(tmp_path / "layers.2", **changes)
    values = pre(w, HIDDEN, centred=True)
    if changes.get("signed"):
        wanted = values * torch.zeros_like(values).scatter_(1, values.abs().topk(6, dim=1).indices, 1.0)
    else:
        wanted = keep_top(values.relu(), 6)
    sae = load_sae(tmp_path / "layers.2")
    check(sae, wanted, 2, w["dec"])
    assert check_sae(sae, tiny_model()) == 2
    assert sae.source == {"path": str((tmp_path / "layers.2").resolve())}


def test_sparsify_by_name(put: Put) -> None:
    repo = "EleutherAI/sae-llama-3-8b-32x"
    w = sparsify_files(put(repo, "layers.10/cfg.json").parent)
    sae = load_sae(f"{repo}:layers.10")
    check(sae, keep_top(pre(w, HIDDEN, centred=True).relu(), 6), 10, w["dec"])
    assert sae.source == {"release": repo, "id": "layers.10"}
    sparsify_files(put(repo, "layers.10.mlp/cfg.json").parent)
    with pytest.raises(AnatomyError, match=r"reads 'layers\.10\.mlp'; only the residual stream"):
        check_sae(load_sae(f"{repo}:layers.10.mlp"), tiny_model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, "is a transcoder"),
        ({"skip_connection": True}, "is a transcoder"),
        ({"activation": "groupmax"}, "the activation 'groupmax'; only 'topk'"),
        ({"num_latents": 50}, "other shapes than its cfg.json says"),
        ({"d_in": None}, "cannot be read: TypeError"),
    ],
)
def test_what_sparsify_saves_and_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    sparsify_files(tmp_path / "layers.2", **changes)
    with pytest.raises(AnatomyError, match=message):
        load_sae(tmp_path / "layers.2")


def test_sparsify_weights_of_another_layout_are_refused(tmp_path: Path) -> None:
    w = sparsify_files(tmp_path / "layers.2")
    save_file({"encoder.weight": w["enc"], "W_dec": w["dec"]}, tmp_path / "layers.2" / "sae.safetensors")
    with pytest.raises(AnatomyError, match=r"holds \['W_dec', 'encoder.weight'\], but"):
        load_sae(tmp_path / "layers.2")


def test_a_folder_of_sae_lens_on_the_hub(put: Put) -> None:
    inner = tiny_sae("topk", hook="blocks.1.hook_resid_post")
    inner.save_model(put("someone/saes", "one/cfg.json").parent)
    sae = load_sae("someone/saes:one")
    torch.testing.assert_close(sae.encode(HIDDEN), inner.encode(HIDDEN))
    assert (sae.layer, sae.neuronpedia_id, sae.card_l0, sae.l0_note(1e6)) == (1, None, None, None)


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_nothing_is_unpickled(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    release, sae_id = "goodfire-llama-3.1-8b-instruct", "layer_19"
    repo, file = register(monkeypatch, release, sae_id)
    torch.save({"encoder_linear.weight": Bomb()}, put(repo, file))
    with pytest.raises(AnatomyError, match="stored as a pickle with more in it than weights"):
        load_sae(f"{release}:{sae_id}")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(AnatomyError, match="unset it"):
        load_sae(f"{release}:{sae_id}")
    assert not (tmp_path / "exploded").exists()


def test_releases_told_apart_from_bad_files(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    release, sae_id = "goodfire-llama-3.1-8b-instruct", "layer_19"
    repo, file = register(monkeypatch, release, sae_id)
    with pytest.raises(AnatomyError, match=r"could not be fetched .*: connect once"):
        load_sae(f"{release}:{sae_id}")
    torch.save({"weight": torch.zeros(2)}, put(repo, file))
    with pytest.raises(AnatomyError, match="not in the layout that sae-lens reads: KeyError"):
        load_sae(f"{release}:{sae_id}")
    with pytest.raises(AnatomyError, match="the release has 1, such as layer_19"):
        load_sae(f"{release}:layer_3")


def test_the_page_links_latents_to_neuronpedia_where_the_sae_has_an_id(tmp_path: Path) -> None:
    audit = make_audit(tmp_path, make_world())
    assert "neuronpedia" not in render(audit).lower()
    audit.info["sae"]["neuronpedia_id"] = 'gemma-2-2b/12-res"><script>'
    shown = next(concept for concept in audit.concepts.to_pylist() if concept["verdict"] == "rises")
    page = render(audit)
    url = f"https://www.neuronpedia.org/gemma-2-2b/12-res%22%3E%3Cscript%3E/{shown['features'][0]}"
    assert f'<a href="{url}" rel="noreferrer">{shown["features"][0]}</a>' in page
    assert page.count("<script") == render(make_audit(tmp_path / "plain", make_world())).count("<script")


def test_an_audit_notes_an_l0_far_from_the_published_one(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    write_start_model(tmp_path / "model")
    write_sae(put("someone/saes", "one/cfg.json").parent)
    like = directory["gemma-scope-2b-pt-res-canonical"]
    ours: dict[str, Any] = {"conversion_func": None, "saes_map": {"one": "one"}, "neuronpedia_id": {"one": "m/1-res"}}
    entry = replace(like, release="small", repo_id="someone/saes", expected_l0={"one": 600.0}, **ours)
    monkeypatch.setitem(directory, "small", entry)
    out = str(tmp_path / "out")
    config = AuditConfig(model=str(tmp_path / "model"), dataset="words", sae="small:one", out=out, bootstrap=100)
    audit = run_audit(config, dataset=word_pairs(), progress=False)
    assert (audit.info["sae"]["neuronpedia_id"], audit.info["sae"]["card_l0"]) == ("m/1-res", 600.0)
    assert any("The SAE at 'small:one' fires on 6.0 latents per token here" in note for note in audit.info["notes"])
    assert "600 are published for it" in (tmp_path / "out" / "report.html").read_text()
