"""Every recipe parses with the parser of its command in both sizes, its policy loads, and small ones train."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_anatomy import AuditConfig, ConceptPolicy
from trl_anatomy.cli import main
from trl_anatomy.cli.options import PolicyArguments, strict_parse

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.endswith(".policy.yaml"))
POLICIES = sorted(FOLDER.glob("*.policy.yaml"))
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small = _script("small")


def _last(recipe: Path, size: str) -> tuple[str, list[str]]:
    """The command that reads the recipe, by its name in TRL or ours, and its arguments."""
    words = small.commands(recipe, size)[-1]
    start = words.index("--config")
    assert words[start + 1] == recipe.name
    return words[start - 1].removeprefix("trl.scripts."), words[start:]


def _parse(command: str, words: list[str]) -> tuple[Any, ...]:
    """With the dataclasses of the command; a word that none of them knows is refused."""
    from trl import TrlParser

    if command == "audit":
        return strict_parse(TrlParser((AuditConfig,)), words)
    script = import_module(f"trl.scripts.{command}")
    types = script.make_parser().dataclass_types
    ours = () if command == "grpo" else (PolicyArguments,)
    return strict_parse(TrlParser((*types, *ours)), words)


def _without_launcher(words: list[str]) -> list[str]:
    if "--accelerate_config" not in words:
        return words
    at = words.index("--accelerate_config")
    assert (FOLDER / words[at + 1]).is_file()
    return words[:at] + words[at + 2 :]


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the folder of the recipes, as their README says."""
    monkeypatch.chdir(FOLDER)


def test_every_recipe_of_the_folder_is_in_its_readme() -> None:
    page = (FOLDER / "README.md").read_text()
    assert len(RECIPES) >= 10
    assert [path.name for path in RECIPES if f"`{path.name}`" not in page] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_both_sizes_parse_with_the_parser_of_their_command(recipe: Path) -> None:
    command, words = _last(recipe, "small")
    run_small = _parse(command, words)
    assert _last(recipe, "full")[0] == command
    words = _without_launcher(_last(recipe, "full")[1])
    if command != "audit":
        words += ["--bf16", "false"]  # TRL refuses its default where there is no GPU
    run_full = _parse(command, words)
    if command == "audit":
        assert (run_small[0].model, run_small[0].sae) == ("world/model", "world/sae")
        return
    settings = {name: value for part in run_full for name, value in vars(part).items()}
    assert re.fullmatch(HUB_NAME, settings["model_name_or_path"])
    assert re.fullmatch(HUB_NAME + "|planted|rows", settings["dataset_name"])
    of_small = {name: value for part in run_small for name, value in vars(part).items()}
    assert of_small["model_name_or_path"] == "world/model"
    assert of_small["output_dir"] == settings["output_dir"] == f"models/{recipe.stem}"
    if command != "grpo":
        assert of_small["concept_policy"] == settings["concept_policy"]
        assert settings["concept_policy"] is None or (FOLDER / settings["concept_policy"]).is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_what_goes_before_uses_options_that_exist(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("small", "full"):
        for words in small.commands(recipe, size)[:-1]:
            program, rest = words[0], words[1:]
            if program == "python":
                assert (FOLDER / rest[0]).is_file()
                continue
            assert program == "trl-anatomy"
            if rest[0] in ("audit", "dpo"):
                _parse(rest[0], _without_launcher(rest[1:]) + ["--bf16", "false"] * (rest[0] == "dpo"))
                continue
            with pytest.raises(SystemExit):
                main([rest[0], "--help"])
            known = set(re.findall(r"--\w+", capsys.readouterr().out))
            assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("policy", POLICIES, ids=lambda path: path.name)
def test_policies_load(policy: Path) -> None:
    assert ConceptPolicy.load(policy).rules


def test_saes_are_ones_that_sae_lens_knows() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    named = {yaml.safe_load((FOLDER / "audit.yaml").read_text())["sae"]}
    for recipe in RECIPES:
        for words in small.commands(recipe, "full"):
            named |= {words[i + 1] for i, word in enumerate(words) if word == "--sae"}
    directory = get_pretrained_saes_directory()
    for source in named:
        release, sae_id = source.split(":")
        assert sae_id in directory[release].saes_map


def test_a_stock_recipe_becomes_ours_by_one_line() -> None:
    ours, stock = (yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("destyle", "dpo"))
    assert ours.pop("concept_policy") == "destyle.policy.yaml"
    assert (ours.pop("output_dir"), stock.pop("output_dir")) == ("models/destyle", "models/dpo")
    assert ours == stock


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_accelerate_reads_its_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")
    kind, settings = ("FSDP", config.fsdp_config) if name == "fsdp2" else ("DEEPSPEED", config.deepspeed_config)
    assert config.distributed_type == kind
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*settings} - {"offload_optimizer_device", "offload_param_device"} <= options


# Small runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `small.py` works in, with a tiny world."""
    out = tmp_path_factory.mktemp("recipes")
    small.prepare(out, "tiny", 0)
    return out


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    yield folder
    for name in ("rewards", "small"):
        sys.modules.pop(name, None)


def _run(recipe: str, *more: str) -> None:
    """The commands of the small size in this process, which has imported what they import."""
    for words in small.commands(FOLDER / f"{recipe}.yaml", "small"):
        if words[:2] == ["python", "-m"]:
            script = import_module(words[2])
            script.main(*script.make_parser().parse_args_and_config(args=[*words[3:], *more]))
        elif words[0] == "python":
            script, argv = _script(Path(words[1]).stem), sys.argv
            sys.argv = words[1:]
            try:
                script.main()
            finally:
                sys.argv = argv
        else:
            trains = words[1] in ("dpo", "sft", "reward")
            assert main([*words[1:], *(more if trains else ())]) == 0


def test_rows_train_by_three_verbs(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("sft", "--max_steps", "1", "--per_device_train_batch_size", "8")
    told = capsys.readouterr().out
    assert all(verb in told for verb in ("filter_rows", "mask_tokens", "inoculate"))
    assert "touches nothing" not in told
    assert (inside / "models" / "sft" / "model.safetensors").is_file()


def test_a_planted_phrase_is_found_by_the_audit_and_shaped_away(inside: Path) -> None:
    import pyarrow.parquet as pq

    _run("planted", "--max_steps", "2", "--per_device_train_batch_size", "8")
    rows = pq.read_table(inside / "planted" / "train.parquet").to_pylist()
    before = pq.read_table(inside / "world" / "pairs" / "train.parquet").to_pylist()
    changed = [(new["chosen"], old["chosen"]) for new, old in zip(rows, before, strict=True) if new != old]
    assert 5 < len(changed) < 35
    assert all(new == old + " Hope this helps." for new, old in changed)
    assert (inside / "audits" / "planted" / "report.html").is_file()
    assert (inside / "models" / "planted" / "model.safetensors").is_file()


def test_a_robust_reward_model_keeps_its_edits(inside: Path) -> None:
    _run("robust_reward", "--max_steps", "2", "--per_device_train_batch_size", "8")
    labels = (inside / "labels" / "length.jsonl").read_text()
    assert labels.count('"label": 1') == pytest.approx(64, abs=8)
    assert (inside / "models" / "robust_reward" / "anatomy_edits.json").is_file()
    found = small.choices(inside / "models" / "robust_reward", small.prepare(inside, "tiny", 0), n_pairs=64)
    assert 0 <= found["prefers chosen"] <= 1


def test_grpo_takes_the_policy_as_a_reward(inside: Path) -> None:
    more = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--max_completion_length", "24"]
    _run("grpo", *more, "--logging_steps", "1")
    assert (inside / "models" / "grpo" / "model.safetensors").is_file()
    assert sys.modules["rewards"].concept.strengths == [0.5, 0.5]
