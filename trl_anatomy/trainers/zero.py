"""What DeepSpeed's ZeRO-3 does to a model before training: it is in parts, which only DeepSpeed's engine can run.

Scores are read from the whole start model on every process, before there is an engine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinMethodType

from torch import nn
from transformers.integrations import deepspeed as glue


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Under ZeRO-3 transformers loads a model in parts; in this scope whole.

    accelerate 1.15 has it do so whatever `zero3_init_flag` says.
    """
    held = glue._hf_deepspeed_config_weak_ref
    settings = None if held is None else held()
    glue.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            glue.set_hf_deepspeed_config(settings)


def in_parts(model: nn.Module) -> bool:
    """Whether the weights are sharded by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The whole weights of a model in parts, for the processes together: all of them must come here."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def undo_leftover() -> None:
    """Give `nn.Module` back its inherited `__init_subclass__`.

    `deepspeed.zero.Init` ends with one set on the class itself. It hides that of `Generic` from every class that comes
    later: sae-lens can no longer be imported.
    """
    if isinstance(vars(nn.Module).get("__init_subclass__"), BuiltinMethodType):
        del nn.Module.__init_subclass__
