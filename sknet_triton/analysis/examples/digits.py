"""scikit-learn's handwritten digits, enlarged, in a small SKNet before and after brief training.

A digit of 8x8 pixels is drawn on 16x16 in the middle of 32x32, so that it fills the image at 2.0
and nothing of it is cut off. The network learns from digits of random sizes between 1.0 and 2.0,
as a network for photographs does from random crops; held-out digits are recorded.

So small a network, so briefly trained, does not show the paper's pattern: over the five seeds that
the project keeps, every unit's change from 1.0 to 2.0 has both signs.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sknet_triton.analysis.enlarge import enlarge
from sknet_triton.analysis.record import SCALES, record_sizes
from sknet_triton.models import SKNet, StageSpec

CLASSES = 10
EPOCHS = 4
DIGIT, MARGIN = 16, 8

_STAGES = (StageSpec(32, 2, stride=1), StageSpec(64, 2))
_BATCH = 64
# Images of one batch that share a size: batch norms are to see several sizes at once.
_SAME_SIZE = 8
_HELD_OUT = 0.2


def run(seed: int, epochs: int = EPOCHS) -> pd.DataFrame:
    """Records the held-out digits, untrained and trained, from one seed.

    Returns:
        The columns of `record_sizes` and before them ``network``, ``untrained`` or ``trained``,
        and ``accuracy``, that of the held-out digits at the row's scale.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    learn, held_out = load()
    torch.manual_seed(seed)
    net = SKNet(_STAGES, num_classes=CLASSES, in_chans=1, unit_options={"G": 8})
    untrained = _recorded(net, held_out, "untrained")
    _train(net, learn, epochs)
    return pd.concat([untrained, _recorded(net, held_out, "trained")], ignore_index=True)


def load() -> tuple[TensorDataset, TensorDataset]:
    """Returns what is learned from and what is held out: images [1, 32, 32] in [0, 1], labels."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'sknet-triton[analysis]'"
        ) from error
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.pad(F.interpolate(small, size=(DIGIT, DIGIT), mode="bilinear"), (MARGIN,) * 4)
    labels = torch.tensor(digits.target)
    learn, held_out = train_test_split(
        range(len(labels)), test_size=_HELD_OUT, random_state=0, stratify=digits.target
    )
    return TensorDataset(images[learn], labels[learn]), TensorDataset(
        images[held_out], labels[held_out]
    )


def _train(net: nn.Module, learn: TensorDataset, epochs: int) -> None:
    """AdamW with one cycle of the learning rate."""
    loader = DataLoader(learn, batch_size=_BATCH, shuffle=True, drop_last=True)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=1e-2, total_steps=epochs * len(loader)
    )
    net.train()
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(net(_of_random_sizes(images)), labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()


def _of_random_sizes(images: Tensor) -> Tensor:
    low, high = SCALES[0], SCALES[-1]
    parts = torch.split(images, _SAME_SIZE)
    return torch.cat([enlarge(part, float(torch.empty(()).uniform_(low, high))) for part in parts])


def _recorded(net: nn.Module, held_out: TensorDataset, network: str) -> pd.DataFrame:
    table = record_sizes(net, DataLoader(held_out, batch_size=_BATCH))
    accuracy = {scale: _accuracy(net, held_out, scale) for scale in SCALES}
    table.insert(0, "network", network)
    table.insert(1, "accuracy", table.scale.map(accuracy))
    return table


@torch.no_grad()
def _accuracy(net: nn.Module, held_out: TensorDataset, scale: float) -> float:
    images, labels = held_out.tensors
    net.eval()
    right: Tensor = net(enlarge(images, scale)).argmax(1) == labels
    return right.double().mean().item()
