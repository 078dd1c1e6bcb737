"""Layers without state, whose ``forward`` replaces that of a user's layer.

`kernels` binds the forward to the user's module: a layer has no parameters, no constructor and no
attributes but the two flags, and its forward takes as many arguments as the one it replaces.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from sknet_triton.functional import sk_fuse, sk_select


class SKFuse(nn.Module):
    """Averages the sum of the branches over space: [B, C, *spatial] each, to [B, C]."""

    can_torch_compile = True
    has_backward = True

    def forward(self, branches: Sequence[Tensor]) -> Tensor:
        """Returns [B, C]; arguments and errors as in the function sk_fuse."""
        return sk_fuse(branches)


class SKSelect(nn.Module):
    """Weighs the branches by the softmax of logits [B, M, C] over M and adds them."""

    can_torch_compile = True
    has_backward = True

    def forward(self, branches: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Returns [B, C, *spatial]; arguments and errors as in the function sk_select."""
        return sk_select(branches, logits)
