"""`benchmarks/canary.py` finds what a release moved by reading it, and says which file of ours rests on it."""

import importlib.util
import re
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trl_anatomy.errors import AnatomyError
from trl_anatomy.upstream import FUSED_HEAD, SEAMS, SHARED_PREFIX, release_of, seams_of
from trl_anatomy.versions import check_trl

ROOT = Path(__file__).parents[1]
SITE = Path(sysconfig.get_paths()["purelib"])
PROJECTS = {"trl": "trl", "transformers": "transformers", "peft": "peft", "sae_lens": "sae-lens"}


@pytest.fixture(scope="module")
def canary() -> ModuleType:
    spec = importlib.util.spec_from_file_location("canary", ROOT / "benchmarks" / "canary.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["canary"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def moved(canary: ModuleType, package: str, changed: dict[str, str | None] | None = None) -> list[str]:
    """What the canary says of an installed package, with other texts in place of some of its files."""
    found, changed = version(PROJECTS[package]), changed or {}
    here = canary.from_folder(SITE, package, found)
    copy = canary.Release(package, found, lambda name: changed.get(name, here._text(name)), here.names)
    seams = list(canary.upstream().seams_of(package, found))
    said: list[str] = copy.moved(seams, canary.our_imports()[package])
    return said


@pytest.mark.parametrize("package", PROJECTS)
def test_nothing_moved_in_what_is_installed(canary: ModuleType, package: str) -> None:
    assert moved(canary, package) == []


DPO, TRAINER = "trl/trainer/dpo_trainer.py", "transformers/trainer.py"
# What a release could do: rename or add a parameter, rename a function or field, change a line or an order, drop a
# module or an import. Package, file, text there, text instead (None: the file is gone), what the canary says.
MOVES: dict[str, tuple[str, str, str, str | None, str]] = {
    "parameter renamed": (
        "trl",
        DPO,
        "def compute_ref_log_probs(self, model, inputs)",
        "def compute_ref_log_probs(self, model, batch)",
        r"no longer takes inputs .*; trl_anatomy/trainers/dpo\.py rests on it",
    ),
    "parameter added": (
        "trl",
        DPO,
        "def _compute_loss(self, model, inputs, return_outputs)",
        "def _compute_loss(self, model, inputs, return_outputs, rows)",
        "takes self, model, inputs, return_outputs, rows, which was",
    ),
    "method renamed": (
        "trl",
        DPO,
        "def _precompute_ref_logps",
        "def _precompute_reference",
        "has no DPOTrainer._precompute_ref_logps",
    ),
    "key renamed": ("trl", DPO, 'inputs["ref_chosen_logps"]', 'inputs["ref_chosen"]', "no longer says"),
    "switch renamed": ("trl", DPO, "self.precompute_ref_logps", "self.precomputes", "no longer says"),
    "metric renamed": ("trl", DPO, '"rewards/margins"', '"margins"', "rewards/margins"),
    "field gone": ("trl", "trl/trainer/dpo_config.py", "truncation_mode: str", "cut: str", "DPOConfig.truncation_mode"),
    "module gone": ("trl", "trl/trainer/rloo_trainer.py", "", None, "there is no module trl.trainer.rloo_trainer"),
    "import gone": (
        "trl",
        "trl/trainer/utils.py",
        "def get_config_model_id",
        "def model_id_of_config",
        r"trl.trainer.utils has no get_config_model_id; trl_anatomy/trainers/\w+\.py imports it",
    ),
    "order changed": (
        "transformers",
        TRAINER,
        "self._save_rng_state(output_dir)",
        "self.state.save_to_json(output_dir); self._save_random(output_dir)",
        r"Trainer\._save_checkpoint no longer says 'self\._save_rng_state\('",
    ),
    "base class renamed": (
        "transformers",
        "transformers/models/auto/auto_factory.py",
        "def from_config(",
        "def of_config(",
        "has no AutoModelForCausalLM.from_config",
    ),
    "adapter's property renamed": (
        "peft",
        "peft/tuners/tuners_utils.py",
        "def disable_adapters(",
        "def adapters_off(",
        "has no BaseTunerLayer.disable_adapters",
    ),
    "registry renamed": (
        "sae_lens",
        "sae_lens/registry.py",
        "SAE_TRAINING_CLASS_REGISTRY",
        "TRAINING_CLASSES",
        "has no SAE_TRAINING_CLASS_REGISTRY",
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_is_found(canary: ModuleType, name: str) -> None:
    package, file, old, new, said = MOVES[name]
    text = (SITE / file).read_text()
    assert old in text
    changed: dict[str, str | None] = {file: None if new is None else text.replace(old, new)}
    found = moved(canary, package, changed)
    assert len(found) >= 1
    assert any(re.search(said, sentence) for sentence in found), found
    assert all(s.startswith(f"{PROJECTS[package]} {version(PROJECTS[package])}: ") for s in found)


def test_a_rename_with_its_old_name_kept_is_no_move(canary: ModuleType) -> None:
    text = (SITE / DPO).read_text().replace("class DPOTrainer(", "class NewTrainer(") + "\nDPOTrainer = NewTrainer\n"
    assert moved(canary, "trl", {DPO: text}) == []


def test_only_the_newest_of_each_minor_is_read(canary: ModuleType) -> None:
    assert canary.newest_of_minors(["1.9.1", "1.10.0rc1", "1.9.2", "1.10.0", "1.16.0.dev0"]) == ["1.9.2", "1.10.0"]
    assert canary.admits(">=1.9,<1.17", (1, 16, 3))
    assert not canary.admits(">=1.9,<1.17", (1, 17))
    assert not canary.admits(">=1.9,<1.17", (1, 8, 9))
    for project in PROJECTS.values():
        assert canary.admits(canary.version_range(project), release_of(version(project)))


def test_our_files_that_rest_on_a_place_are_there() -> None:
    assert not [seam for seam in SEAMS if not (ROOT / seam.ours).is_file()]


def test_each_release_has_one_of_two_seams_that_replace_each_other() -> None:
    for border in (FUSED_HEAD, SHARED_PREFIX):
        new = [seam for seam in SEAMS if seam.since == border]
        old = [seam for seam in SEAMS if seam.before == border]
        assert new
        assert old
        assert {seam.name for seam in old} <= {seam.name for seam in new}
    names = [(seam.name, seam.says) for seam in seams_of("trl", "1.9.2")]
    assert len(names) == len(set(names))


def test_an_old_trl_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_anatomy.versions.version", lambda _: "1.8.0")
    with pytest.raises(
        AnatomyError, match=r"trl 1\.8\.0 is installed, whose .*compute_ref_log_probs takes no model: install trl"
    ):
        check_trl()


def test_a_trl_that_moved_a_place_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import DPOTrainer

    check_trl()

    def other(self: Any, model: Any, batch: Any) -> None: ...

    monkeypatch.setattr("trl_anatomy.versions.version", lambda _: "1.99.0")  # not read before by this process
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", other)
    with pytest.raises(
        AnatomyError, match=r"trl 1\.99\.0 is installed, in which .*compute_ref_log_probs no longer takes inputs"
    ):
        check_trl()
