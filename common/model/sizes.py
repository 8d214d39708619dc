"""The one table of model sizes, read by every study."""

from typing import NamedTuple

from common.errors import InputError


class Size(NamedTuple):
    """Width of a token, number of blocks, attention heads per block. The MLP is four times as wide as a token."""

    width: int
    depth: int
    heads: int


SIZES = {
    "nano": Size(48, 4, 3),  # ours: trains on embedded data in a minute on one CPU core
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "xlarge": Size(1152, 28, 16),  # DiT-XL (Peebles and Xie 2023, table 1)
}


def resolve_size(
    size: str, width: int | None = None, depth: int | None = None, heads: int | None = None
) -> Size:
    """Look `size` up in the table and let every number that is given override it.

    Raises:
        InputError: an unknown size, a number below one, or heads that do not divide the width.
    """
    if size not in SIZES:
        raise InputError(f"model.size={size!r} is not known; choose one of {', '.join(SIZES)}")
    overrides = {"width": width, "depth": depth, "heads": heads}
    for key, value in overrides.items():
        if value is not None and value < 1:
            raise InputError(f"model.{key}={value} must be at least 1")
    resolved = SIZES[size]._replace(**{key: value for key, value in overrides.items() if value is not None})
    if resolved.width % resolved.heads:
        nearest = nearest_divisors(resolved.heads, resolved.width)
        raise InputError(f"model.heads={resolved.heads} does not divide width={resolved.width}; "
                         f"nearest that do: {nearest}")
    return resolved


def nearest_divisors(value: int, number: int) -> str:
    """The divisors of `number` next to `value` on either side, in words for a message: "4 and 8"."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < value][-1:]
    above = [divisor for divisor in divisors if divisor > value][:1]
    return " and ".join(str(divisor) for divisor in below + above)
