"""What lies between SKConv's convolutions and V, running statistics too: SKConv on given maps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sknet_triton as skt
from perf.peers.baseline import with_plain_convs

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class _Given(nn.Module):
    """Stands for a convolution: whatever comes in, the same map goes out."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out


@dataclass(frozen=True)
class Section:
    """One module on given maps.

    Attributes:
        module: SKConv, or the plain module.
        maps: what the convolutions would return, M tensors [B, C, H, W] with a gradient.
    """

    module: nn.Module
    maps: list[Tensor]

    def infer(self) -> None:
        """Computes V in evaluation mode."""
        self.module.eval()
        with torch.no_grad():
            self.module(self.maps[0])

    def train(self, dout: Tensor) -> None:
        """Computes V, moves the running statistics and computes every gradient anew."""
        for leaf in (*self.maps, *self.module.parameters()):
            leaf.grad = None
        self.module.train()
        torch.autograd.backward(self.module(self.maps[0]), dout)


def sections(maps: list[Tensor]) -> tuple[Section, Section]:
    """Returns ours and the plain one, with the same parameters, on ``maps``."""
    C = maps[0].shape[1]
    ours = skt.SKConv(C, C, M=len(maps), G=1).to(maps[0].dtype)
    plain = with_plain_convs(ours)
    for module in (ours, plain):
        for branch, out in zip(module.get_submodule("branches").children(), maps, strict=True):
            branch.conv = _Given(out)
    return Section(ours, maps), Section(plain, maps)
