"""One vocabulary on the command line: TRL's names and ours, help in the order of need, real examples."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_anatomy.cli import COMMANDS, main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.recipe import Recipe, check_audited

NO_GPU = [] if torch.cuda.is_available() else ["--use_cpu"]  # TRL's default precision is that of a GPU


def read(command: str, words: str) -> Any:
    more = NO_GPU if command in ("dpo", "reward", "sft", "predict") else []
    return import_module(f"trl_anatomy.cli.{command}").arguments([*shlex.split(words), *more])


def flat(parsed: Any) -> dict[str, Any]:
    """Settings by name, whatever holds them."""
    holders = parsed if isinstance(parsed, tuple) else (parsed,)
    return {name: value for holder in holders if holder is not None for name, value in vars(holder).items()}


def shown(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_stands_in_the_order_of_need_and_ends_in_examples_that_are_read(command, capsys, monkeypatch):
    text = shown(command, capsys, monkeypatch)
    titles = re.findall(r"^(required|common|advanced|options of `trl \w+`):$", text, re.MULTILINE)
    order = ["required", "common", "advanced"] + [title for title in titles if title.startswith("options")]
    assert titles == [title for title in order if title in titles]
    assert "common" in titles
    assert text.startswith(f"usage: trl-anatomy {command}")
    assert text.index("\n\n") < 200  # the usage is a line, not every option
    *_, last = text.rstrip().splitlines()
    assert last.startswith(f"example: trl-anatomy {command} ")
    examples = re.findall(rf"^example: trl-anatomy {command} (.*)$", text, re.MULTILINE)
    for words in examples:
        read(command, words)


@pytest.mark.parametrize("command", ["dpo", "reward", "sft", "predict"])
def test_ours_stands_before_what_trl_has(command, capsys, monkeypatch):
    text = shown(command, capsys, monkeypatch)
    ours = max(text.index(option) for option in ("--concept_policy", "--audit", "--model_name_or_path", "--output_dir"))
    assert ours < text.index("options of `trl") < text.index("--weight_decay")
    assert text[: text.index("options of `trl")].count("\n") < 90


TRL = (
    "--model_name_or_path m --dataset_name d --dataset_train_split s --dataset_config c --max_length 99 --output_dir o"
)
OURS = "--model m --dataset d --dataset_split s --dataset_subset c --max_length 99 --out o"


@pytest.mark.parametrize(
    ("command", "trl", "ours"),
    [
        *((command, TRL, OURS) for command in ("audit", "sae", "fit", "dpo", "reward", "sft")),
        (
            "predict",
            f"{TRL} --audit a --concept_policy p",
            f"{OURS} --audit a --policy p".replace("--out ", "--output_dir "),
        ),
        ("dpo", "--truncation_mode keep_start --concept_policy p", "--truncation keep_start --policy p"),
        (
            "plan",
            f"--audit a --concept_policy p {TRL}".replace(" --output_dir o", ""),
            f"--audit a --policy p {OURS}".replace(" --out o", ""),
        ),
        ("compare", "--audit a --model_name_or_path b --output_dir o", "--audit a --before b --after o"),
        (
            "compare",
            "--audit a --model b --output_dir o --dataset_name d",
            "--audit a --before b --after o --dataset d",
        ),
        ("demo", "--output_dir o", "--out o"),
    ],
)
def test_either_name_in_either_spelling_is_the_same_setting(command, trl, ours):
    dashed = re.sub(r"--(\w+)", lambda option: "--" + option[1].replace("_", "-"), trl)
    settings = [
        {name: str(value) for name, value in flat(read(command, words)).items() if name != "logging_dir"}
        for words in (trl, ours, dashed)
    ]
    assert settings[0] == settings[1]
    assert settings[0] == settings[2]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("plan --adit a --concept_policy p", "--audit"),
        ("plan --audit a --concept_polcy p", "--concept_policy"),
        ("compare --audit a --befoer b --after c", "--before"),
        ("fit --model m --dataset_nam_ d --out o", "--dataset_name"),
        ("report --audt a", "--audit"),
        ("demo --output_dirr o", "--output_dir"),
        ("audit --dataset_nme d", "--dataset_name"),
        ("sae --model_name_or_pth m", "--model_name_or_path"),
        ("dpo --concept_polcy p", "--concept_policy"),
    ],
)
def test_a_misspelt_option_gets_a_suggestion_of_every_command(words, option, capsys):
    """Also where argparse would first ask for the option that is there, misspelt."""
    command, *rest = words.split()
    assert main([command, *rest, *(NO_GPU if command == "dpo" else [])]) == 2
    told = capsys.readouterr().err
    assert f"did you mean '{option}'" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(("word", "meant"), [("audti", "audit"), ("compair", "compare"), ("rewards", "reward")])
def test_a_misspelt_command_gets_a_suggestion(word, meant, capsys):
    assert main([word]) == 2
    assert f"did you mean '{meant}'" in capsys.readouterr().err


SETTINGS = {"model": "m", "dataset": "d", "dataset_split": "train", "max_length": 512, "truncation": "keep_start"}


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ({"dataset": "other"}, "--dataset_name"),
        ({"model": "other"}, "--model_name_or_path"),
        ({"max_length": 1024}, "--max_length"),
        ({"dataset_split": "test"}, "--dataset_train_split"),
        ({"truncation": "drop"}, "--truncation_mode"),
    ],
)
def test_what_the_line_says_of_the_training_is_held_against_the_audit(line, option):
    with pytest.raises(AnatomyError, match=option):
        check_audited(None, SETTINGS, "audits/run1", (), line)
    check_audited(None, SETTINGS, "audits/run1", (), {name: SETTINGS[name] for name in line})


def test_the_line_wins_over_the_recipe():
    training = Recipe("recipe.yaml", {"dataset_name": "other", "max_length": 512})
    check_audited(training, SETTINGS, "audits/run1", (), {"dataset": "d"})
    with pytest.raises(AnatomyError, match=r"recipe\.yaml trains with"):
        check_audited(training, SETTINGS, "audits/run1", (), {"model": "m"})


def test_a_setting_of_both_is_written_once():
    """The SAE's reading of model and data is the audit's: the same default, help and names."""
    from trl_anatomy.audit.config import AuditConfig
    from trl_anatomy.audit.make_sae import SAEConfig

    audit, sae = (kind.__dataclass_fields__ for kind in (AuditConfig, SAEConfig))
    same = [name for name in audit if name in sae and name not in ("layer", "out", "seed", "dtype", "dataset")]
    assert len(same) >= 10
    for name in same:
        assert sae[name].default == audit[name].default
        assert sae[name].metadata is audit[name].metadata or sae[name].metadata == audit[name].metadata


def test_a_recipe_keeps_its_meaning(tmp_path: Path):
    """The folder of the training is not that of the audit, although the line may call it so."""
    file = tmp_path / "recipe.yaml"
    file.write_text("output_dir: runs/dpo\nmodel_name_or_path: m\ndataset_name: d\n")
    config, _ = read("audit", f"--config {file}")
    assert (config.out, config.model, config.dataset) == ("audits/run", "m", "d")
    config, _ = read("audit", f"--config {file} --output-dir audits/mine")
    assert config.out == "audits/mine"


@pytest.mark.parametrize("kind", ["pairs.jsonl", "pairs.parquet", "saved"])
def test_the_path_that_an_audit_takes_works_in_every_command(kind: str, tmp_path: Path) -> None:
    """Training reads them in test_dataset.py."""
    from test_audit_folder import word_pairs, write_start_model

    from trl_anatomy.audit.run import load_dataset
    from trl_anatomy.checking.responses import prompts_for

    data, path = word_pairs(40, more_words=0).select(range(1, 40)), tmp_path / kind
    write = {"pairs.jsonl": data.to_json, "pairs.parquet": data.to_parquet, "saved": data.save_to_disk}[kind]
    write(path)
    rows = data.to_list()
    assert load_dataset(read("audit", f"--dataset_name {path}")[0]).to_list() == rows
    assert load_dataset(read("sae", f"--model_name_or_path m --dataset_name {path}")[0].audit()).to_list() == rows
    asked = {str(prompt) for prompt in prompts_for(None, str(path), 1000, 0)}  # compare and predict: --prompts
    assert len(asked) == len({row["prompt"] for row in rows})
    write_start_model(tmp_path / "model")
    words = f"--model_name_or_path {tmp_path}/model --dataset_name {path} --layers 1 --output_dir {tmp_path}/concept"
    assert main(["fit", *words.split()]) == 0


def test_a_dry_run_is_a_table_with_the_longest_row_and_the_problems(tmp_path: Path, capsys: Any) -> None:
    from audit_files import config_for, write_inputs

    write_inputs(tmp_path)
    config = config_for(tmp_path, ".")
    words = ["audit", "--model", config.model, "--dataset", config.dataset, "--sae", config.sae, "--max_length", "9"]
    assert main([*words, "--output_dir", config.out, "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^pairs +239$", told, re.MULTILINE)
    assert re.search(
        r"^longest pair +[\d,]+ tokens, row \d+ \(prompt \d+, chosen \d+, rejected \d+\)$", told, re.MULTILINE
    )
    assert re.search(r"^its chosen ends +\S", told, re.MULTILINE)
    assert re.search(r"^Problems of the data: ", told, re.MULTILINE)
    assert "{" not in told
    assert not (tmp_path / "audit").exists()


@pytest.mark.parametrize("command", ["dpo", "reward", "sft", "predict --audit a"])
@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--output_dir o", "--model_name_or_path"),
        ("--output_dir o --model m", "--dataset_name"),
        ("--output_dir o --dataset d", "--model_name_or_path"),
    ],
)
def test_a_training_of_nothing_is_told_in_one_sentence(command: str, words: str, option: str, capsys: Any) -> None:
    assert main([*command.split(), *words.split(), *NO_GPU]) == 2
    told = capsys.readouterr().err
    assert option in told
    assert told.count("\n") == 1
