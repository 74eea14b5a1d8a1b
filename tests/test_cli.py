"""What the command line refuses, and what it prints, before any model is loaded."""

import subprocess
import sys

import pytest

from trl_anatomy.cli import COMMANDS, _without, main


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def test_overview_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


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


@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_a_misspelt_key_of_a_recipe_is_refused(command, tmp_path, capsys):
    """TRL passes over a key that nothing reads; a policy that silently does not act is what users must never get."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nbf16: false\nlearning_rat: 1.0e-6\n")
    error = refused(capsys, command, "--config", str(recipe))
    assert "learning_rat" in error
    assert "did you mean" in error


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
    assert _without(words, ["--num_processes", "2"]) == ["--config", "a.yaml", "--beta", "2"]


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "trl", "sae_lens", "wandb", "sklearn", "pyarrow")
    program = f"import sys, trl_anatomy; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
