"""`trl-anatomy sae` from the command line: train, judge, texts, bad input."""

import json

import pytest
from test_audit_folder import word_pairs, write_start_model

from trl_anatomy.cli import main


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


def test_a_training_bounded_by_minutes_goes_on_as_it_began(root, capsys):
    words = ["--out", str(root / "minutes"), "--latents", "64", "--k", "4", "--minutes", "0.05"]
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
        (["--layer", "77"], "Layer 77 is out of range"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--minutes", "0.00001"], "minutes or more"),
    ],
)
def test_bad_input_is_one_sentence(root, capsys, words, told):
    code, printed = run(capsys, root, "--out", str(root / "bad"), *words)
    assert code == 2
    assert told in printed.err.strip().splitlines()[-1]
