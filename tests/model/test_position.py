import math

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from common.errors import InputError
from common.model import VisionTransformer, resample_position, sincos_position


def test_sincos_against_entries_worked_out_by_hand():
    grid, width = (3, 5), 16
    table = sincos_position(grid, width, prefix=1)
    assert table.shape == (1, 16, width)
    assert torch.equal(table[0, 0], torch.zeros(width))
    row, column = 2, 4
    frequencies = [1.0, 0.1, 0.01, 0.001]  # 10000^(-k / 4)
    expected = [
        function(position * frequency)
        for position in (column, row)
        for function in (math.sin, math.cos)
        for frequency in frequencies
    ]
    torch.testing.assert_close(table[0, 1 + row * 5 + column], torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_sincos_axes_do_not_mix_on_a_non_square_grid():
    table = sincos_position((3, 5), 32, prefix=0).reshape(3, 5, 32)
    assert torch.equal(table[..., :16], table[:1, :, :16].expand(3, 5, 16)), "first half: the column alone"
    assert torch.equal(table[..., 16:], table[:, :1, 16:].expand(3, 5, 16)), "second half: the row alone"
    assert len(table.reshape(15, 32).unique(dim=0)) == 15


def test_sincos_model_keeps_its_table_fixed_and_in_its_weights():
    model = VisionTransformer((4, 6), 2, classes=10, size="nano", position="sincos")
    assert "pos_embed" in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())
    assert torch.equal(model.pos_embed, sincos_position((2, 3), 48, prefix=1))


def test_sincos_refuses_a_width_that_does_not_split():
    with pytest.raises(InputError, match="width=42"):
        VisionTransformer(4, 2, width=42, heads=3, depth=1, position="sincos")


@pytest.mark.parametrize("new_grid", [(8, 8), (3, 7), (2, 2)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_resampling_equals_timm(new_grid, prefix):
    table = torch.randn(1, prefix + 4 * 6, 8)
    expected = resample_abs_pos_embed(table, list(new_grid), [4, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(resample_position(table, (4, 6), new_grid, prefix), expected)


def test_resampling_keeps_the_class_slot_and_goes_along_the_right_axis():
    ramp = torch.arange(6.0)[None, :, None].expand(4, 6, 2).reshape(1, 24, 2)  # rises along the columns
    table = torch.cat([torch.full((1, 1, 2), 9.0), ramp], dim=1)
    resampled = resample_position(table, (4, 6), (5, 12), prefix=1)
    assert torch.equal(resampled[0, 0], table[0, 0])
    plane = resampled[0, 1:].reshape(5, 12, 2)
    torch.testing.assert_close(plane, plane[:1].expand_as(plane))
    assert (plane[0].diff(dim=0) > 0).all()
