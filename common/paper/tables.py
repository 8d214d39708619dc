"""python -m common.paper.tables designs | sizes: the paper's tables 1 and 2 in Markdown, read off the models.

`designs` asks untrained models which designs for locality they have: of every layer, how many places of its input an
output reads, and whether a shift of the input by one stride shifts the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from common.command import Parser, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from common.model.vit import VisionTransformer

SIZES = {"tiny": "T", "small": "S", "base": "B", "large": "L"}
TASKS = {"CIFAR-100 at 32x32": (32, 100), "ImageNet at 28x28": (28, 1000)}


# Table 2


def sizes() -> Iterator[str]:
    """A row a size; MLP width and parameters are those of models of the suite, class token and head included."""
    tasks = [(title, side, classes, patch) for title, (side, classes) in TASKS.items() for patch in (2, 1)]
    yield _row(["size", "layers", "width", "heads", "MLP", *(f"{title}, /{patch}" for title, _, _, patch in tasks)])
    yield _row(["---", *["---:"] * (4 + len(tasks))])
    for size, name in SIZES.items():
        models = [model(size, side, patch, classes) for _, side, classes, patch in tasks]
        one = models[0]
        yield _row([name, one.depth, one.width, one.heads, one.blocks[0].mlp.fc1.out_features,
                    *(f"{sum(p.numel() for p in each.parameters()) / 1e6:.2f} M" for each in models)])
    yield "\nThe paper's own numbers are unknown; these are the sizes that timm and DiT call so, and their parameters."


def model(size: str, side: int, patch: int, classes: int) -> VisionTransformer:
    """A model without numbers, for images of `side` pixels."""
    import torch

    from common.model.vit import VisionTransformer

    with torch.device("meta"):
        return VisionTransformer(side, patch, classes=classes, size=size)


# Table 1


class Layer(NamedTuple):
    """A function of maps (1, C, h, w), one input that it got, and by how many places of it a place of the output moves.
    """

    function: Callable[[Tensor], Tensor]
    input: Tensor
    stride: int

    def side(self) -> int:
        return self.function(self.input).shape[-1]

    def reads(self) -> tuple[int, int]:
        """Places of the input on which the output in the middle depends, of how many."""
        import torch

        given = self.input.detach().requires_grad_()
        output = self.function(given)
        middle = output[0, :, output.shape[2] // 2, output.shape[3] // 2]
        # Squares: what a LayerNorm returns sums to a constant, whose gradient is 0.
        gradient = torch.autograd.grad(middle.square().sum(), given)[0]
        return int((gradient[0].abs().sum(0) > 0).sum()), given.shape[2] * given.shape[3]

    def commutes(self) -> bool:
        """Whether a shift of the input by the stride shifts the output by one, apart from its borders."""
        import torch

        with torch.no_grad():
            shifted = self.function(self.input.roll(self.stride, -1))
            expected = self.function(self.input).roll(1, -1)
        side = expected.shape[-1]
        border = min(max(side // 4, 2), (side - 1) // 2)
        inner = slice(border, -border)
        return torch.allclose(shifted[..., inner], expected[..., inner], atol=1e-5)


class Design(NamedTuple):
    """What was measured of a model: sides of its feature maps, places that its first layer reads, layers that read more
    than one place and those of them that read a part, layers and those of them that commute with shifts.
    """

    sides: tuple[int, ...]
    first: int
    mixing: int
    local: int
    layers: int
    commuting: int

    @property
    def verdicts(self) -> tuple[str, str, str]:
        """Hierarchy, translation equivariance, locality."""
        return ("yes" if len(self.sides) > 1 else "no", _share(self.commuting, self.layers),
                _share(self.local, self.mixing))


def design(layers: list[Layer]) -> Design:
    """Of a model given as its layers, from the image on."""
    reads = [layer.reads() for layer in layers]
    mixing = [(some, all_) for some, all_ in reads if some > 1]
    return Design(tuple(dict.fromkeys(layer.side() for layer in layers)), reads[0][0], len(mixing),
                  sum(some < all_ for some, all_ in mixing), len(layers), sum(layer.commutes() for layer in layers))


def convnet(side: int = 224) -> list[Layer]:
    """The convolutions and the pooling of an untrained ResNet-18, each with what reaches it of one image of noise."""
    import timm
    import torch
    from torch import nn

    net = timm.create_model("resnet18").eval()
    layers: list[Layer] = []

    def collect(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        layers.append(Layer(module.forward, given[0], module.stride[0] if isinstance(module.stride, tuple)
                            else module.stride))

    hooks = [module.register_forward_hook(collect) for module in net.modules()
             if isinstance(module, nn.Conv2d | nn.MaxPool2d)]
    with torch.no_grad():
        net(torch.randn(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return layers


def transformer(side: int, patch: int) -> list[Layer]:
    """The projection, the addition of positions and the blocks of an untrained nano model, on maps of tokens."""
    import torch

    from common.model.vit import VisionTransformer

    net = VisionTransformer(side, patch, classes=0, size="nano", class_token=False, pool="avg").eval()
    cells = net.grid

    def on_maps(of_tokens: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda maps: of_tokens(maps.flatten(2).mT).mT.unflatten(2, cells)

    functions = [(lambda images: net.patch_embed(images).mT.unflatten(2, cells), patch),
                 (on_maps(lambda tokens: tokens + net.pos_embed), 1), *((on_maps(block), 1) for block in net.blocks)]
    layers, x = [], torch.randn(1, 3, side, side)
    with torch.no_grad():
        for function, stride in functions:
            layers.append(Layer(function, x, stride))
            x = function(x)
    return layers


def designs() -> Iterator[str]:
    """A row a model: the paper's three designs, and the numbers behind each."""
    import torch

    torch.manual_seed(0)
    yield _row(["model", "hierarchy", "sides of feature maps", "translation equivariance", "layers that shifts pass",
                "locality", "layers that read a part of the image", "pixels that the first layer reads"])
    yield _row(["---"] * 8)
    for name, layers in [("ResNet-18, 224x224", convnet()), ("ViT/16, 224x224", transformer(224, 16)),
                         ("ViT/1, 28x28", transformer(28, 1))]:
        found = design(layers)
        hierarchy, equivariance, locality = found.verdicts
        yield _row([name, hierarchy, ", ".join(map(str, found.sides)), equivariance,
                    f"{found.commuting} of {found.layers}", locality, f"{found.local} of {found.mixing}", found.first])
    yield ("\nMeasured on untrained models. Shifts pass every layer of a Transformer but the addition of positions; "
           "attention reads all places, and the projection of single pixels one: so nothing in ViT/1 is local.")


def _share(some: int, all_: int) -> str:
    return "yes" if some == all_ else "weakened" if some else "no"


def _row(cells: list) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: list[str]) -> int:
    parser = Parser("python -m common.paper.tables", __doc__)
    tables = {"designs": designs, "sizes": sizes}
    parser.add_argument("table", choices=tables)
    print("\n".join(tables[parser.parse_args(arguments).table]()))
    return 0


if __name__ == "__main__":
    run_command(main)
