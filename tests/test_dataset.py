"""One loader for every command: what `audit` reads trains as well, and bad files end in one sentence."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from reading_world import build_tokenizer
from test_audit_folder import WORDS, word_pairs, write_sae, write_start_model

from trl_anatomy.audit import run
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.columns import column_notes, prompt_column, unread_columns
from trl_anatomy.reading.dataset import load_rows, load_splits
from trl_anatomy.reading.sft import read_rows

ROWS = [{"prompt": f"p {i}", "chosen": f"{i}", "rejected": "None" if i else "NA"} for i in range(3)]
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def written(kind: str, root: Path) -> Path:
    data, path = Dataset.from_list(ROWS), root / f"rows{kind}"
    if kind in (".jsonl", ".json"):
        data.to_json(path)
    elif kind == ".jsonl.gz":
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    elif kind == ".parquet":
        data.to_parquet(path)
    elif kind == ".csv":
        path.write_text("prompt,chosen,rejected\n" + "".join(f"{','.join(row.values())}\n" for row in ROWS))
    elif kind == "saved":
        data.save_to_disk(path)
    elif kind == "splits":
        DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)
    else:
        path.mkdir()
        (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv", "saved", "splits", "folder"])
def test_every_kind_of_dataset_is_read_alike_by_an_audit_and_for_a_training(kind: str, tmp_path: Path) -> None:
    """Answers such as "None", "NA" and "0" stay text in CSV files too."""
    path = written(kind, tmp_path)
    assert load_rows(str(path)).to_list() == ROWS
    assert run.load_dataset(AuditConfig(dataset=str(path))).to_list() == ROWS
    splits = load_splits(str(path))
    assert splits["train"].to_list() == ROWS
    assert set(splits) == ({"train", "test"} if kind == "splits" else {"train"})
    assert load_splits(str(path), split="train").to_list() == ROWS
    assert list(load_splits(str(path), streaming=True)["train"]) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", "", "the file is empty"),
        ("rows.csv", "\n\n", "the file is empty"),
        ("rows.csv", "prompt,chosen,rejected\n", "holds no rows"),
        ("rows.json", "[]", "holds no rows; give"),
        ("rows.json", "\n[ ]\n", "holds no rows; give"),
        ("rows.jsonl", PAIR + '{"prompt": "a", "chos\n' + PAIR, r"rows\.jsonl, line 2: not valid JSON"),
        ("rows.jsonl", PAIR * 3 + '"words"\n', r"rows\.jsonl, line 4: found no JSON object"),
        ("rows.json", f"[{PAIR},\n{PAIR[:20]}", r"rows\.json, line 3: not valid JSON"),
        ("rows.csv", "prompt,chosen,rejected\na,b,c\na,b,c,d\n", "Expected 3 columns, got 4"),
        ("rows.parquet", "nothing of the kind", "cannot be loaded"),
        ("rows.txt", PAIR, r"unknown kind of file, allowed: \.json, \.jsonl, \.csv \(also \.gz\), \.parquet"),
    ],
)
@pytest.mark.parametrize("read", [load_rows, load_splits])
def test_a_bad_file_ends_in_one_sentence(
    name: str, content: str, told: str, read: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AnatomyError, match=told) as caught:
        read(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [load_rows, load_splits])
def test_a_bad_line_is_found_in_a_folder_too(read: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(PAIR * 4 + "{")
    with pytest.raises(AnatomyError, match=r"train\.jsonl, line 5: not valid JSON"):
        read(str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["nothing/here", "./nothing", "nothing"])
@pytest.mark.parametrize("read", [load_rows, load_splits])
def test_what_is_not_there_ends_in_one_sentence(name: str, read: Callable[[str], Any]) -> None:
    with pytest.raises(AnatomyError, match=f"^dataset {name}: cannot be loaded") as caught:
        read(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [load_rows, load_splits])
def test_an_audit_folder_is_no_dataset(read: Callable[[str], Any], tmp_path: Path) -> None:
    for name in ("audit.json", "concepts.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(AnatomyError, match="is an audit folder; name the dataset"):
        read(str(tmp_path))


# Training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_start_model(root / "model")
    data = word_pairs(12).select(range(1, 12))
    data.to_json(root / "pairs.jsonl")
    data.to_csv(root / "pairs.csv")
    data.save_to_disk(root / "saved")
    return root


def train(world: Path, kind: str, *words: str) -> int:
    needed = ["--model_name_or_path", str(world / "model"), "--output_dir", str(world / "out"), "--use_cpu"]
    needed += ["--bf16", "false", "--max_steps", "1", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    needed += ["--gradient_checkpointing", "false"]
    quiet = [] if "--config" in words else ["--report_to", "none", "--save_strategy", "no"]
    return main([kind, *needed, *quiet, *words])


@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "saved"])
def test_what_an_audit_reads_trains_as_well(kind: str, name: str, world: Path) -> None:
    assert train(world, kind, "--dataset_name", str(world / name)) == 0


def test_files_are_read_in_a_mixture_and_no_and_off_in_yaml_are_words(world: Path, tmp_path: Path) -> None:
    """YAML reads `no` as false, which the options of transformers refuse."""
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "save_strategy: no\neval_strategy: No\nreport_to: no\nlogging_strategy: off\ndatasets:\n"
        f"  - path: {world / 'pairs.jsonl'}\n  - path: {world / 'pairs.csv'}\n"
    )
    assert train(world, "dpo", "--config", str(config)) == 0
    assert not list((world / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("save_strategy: yes", "save_strategy is true .*allowed: no, steps, epoch, best"),
        ("eval_strategy: on", "eval_strategy is true .*allowed: no, steps, epoch"),
        ("lr_scheduler_type: off", "lr_scheduler_type is false .*allowed: linear, cosine"),
        ("report_to: true", "report_to is true .*allowed: none, all"),
    ],
)
def test_a_boolean_that_is_no_word_of_an_option(line: str, told: str, world: Path, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(f"{line}\ndataset_name: {world / 'pairs.jsonl'}\n")
    assert train(world, "dpo", "--config", str(config)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(told, error), error
    assert str(config) in error


@pytest.mark.parametrize("word", ["null", "None", "~", "none", "no"])
def test_words_for_nothing_to_report_to(word: str, world: Path, tmp_path: Path) -> None:
    """YAML reads `null` as nothing, which transformers takes for the name of a tracker."""
    config = tmp_path / "recipe.yaml"
    config.write_text(f"report_to: {word}\nsave_strategy: no\n")
    assert train(world, "dpo", "--config", str(config), "--dataset_name", str(world / "pairs.jsonl")) == 0


@pytest.mark.parametrize(
    "line", ["optim: adamwz", "lr_scheduler_type: cosin", "loss_type: [sigmoid]\nloss_weights: [1, 2]"]
)
def test_a_value_that_an_option_cannot_have_ends_in_one_sentence(
    line: str, world: Path, tmp_path: Path, capsys: Any
) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(f"{line}\nreport_to: none\n")
    assert train(world, "dpo", "--config", str(config), "--dataset_name", str(world / "pairs.jsonl")) == 2
    assert "The options cannot be used: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "it holds SFT data ('messages'): train on it with `trl sft`",
        ),
        ({"prompt": "a", "completion": "b"}, "it holds SFT data ('completion')"),
        ({"text": "a"}, "it holds SFT data ('text')"),
        ({"prompt": "a", "completion": "b", "label": True}, "it holds unpaired answers with a label (as `trl kto`"),
        ({"question": "a", "answer": "b"}, "preference data needs 'chosen' and 'rejected'"),
    ],
)
def test_data_that_are_no_pairs(kind: str, row: Any, told: str, world: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert train(world, kind, "--dataset_name", str(tmp_path / "rows.jsonl")) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_split_that_is_not_there(world: Path, capsys: Any) -> None:
    name = ["--dataset_name", str(world / "pairs.jsonl")]
    assert train(world, "dpo", *name, "--dataset_train_split", "validation") == 2
    assert "found splits train, but dataset_train_split is 'validation'" in capsys.readouterr().err.splitlines()[-1]
    assert train(world, "dpo", *name, "--eval_strategy", "steps", "--eval_steps", "1") == 2
    assert "dataset_test_split is 'test' (evaluation needs it" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_folder_that_is_no_audit(kind: str, world: Path, capsys: Any) -> None:
    words = ["--dataset_name", str(world / "pairs.jsonl"), "--audit", str(world / "saved")]
    assert train(world, kind, *words) == 2
    assert "saved: is no audit folder (found no audit.json)" in capsys.readouterr().err.splitlines()[-1]


# Columns ---------------------------------------------------------------------------------------------------------


def data_of(column: str, value: Any, **more: Any) -> Dataset:
    return Dataset.from_list(
        [{column: value(i), "id": f"row {i}", "chosen": f"yes {i}", "rejected": f"no {i}", **more} for i in range(8)]
    )


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("question", lambda i: f"how many are {i}"),
        ("Instruction", lambda i: f"count to {i}"),
        ("input_messages", lambda i: [{"role": "user", "content": f"what is {i}"}]),
        ("用户query", lambda i: f"第{i}个问题"),
    ],
)
def test_the_column_that_looks_like_the_prompt_is_named(column: str, value: Callable[[int], Any]) -> None:
    data = data_of(column, value)
    assert prompt_column(data) == column
    assert column_notes(unread_columns(data), column) == [
        f"Columns nothing reads: {column}, id. These pairs have no prompt, and `{column}` looks like it: rename it to "
        "prompt."
    ]


@pytest.mark.parametrize(
    "data",
    [
        data_of("question", lambda i: f"how many are {i}", prompt="count "),  # has one
        data_of("question_id", lambda i: f"q{i}"),  # no text
        data_of("context", lambda i: "all the same"),
        data_of("user", lambda i: i),
        data_of("rationale", lambda i: f"because of {i}"),  # not a prompt's name
        Dataset.from_list(  # the responses begin with their prompts
            [
                {"question": f"how is {i}", "chosen": f"how is {i}? good", "rejected": f"how is {i}? bad"}
                for i in range(8)
            ]
        ),
    ],
)
def test_other_columns_are_not_taken_for_the_prompt(data: Dataset) -> None:
    assert prompt_column(data) is None
    assert column_notes(unread_columns(data), None) == [f"Columns nothing reads: {', '.join(unread_columns(data))}."]


def test_an_audit_says_what_nothing_reads(world: Path, tmp_path: Path, capsys: Any) -> None:
    """In the terminal, in audit.json and on the page; a training says it before its first step."""
    write_sae(tmp_path / "sae")
    rows = [{**row, "source": "here"} for row in word_pairs(120).select(range(1, 120))]
    for i, row in enumerate(rows):
        row["question"] = f"{row.pop('prompt')} {WORDS[i % len(WORDS)]}"
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    told = "Columns nothing reads: source, question. These pairs have no prompt, and `question` looks like it"
    words = ["audit", "--model", str(world / "model"), "--dataset", str(tmp_path / "rows.jsonl"), "--device", "cpu"]
    words += ["--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "audit"), "--bootstrap", "100"]
    assert main([*words, "--dry_run"]) == 0
    assert told in capsys.readouterr().out
    assert main(words) == 0
    assert told in capsys.readouterr().out
    info = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert info["notes"][0].startswith(told)
    assert info["data"]["unread_columns"] == ["source", "question"]
    assert "looks like it: rename it to prompt" in (tmp_path / "audit" / "report.html").read_text()
    assert train(world, "dpo", "--dataset_name", str(tmp_path / "rows.jsonl")) == 0
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("column", ["question", "instruction", "user_prompt"])
def test_conversations_without_a_prompt_name_the_column_too(column: str) -> None:
    """A template refuses an empty conversation: the reason is the column."""
    rows = [
        {
            column: [{"role": "user", "content": f"Say {i} twice."}],
            **{side: [{"role": "assistant", "content": f"{side} {i}"}] for side in ("chosen", "rejected")},
        }
        for i in range(4)
    ]
    with pytest.raises(AnatomyError, match=f"`{column}` looks like it: rename it to prompt"):
        read_rows(Dataset.from_list(rows), build_tokenizer(), data_kind="pairs")
