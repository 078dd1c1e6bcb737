"""A kernel launch as data, so that it can be run, or compiled for another machine."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        programs: number of programs; the grid has one axis, whose limit is 2**31 - 1.
        arguments: pointers, strides and sizes by name.
        constants: the ``tl.constexpr`` arguments by name.
        num_warps: warps a program.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int

    def run(self, device: torch.device) -> None:
        """Runs the kernel on ``device``, which need not be the current one."""
        if self.programs == 0:
            return
        with _current(device):
            self.kernel[(self.programs,)](
                **self.arguments, **self.constants, num_warps=self.num_warps
            )


def _current(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context
