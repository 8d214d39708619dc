"""Random numbers as a function of what they are drawn for.

A stream name and integer keys (seed, epoch, dataset index, optimiser step, place in the global batch) determine every
draw; the order of calls, the rank and the worker do not. So a run can stop anywhere and go on elsewhere, exactly.
The mixing function is splitmix64 (Steele et al. 2014), on int64 tensors whose products wrap, and on Python's numbers.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number, like the two factors below
_MASK = 2**64 - 1
_FACTORS = ((30, -4658895280553007687), (27, -7723592293110705685))


# In place on what they make themselves, since a step's draws are mixed with every batch.


def _shift(x: Tensor, bits: int, width: int = 64) -> Tensor:
    """`width` bits of x from the bit of this number on; logical, where int64 shifts carry the sign."""
    return (x >> bits).bitwise_and_((1 << min(width, 64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    for bits, factor in _FACTORS:
        x = _shift(x, bits).bitwise_xor_(x).mul_(factor)
    return _shift(x, 31).bitwise_xor_(x)


def _mix_number(x: int) -> int:
    """The same of a key that all elements share, without the twenty tensors that it would take."""
    x &= _MASK
    for bits, factor in _FACTORS:
        x = (x >> bits ^ x) * factor & _MASK
    x ^= x >> 31
    return x - (x >> 63 << 64)  # signed, as in a tensor


def _draws(bits: Tensor, n: int) -> Tensor:
    """`n` times 64 further random bits for each element: (..., n)."""
    return _mix(bits[..., None] + _GOLDEN * torch.arange(1, n + 1, device=bits.device))


def _unit(bits: Tensor, first: int) -> Tensor:
    """24 of the bits as a number in [0, 1)."""
    return _shift(bits, first, 24).float().mul_(2.0**-24)


def hashed(stream: str, *keys: int | Tensor) -> Tensor:
    """64 random bits for each element of the broadcast `keys`."""
    state: int | Tensor = zlib.crc32(stream.encode())
    for key in keys:
        if isinstance(key, Tensor):
            mixed, state = _mix(key.long() + _GOLDEN), torch.as_tensor(state)
        else:
            mixed = _mix_number(int(key) + _GOLDEN)
        state = state + _GOLDEN ^ mixed
        state = _mix(state) if isinstance(state, Tensor) else _mix_number(state)
    return torch.as_tensor(state)


def uniform(stream: str, *keys: int | Tensor, n: int) -> Tensor:
    """`n` uniform draws in [0, 1) for each element of the broadcast keys: shape (..., n), float32 of 24 bits."""
    return _unit(_draws(hashed(stream, *keys), n), 40)


def normal(stream: str, *keys: int | Tensor, n: int) -> Tensor:
    """`n` standard normal draws for each element of the broadcast keys: shape (..., n), float32, at most 5.8.

    By Box and Muller (1958): 64 bits make a pair.
    """
    bits = _draws(hashed(stream, *keys), (n + 1) // 2)
    radius, angle = (1 - _unit(bits, 40)).log_().mul_(-2).sqrt_(), _unit(bits, 16).mul_(2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(-2)[..., :n]


def permutation(stream: str, *keys: int, n: int) -> Tensor:
    """A random order of range(n)."""
    return hashed(stream, *keys, torch.arange(n)).argsort(stable=True)


@contextmanager
def seeded(stream: str, *keys: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's (CPU) global generators, seeded for the block and restored after it.

    For library code that draws from them (timm's Mixup and RandAugment, the initialisation of weights).
    """
    with closing(seeded_each(stream, *keys)) as once:
        next(once)
        yield


def seeded_each(stream: str, *keys: int | Tensor) -> Iterator[int]:
    """Seeds them for one element of the broadcast keys after the other, and yields its number.

    A loop over it costs a third of as many blocks of `seeded`. Closing it restores the generators, as its end does.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        for number, bits in enumerate(hashed(stream, *keys).flatten().tolist()):
            seed = bits & 0xFFFFFFFF
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield number
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
