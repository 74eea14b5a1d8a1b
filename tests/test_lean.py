"""What needs no SAE runs without the packages of the extras, and what needs one names the extra before it begins."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from audit_files import write_inputs

from trl_anatomy.errors import EXTRAS, require

ROOT = Path(__file__).parents[1]
BLOCKED = ("sae_lens", "transformer_lens", "plotly", "sknetwork", "wandb", "evaluate")
BLOCK = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {BLOCKED} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def lean(code: str, folder: Path) -> str:
    """What a process prints in which the packages of the extras cannot be imported."""
    done = subprocess.run([sys.executable, "-c", BLOCK + code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lean")
    write_inputs(folder)
    return folder


TEXT_AUDIT = """
from trl_anatomy.cli import main
main(["audit", "--dataset", "pairs.jsonl.gz", "--out", "text"])
main(["report", "--audit", "text"])
"""

TRAINING = """
from datasets import load_dataset
from trl import DPOConfig, RewardConfig
from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer
rows = load_dataset("json", data_files="pairs.jsonl.gz", split="train").select(range(12))
policy = {"version": 1, "concepts": {"a": {"scorer": "text", "pattern": "e"}},
          "rules": [{"explain_away": "a", "with": "shape_reward", "strength": 0.5}]}
for cls, config in ((AnatomyDPOTrainer, DPOConfig), (AnatomyRewardTrainer, RewardConfig)):
    args = config(output_dir=cls.__name__, max_steps=1, report_to="none", use_cpu=True, bf16=False)
    cls(model="model", args=args, train_dataset=rows, concept_policy=policy).train()
    print("trained", cls.__name__)
"""

MISSING = """
from trl_anatomy.errors import AnatomyError
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.run import run_audit
from trl_anatomy.checking.compare import compare
from trl_anatomy.reading.sae_list import published_sae
from trl_anatomy.testbed.demo import run_demo
from pathlib import Path
def rates():
    from trl_anatomy.checking.rates import ConceptRate
asked = {
    "audit": lambda: run_audit(AuditConfig(model="model", sae="sae", out="no"), dataset=[]),
    "compare": lambda: compare(None, None, None, [], out="no"),
    "list": lambda: published_sae(["google/gemma-2-2b"], 26),
    "demo": lambda: run_demo(Path("no")),
    "rates": rates,
}
for name, ask in asked.items():
    try:
        ask()
    except AnatomyError as error:
        print(name, error)
assert not Path("no").exists()
"""


def test_a_text_audit_and_its_page_need_none_of_them(inputs: Path) -> None:
    assert "Report: text/report.html" in lean(TEXT_AUDIT, inputs)
    assert (inputs / "text" / "report.html").is_file()


def test_both_trainers_train_with_a_text_policy(inputs: Path) -> None:
    said = lean(TRAINING, inputs)
    assert "trained AnatomyDPOTrainer" in said
    assert "trained AnatomyRewardTrainer" in said


def test_what_is_missing_is_named_with_its_extra_before_anything_is_done(inputs: Path) -> None:
    said = dict(line.split(" ", 1) for line in lean(MISSING, inputs).splitlines())
    sentence = "{} is not installed, which this needs: pip install 'trl-anatomy[{}]'."
    assert said == {
        "audit": sentence.format("sae_lens", "sae"),
        "compare": sentence.format("plotly", "report"),
        "list": sentence.format("sae_lens", "sae"),
        "demo": sentence.format("sae_lens", "sae"),
        "rates": sentence.format("evaluate", "evaluate"),
    }


def test_what_is_installed_is_not_refused() -> None:
    require(*EXTRAS)
    with pytest.raises(KeyError):  # no extra brings it
        require("no_such_package")


def test_every_extra_that_is_named_exists_and_brings_its_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    projects = {"sae_lens": "sae-lens", "sknetwork": "scikit-network"}
    for module, extra in EXTRAS.items():
        assert any(entry.startswith(projects.get(module, module) + ">") for entry in extras[extra])
    assert extras["all"] == [f"trl-anatomy[{','.join(dict.fromkeys(EXTRAS.values()))}]"]
    assert "trl-anatomy[all]" in extras["dev"]
