"""The real-input workload: a small SKNet learns scikit-learn's handwritten digits (8x8 pixels).

Stratified 80/20 split, 1437 images to learn from and 360 held out.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sknet_triton import SKUnit

EPOCHS = 6
CLASSES = 10


class DigitsNet(nn.Module):
    """A stem, two selective-kernel units and a linear head, for images [B, 1, 8, 8]."""

    def __init__(self, M: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.units = nn.Sequential(SKUnit(32, 32, M=M, G=8), SKUnit(64, 64, stride=2, M=M, G=8))
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits [B, 10]."""
        logits: Tensor = self.head(self.units(self.stem(x)).mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8], scaled to [0, 1], and their labels [N]."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Digits":
        """Returns the data on ``device``."""
        return Digits(self.images.to(device), self.labels.to(device))


@functools.cache
def load() -> tuple[Digits, Digits]:
    """Returns what is learned from and what is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    learn, held_out = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=data.target
    )
    return Digits(images[learn], labels[learn]), Digits(images[held_out], labels[held_out])


@dataclass(frozen=True)
class Training:
    """Milliseconds of every training step, the first left out, and the held-out accuracy."""

    step_ms: list[float]
    accuracy: float


def train(
    net: Callable[[Tensor], Tensor],
    parameters: nn.Module,
    *,
    batch: int,
    seed: int,
    device: torch.device,
    epochs: int = EPOCHS,
) -> Training:
    """Trains ``net``, which computes with ``parameters`` and may be its compiled form.

    AdamW with one cycle of the learning rate; the order of the images follows from ``seed``.
    """
    learn, held_out = (part.to(device) for part in load())
    generator = torch.Generator().manual_seed(seed)
    steps = len(learn.labels) // batch
    optimiser = torch.optim.AdamW(parameters.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=1e-2, total_steps=epochs * steps
    )
    parameters.train()
    step_ms = []
    for _ in range(epochs):
        order = torch.randperm(len(learn.labels), generator=generator).to(device)
        for rows in torch.split(order[: steps * batch], batch):
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(net(learn.images[rows]), learn.labels[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            loss.item()  # waits for the device, so that the clock sees the whole step
            step_ms.append(1e3 * (time.perf_counter() - start))
    return Training(step_ms[1:], accuracy(parameters, held_out))


@torch.no_grad()
def accuracy(net: nn.Module, digits: Digits) -> float:
    """Returns the share of ``digits`` that ``net`` names rightly, in evaluation mode."""
    net.eval()
    right: Tensor = net(digits.images).argmax(dim=1) == digits.labels
    return right.double().mean().item()
