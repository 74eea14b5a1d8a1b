"""Work divided over the processes that torchrun or accelerate started."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import AnatomyError

_T = TypeVar("_T")
# A process may wait for the statistics of another: waiting is never an error, a process that dies ends all of them.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of one launch. `Ranks()` is a process on its own.

    Attributes:
        index: number of this process, from 0.
        size: processes.
    """

    index: int = 0
    size: int = 1
    _group: Any = None

    @classmethod
    def current(cls) -> "Ranks":
        """The processes of this launch; they all have to call this together.

        They talk through a group of their own, over the CPU, with a timeout that no statistics reach.
        """
        import torch.distributed as dist

        started = dist.is_available() and dist.is_initialized()
        if not started and int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        # It starts the group on the right device; its own count of processes is 1 on some machines without a GPU.
        PartialState(**({} if started else {"timeout": _PATIENCE}))
        if not dist.is_initialized() or dist.get_world_size() < 2:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def main(self) -> bool:
        """Whether this process does what only one may do."""
        return self.index == 0

    def together(self, work: Callable[[], _T]) -> list[_T]:
        """Do `work` in every process, wait for all, and give the results of all in order of rank.

        Raises:
            AnatomyError: in every process, if the work of any raised it.
        """
        try:
            mine: tuple[Any, str | None] = (work(), None)
        except AnatomyError as error:
            if self.size == 1:
                raise
            mine = (None, str(error))
        if self.size == 1:
            return [mine[0]]
        import torch.distributed as dist

        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, mine, group=self._group)
        for _, failure in every:
            if failure is not None:
                raise AnatomyError(failure)
        return [result for result, _ in every]

    def in_main(self, work: Callable[[], _T]) -> _T | None:
        """Do `work` in the main process while the others wait; they get what it returns, pickled between them."""
        return self.together(lambda: work() if self.main else None)[0]


def is_main_process() -> bool:
    """Whether this process is the main one of its launch, or on its own."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
