"""What the operators share: their namespace, and what none of them has."""

from torch.autograd import forward_ad

NAMESPACE = "sknet_triton"


def refuse_forward_mode(name: str) -> None:
    """Refuses where PyTorch would give tangents of zero, having no rule for a custom operator.

    `sknet_triton.functional` does not come here in forward mode; who calls an operator does.

    Raises:
        NotImplementedError: a level of forward-mode differentiation is entered.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} has no forward-mode derivative; "
            "the functions of sknet_triton.functional under use_backend('reference') have"
        )
