"""No command runs code that lies beside a model, whatever the model says of it, and nobody is asked whether it may."""

import ast
import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_files import write_inputs
from every_command import AUDIT, TRAIN
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import trl_anatomy
from trl_anatomy.checking.responses import load_model
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.trainers.concept_reward import ConceptReward

PACKAGE = Path(trl_anatomy.__file__).parent
RECIPES = PACKAGE.parent / "recipes"
LOADERS = ("from_pretrained", "from_config", "create_model_from_path", "LLM")
# Loads weights only.
NO_CODE = {"LensSAE.from_pretrained"}

CODE = """\
from pathlib import Path
Path(MARKER).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
class MineScore(LlamaForSequenceClassification):
    config_class = MineConfig
class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


# --- the source ---


def loads(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call that could load a model, its configuration or its tokenizer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.split(".")[-1] in LOADERS and name not in NO_CODE:
                yield name, node


def problem(call: ast.Call) -> str | None:
    value = next((keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"), None)
    if value is None:
        return "says nothing of trust_remote_code"
    if isinstance(value, ast.Constant):
        return None if value.value is False else f"says {value.value}"
    return None if "trust" in ast.unparse(value) else f"says {ast.unparse(value)}"


@pytest.mark.parametrize("file", sorted([*PACKAGE.rglob("*.py"), *RECIPES.glob("*.py")]), ids=lambda file: file.name)
def test_every_load_in_the_source_says_no(file: Path) -> None:
    """Or what the user's own setting says."""
    for name, call in loads(ast.parse(file.read_text())):
        if any(keyword.arg is None for keyword in call.keywords) and name == "create_model_from_path":
            assert 'init.setdefault("trust_remote_code", config.trust_remote_code)' in file.read_text()
            continue
        assert problem(call) is None, f"{file.name}:{call.lineno}: {name} {problem(call)}"


def test_the_walk_finds_what_it_looks_for() -> None:
    found = [name for file in PACKAGE.rglob("*.py") for name, _ in loads(ast.parse(file.read_text()))]
    assert len(found) >= 9
    assert {"vllm.LLM", "create_model_from_path", "auto.from_config"} <= set(found)
    bad = "A.from_pretrained(n)\nA.from_config(c, trust_remote_code=True)\nvllm.LLM(trust_remote_code=None)"
    assert [problem(call) for _, call in loads(ast.parse(bad))] == [
        "says nothing of trust_remote_code",
        "says True",
        "says None",
    ]


# --- the commands ---


def write_code(model: Path, marker: Path, *, model_type: str = "mine") -> None:
    """Make a model's files say that code beside them loads it."""
    config = json.loads((model / "config.json").read_text())
    classes = {
        "AutoConfig": "mine.MineConfig",
        "AutoModelForCausalLM": "mine.Mine",
        "AutoModelForSequenceClassification": "mine.MineScore",
    }
    (model / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": classes}))
    (model / "mine.py").write_text(CODE.replace("MARKER", repr(str(marker))))
    if model_type == "mine":
        file = model / "tokenizer_config.json"
        told = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}}
        file.write_text(json.dumps(json.loads(file.read_text()) | told))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished audit of `model`; `bad` is the same model, with code."""
    root = tmp_path_factory.mktemp("code")
    write_inputs(root)
    shutil.copytree(root / "model", root / "bad")
    (root / "pairs").mkdir()
    shutil.copy(root / "pairs.jsonl.gz", root / "pairs" / "train.jsonl.gz")
    write_code(root / "bad", root / "marker")
    text = "concepts:\n  b: {scorer: text, pattern: bold}\nrules:\n  - {explain_away: b, with: shape_reward}\n"
    (root / "text.yaml").write_text(text)
    (root / "habit.yaml").write_text(text.replace("{scorer: text, pattern: bold}", "{scorer: features, cluster: T1}"))
    before = Path.cwd()
    os.chdir(root)
    try:
        assert main(AUDIT.split()) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def unasked(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody answers, and nothing was run in the end."""

    def asked(*_: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.chdir(world)
    yield world
    assert not (world / "marker").exists()


BAD_TRAIN = TRAIN.replace("--model_name_or_path model", "--model_name_or_path bad")
COMMANDS = {
    "dry run": AUDIT.replace("--model model", "--model bad").replace("--out audit", "--out other") + " --dry_run",
    "audit": AUDIT.replace("--model model", "--model bad").replace("--out audit", "--out other"),
    "labels": AUDIT.replace("--out audit", "--out other") + " --label_model bad",
    "sae": "sae --model bad --dataset pairs.jsonl.gz --out saes --tokens 1000",
    "fit": "fit --model bad --dataset pairs.jsonl.gz --scorer probe --layers 1 --out concept",
    "compare before": "compare --audit audit --before bad --after model --n_prompts 4 --n_per_prompt 2",
    "compare after": "compare --audit audit --before model --after bad --n_prompts 4 --n_per_prompt 2",
    "dpo": f"dpo {BAD_TRAIN} --output_dir out",
    "dpo, a policy": f"dpo {BAD_TRAIN} --output_dir out --concept_policy text.yaml",
    "reward": f"reward {BAD_TRAIN} --output_dir out",
    "reward, a policy": f"reward {BAD_TRAIN} --output_dir out --concept_policy text.yaml",
    "predict": f"predict {BAD_TRAIN} --output_dir out --audit audit --concept_policy text.yaml",
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_no_command_runs_it(name: str, unasked: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(COMMANDS[name].split()) == 2
    errors = capfd.readouterr().err.splitlines()
    [line] = [line for line in errors if line.startswith("trl-anatomy ")]
    assert line == errors[-1]
    assert "bad: " in line
    assert "its files bring code of their own, which is not run here: " in line
    # audit and sae read a recipe's own `trust_remote_code` since they take a recipe
    settable = name.startswith(("dpo", "reward")) or name in ("dry run", "audit", "sae")
    assert ("set trust_remote_code if you trust it" in line) == settable


@pytest.mark.parametrize("command", ["plan --audit audit --policy habit.yaml", "report --audit audit"])
def test_nor_where_an_audited_model_has_changed(
    command: str, unasked: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("audit", "sae"):
        shutil.copytree(unasked / name, tmp_path / name)
    shutil.copy(unasked / "habit.yaml", tmp_path)
    shutil.copy(unasked / "pairs.jsonl.gz", tmp_path)
    shutil.copytree(unasked / "bad", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    main(command.split())
    assert "Traceback" not in capfd.readouterr().err


def test_a_concept_reward_runs_none(unasked: Path) -> None:
    with pytest.raises(AnatomyError, match="bring code of their own"):
        ConceptReward("habit.yaml", model=str(unasked / "bad"), reference=None, audit=str(unasked / "audit"))


@pytest.mark.parametrize("name", ["model", "bad"])
def test_an_adapter_is_its_base_model(name: str, unasked: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(unasked / "model"), LoraConfig(target_modules=["q_proj"], lora_alpha=64)
    )
    model.peft_config["default"].base_model_name_or_path = str(unasked / name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad * 0.1
    model.save_pretrained(tmp_path)
    if name == "bad":
        with pytest.raises(AnatomyError, match="bring code of their own"):
            load_model(str(tmp_path))
        return
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(tmp_path))(ids).logits.cpu(), model(ids).logits)


def test_an_architecture_that_transformers_has_is_loaded_by_its_own_class(unasked: Path, tmp_path: Path) -> None:
    shutil.copytree(unasked / "model", tmp_path / "model")
    write_code(tmp_path / "model", unasked / "marker", model_type="llama")
    assert main(f"{AUDIT.replace('--model model', f'--model {tmp_path}/model')} --dry_run".split()) == 0


def test_only_a_users_own_setting_runs_it(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, without a standard input: refused, and run when told to."""
    shutil.copytree(world / "bad", tmp_path / "bad")
    write_code(tmp_path / "bad", tmp_path / "marker")
    shutil.copytree(world / "pairs", tmp_path / "pairs")
    shutil.copy(world / "text.yaml", tmp_path)
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    words = COMMANDS["dpo, a policy"].split()
    told = (
        "import os; from trl_anatomy.cli import main\n"
        f"refused = main({words}), os.path.exists('marker')\n"
        f"print('ended', refused, main({[*words, '--trust_remote_code']}), os.path.exists('marker'))"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    process = subprocess.run([sys.executable, "-c", told], cwd=tmp_path, env=env, **pipes)
    assert process.stdout.splitlines()[-1] == "ended (2, False) 0 True", process.stderr[-3000:]


def test_what_transformers_says_is_recognised(unasked: Path) -> None:
    """Its sentence names the argument: that is how it is told from other errors."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(unasked / "bad", trust_remote_code=False)
