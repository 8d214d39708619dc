"""Tables 1 and 2 of the paper, as the models themselves tell them."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import layer_norm

from common.paper.tables import TASKS, Layer, convnet, design, main, sizes, transformer

TIMM = {"T": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_sizes_are_timm_s():
    header, _, *rows, _ = sizes()
    assert len(rows) == len(TIMM) and len(cells(header)) == 9
    for name, layers, width, heads, mlp, *counts in map(cells, rows):
        assert (int(width), int(layers), int(heads)) == TIMM[name] and int(mlp) == 4 * int(width)
        dim, depth, head = TIMM[name]
        expected = []
        for side, classes in TASKS.values():
            for patch in (2, 1):
                with torch.device("meta"):
                    net = VisionTransformer(side, patch, num_classes=classes, embed_dim=dim, depth=depth,
                                            num_heads=head)
                expected.append(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M")
        assert counts == expected


def test_designs_of_the_three_models():
    torch.manual_seed(0)
    conv, patches, pixels = design(convnet()), design(transformer(64, 16)), design(transformer(12, 1))
    assert (conv.sides, conv.first) == ((112, 56, 28, 14, 7), 7 * 7)
    assert conv.mixing == 18  # 17 convolutions of 3x3 and more, and the pooling; three of 1x1 mix nothing
    assert (patches.sides, patches.first, patches.mixing, patches.local) == ((4,), 256, 5, 1)
    assert (pixels.sides, pixels.first, pixels.mixing, pixels.local) == ((12,), 1, 4, 0)
    assert (patches.layers, patches.commuting) == (6, 5)  # on a grid of 4x4
    assert conv.verdicts == ("yes", "yes", "yes")
    assert pixels.verdicts == ("no", "weakened", "no")


def test_patches_are_weakened():
    torch.manual_seed(0)
    assert design(transformer(224, 16)).verdicts == ("no", "weakened", "weakened")
    assert design(transformer(24, 2)).first == 4


@pytest.mark.parametrize("function, reads, commutes", [
    (nn.Conv2d(2, 2, 3, padding=1), 9, True),
    (nn.Conv2d(2, 2, 1), 1, True),
    (lambda maps: maps + torch.linspace(0, 1, 12), 1, False),  # positions
    (lambda maps: maps + maps.mean((2, 3), keepdim=True), 144, True),
    (lambda maps: layer_norm(maps.mT, (12,)).mT, 12, True),  # over a column
])
def test_what_a_layer_reads_and_whether_it_commutes(function, reads, commutes):
    torch.manual_seed(0)
    layer = Layer(function, torch.randn(1, 2, 12, 12), 1)
    assert layer.reads() == (reads, 144) and layer.commutes() is commutes


def test_it_prints_markdown(capsys):
    assert main(["sizes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| size | layers |") and lines[1].startswith("| --- | ---: |")
