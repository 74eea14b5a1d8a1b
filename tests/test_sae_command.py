"""`trl-anatomy sae` from the command line: train, judge, texts, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from interrupting import hashed
from test_audit_folder import word_pairs, write_start_model
from test_disk import with_files_of_at_most
from test_restart import ended, in_a_process
from transformers import AutoModelForCausalLM

from trl_anatomy.audit.make_sae import SAEConfig, make_sae
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import sae_training


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sae-command")
    write_start_model(root / "model")
    rows = (json.dumps(row) + "\n" for row in word_pairs(1000))
    (root / "pairs.jsonl").write_text("".join(rows))
    return root


def run(capsys, root, *words: str):
    given = ["sae", "--model", str(root / "model"), "--dataset", str(root / "pairs.jsonl"), "--device", "cpu"]
    code = main([*given, *words])
    return code, capsys.readouterr()


def test_train_and_judge(root, capsys):
    out = root / "made"
    words = ["--out", str(out), "--layer", "1", "--tokens", "40960", "--latents", "64", "--k", "4", "--json"]
    code, told = run(capsys, root, *words)
    assert code == 0, told.err
    fit = json.loads(told.out)[str(out)]
    assert fit["verdict"] in ("fits", "continue training it", "do not use")
    assert f"**{fit['verdict']}**" in (out / "README.md").read_text()
    code, told = run(capsys, root, "--check", str(out), "--json")
    assert code == 0, told.err
    assert json.loads(told.out)[str(out)] == fit
    code, told = run(capsys, root, "--check", str(out))
    assert fit["reason"] in told.out


def test_texts_beside_the_pairs(root, capsys):
    (root / "text.jsonl").write_text("".join(json.dumps({"text": "a b c " * 50}) + "\n" for _ in range(20)))
    words = ["--text", str(root / "text.jsonl"), "--tokens", "40960", "--latents", "64", "--k", "4"]
    code, told = run(capsys, root, "--out", str(root / "more"), *words)
    assert code == 0, told.err
    card = (root / "more" / "README.md").read_text()
    code, told = run(capsys, root, "--out", str(root / "less"), *words[2:])
    assert code == 0, told.err
    n_more, n_less = (
        int(c.split(" tokens of data")[0].split()[-1]) for c in (card, (root / "less" / "README.md").read_text())
    )
    assert n_more > n_less


def test_float32_is_read_in_bfloat16_where_that_is_faster(root, tmp_path, capsys):
    """By default, on a CPU that computes in it; judged as audits read it; and not where a precision is asked for."""
    cards, kept = {}, {}
    words = ["--tokens", "40960", "--latents", "64", "--k", "8", "--json"]
    for dtype in ("auto", "float32", "bfloat16"):
        out = tmp_path / dtype
        code, told = run(capsys, root, "--out", str(out), "--dtype", dtype, *words)
        assert code == 0, told.err
        cards[dtype] = (out / "README.md").read_text()
        kept[dtype] = (out / "sae_weights.safetensors").read_bytes(), json.loads(told.out)[str(out)]
    can = torch.cpu.get_capabilities()
    same, other = ("bfloat16", "float32") if can.get("avx512_bf16") or can.get("amx_bf16") else ("float32", "bfloat16")
    assert f"learned it in {same};" in cards["auto"]
    assert kept["auto"][0] == kept[same][0] != kept[other][0]
    code, told = run(capsys, root, "--check", str(tmp_path / "auto"), "--json")
    assert json.loads(told.out)[str(tmp_path / "auto")] == kept["auto"][1]
    explained = {dtype: fit["variance_explained"]["chosen"] for dtype, (_, fit) in kept.items()}
    assert explained["auto"] == pytest.approx(explained["float32"], abs=0.02)


def test_a_training_bounded_by_minutes_goes_on_as_it_began(root, capsys):
    words = ["--out", str(root / "minutes"), "--latents", "64", "--k", "4", "--minutes", "0.1"]
    code, told = run(capsys, root, *words)
    assert code == 0, told.err
    made = (root / "minutes" / "sae_weights.safetensors").read_bytes()
    code, told = run(capsys, root, *words)  # the speed is another now, the training the same
    assert code == 0, told.err
    assert (root / "minutes" / "sae_weights.safetensors").read_bytes() == made


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tokens", "50000", "--minutes", "2"], "give tokens or minutes"),
        (["--architecture", "gated"], "allowed: batchtopk"),
        (["--k", "900", "--latents", "64"], "k is 900"),
        (["--k", "0"], "k is 0"),
        (["--latents", "0"], "number of latents is 0"),
        (["--lr", "-1"], "lr is -1"),
        (["--layer", "77"], "Layer 77 is out of range"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--minutes", "0.00001"], "minutes or more"),
    ],
)
def test_bad_input_is_one_sentence(root, capsys, words, told):
    code, printed = run(capsys, root, "--out", str(root / "bad"), *words)
    assert code == 2
    assert told in printed.err.strip().splitlines()[-1]


def test_pairs_that_are_too_few(root, tmp_path, capsys):
    """None, empty ones, and a single one: told by the command and by the function, and the folder stays free."""
    empty = {"prompt": "", "chosen": "", "rejected": ""}
    single = {"prompt": "tell me about a soup ", "chosen": "sea soup", "rejected": "sea"}
    for name, rows in (("none", []), ("empty", [empty] * 3), ("single", [single])):
        file, out = tmp_path / f"{name}.jsonl", tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["sae", "--model", str(root / "model"), "--dataset", str(file), "--out", str(out), "--device", "cpu"]
        assert main(words) == 2, name
        told = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in "".join(told)
        with pytest.raises(AnatomyError) as raised:
            make_sae(SAEConfig(str(root / "model"), str(file), out=str(out), device="cpu"), progress=False)
        assert str(raised.value) in told[-1]
        assert "\n" not in str(raised.value)
        assert not (out / "training.json").exists(), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_activations_are_not_finite(root, tmp_path, capsys, value):
    shutil.copytree(root / "model", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = value
    model.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--tokens", "40960"]
    code, told = run(capsys, root, *words)
    assert code == 2
    assert "activations of layer 1 are not finite" in told.err.strip().splitlines()[-1]


@pytest.mark.parametrize(("size", "seconds"), [(300, 0.0), (30_000, 0.0), (10_000, 1e9)])
def test_a_full_disk_is_told_and_what_was_trained_serves_the_next_run(root, tmp_path, monkeypatch, size, seconds):
    """Full as the settings, the state of the training, or the SAE's weights are written; then there is room."""
    monkeypatch.setattr(sae_training, "_SAVE_SECONDS", seconds)

    def trained(out: Path) -> None:
        given = {"tokens": 40960, "latents": 64, "k": 4, "device": "cpu"}
        make_sae(SAEConfig(str(root / "model"), str(root / "pairs.jsonl"), out=str(out), **given), progress=False)

    def full() -> None:
        told = r"cannot be written \(File too large\)\. What was finished before is kept"
        with pytest.raises(AnatomyError, match=told):
            trained(tmp_path / "full")

    assert with_files_of_at_most(size, full) == 0
    assert not list((tmp_path / "full").rglob("*.partial"))
    assert not (tmp_path / "full" / "cfg.json").exists()
    for out in ("full", "whole"):
        assert ended(in_a_process(lambda out=out: trained(tmp_path / out))) == 0
    assert hashed(tmp_path / "full", "*") == hashed(tmp_path / "whole", "*")
