"""The families that `accelerate` knows: the built-in ones and the user's own."""

from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.known import KNOWN

_registered: dict[str, Family] = {}


def families() -> tuple[Family, ...]:
    """Returns the families in the order that they are tried: the user's own come first."""
    return (*reversed(_registered.values()), *KNOWN)


def register_family(family: Family) -> None:
    """Makes `accelerate` recognise a structure of your own.

    Raises:
        TypeError: ``family`` is not a `Family`.
        ValueError: a family of that name is known already.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family: expected a Family, got {type(family).__name__}")
    if any(family.name == known.name for known in families()):
        raise ValueError(f"family: the name {family.name!r} is taken; unregister_family frees it")
    _registered[family.name] = family


def unregister_family(name: str) -> None:
    """Forgets a family of the user's own; modules that were swapped stay so.

    Raises:
        ValueError: none of that name was registered.
    """
    if name not in _registered:
        raise ValueError(f"name: expected one of {sorted(_registered)}, got {name!r}")
    del _registered[name]
