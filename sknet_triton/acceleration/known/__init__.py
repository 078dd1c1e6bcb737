"""The structures of published modules, one file for a kind. The formulas are those of the papers.

A file holds no code of the packages it names, and needs none of them installed.
"""

from sknet_triton.acceleration.known.fusion import MIRNET_SKFF, SK_FUSION
from sknet_triton.acceleration.known.ports import PORTS
from sknet_triton.acceleration.known.reweighting import CYCLE_MLP, VISION_PERMUTATOR
from sknet_triton.acceleration.known.simclr import SIMCLR
from sknet_triton.acceleration.known.split_attention import SPLIT_ATTENTION, SPLIT_ATTENTION_RADIX_1
from sknet_triton.acceleration.known.timm import TIMM

KNOWN = (
    TIMM,
    PORTS,
    SPLIT_ATTENTION,
    SPLIT_ATTENTION_RADIX_1,
    MIRNET_SKFF,
    SK_FUSION,
    SIMCLR,
    CYCLE_MLP,
    VISION_PERMUTATOR,
)
