import pytest
import torch
from torch import nn

from common.model import LinearTokens, patchify, unpatchify


def test_patches_are_row_major_and_ordered_row_column_channel():
    channels, height, width, patch = 3, 4, 6, 2
    images = torch.arange(2 * channels * height * width).reshape(2, channels, height, width)
    patches = patchify(images, patch)
    assert patches.shape == (2, 6, 12)
    for token in range(6):
        top, left = token // 3 * patch, token % 3 * patch
        expected = [
            images[1, c, top + row, left + column] for row in range(patch) for column in range(patch) for c in range(3)
        ]
        assert patches[1, token].tolist() == [int(value) for value in expected]


@pytest.mark.parametrize("patch, grid", [(1, (4, 6)), (2, (3, 5)), (3, (2, 1))])
def test_unpatchify_inverts_patchify(patch, grid):
    images = torch.randn(2, 5, grid[0] * patch, grid[1] * patch)
    assert torch.equal(unpatchify(patchify(images, patch), grid, patch), images)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_linear_tokens_load_a_convolution(patch):
    convolution = nn.Conv2d(3, 16, patch, patch)
    tokens = LinearTokens(patch, 3, 16)
    weights = {f"proj.{name}": value for name, value in convolution.state_dict().items()}
    tokens.load_state_dict(weights)
    assert weights["proj.weight"].ndim == 4, "the caller's own weights must stay as they were"
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(tokens(images), convolution(images).flatten(2).transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_a_convolution_of_another_shape_is_refused():
    tokens = LinearTokens(2, 4, 16)
    convolution = nn.Conv2d(1, 16, 4, 4)  # as many numbers, 16 a patch, but of another meaning
    with pytest.raises(RuntimeError, match="size mismatch for proj.weight"):
        tokens.load_state_dict({f"proj.{name}": value for name, value in convolution.state_dict().items()})
