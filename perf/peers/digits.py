"""The real-input workload: a small SKNet learns scikit-learn's handwritten digits (8x8 pixels).

Stratified 80/20 split, 1437 images to learn from and 360 held out.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sknet_triton import SKUnit

EPOCHS = 6


def digits_net(M: int) -> nn.Sequential:
    """Returns a stem, two selective-kernel units and a linear head: [B, 1, 8, 8] -> [B, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        SKUnit(32, 32, M=M, G=8),
        SKUnit(64, 64, stride=2, M=M, G=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@functools.cache
def load() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns what is learned from and what is held out.

    Each is images [N, 1, 8, 8], scaled to [0, 1], and their labels [N].
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    parts = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=data.target
    )
    learn, held_out = ((images[part], labels[part]) for part in parts)
    return learn, held_out


def train(
    net: Callable[[Tensor], Tensor],
    module: nn.Module,
    *,
    batch: int,
    seed: int,
    device: torch.device,
) -> tuple[list[float], float]:
    """Trains ``net``, which is ``module`` or its compiled form.

    AdamW with one cycle of the learning rate; the order of the images follows from ``seed``.

    Returns:
        Milliseconds of every step but the first, and the share of the held-out images that the
        module then names rightly.
    """
    (images, labels), held_out = ([x.to(device) for x in part] for part in load())
    generator = torch.Generator().manual_seed(seed)
    steps = len(labels) // batch
    optimiser = torch.optim.AdamW(module.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=1e-2, total_steps=EPOCHS * steps
    )
    module.train()
    step_ms = []
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator).to(device)
        for rows in torch.split(order[: steps * batch], batch):
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            loss.item()  # waits for the device, so that the clock sees the whole step
            step_ms.append(1e3 * (time.perf_counter() - start))
    with torch.no_grad():
        right: Tensor = module.eval()(held_out[0]).argmax(dim=1) == held_out[1]
    return step_ms[1:], right.double().mean().item()
