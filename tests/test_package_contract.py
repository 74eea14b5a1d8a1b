"""The places where this package reaches into transformers, peft and sae-lens. A failure names the seam that moved.

TRL's are in `test_trl_contract.py`.
"""

import types
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from typing import Generic, TypeVar

import pytest

from trl_anatomy.upstream import Seam, seams_of
from trl_anatomy.versions import place_of, why_moved

INSTALLED = [
    (name, version(project)) for name, project in (("transformers",) * 2, ("peft",) * 2, ("sae_lens", "sae-lens"))
]


@pytest.mark.parametrize(
    "seam",
    [seam for package, found in INSTALLED for seam in seams_of(package, found)],
    ids=lambda seam: f"{seam.name} {seam.says}",
)
def test_seams_are_where_they_were(seam: Seam) -> None:
    assert why_moved(seam, place_of(seam, import_module(seam.name.partition(":")[0]))) == ""


def test_a_moved_seam_is_named() -> None:
    module = import_module("transformers.trainer")
    step = Seam("transformers.trainer:Trainer.no_such_step", "ours.py")
    with pytest.raises(AttributeError, match="no_such_step"):
        place_of(step, module)
    step = replace(step, name="transformers.trainer:Trainer.training_step", takes=("model", "rows"))
    assert why_moved(step, place_of(step, module)) == "transformers.trainer:Trainer.training_step no longer takes rows"
    step = replace(step, takes=("model", "inputs"), exactly=True)
    assert "takes self, model, inputs, num_items_in_batch" in why_moved(step, place_of(step, module))
    step = replace(step, takes=None, says=("backward(", "self.no_such_line()"))
    assert "no longer says 'self.no_such_line()'" in why_moved(step, place_of(step, module))


def test_models_are_loaded_whole_though_zero3_is_on() -> None:
    """transformers asks `is_deepspeed_zero3_enabled`; afterwards it hears what it heard before."""
    from transformers.integrations import deepspeed as glue

    from trl_anatomy.trainers.zero import loaded_whole

    class Settings:
        def is_zero3(self) -> bool:
            return True

    with loaded_whole():
        pass
    assert not glue.is_deepspeed_zero3_enabled()
    settings = Settings()  # transformers holds it weakly
    glue.set_hf_deepspeed_config(settings)
    try:
        with loaded_whole():
            assert not glue.is_deepspeed_zero3_enabled()
        assert glue.is_deepspeed_zero3_enabled()
    finally:
        glue.unset_hf_deepspeed_config()


def test_what_zero_init_leaves_behind_is_undone() -> None:
    from torch import nn

    from trl_anatomy.trainers.zero import undo_leftover

    of = TypeVar("of")
    undo_leftover()  # finds nothing
    nn.Module.__init_subclass__ = nn.Module.__init_subclass__  # how `deepspeed.zero.Init` ends
    try:
        with pytest.raises(AttributeError, match="__parameters__"):
            types.new_class("Broken", (nn.Module, Generic[of]))[int]
    finally:
        undo_leftover()
    assert "__init_subclass__" not in vars(nn.Module)
    assert types.new_class("Whole", (nn.Module, Generic[of])).__parameters__ == (of,)
