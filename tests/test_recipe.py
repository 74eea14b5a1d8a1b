"""One YAML file serves every command: each takes what is its own from a recipe of TRL."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from audit_files import write_inputs
from huggingface_hub import constants
from test_remote_code import write_code
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, get_dataset

import trl_anatomy
from trl_anatomy import AuditConfig, load_audit
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.audit.run import load_model, load_tokenizer
from trl_anatomy.checking.responses import load_audited
from trl_anatomy.cli import main
from trl_anatomy.cli.options import ours
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.dataset import load_mixture
from trl_anatomy.recipe import _known

TRAINING = {
    "model_name_or_path": "model",
    "dataset_name": "pairs.jsonl.gz",
    "output_dir": "out",
    "max_length": 12,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": False,  # what YAML makes of `no`
    "dtype": "float32",
}
DPO, REWARD = {"beta": 0.2}, {"center_rewards_coefficient": 0.01}
POLICY = "concepts:\n  b: {scorer: text, pattern: bold}\nrules:\n  - {explain_away: b, with: reweight_pairs}\n"
MIXTURE = [
    {"path": "pairs.jsonl.gz", "columns": ["prompt", "chosen", "rejected"]},
    {"path": "more", "split": "validation"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, SAE, pairs in a file, and a folder of two splits."""
    root = tmp_path_factory.mktemp("recipe")
    write_inputs(root)
    rows = [{"prompt": f"q{i} ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    (root / "more").mkdir()
    for split, part in (("train", rows[:12]), ("validation", rows[12:]), ("test", rows[:3])):
        (root / "more" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (root / "policy.yaml").write_text(POLICY)
    return root


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the inputs of `world`, in which the test stands."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**options: Any) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(options))
    return "recipe.yaml"


def settings(*words: str, out: str = "counted") -> dict[str, Any]:
    """The settings of an audit of habits alone by these words."""
    assert main(["audit", "--sae", "none", "--out", out, *words]) == 0
    return load_audit(out).info["settings"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err.splitlines()[-1]


# --- one file, every command ---


@pytest.mark.parametrize(("kind", "own"), [("dpo", DPO), ("reward", REWARD)])
def test_one_file_serves_every_command(kind: str, own: dict[str, Any], here: Path, capfd) -> None:
    """The trainer compares its rows with those of the audit: that it starts says that both read the same."""
    shared = {"audit": "audits/run1", "sae": "sae", "concept_policy": "policy.yaml", "bootstrap": 100, "layer": 1}
    few = {"n_prompts": 6, "n_per_prompt": 4, "max_new_tokens": 4, "n_pairs": 24}
    words = ["--config", write(**TRAINING, **own, **shared, **few)]
    assert main(["audit", *words]) == 0
    audit = load_audit("audits/run1")
    assert audit.info["settings"]["truncation"] == ("drop" if kind == "reward" else "keep_start")
    assert audit.info["sae"]["layer"] == 1
    assert main(["plan", *words]) == 0
    if kind == "dpo":
        assert main(["predict", *words]) == 0
        assert (here / "audits" / "run1" / "prediction" / "prediction.json").is_file()
    capfd.readouterr()
    assert main([kind, *words]) == 0
    said = capfd.readouterr()
    assert f"{kind} does not read bootstrap, layer, max_new_tokens, n_pairs, n_per_prompt, n_prompts, sae." in said.err
    assert "reweight_pairs" in said.out
    if kind == "dpo":
        assert main(["compare", *words]) == 0
        assert (here / "audits" / "run1" / "compare" / "compare.json").is_file()
        assert main(["sae", *words, "--check", "sae"]) == 0


def test_an_audit_by_our_names_serves_training_too(here: Path) -> None:
    ours = {"model": "model", "dataset": "pairs.jsonl.gz", "truncation": "keep_end", "policy": "policy.yaml"}
    rest = {key: value for key, value in TRAINING.items() if key not in ("model_name_or_path", "dataset_name")}
    words = ["--config", write(**ours, **rest, audit="run", sae="sae", bootstrap=100)]
    with pytest.warns(FutureWarning, match="keep_end"):
        assert [main([command, *words]) for command in ("audit", "dpo")] == [0, 0]
    assert load_audit("run").info["settings"]["truncation"] == "keep_end"


def test_an_sae_is_trained_where_the_recipe_names_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"w{i % 40} yes no {'w3 ' * (i % 9)}" * 9}) + "\n" for i in range(400))
    more = {"text": "text.jsonl", "latents": 48, "k": 4, "layer": 1}
    words = ["--config", write(**TRAINING, sae="saes/mine", out="elsewhere", **more)]
    assert main(["sae", *words, "--tokens", "33000"]) == 0
    assert (here / "saes" / "mine" / "cfg.json").is_file()
    assert not (here / "elsewhere").exists()


# --- names ---


@pytest.mark.parametrize(
    "words",
    [
        "--model_name_or_path model --dataset_name more --dataset_train_split validation --truncation_mode keep_end",
        "--model-name-or-path=model --dataset-name=more --dataset-train-split=validation --truncation-mode=keep_end",
        "--model model --dataset_name more --dataset_split validation --truncation keep_end",
        "--model model --model_name_or_path model --dataset more --dataset_split validation --truncation keep_end",
    ],
)
def test_every_name_on_the_line_means_the_same(words: str, here: Path) -> None:
    plain = "--model model --dataset more --dataset_split validation --truncation keep_end"
    expected = settings(*plain.split())
    assert settings(*words.split()) | {"out": ""} == expected | {"out": ""}
    assert expected["model"] == str((here / "model").resolve())
    assert (expected["dataset_split"], expected["truncation"]) == ("validation", "keep_end")


@pytest.mark.parametrize("names", [("model", "dataset"), ("model_name_or_path", "dataset_name")])
def test_fit_takes_either_name(names: tuple[str, str], here: Path) -> None:
    model, dataset = names
    words = f"--{model} model --{dataset} pairs.jsonl.gz --scorer probe --layers 1 --out concept --max_length 16"
    assert main(["fit", *words.split()]) == 0
    assert (here / "concept" / "card.json").is_file()


def test_the_line_wins_over_the_file(here: Path) -> None:
    recipe = write(**TRAINING, dataset_train_split="train", seed=5)
    found = settings("--config", recipe, "--max_length", "7", "--dataset", "more", "--dataset_split", "validation")
    assert (found["max_length"], found["dataset_split"], found["seed"]) == (7, "validation", 5)
    assert found["dataset"].endswith("more")
    assert settings("--config", recipe)["max_length"] == 12
    mixed = settings("--config", write(**{**TRAINING, "datasets": MIXTURE}), "--dataset_name", "more")
    assert (mixed["dataset"].split("/")[-1], mixed["datasets"]) == ("more", None)


@pytest.mark.parametrize(
    ("options", "words", "told"),
    [
        ({"model": "other", "model_name_or_path": "model"}, "audit", ["model is 'other'", "'model'", "keep one"]),
        ({"dataset_split": "a", "dataset_train_split": "b"}, "audit", ["dataset_split is 'a'", "train_split is 'b'"]),
        ({"audit": "a", "out": "b"}, "audit", ["audit is 'a' and out is 'b'"]),
        ({"policy": "a", "concept_policy": "b"}, "plan", ["policy is 'a'", "concept_policy is 'b'"]),
        ({"dataset": "a", "dataset_name": "b"}, "dpo", ["dataset is 'a'", "dataset_name is 'b'"]),
        ({"truncation": "drop", **TRAINING}, "dpo", ["truncation is drop"]),
        ({}, "audit --model a --model_name_or_path b", ["--model is a and --model_name_or_path is b"]),
        ({}, "sae --dataset_name a --dataset b", ["--dataset_name is a and --dataset is b"]),
        ({}, "plan --audit a --policy b --concept_policy c", ["--policy is b and --concept_policy is c"]),
    ],
)
def test_two_names_of_one_setting_agree(options, words: str, told: list[str], here: Path, capsys) -> None:
    error = refused(capsys, *words.split(), "--config", write(**options))
    assert [part for part in told if part not in error] == []


@pytest.mark.parametrize("command", ["audit", "sae", "plan", "predict", "dpo", "reward", "compare"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [("model_name_or_pth", "model_name_or_path"), ("max_lenght", "max_length"), ("torch_dtype", "dtype")],
)
def test_a_misspelt_key_gets_the_nearest_name(command: str, key: str, meant: str, here: Path, capsys) -> None:
    error = refused(capsys, command, "--config", write(**TRAINING, audit="a", sae="sae", **{key: 1}))
    assert f"'{key}'" in error
    assert f"did you mean '{meant}'" in error


def test_every_option_of_a_command_may_stand_in_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("audit", "sae", "plan", "predict", "dpo", "reward", "compare"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = re.sub(r"\s+", " ", capsys.readouterr().out).replace("- ", "-")
        options = {word.replace("-", "_") for word in re.findall(r"[ \[]--([\w-]+)", printed)}
        assert len(options) > 6
        left = {option for option in options - _known(ours()) if not option.startswith("no_")}
        assert left <= {"help", "config", "open"}, command


# --- what the recipe says of the data ---


@pytest.mark.parametrize(
    "parts",
    [
        MIXTURE,
        [{"path": "more", "fraction": 0.25}, {"path": "more", "split": "validation", "fraction": 0.75}],
        [
            {"path": "json", "data_files": "more/validation.jsonl"},
            {"path": "more", "data_files": {"train": "train.jsonl"}},
        ],
    ],
    ids=["columns and splits", "fractions", "files"],
)
def test_a_mixture_holds_the_rows_that_trl_trains_on(parts: list[dict[str, Any]], here: Path, monkeypatch) -> None:
    import datasets

    from trl_anatomy.reading.dataset import load_splits

    found = load_mixture(parts)
    monkeypatch.setattr(datasets, "load_dataset", load_splits)  # as our dpo does, so that files can be read
    expected = get_dataset(DatasetMixtureConfig(datasets=[dict(part) for part in parts]))["train"]
    assert found.to_list() == expected.to_list()
    assert len(found) > 10


def test_a_mixture_is_audited_planned_and_trained_on(here: Path) -> None:
    files = {key: value for key, value in TRAINING.items() if key != "dataset_name"}
    recipe = write(**files, **DPO, datasets=MIXTURE, audit="run", sae="sae", policy="policy.yaml", bootstrap=100)
    assert [main([command, "--config", recipe]) for command in ("audit", "plan", "dpo")] == [0, 0, 0]
    audit = load_audit("run")
    assert audit.info["data"]["name"] == "pairs.jsonl.gz + more"
    assert audit.info["data"]["n_rows"] == 240 + 18
    assert [Path(part["path"]).is_absolute() for part in audit.info["settings"]["datasets"]] == [True, True]


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([{"pth": "more"}], "unknown key 'pth' (did you mean 'path'?)"),
        ([{"name": "more"}], "part 1: found no path"),
        ({"path": "more"}, "found no list of parts"),
        ([{"path": "more", "fraction": 0.5}, {"path": "more"}], "fraction"),
        ([{"path": "more", "columns": ["prompt", "better"]}], "found no column better"),
        ([{"path": "more", "columns": ["prompt"]}, {"path": "nowhere"}], "dataset nowhere: cannot be loaded"),
    ],
)
def test_a_mixture_that_is_none_is_one_sentence(parts: Any, told: str, here: Path, capsys) -> None:
    assert told in refused(capsys, "audit", "--config", write(datasets=parts), "--sae", "none")


def test_a_mixture_beside_a_dataset_is_read_as_trl_reads_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = settings("--config", write(**TRAINING, datasets=MIXTURE, test_split_size=0.1))
    assert (found["dataset"], len(found["datasets"])) == (None, 2)
    said = capsys.readouterr().err
    assert "dataset_name beside it is not" in said
    assert "test_split_size" in said
    with pytest.raises(AnatomyError, match="beside datasets"):
        AuditConfig(dataset="a", datasets=MIXTURE)


def test_the_test_split_of_a_training_is_the_audits_evaluation_set(here: Path) -> None:
    recipe = {**TRAINING, "dataset_name": "more", "dataset_test_split": "test"}
    assert settings("--config", write(**recipe))["eval_dataset"] is None
    found = settings("--config", write(**recipe, eval_strategy="steps"))
    assert (found["eval_dataset"], found["eval_split"]) == (str((here / "more").resolve()), "test")
    assert settings("--config", write(**recipe, eval_strategy=False))["eval_dataset"] is None


@pytest.mark.parametrize(
    ("options", "truncation", "note"),
    [
        ({}, "keep_start", "nothing in it tells dpo from reward"),
        (DPO, "keep_start", ""),
        ({"truncation_mode": "keep_end"}, "keep_end", ""),
        (REWARD, "drop", "a recipe of reward training (center_rewards_coefficient)"),
        ({"lora_task_type": "SEQ_CLS"}, "drop", "pairs longer than max_length are left out"),
        ({**REWARD, "truncation": "keep_start"}, "keep_start", ""),
    ],
)
def test_a_recipe_is_read_as_its_trainer_reads(options, truncation: str, note: str, here: Path, capsys) -> None:
    assert settings("--config", write(**TRAINING, **options))["truncation"] == truncation
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recipe.yaml: ")]
    assert note in "".join(said)
    assert len(said) == bool(note)


def test_a_recipe_of_both_trainers_asks_which(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(**TRAINING, **DPO, **REWARD)
    error = refused(capsys, "audit", "--sae", "none", "--config", recipe)
    assert "keys of dpo (beta) and of reward (center_rewards_coefficient)" in error
    assert settings("--config", recipe, "--truncation", "drop")["truncation"] == "drop"
    assert main(["dpo", "--config", recipe]) == 0
    assert "dpo does not read center_rewards_coefficient" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"dataset_streaming": True}, "read whole, not as a stream"),
        ({"load_in_4bit": True}, "not quantised"),
        ({"model_init_kwargs": {"rope_scaling": {"factor": 2.0}}}, "read without rope_scaling of model_init_kwargs"),
        ({"model_init_kwargs": '{"attn_implementation": "eager"}'}, ""),
    ],
)
def test_what_an_audit_cannot_follow_is_said(options: dict[str, Any], note: str, here: Path, capsys) -> None:
    settings("--config", write(**TRAINING, **DPO, **options))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recipe.yaml: ")]
    assert note in "".join(said)
    assert len(said) == bool(note)


@pytest.mark.parametrize("command", ["audit", "sae"])
@pytest.mark.parametrize(
    ("options", "told"),
    [({"eos_token": "yes"}, "eos_token is 'yes'"), ({"model_init_kwargs": "a"}, "model_init_kwargs holds no settings")],
)
def test_what_would_change_the_tokens_is_refused(options, told: str, command: str, here: Path, capsys) -> None:
    assert told in refused(capsys, command, "--config", write(**TRAINING, **options))


def test_a_plan_of_another_training_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {**TRAINING, **DPO, "audit": "run", "concept_policy": "policy.yaml", "sae": "sae", "bootstrap": 100}
    assert main(["audit", "--config", write(**same)]) == 0
    for change in ({"max_length": 20}, {"dataset_name": "more"}, {"model_name_or_path": "elsewhere"}):
        error = refused(capsys, "plan", "--config", write(**{**same, **change}))
        assert repr(next(iter(change.values())))[1:-1] in error
        assert "audit what is trained on" in error
    assert main(["plan", "--config", write(audit="run", concept_policy="policy.yaml")]) == 0


def test_variables_of_a_recipe_are_set(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPE_PLACE", "before")
    settings(f"--config={write(dataset_name='more', env={'RECIPE_PLACE': 3})}")
    assert os.environ["RECIPE_PLACE"] == "3"


# --- which model ---


@pytest.fixture
def hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the hub in the cache, in two versions; its name."""
    folder = tmp_path / "hub" / "models--someone--tiny"
    (folder / "refs").mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    for number, name in enumerate(("main", "v2")):
        snapshot = folder / "snapshots" / (str(number) * 40)
        with torch.no_grad():
            model.lm_head.weight.fill_(number)
        model.save_pretrained(snapshot)
        tokenizer = AutoTokenizer.from_pretrained(world / "model")
        tokenizer.chat_template = f"{{# {name} #}}{{{{ messages }}}}"
        tokenizer.save_pretrained(snapshot)
        (folder / "refs" / name).write_text(str(number) * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/tiny"


def test_the_version_of_a_model_is_that_of_the_recipe(hub: str, here: Path) -> None:
    recipe = {**TRAINING, **DPO, "model_name_or_path": hub, "audit": "run", "policy": "policy.yaml", "sae": "sae"}
    assert main(["audit", "--config", write(**recipe, model_revision="v2", bootstrap=100)]) == 0
    audit = load_audit("run")
    assert "v2" in audit.info["data"]["chat_template"]
    assert reopen(audit).model.lm_head.weight.unique().tolist() == [1]
    assert load_audited(audit, hub).lm_head.weight.unique().tolist() == [1]
    assert main(["plan", "--config", "recipe.yaml"]) == 0
    assert main(["plan", "--config", write(**recipe)]) == 2  # of the version `main`
    assert main(["predict", "--config", "recipe.yaml"]) == 2


@pytest.mark.parametrize(
    ("options", "version"),
    [({}, "main"), ({"model_revision": "v2"}, "v2"), ({"model_init_kwargs": {"revision": "v2"}}, "v2")],
)
def test_the_tokens_are_those_of_the_version(options: dict[str, Any], version: str, hub: str, here: Path) -> None:
    found = settings("--config", write(**{**TRAINING, **DPO, "model_name_or_path": hub}, **options))
    assert found["model_revision"] == version
    assert version in load_audit("counted").info["data"]["chat_template"]


def test_another_model_is_not_read_in_the_audits_version(hub: str, world: Path) -> None:
    config = AuditConfig(model=str(world / "model"), model_revision="v2")
    assert "main" in load_tokenizer(hub, config).chat_template
    assert "v2" in load_tokenizer(hub, AuditConfig(model=hub, model_revision="v2")).chat_template
    with pytest.raises(AnatomyError, match="someone/tiny: cannot be loaded"):
        load_model(AuditConfig(model=hub, model_revision="v3"))


def test_code_beside_a_model_runs_where_the_recipe_trusts_it(world: Path, tmp_path: Path) -> None:
    """In a process of its own; the audit's folder is no reason to trust it again."""
    for name in ("sae", "pairs.jsonl.gz", "policy.yaml"):
        (tmp_path / name).symlink_to(world / name)
    shutil.copytree(world / "model", tmp_path / "bad")
    write_code(tmp_path / "bad", tmp_path / "marker")
    for file in ("config.json", "mine.py"):  # of an architecture that can be read, with code for all that loads it
        text = (tmp_path / "bad" / file).read_text()
        (tmp_path / "bad" / file).write_text(re.sub(r'(model_type"?\s*[:=] )"mine"', r'\1"llama"', text))
    trusted = {**TRAINING, **DPO, "model_name_or_path": "bad", "audit": "run", "policy": "policy.yaml", "sae": "sae"}
    recipe = trusted | {"trust_remote_code": True, "bootstrap": 100}
    (tmp_path / "no.yaml").write_text(yaml.safe_dump({**recipe, "trust_remote_code": False}))
    (tmp_path / "yes.yaml").write_text(yaml.safe_dump(recipe))
    program = """if True:
        import os
        from trl_anatomy.cli import main
        def run(words):
            return main(words.split()), os.path.exists("marker")
        ended = [run("audit --config no.yaml --sae none"), run("audit --config yes.yaml")]
        os.remove("marker")
        ended += [run(words) for words in ("plan --audit run --policy policy.yaml", "report --audit run")]
        ended += [run("plan --config yes.yaml")[:1]]
        print(ended)
    """
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(Path(trl_anatomy.__file__).parents[1])}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    told = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, **pipes)
    expected = "[(2, False), (0, True), (2, False), (2, False), (0,)]"
    assert told.stdout.splitlines()[-1:] == [expected], told.stderr[-3000:]
    assert "trust_remote_code" not in json.loads((tmp_path / "run" / "audit.json").read_text())["settings"]
