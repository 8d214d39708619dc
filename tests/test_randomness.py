"""Draws are a function of what they are drawn for, and look random."""

import random
import zlib

import numpy as np
import pytest
import torch
from scipy import stats

from common.randomness import hashed, normal, permutation, seeded, seeded_each, uniform

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def finaliser(x: int) -> int:
    """splitmix64's, on Python's unbounded integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def reference(stream: str, *keys: int) -> int:
    state = zlib.crc32(stream.encode())
    for key in keys:
        state = finaliser((state + GOLDEN & WORD) ^ finaliser(key + GOLDEN & WORD))
    return state


def test_the_reference_is_splitmix64():
    # The first outputs of the published generator from the seed 0.
    assert [finaliser(GOLDEN * n & WORD) for n in (1, 2, 3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # fmt: skip


@pytest.mark.parametrize("keys", [(), (0,), (1, 2), (2**63 - 1,), (-1, -(2**63)), (12345678901234567, 3, 0)])
def test_hashes_equal_big_integers(keys):
    for made in ([], [0], [1], range(len(keys))):  # numbers, tensors, and some of each
        mixed = [torch.tensor(key) if place in made else key for place, key in enumerate(keys)]
        assert int(hashed("order", *mixed)) & WORD == reference("order", *keys)


def test_draws_are_the_splitmix64_sequence_from_the_hash():
    state = reference("mixup", 7, 3)
    expected = [(finaliser(state + GOLDEN * k & WORD) >> 40) / 2**24 for k in range(1, 6)]
    assert uniform("mixup", 7, 3, n=5).tolist() == expected


def test_an_element_does_not_depend_on_its_batch():
    places = torch.tensor([9, 0, 4_000_000_000, 3])
    batch = uniform("a", 1, places, n=3)
    for place, row in zip(places.tolist(), batch, strict=True):
        assert torch.equal(uniform("a", 1, place, n=3), row)
    assert torch.equal(uniform("a", 1, places[:, None], torch.arange(2), n=3)[2, 1], uniform("a", 1, places[2], 1, n=3))
    assert torch.equal(uniform("a", 1, places, n=7)[:, :3], batch)  # more draws leave the first as they were


def test_streams_keys_and_their_order_matter():
    draws = [uniform("a", 1, 2, n=4), uniform("b", 1, 2, n=4), uniform("a", 2, 1, n=4), uniform("a", 1, 2, 0, n=4),
             uniform("a", 0, 2, n=4), uniform("a", 1, n=4)]  # fmt: skip
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


@pytest.mark.parametrize("keys", [(torch.arange(50_000),), (0, 5, torch.arange(50_000)), (torch.arange(50_000), 1)])
def test_draws_are_uniform_and_independent(keys):
    draws = uniform("noise", *keys, n=2).double().numpy()
    assert draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        assert stats.chisquare(np.histogram(column, 1024, (0, 1))[0]).pvalue > 1e-3
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 4 / 50_000**0.5  # neighbouring keys
    assert abs(np.corrcoef(draws.T)[0, 1]) < 4 / 50_000**0.5  # draws of one key


def test_neighbouring_streams_and_steps_are_uncorrelated():
    places = torch.arange(50_000)
    columns = [uniform(stream, 0, step, places, n=1)[:, 0] for stream in ("mask", "noise") for step in (0, 1)]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(4)
    assert correlation.abs().max() < 4.5 / 50_000**0.5


def test_each_bit_of_a_hash_is_fair():
    bits = hashed("bits", torch.arange(20_000))[:, None] >> torch.arange(64) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 4.5 * 0.5 / 20_000**0.5


def test_normal_draws_are_normal_and_independent():
    draws = normal("noise", 0, torch.arange(20_000), n=5)
    assert draws.shape == (20_000, 5) and draws.dtype == torch.float32
    for column in draws.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    for moments in (draws, draws.square()):  # a pair of Box and Muller shares its radius
        correlation = torch.corrcoef(moments.T) - torch.eye(5)
        assert correlation.abs().max() < 4.5 / 20_000**0.5


def test_normal_draws_depend_on_their_keys_alone():
    whole = normal("noise", 3, torch.arange(10), n=7)
    assert torch.equal(normal("noise", 3, torch.tensor([9, 4]), n=7), whole[[9, 4]])
    assert torch.equal(normal("noise", 3, torch.arange(10), n=6), whole[:, :6])
    assert not (normal("noise", 4, torch.arange(10), n=7) == whole).any()


def test_permutations():
    first, second, other_seed = (permutation("order", *keys, n=1000) for keys in [(0, 0), (0, 1), (1, 0)])
    assert first.sort().values.tolist() == list(range(1000))
    assert first.tolist() != second.tolist() and first.tolist() != other_seed.tolist()
    assert torch.equal(first, permutation("order", 0, 0, n=1000))
    # Where element 0 goes is uniform over the places.
    places = [permutation("order", 0, epoch, n=8).tolist().index(0) for epoch in range(1600)]
    assert stats.chisquare(np.bincount(places, minlength=8)).pvalue > 1e-3


def test_draws_follow_the_device_and_the_shape_of_the_keys():
    draws = uniform("a", 0, torch.zeros(3, dtype=torch.int32, device="meta"), 5, n=2)
    assert draws.device.type == "meta" and draws.shape == (3, 2) and draws.dtype == torch.float32
    assert uniform("a", n=2).shape == (2,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_are_the_same_on_a_gpu():
    places = torch.arange(1000)
    assert torch.equal(uniform("a", 1, places.cuda(), 2, n=4).cpu(), uniform("a", 1, places, 2, n=4))


def global_draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_seeding_for_each_of_many_is_seeding_for_one_after_the_other():
    random.seed(1)
    before = random.getstate()
    epochs, indices = torch.tensor([2, 2, 3]), torch.tensor([7, 8, 7])
    each = {number: global_draws() for number in seeded_each("rand_augment", 5, epochs, indices)}
    assert random.getstate() == before
    for number, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
        with seeded("rand_augment", 5, epoch, index):
            assert global_draws() == each[number]
    assert len(each) == 3 and each[0] != each[1] != each[2]


def test_seeded_library_code_leaves_the_global_generators_alone():
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(1)
    undisturbed = global_draws()
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(1)
    with pytest.raises(RuntimeError, match="within"):
        with seeded("mixup", 0, 3):
            inside = global_draws()
            with seeded("init", 0):
                nested = global_draws()
            continued = global_draws()
            raise RuntimeError("within")
    assert global_draws() == undisturbed
    with seeded("mixup", 0, 3):
        assert global_draws() == inside and global_draws() == continued
    with seeded("mixup", 0, 4):
        assert global_draws() != inside
    assert all(a != b for a, b in zip(inside, nested, strict=True))
