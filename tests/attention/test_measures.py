"""Attention distance and offset against closed values and plain loops."""

import math

import pytest
import torch

from common.attention.measures import AttentionMeasures


def measured(maps: torch.Tensor, grid: tuple[int, int], prefix: int):
    measures = AttentionMeasures(grid, prefix)
    measures.update(0, maps)
    return measures.compute()


@pytest.mark.parametrize("side, expected", [(14, (0.5201, 0.5601, 0, 0.4112)), (28, (0.5211, 0.5404, 0, 0.3966))])
@pytest.mark.parametrize("prefix", [0, 1])
def test_uniform_attention_has_the_values_in_closed_form(side: int, expected: tuple, prefix: int) -> None:
    tokens = prefix + side**2
    found = measured(torch.full((2, 3, tokens, tokens), 1 / tokens), (side, side), prefix)
    for values, value in zip(found, expected, strict=True):
        assert values.shape == (1, 3)
        assert values.numpy() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("grid, prefix", [((4, 4), 0), ((3, 5), 1), ((6, 2), 1)])
def test_random_attention_agrees_with_loops(grid: tuple[int, int], prefix: int) -> None:
    """The offset by the published recipe: every map is moved so that its query lies in the middle of a canvas, the
    maps are averaged there, and the centre of the average is taken.
    """
    rows, columns = grid
    n = rows * columns
    maps = torch.rand(2, 2, prefix + n, prefix + n, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = measured(maps, grid, prefix)
    side = max(grid)
    for head in range(2):
        distances, canvas, displacements = [], torch.zeros(2 * rows - 1, 2 * columns - 1), []
        for image in range(2):
            inner = maps[image, head, prefix:, prefix:]
            for query in range(n):
                weights = inner[query] / inner[query].sum()
                r, c = divmod(query, columns)
                steps = [(key // columns - r, key % columns - c) for key in range(n)]
                distances.append(sum(float(w) * math.hypot(*s) for w, s in zip(weights, steps, strict=True)))
                mean = [sum(float(w) * s[axis] for w, s in zip(weights, steps, strict=True)) for axis in (0, 1)]
                displacements.append(math.hypot(*mean))
                for weight, (down, right) in zip(weights, steps, strict=True):
                    canvas[rows - 1 + down, columns - 1 + right] += weight
        distance = sum(distances) / len(distances)
        canvas /= canvas.sum()
        down = float((canvas.sum(1) * (torch.arange(2 * rows - 1) - (rows - 1))).sum())
        right = float((canvas.sum(0) * (torch.arange(2 * columns - 1) - (columns - 1))).sum())
        expected = (distance / side, distance / (side - 1), math.hypot(down, right) / (side - 1),
                    sum(displacements) / len(displacements) / (side - 1))  # fmt: skip
        assert [float(values[0, head]) for values in found] == pytest.approx(expected, rel=1e-4)


def test_batches_and_layers_add_up() -> None:
    maps = torch.rand(5, 2, 10, 10, generator=torch.Generator().manual_seed(1)).softmax(-1)
    whole, parts = AttentionMeasures((3, 3), 1), AttentionMeasures((3, 3), 1)
    for layer in (0, 1):
        whole.update(layer, maps.roll(layer, 0))
        for part in maps.roll(layer, 0).split(2):
            parts.update(layer, part)
    for one, other in zip(whole.compute(), parts.compute(), strict=True):
        assert one.shape == (2, 2)
        torch.testing.assert_close(one, other)
