"""The objective of an autoencoder and its adversary against separate losses; codebook, metrics, cost."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from common.training.optim import Recipe
from diffusion.autoencoder import Autoencoder
from diffusion.codebook import CodebookUsage, add_counts, usage
from diffusion.discriminator import PatchDiscriminator, adaptive_weight
from diffusion.objective import Adversary, Objective, Players, Pull, step_cost, weight_gradient
from diffusion.vqgan import AutoencoderTraining

NET = {"channels": 2, "codebook_size": 16, "base": 8, "groups": 4, "multipliers": (1, 2), "res_blocks": 1,
       "attention": "none"}  # fmt: skip


def players(kind: str = "vq", channels: int = 1) -> Players:
    torch.manual_seed(0)
    net = Autoencoder(kind, image_channels=channels, **NET)
    if kind == "vq":
        nn.init.normal_(net.model.quantize.embedding.weight)  # spread as trained codes are
    return Players(net, PatchDiscriminator(channels, (16, 16), width=8, layers=1), None)


def pictures(number: int = 4, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(number, channels, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# The objective

PLAYING = Adversary(weight=0.8, start=10, warmup=5, width=8, layers=1)
NOISE = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_each_player_gets_the_gradient_of_its_own_losses_alone(kind):
    net, discriminator, _ = parts = players(kind)
    images = pictures()
    objective = Objective(PLAYING, codebook_weight=0.5, kl_weight=1e-2)
    loss, terms, _ = objective(parts, images, NOISE, step=10)
    found = gradients(loss, net), gradients(loss, discriminator)

    out = net(images, NOISE)
    l1 = (out.images - images).abs().mean()
    regular = 0.5 * out.codebook_loss if kind == "vq" else 1e-2 * out.kl.mean() / (16 * 16)
    adversarial = -discriminator(out.images).mean()
    last = net.model.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (l1, adversarial)]
    weight = (norms[0] / (norms[1] + 1e-4)).item()
    ours = l1 + regular + 0.8 * weight * adversarial
    real, fake = discriminator(images), discriminator(out.images.detach())
    theirs = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())

    torch.testing.assert_close(found[0], gradients(ours, net))
    torch.testing.assert_close(found[1], gradients(theirs, discriminator))
    torch.testing.assert_close(loss, ours + theirs)
    expected = {"l1": l1, "codebook" if kind == "vq" else "kl": out.codebook_loss if kind == "vq" else out.kl.mean(),
                "adversarial": adversarial, "discriminator": theirs, "logits_real": real.mean(),
                "logits_fake": fake.mean(), "adaptive_weight": torch.tensor(weight)}  # fmt: skip
    assert terms.keys() == expected.keys() and not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(terms, {name: value.detach() for name, value in expected.items()})


@pytest.mark.parametrize("step, learns, felt", [(4, False, False), (5, True, False), (9, True, False),
                                                (10, True, True)])  # fmt: skip
def test_the_discriminator_learns_before_it_is_felt(step, learns, felt):
    parts = players()
    loss, terms, _ = Objective(PLAYING)(parts, pictures(), None, step)
    assert ("discriminator" in terms, "adversarial" in terms) == (learns, felt)
    if not felt:
        without, _, _ = Objective(Adversary(weight=0))(parts._replace(discriminator=None), pictures(), None, step)
        torch.testing.assert_close(gradients(loss, parts.net), gradients(without, parts.net))


def test_the_gradient_of_the_adaptive_weight_is_fp32_under_autocast():
    """Equal to float64's where torch's own backward is off by the rounding of bf16."""
    conv, inputs = nn.Conv2d(8, 3, 3, padding=1), torch.randn(4, 8, 16, 16).bfloat16()
    target = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = conv(inputs).float()
    loss = (output - target).square().mean()
    exact = copy.deepcopy(conv).double()
    (at_output,) = torch.autograd.grad(loss, output, retain_graph=True)
    (expected,) = torch.autograd.grad(exact(inputs.double()), exact.weight, at_output.double())
    torch.testing.assert_close(weight_gradient(at_output, conv, inputs), expected.float(), rtol=1e-4, atol=1e-7)
    (rounded,) = torch.autograd.grad(loss, conv.weight)
    assert ((rounded - expected).norm() / expected.norm()).item() > 1e-4


def test_the_adaptive_weight_is_fp32_under_autocast(monkeypatch):
    seen = []
    monkeypatch.setattr("diffusion.objective.weight_gradient",
                        lambda *given: seen.append(given) or weight_gradient(*given))
    with torch.autocast("cpu", torch.bfloat16):
        terms = Objective(PLAYING)(players(), pictures(), None, 10)[1]
    exact = []
    for at_output, conv, inputs in seen:
        twin = copy.deepcopy(conv).double()
        exact += torch.autograd.grad(twin(inputs.detach().double()), twin.weight, at_output.double())
    weight = terms["adaptive_weight"]
    assert len(exact) == 2 and 0 < weight < 1e4 and weight.dtype == torch.float32
    torch.testing.assert_close(weight, adaptive_weight(*exact).float(), rtol=1e-4, atol=0)


def test_the_adaptive_weight_is_that_of_the_mean_gradient_over_ranks():
    images = pictures(8)
    parts = players()._replace(discriminator=PatchDiscriminator(1, (16, 16), width=16, layers=1, norm="group"))
    objective, seen = Objective(PLAYING), []
    whole = objective(parts, images, None, 10, lambda x: seen.append(x) or x)[1]["adaptive_weight"]
    halves = []
    for half in images.chunk(2):
        objective(parts, half, None, 10, lambda x: halves.append(x) or x)
    torch.testing.assert_close(torch.stack(halves).mean(0), seen[0], rtol=1e-4, atol=1e-7)
    for half in images.chunk(2):
        shared = objective(parts, half, None, 10, lambda _: torch.stack(halves).mean(0))[1]["adaptive_weight"]
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_micro_batches_add_up_to_the_whole_batch(kind):
    parts = players(kind)._replace(discriminator=PatchDiscriminator(1, (16, 16), width=16, layers=1, norm="group"))
    objective, images, noise = Objective(PLAYING), pictures(6), NOISE.repeat(2, 1, 1, 1)[:6]
    both = nn.ModuleList(parts[:2])
    loss, terms, _ = objective(parts, images, noise, 10)
    expected, weight = [loss.detach(), *gradients(loss, both)], terms["adaptive_weight"]

    earlier, found, logged, asked = Pull(), [], [], []
    for place, pair in enumerate(zip(images.chunk(3), noise.chunk(3), strict=True)):
        loss, terms, _ = objective(parts, *pair, 10, lambda x: asked.append(x) or x, earlier, more=place < 2)
        found.append((loss.detach(), *gradients(loss, both)))
        logged.append(terms.get("adaptive_weight"))
    assert logged[:2] == [None, None] and len(asked) == 1  # ranks talk once a step
    torch.testing.assert_close(logged[2], weight, rtol=1e-4, atol=0)
    for values, reference in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(values) / 3, reference, rtol=1e-4, atol=1e-6)


def test_the_perceptual_distance_is_weighed_into_the_reconstruction():
    judge = nn.Module()
    judge.forward = lambda one, other: (one - other).square().mean(dim=(1, 2, 3))
    parts = players()._replace(discriminator=None, perceptual=judge)
    images = pictures()
    loss, terms, out = Objective(Adversary(weight=0), perceptual_weight=3.0)(parts, images, None, 0)
    square = (out.images - images).square().mean()
    torch.testing.assert_close(terms["perceptual"], square.detach())
    torch.testing.assert_close(loss, (out.images - images).abs().mean() + 3 * square + out.codebook_loss)


# Cost


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_the_cost_is_that_of_a_real_step(kind):
    """FLOPs by torch's counter of the autoencoder and of each loss by itself; bytes as autograd keeps them."""
    objective = Objective(Adversary(weight=0.8, start=0, width=8, layers=1))
    cost = step_cost(objective, lambda: players(kind), 1, (16, 16))
    parts, images = players(kind), pictures(2)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        parts.net(images, NOISE[:2])
    kept: dict[int, Tensor] = {}
    with saved_tensors_hooks(lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x):
        loss, _, _ = objective(parts, images, NOISE[:2], 0)
    with FlopCounterMode(display=False) as training:
        loss, _, _ = objective(parts, images, NOISE[:2], 0)
        loss.backward()
    weights = {p.data_ptr() for part in parts[:2] for p in part.parameters()}
    kept_bytes = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights)
    assert cost.forward_flops == forward.get_total_flops() // 2 > 0
    assert cost.training_flops == training.get_total_flops() // 2 > 3 * cost.forward_flops
    assert cost.saved_bytes == pytest.approx(kept_bytes / 2, rel=0.01)


# The codebook


def test_usage_by_hand():
    counts = add_counts(torch.zeros(5, dtype=torch.int64), torch.tensor([[0, 1], [1, 3]]))
    assert counts.tolist() == [1, 2, 0, 1, 0]
    found = usage(counts)
    assert found["codebook_usage"].item() == pytest.approx(3 / 5)
    assert found["codebook_perplexity"].item() == pytest.approx(4 ** (1 / 4) * 2 ** (1 / 2) * 4 ** (1 / 4))
    assert usage(torch.full((7,), 3))["codebook_perplexity"].item() == pytest.approx(7)
    assert usage(torch.zeros(7, dtype=torch.int64))["codebook_usage"].item() == 0


def test_the_usage_of_an_evaluation_is_that_of_all_its_batches():
    indices = torch.randint(16, (6, 8, 8), generator=torch.Generator().manual_seed(0)) // 2
    metric = CodebookUsage(16)
    for part in indices.split([4, 2]):
        metric.update(part)
    shares = np.bincount(indices.flatten().numpy(), minlength=16) / indices.numel()
    entropy = -sum(share * math.log(share) for share in shares if share)
    found = metric.compute()
    assert found["codebook_perplexity"].item() == pytest.approx(math.exp(entropy))
    assert found["codebook_usage"].item() == pytest.approx((shares > 0).mean())


# Evaluation


@pytest.mark.parametrize("kind, channels", [("vq", 3), ("kl", 1)])
def test_metrics_are_means_over_images_by_scikit_image(kind, channels):
    module = AutoencoderTraining(Recipe(lr=1e-3), perceptual="none", kind=kind)
    module.net = net = players(kind, channels).net
    with torch.no_grad():  # a poor decoder leaves [-1, 1]: what is compared is what would be seen
        net.model.decoder.conv_out.weight.mul_(4)
    scores = module.metrics(SimpleNamespace(image_size=(16, 16)))
    images = pictures(5, channels)
    for part in images.split([3, 2]):
        with torch.no_grad():
            module.evaluate(net, {"image": part}, scores)
    found = {name: value.item() for name, value in scores.compute().items()}
    with torch.no_grad():
        out = net(images)
    assert out.images.abs().max() > 1
    originals, copies = ((x.permute(0, 2, 3, 1).double().numpy().clip(-1, 1) + 1) / 2 for x in (images, out.images))
    pairs = list(zip(originals, copies, strict=True))
    expected = {
        "l1": (out.images - images).abs().mean().item(),
        "psnr": np.mean([peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]),
        # scikit-image leaves out the border of half a window; torchmetrics mirrors the image there and counts it.
        "ssim": np.mean([structural_similarity(*(np.pad(x, ((5, 5), (5, 5), (0, 0)), mode="reflect") for x in pair),
                                               data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                               use_sample_covariance=False) for pair in pairs]),
    }  # fmt: skip
    expected["loss"] = expected["l1"]
    if kind == "kl":
        expected["kl"] = out.kl.mean().item()
    else:
        expected["codebook_usage"] = len(out.indices.unique()) / 16
        assert 1 < found.pop("codebook_perplexity") <= 16
    assert found == pytest.approx(expected, rel=1e-4)
    for shown, truth in zip(module.shown, (originals, copies), strict=True):
        assert np.abs(shown.permute(0, 2, 3, 1).numpy() - 255 * truth[:3]).max() <= 0.501


def test_similarity_is_measured_in_fp32_under_bf16():
    """Of a smooth bright image, whose variance is the small difference of two large numbers."""
    module = AutoencoderTraining(Recipe(lr=1e-3), perceptual="none", kind="kl")
    module.net = players("kl", 3).net
    scores = module.metrics(SimpleNamespace(image_size=(32, 32)))
    images = torch.linspace(0.6, 0.7, 32).expand(2, 3, 32, 32)
    perfect = SimpleNamespace(images=images, indices=None, kl=torch.zeros(2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        module.evaluate(lambda _: perfect, {"image": images}, scores)
    assert scores["ssim"].compute().item() == pytest.approx(1, abs=1e-4)


def test_the_posterior_is_drawn_anew_in_every_step():
    module = AutoencoderTraining(Recipe(lr=1e-3), perceptual="none", kind="kl")
    module.net = players("kl", 3).net
    batch = {"image": torch.zeros(6, 3, 16, 16), "place": torch.arange(6)}
    drawn = []
    for step in (0, 1):
        module.trainer = SimpleNamespace(seed=0, global_step=step)
        drawn.append(module._noise(batch))
    rows = torch.stack(drawn).flatten(2).flatten(0, 1)
    assert (rows.corrcoef() - torch.eye(12)).abs().max() < 0.6 and (rows.std() - 1).abs() < 0.1
    assert drawn[0].shape == module.net.moments(batch["image"]).chunk(2, dim=1)[0].shape
