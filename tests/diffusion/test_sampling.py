"""Samplers against a distribution whose noise is known in closed form, and their independence of the batch."""

import pytest
import torch

from common.errors import InputError
from diffusion.dit import DiT
from diffusion.process import GaussianDiffusion
from diffusion.samples import Sampling
from diffusion.sampling import Sampler, labels_of

SOLVERS = ("ddpm", "ddim", "dpm++")


class Points(torch.nn.Module):
    """Knows the noise exactly where all data of a class are one point: its label in every pixel."""

    channels, input_size, classes = 2, (3, 4), 5

    def __init__(self) -> None:
        super().__init__()
        self.kept = GaussianDiffusion().alphas_cumprod
        self.calls: list[int] = []

    def point(self, y: torch.Tensor) -> torch.Tensor:
        return (y.float() / 4 - 0.5)[:, None, None, None]

    def forward(self, x, t, y):
        self.calls.append(int(t[0]))
        kept = self.kept[t].float()[:, None, None, None]
        noise = (x - kept.sqrt() * self.point(y)) / (1 - kept).sqrt()
        return torch.cat([noise, torch.full_like(noise, -1)], dim=1)  # -1: the posterior's variance

    def forward_with_guidance(self, x, t, y, scale, channels):
        raise AssertionError("guidance 1 must cost one forward")


@pytest.mark.parametrize("steps", [10, 250])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_point_of_each_class_is_found(solver, steps):
    net, labels = Points(), torch.tensor([0, 3, 1])
    samples = Sampler(GaussianDiffusion(), solver, steps)(net, torch.arange(3), labels)
    assert samples.shape == (3, 2, 3, 4) and samples.dtype == torch.float32
    torch.testing.assert_close(samples, net.point(labels).expand_as(samples), atol=1e-3, rtol=0)
    assert len(net.calls) == steps and net.calls == sorted(net.calls, reverse=True)
    assert net.calls[0] == 999


def test_ddpm_visits_the_steps_of_adm():
    net = Points()
    Sampler(GaussianDiffusion(), "ddpm", 250)(net, torch.arange(1), torch.tensor([0]))
    assert net.calls[:4] == [999, 995, 991, 987] and net.calls[-2:] == [4, 0]


def dit() -> DiT:
    torch.manual_seed(1)
    net = DiT(4, patch_size=2, channels=2, classes=3, width=16, depth=2, heads=2).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_is_a_function_of_its_number(solver):
    net, sampler = dit(), Sampler(GaussianDiffusion(), solver, 12, guidance=1.5)
    labels = torch.arange(40) % 3
    whole = sampler(net, torch.arange(40), labels)  # in pieces, and some more
    for numbers in ([6, 2], [0, 1, 5], [3], [39, 16]):
        alone = sampler(net, torch.tensor(numbers), labels[numbers])
        torch.testing.assert_close(alone, whole[numbers], atol=1e-4, rtol=1e-4)
    assert (whole[0] - whole[3]).abs().max() > 0.1  # the same class, another number
    other = Sampler(GaussianDiffusion(), solver, 12, guidance=1.5, seed=1)(net, torch.arange(7), labels[:7])
    assert (other - whole[:7]).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_guidance_is_what_the_net_makes_of_it():
    net, labels = dit(), torch.tensor([1, 2])
    seen = []
    plain = net.forward_with_guidance
    net.forward_with_guidance = lambda *arguments: seen.append(arguments[3:]) or plain(*arguments)
    guided = Sampler(GaussianDiffusion(), "ddim", 5, guidance=4.0, guidance_channels=2)(net, torch.arange(2), labels)
    assert seen == [(4.0, 2)] * 5
    free = Sampler(GaussianDiffusion(), "ddim", 5)(net, torch.arange(2), labels)
    assert (guided - free).abs().max() > 0.01


def test_labels_are_uniform_over_the_classes_that_were_asked_for():
    labels = labels_of(torch.arange(3000), [2, 5, 7], seed=0)
    assert set(labels.tolist()) == {2, 5, 7}
    assert all(900 < (labels == label).sum() < 1100 for label in (2, 5, 7))
    assert torch.equal(labels_of(torch.tensor([17]), [2, 5, 7], seed=0), labels[17:18])
    assert not torch.equal(labels_of(torch.arange(3000), [2, 5, 7], seed=1), labels)


def test_less_than_no_guidance_is_refused():
    with pytest.raises(InputError, match="model.predict.guidance: 0.5 is below 1"):
        Sampling(guidance=0.5)
