"""How many kernels a training compiles whose image sizes and batches change."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

from perf.static.specialisations import LAYOUTS, NETWORK_STAGES, Setting, kernel_name
from sknet_kernels.config import DeviceFacts, cdiv
from sknet_kernels.launch import Launch

H100 = DeviceFacts(multiprocessors=132, warp_size=32)
SQUARES = tuple((size, size) for size in range(224, 513, 6))
BATCHES = (2, 3, 4, 5)
RECTANGLES = tuple((224 + 32 * i, 256 + 40 * j) for i in range(5) for j in range(6))
MOST = {"channels_last": 60, "contiguous": 120}


def shapes() -> Iterator[tuple[int, int, int]]:
    """Yields B, C and S of the network's stages for every image and batch."""
    images = [(B, *size) for size in SQUARES for B in BATCHES]
    images += [(BATCHES[i % 4], *size) for i, size in enumerate(RECTANGLES)]
    for B, height, width in images:
        for stage, (C, _) in enumerate(NETWORK_STAGES):
            yield B, C, cdiv(height, 4 << stage) * cdiv(width, 4 << stage)


def compile_key(launch: Launch) -> Any:
    """Returns what Triton compiles a kernel anew for, by its own specialisation of arguments."""
    kernel = launch.kernel
    plain = getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"] or ()
    specialised = [
        native_specialize_impl(BaseBackend, value, False, name not in plain, name not in plain)
        for name, value in launch.arguments.items()
    ]
    constants = tuple(map(str, launch.constants.values()))
    return kernel_name(launch), tuple(specialised), constants, tuple(launch.options.items())


def test_a_size_of_one_and_a_multiple_of_16_are_kernels_of_their_own() -> None:
    launch = Setting(2, "contiguous", torch.bfloat16, (2, 16, 64)).training(H100)[0]
    other = Setting(2, "contiguous", torch.bfloat16, (2, 16, 72)).training(H100)[0]
    again = Setting(2, "contiguous", torch.bfloat16, (3, 16, 64)).training(H100)[0]
    assert compile_key(launch) == compile_key(again)
    assert compile_key(launch) != compile_key(other)  # a stride of 64, a stride of 72


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_batches_that_change_compile_few_kernels(layout: str) -> None:
    keys = {
        compile_key(launch)
        for shape in set(shapes())
        for launch in Setting(2, layout, torch.bfloat16, shape).training(H100)
    }
    kernels = Counter(key[0] for key in keys)
    assert len(keys) <= MOST[layout], kernels
    assert len(kernels) == 10, kernels
