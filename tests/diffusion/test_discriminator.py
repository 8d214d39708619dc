"""The discriminator against torch's functions and hand-computed values, its losses and the adaptive weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from diffusion.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss


def discriminator(**options) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(**{"channels": 3, "image_size": (32, 32), "width": 8, **options})


def test_the_published_one_has_30x30_logits_and_as_many_parameters():
    net = PatchDiscriminator(3, (256, 256))
    assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    # 4x4 kernels; a bias where no norm follows, two vectors where one does.
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1)
    assert sum(p.numel() for p in net.parameters()) == kernels + (64 + 1) + 2 * (128 + 256 + 512)
    assert not list(net.buffers())


def test_a_logit_sees_70x70_pixels():
    net = discriminator(image_size=(128, 128))
    for i, module in enumerate(net.main):
        if isinstance(module, nn.BatchNorm2d):  # through its statistics a logit sees everything
            net.main[i] = nn.Identity()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = net(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows, columns = images.grad[0].abs().sum(0).nonzero().unbind(1)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (70, 70)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("layers, strides, widths", [(1, [2, 1, 1], [16, 32]), (3, [2, 2, 2, 1, 1], [16, 32, 64, 128])])
def test_it_is_what_torchs_functions_compute(norm, layers, strides, widths):
    net = discriminator(width=16, layers=layers, norm=norm)
    images = torch.randn(4, 3, 32, 32)
    convolutions = [m for m in net.main if isinstance(m, nn.Conv2d)]
    norms = [m for m in net.main if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert [m.out_channels for m in convolutions] == [*widths, 1]
    x = images
    for i, (conv, stride) in enumerate(zip(convolutions, strides, strict=True)):
        x = F.conv2d(x, conv.weight, conv.bias, stride, padding=1)
        if 0 < i < len(strides) - 1:
            weight, bias = norms[i - 1].weight, norms[i - 1].bias
            x = F.batch_norm(x, None, None, weight, bias, training=True) if norm == "batch" else \
                F.group_norm(x, x.shape[1] // 16, weight, bias)  # fmt: skip
        if i < len(strides) - 1:
            x = F.leaky_relu(x, 0.2)
    torch.testing.assert_close(net(images), x)


def test_group_norm_judges_each_image_by_itself():
    images = torch.randn(4, 3, 32, 32)
    alone, together = (discriminator(norm="group")(part)[:1] for part in (images[:1], images))
    torch.testing.assert_close(alone, together)
    alone, together = (discriminator(norm="batch")(part)[:1] for part in (images[:1], images))
    assert (alone - together).abs().max() > 0.01


@pytest.mark.parametrize("layers, smallest", [(1, 6), (2, 12), (3, 24)])
def test_images_that_are_too_small_are_refused(layers, smallest):
    net = discriminator(image_size=(smallest, 40), layers=layers, norm="group")
    assert net(torch.zeros(1, 3, smallest, 40)).shape[2] == 1
    with pytest.raises(InputError, match=f"adversary.layers: {layers} need images of {smallest}x{smallest} pixels at "
                                         f"least, not 40x{smallest - 1}"):  # fmt: skip
        discriminator(image_size=(40, smallest - 1), layers=layers)


def test_it_starts_as_published_and_runs_in_fp32():
    net = discriminator(width=64)
    weights = torch.cat([m.weight.flatten() for m in net.main if isinstance(m, nn.Conv2d)])
    assert weights.mean().abs() < 1e-4 and weights.std().item() == pytest.approx(0.02, rel=0.01)
    scales = torch.cat([m.weight for m in net.main if isinstance(m, nn.BatchNorm2d)])
    assert scales.mean().item() == pytest.approx(1, abs=0.01) and scales.std().item() == pytest.approx(0.02, rel=0.1)
    images = torch.randn(2, 3, 32, 32)
    plain = net(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(images.bfloat16().float()), net(images.bfloat16()))
        assert torch.equal(net(images), plain)


def test_hinge_loss_by_hand():
    # Hinges 1 - 2 < 0 and 1 - 0 of the real ones, 1 - 2 < 0 and 1 + 0.5 of the others.
    real, fake = torch.tensor([2.0, 0.0], requires_grad=True), torch.tensor([-2.0, 0.5], requires_grad=True)
    loss = hinge_loss(real, fake)
    assert loss.item() == pytest.approx(0.5 * (0.5 + 0.75))
    loss.backward()
    assert real.grad.tolist() == [0, -0.25] and fake.grad.tolist() == [0, 0.25]


def test_adaptive_weight_by_hand():
    reconstruction = torch.tensor([[3.0], [4.0]], requires_grad=True)
    weight = adaptive_weight(reconstruction, torch.tensor([[6.0], [8.0]]))
    assert weight.item() == pytest.approx(5 / (10 + 1e-4), rel=1e-6) and not weight.requires_grad
    assert adaptive_weight(reconstruction, torch.zeros(2, 1)).item() == 1e4  # 5e4 before it is clamped
