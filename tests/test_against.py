"""SFT data against the model's own responses: pairs of the data's side and the model's, sampled once and kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from reading_world import build_tokenizer, tiny_model
from test_sft import sft_dataset

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.checking.against import against_model
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.sft import sft_texts

HOW = {"n_prompts": 6, "max_new_tokens": 5, "batch_size": 4}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(layers=1).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def settings(model_dir: Path, tmp_path: Path, kind: str, **more: Any) -> AuditConfig:
    sft_dataset(kind).to_json(str(tmp_path / "data.jsonl"))
    data = str(tmp_path / "data.jsonl")
    return AuditConfig(model=str(model_dir), dataset=data, data_kind="sft", out=str(tmp_path / "audit"), **more)


@pytest.mark.parametrize("kind", ["prompt-completion", "conversations", "messages"])
def test_pairs_are_the_datas_response_and_the_models(
    kind: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = against_model(settings(model_dir, tmp_path, kind), **HOW)
    assert (config.data_kind, config.dataset) == ("pairs", str(tmp_path / "audit.against" / "pairs.parquet"))
    pairs = load_dataset("parquet", data_files=config.dataset, split="train")
    kept = json.loads((tmp_path / "audit.against" / "responses.json").read_text())
    assert len(pairs) == 6
    written = {sft_texts(row) for row in sft_dataset(kind)}
    for row, said in zip(pairs, kept["responses"], strict=True):
        assert sft_texts({"prompt": row["prompt"], "completion": row["chosen"]}) in written
        assert sft_texts({"prompt": row["prompt"], "completion": row["rejected"]})[1] == said
    if not all(kept["finished"]):
        assert f"{kept['finished'].count(False)} of 6 responses of the model are cut at 5" in capsys.readouterr().err


def test_what_was_sampled_is_not_sampled_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model_dir, tmp_path, "conversations")
    against_model(config, **HOW)
    first = (tmp_path / "audit.against" / "pairs.parquet").read_bytes()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("sampled again")

    monkeypatch.setattr("trl_anatomy.checking.responses.rollouts", never)
    against_model(config, **HOW)
    assert (tmp_path / "audit.against" / "pairs.parquet").read_bytes() == first
    with pytest.raises(AssertionError, match="sampled again"):
        against_model(config, **{**HOW, "max_new_tokens": 4})


def test_the_command_audits_them(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(model_dir, tmp_path, "conversations")
    words = f"audit --model {model_dir} --dataset {config.dataset} --data_kind sft --sae none --out {config.out}"
    assert main(f"{words} --against model --n_prompts 8 --max_new_tokens 6 --json".split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["data"]["n_rows"] == 8
    assert told["settings"]["dataset"].endswith("audit.against/pairs.parquet")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--against rivals --data_kind sft", "found 'rivals', allowed: model"),
        ("--against model", "goes with --data_kind sft"),
        ("--against model --data_kind sft --dry_run", "--dry_run samples nothing"),
        ("--against model --data_kind sft --region a=b", "without --region"),
    ],
)
def test_refusals(words: str, told: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(model_dir, tmp_path, "conversations")
    assert main(f"audit --model {model_dir} --dataset {config.dataset} --out {config.out} {words}".split()) == 2
    assert told in capsys.readouterr().err


def test_plain_text_has_no_prompt(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="plain text has none"):
        against_model(settings(model_dir, tmp_path, "text"), **HOW)
