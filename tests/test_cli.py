"""What the command line refuses, and what it prints, before any model is loaded."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from trl_anatomy.cli import COMMANDS, main
from trl_anatomy.cli.training import without


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def test_overview_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_every_command_has_a_file_and_one_way_in():
    """The entry point of the installed program, `python -m`, and a launcher's module are one and the same."""
    assert all(callable(import_module(f"trl_anatomy.cli.{command}").run) for command in COMMANDS)
    shown = [
        subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, check=True).stdout
        for words in (["-m", "trl_anatomy.cli"], ["-c", "from trl_anatomy.cli import main; main()"])
    ]
    assert shown[0] == shown[1] != ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example: trl-anatomy {command}" in capsys.readouterr().out


def test_a_misspelt_command_gets_a_suggestion(capsys):
    assert "did you mean 'audit'" in refused(capsys, "audti")


def test_a_misspelt_option_gets_a_suggestion(capsys):
    error = refused(capsys, "audit", "--model", "m", "--dataset", "d", "--sae", "s", "--layr", "3")
    assert "--layr" in error
    assert "did you mean '--layer'" in error


@pytest.mark.parametrize("command", ["dpo", "sft", "reward"])
def test_a_misspelt_key_of_a_recipe_is_refused(command, tmp_path, capsys):
    """TRL passes over a key that nothing reads; a policy that silently does not act is what users must never get."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nbf16: false\nlearning_rat: 1.0e-6\n")
    error = refused(capsys, command, "--config", str(recipe))
    assert "learning_rat" in error
    assert "did you mean" in error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("policy.yaml", "'policy.yaml'"),
        ("-concept_policy policy.yaml", "'-concept_policy'"),
        ("--num_processes 1 policy.yaml", "'policy.yaml'"),
    ],
)
@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_a_word_that_nothing_reads_is_refused(command, words, told, tmp_path, capsys):
    """A policy that lost its --concept_policy would be as if it were not there."""
    needed = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--bf16", "false"]
    assert f"{told} on the command line" in refused(capsys, command, *needed, *words.split())


def test_a_word_that_an_audit_does_not_read_is_refused(capsys):
    assert "'more' on the command" in refused(capsys, "audit", "--model", "m", "--dataset", "d", "--sae", "s", "more")


@pytest.mark.parametrize("command", ["dpo", "reward", "audit"])
@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("a: [", "not valid YAML"), ("- a", "no options")]
)
def test_a_file_of_options_that_is_none(command, content, message, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_text(content)
    error = refused(capsys, command, "--config", str(file))
    assert str(file) in error
    assert message in error


@pytest.mark.parametrize(
    "words",
    [
        *(
            f"compare --audit a --before b --after c --{words}"
            for words in ("batch_size 0", "max_new_tokens 0", "seed -1")
        ),
        *(f"fit --model m --dataset d --out o --{words}" for words in ("seed -1", "max_length 0", "batch_tokens no")),
        "demo --seed 1.5",
    ],
)
def test_a_number_that_cannot_be_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert "allowed: a whole number of at least" in capsys.readouterr().err


def test_a_seed_that_the_statistics_cannot_take_is_refused_before_the_pass(capsys):
    assert "seed: found -1" in refused(capsys, "audit", "--model", "m", "--dataset", "d", "--sae", "s", "--seed", "-1")


def test_json_is_all_that_is_printed(tmp_path):
    """Libraries print notes while they are imported, some only where W&B is offline, as on most clusters."""
    from audit_files import config_for, write_inputs

    write_inputs(tmp_path)
    config = config_for(tmp_path, ".")
    words = [sys.executable, "-m", "trl_anatomy.cli", "audit", "--dry_run", "--json", "--out", config.out]
    words += ["--model", config.model, "--dataset", config.dataset, "--sae", config.sae]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"})
    assert json.loads(done.stdout)["pairs"] == 239


@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_a_policy_that_does_not_exist_is_refused_before_anything_loads(command, tmp_path, capsys):
    error = refused(
        capsys,
        command,
        *("--model_name_or_path", "nowhere", "--dataset_name", "nothing", "--output_dir", str(tmp_path)),
        *("--bf16", "false", "--concept_policy", str(tmp_path / "no.yaml")),
    )
    assert "no.yaml" in error
    assert "does not exist" in error


def test_an_audit_folder_that_does_not_exist_is_refused(tmp_path, capsys):
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\n")
    assert "no-audit" in refused(capsys, "plan", "--audit", str(tmp_path / "no-audit"), "--policy", str(policy))


def test_launch_options_are_taken_out_in_order():
    words = ["--config", "a.yaml", "--num_processes", "2", "--beta", "2"]
    assert without(words, ["--num_processes", "2"]) == ["--config", "a.yaml", "--beta", "2"]


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "trl", "sae_lens", "wandb", "sklearn", "pyarrow")
    program = f"import sys, trl_anatomy; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
