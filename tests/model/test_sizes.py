import pytest

from common.errors import InputError
from common.model import SIZES, Size, resolve_size


def test_the_table():
    assert SIZES["tiny"] == (192, 12, 3)
    assert SIZES["small"] == (384, 12, 6)
    assert SIZES["base"] == (768, 12, 12)
    assert SIZES["large"] == (1024, 24, 16)
    assert SIZES["xlarge"] == (1152, 28, 16)
    assert all(size.width % size.heads == 0 for size in SIZES.values())


def test_overrides_replace_one_number_each():
    assert resolve_size("tiny") == SIZES["tiny"]
    assert resolve_size("tiny", depth=2) == Size(192, 2, 3)
    assert resolve_size("nano", width=96, depth=6, heads=4) == Size(96, 6, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": "huge"}, "size='huge'.*nano, tiny, small, base, large, xlarge"),
        ({"size": "tiny", "heads": 5}, "heads=5 does not divide width=192.*4 and 6"),
        ({"size": "tiny", "depth": 0}, "depth=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        resolve_size(**arguments)
