"""A harvest equals the dense reference, survives interruption byte for byte, and says what is wrong with it."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from reading_world import build_tokenizer, dataset, rows, tiny_model, tiny_sae

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import harvest as harvest_module
from trl_anatomy.reading.fingerprint import model_fingerprint
from trl_anatomy.reading.harvest import Harvest, harvest, write_harvest
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.spans import SPANS, Pairs, read_pairs

LAYER = 1


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return read_pairs(dataset("explicit", 10), build_tokenizer(), max_length=60)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


SPECIAL = (0, 1, 2)  # ids of the tokenizer's padding, BOS and EOS


def sae(architecture: str = "topk", seed: int = 0) -> SAE:
    return SAE(tiny_sae(architecture, seed=seed))


def run(model: Any, pairs: Pairs, out: Path, **changes: Any) -> Harvest:
    settings = {"layer": LAYER, "batch_tokens": 150, "shard_pairs": 3, "progress": False} | changes
    return harvest(model, settings.pop("sae", None) or sae(), pairs, out, **settings)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def dense_reference(model: Any, inner: Any, pairs: Pairs) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Maximum and firing frequency, one sequence at a time, model and SAE in float64, everything dense."""
    model = tiny_model().double()
    inner = inner.to(dtype=torch.float64)
    maximum = {span: np.zeros((len(pairs), inner.cfg.d_sae)) for span in SPANS}
    frequency = {span: np.zeros((len(pairs), inner.cfg.d_sae)) for span in SPANS}
    for i in range(len(pairs)):
        prompt, chosen, other, rejected = pairs.tokens(i)
        for before, response, name in ((prompt, chosen, "chosen"), (other, rejected, "rejected")):
            with torch.no_grad():
                states = model(torch.tensor([before + response]), output_hidden_states=True).hidden_states[LAYER + 1][0]
                codes = inner.encode(states).abs().numpy()
            text = ~np.isin(before + response, SPECIAL)  # BOS and EOS are context, and not pooled
            parts = {name: codes[len(before) :][text[len(before) :]]}
            if name == "chosen":
                parts["prompt"] = codes[: len(before)][text[: len(before)]]
            for span, part in parts.items():
                maximum[span][i] = part.max(axis=0)
                frequency[span][i] = (part > 0).mean(axis=0)
    return maximum, frequency


@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk", "jumprelu"])
def test_harvest_is_the_dense_reference(architecture: str, model: Any, pairs: Pairs, tmp_path: Path) -> None:
    found = run(model, pairs, tmp_path, sae=sae(architecture))
    maximum, frequency = dense_reference(model, tiny_sae(architecture), pairs)
    assert (found.n_pairs, len(found), found.d_sae) == (len(pairs), len(pairs), 64)
    assert np.array_equal(found.rows, pairs.rows)
    for span in SPANS:
        np.testing.assert_allclose(found.maximum(span).toarray(), maximum[span], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.frequency(span).toarray(), frequency[span], rtol=1e-6, atol=1e-7)
    tokens = [pairs.tokens(i) for i in range(len(pairs))]
    assert found.lengths["prompt"].tolist() == [len(p) - 1 for p, _, _, _ in tokens]
    assert found.lengths["rejected"].tolist() == [(~np.isin(r, SPECIAL)).sum() for _, _, _, r in tokens]


def test_shards_batches_and_groups_change_nothing(
    model: Any, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, pairs, tmp_path / "whole", shard_pairs=100, batch_tokens=100_000)
    monkeypatch.setattr(harvest_module, "_POOLED_BYTES", 3 * 64 * 8)  # groups of three spans
    monkeypatch.setitem(harvest_module._CHUNK_BYTES, "cpu", 5 * 64 * 4)  # chunks of five tokens
    parts = run(model, pairs, tmp_path / "parts", shard_pairs=4, batch_tokens=90)
    for span in SPANS:
        assert (whole.count(span) != parts.count(span)).nnz == 0
        np.testing.assert_allclose(whole.maximum(span).toarray(), parts.maximum(span).toarray(), rtol=1e-4, atol=1e-5)
    shards = list(parts.shards())
    assert [len(shard.rows) for shard in shards] == [4] * (len(pairs) // 4) + [len(pairs) % 4] * (len(pairs) % 4 > 0)
    stacked = sp.vstack([shard.frequency("chosen") for shard in shards])
    assert (stacked != parts.frequency("chosen")).nnz == 0


@pytest.mark.parametrize("stop_after", [1, 5])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stop_after: int, model: Any, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, pairs, tmp_path / "straight")
    reads = 0
    read_spans = harvest_module.read_spans

    def interrupted(*args: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads > stop_after:
            raise KeyboardInterrupt
        return read_spans(*args)

    monkeypatch.setattr(harvest_module, "read_spans", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, pairs, tmp_path / "resumed")
    done = digests(tmp_path / "resumed") if (tmp_path / "resumed").exists() else {}
    if stop_after > 1:
        assert 1 < len(done) < len(digests(tmp_path / "straight"))
        with pytest.raises(AnatomyError, match=r"unfinished: \d of 10 pairs. Run the audit again"):
            Harvest.open(tmp_path / "resumed")
    reads = -1000
    run(model, pairs, tmp_path / "resumed")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "straight")
    reads_of_resumed = reads + 1000
    reads = -1000
    run(model, pairs, tmp_path / "again")
    assert (reads_of_resumed < reads + 1000) == (len(done) > 1)  # finished shards were not read again
    reads = stop_after
    run(model, pairs, tmp_path / "resumed")  # and a finished harvest reads nothing


def test_damaged_shards_are_named_and_only_they_are_read_again(model: Any, pairs: Pairs, tmp_path: Path) -> None:
    out = tmp_path / "harvest"
    run(model, pairs, out)
    whole = digests(out)
    shard = out / "shard-00001.safetensors"
    data = shard.read_bytes()

    shard.write_bytes(data[:-7])
    with pytest.raises(AnatomyError, match=r"shard-00001\.safetensors: the file is truncated: \d+ bytes instead of"):
        Harvest.open(out)
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(AnatomyError, match=r"shard-00001\.safetensors: its SHA-256 differs"):
        Harvest.open(out)
    shard.unlink()
    with pytest.raises(AnatomyError, match=r"shard-00001\.safetensors: the file is missing. Run the audit again"):
        Harvest.open(out)

    others = {file: (out / file).stat().st_mtime_ns for file in whole if "00001" not in file and "shard" in file}
    run(model, pairs, out)
    assert digests(out) == whole
    assert others == {file: (out / file).stat().st_mtime_ns for file in others}
    assert Harvest.open(out).n_pairs == len(pairs)


def test_missing_and_foreign_folders(model: Any, pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match=r"No harvest in .*: manifest\.json not found"):
        Harvest.open(tmp_path)
    first = run(model, pairs, tmp_path)
    with pytest.raises(AnatomyError, match=r"something else \(different: layer\)"):
        run(model, pairs, tmp_path, layer=2)
    with pytest.raises(AnatomyError, match=r"\(different: sae\)"):
        run(model, pairs, tmp_path, sae=sae(seed=1))
    with pytest.raises(AnatomyError, match=r"\(different: model\)"):
        run(tiny_model(seed=1), pairs, tmp_path)
    others = read_pairs(dataset("explicit", 9), build_tokenizer(), max_length=60)
    with pytest.raises(AnatomyError, match=r"\(different: pairs\)"):
        run(model, others, tmp_path)
    assert Harvest.open(tmp_path).fingerprint == first.fingerprint
    (tmp_path / "manifest.json").write_text(json.dumps({"key": {}}))
    with pytest.raises(AnatomyError, match="not a harvest's manifest"):
        Harvest.open(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_name_layer_and_row(bad: float, tmp_path: Path) -> None:
    raw = dataset("explicit", 4)
    pairs = read_pairs(raw, build_tokenizer(), max_length=None)
    others = {token for i in (0, 1, 3) for part in pairs.tokens(i) for token in part}
    only_here = next(token for token in pairs.tokens(2)[1] if token not in others)
    broken = tiny_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[only_here] = bad
    with pytest.raises(AnatomyError, match="NaN or infinity at layer 1 on dataset row 2: check"):
        run(broken, pairs, tmp_path, batch_tokens=10_000)


def test_empty_responses_do_not_shift_the_rows(model: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    made = rows("explicit", 6)
    made[2]["chosen"] = " "
    some = read_pairs(Dataset.from_list(made), build_tokenizer(), max_length=60)
    assert run(model, some, tmp_path).rows.tolist() == [0, 1, 3, 4, 5]


def test_an_sae_trained_with_bos_wants_one(model: Any, tmp_path: Path) -> None:
    wants_bos = sae()
    wants_bos.prepend_bos = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model, read_pairs(dataset("explicit", 2), build_tokenizer()), tmp_path / "with", sae=wants_bos)
    with pytest.warns(UserWarning, match="begins with BOS, and these prompts do not"):
        run(model, read_pairs(dataset("explicit", 2), build_tokenizer(bos=False)), tmp_path / "without", sae=wants_bos)


def test_write_harvest_gives_back_what_it_was_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = {span: rng.integers(1, 9, 11).astype(np.int32) for span in SPANS}
    count = {span: sp.random_array((11, 70_000), density=1e-3, rng=rng, format="csr") for span in SPANS}
    maximum = {}
    for span in SPANS:
        maximum[span] = count[span].copy()
        count[span].data = np.ones(count[span].nnz, np.int32)
    made = write_harvest(tmp_path, maximum, count, lengths, np.arange(11), {"made": "up"}, shard_pairs=4)
    for found in (made, Harvest.open(tmp_path)):
        assert (found.d_sae, found.n_pairs, found.key) == (70_000, 11, {"made": "up"})
        for span in SPANS:
            np.testing.assert_allclose(found.maximum(span).toarray(), maximum[span].toarray(), rtol=1e-6)
            share = count[span].toarray() / lengths[span][:, None]
            np.testing.assert_allclose(found.frequency(span).toarray(), share, rtol=1e-6)
    with pytest.raises(AnatomyError, match="stored at different places"):
        write_harvest(tmp_path, maximum, {**count, "chosen": count["prompt"]}, lengths, np.arange(11), {})


def test_model_fingerprint_knows_weights_and_not_their_place(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert model_fingerprint(model) == model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert model_fingerprint(model) != model_fingerprint(tiny_model(seed=1))
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight += 1e-3
    assert model_fingerprint(model) != before


def test_model_fingerprint_knows_whether_an_adapter_is_on() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    on = model_fingerprint(model)
    with model.disable_adapter():
        assert model_fingerprint(model) != on
    assert model_fingerprint(model) == on
