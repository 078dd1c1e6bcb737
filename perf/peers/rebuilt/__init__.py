"""Selective-kernel modules of other packages, rebuilt from their formulas by our own hand.

Names of classes, children and attributes are theirs, since modules are recognised by structure and
checkpoints by key. Each computes in the plainest way, as the originals do: stack, multiply, sum.
They are what `perf` measures as "before", and what the tests accelerate.
"""

from perf.peers.rebuilt.fusion import SKFF, SKFusion
from perf.peers.rebuilt.ports import SKConv, SKConvHeads
from perf.peers.rebuilt.pytorchcv import SKConvBlock
from perf.peers.rebuilt.simclr import SimCLRSelectiveKernel
from perf.peers.rebuilt.spatial_mlp import CycleMLP, WeightedPermuteMLP
from perf.peers.rebuilt.split_attention import SplitAttn
from perf.peers.rebuilt.stacked import weighted
from perf.peers.rebuilt.timm import SelectiveKernel

__all__ = [
    "SKFF",
    "CycleMLP",
    "SKConv",
    "SKConvBlock",
    "SKConvHeads",
    "SKFusion",
    "SelectiveKernel",
    "SimCLRSelectiveKernel",
    "SplitAttn",
    "WeightedPermuteMLP",
    "weighted",
]
