"""Samplers against a distribution whose noise is known in closed form, and their independence of the batch."""

import pytest
import torch
from diffusers import DDIMScheduler

from common.errors import InputError
from diffusion import sampling
from diffusion.dit import DiT
from diffusion.process import GaussianDiffusion
from diffusion.samples import Sampling
from diffusion.sampling import Sampler, ddim, labels_of

SOLVERS = ("ddpm", "ddim", "dpm++")


class Points(torch.nn.Module):
    """Knows the noise exactly where all data of a class are one point: its label in every pixel."""

    channels, input_size, tokens, classes = 2, (3, 4), 12, 5

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


def test_ddpm_adds_new_noise_in_every_step(monkeypatch):
    added, p_sample = [], GaussianDiffusion.p_sample

    def watched(process, output, x, t, noise):
        added.append(noise)
        return p_sample(process, output, x, t, noise)

    monkeypatch.setattr(GaussianDiffusion, "p_sample", watched)
    numbers = torch.arange(80)
    sampler = Sampler(GaussianDiffusion(), "ddpm", 10)
    sampler(Points(), numbers, torch.zeros(80, dtype=torch.long))
    rows = torch.stack([noise.flatten() for noise in [sampler.noise("sample", numbers, (2, 3, 4)), *added]])
    assert len(rows) == 1 + 10 and rows.mean(1).abs().max() < 0.1 and (rows.std(1) - 1).abs().max() < 0.1
    assert (rows.corrcoef() - torch.eye(11)).abs().max() < 0.1


class Normal(torch.nn.Module):
    """Knows the noise exactly where all data are normal numbers of this mean and deviation."""

    channels, input_size, tokens, classes, mean, std = 1, (50, 50), 2500, 0, 0.5, 0.1

    def forward(self, x, t, y):
        kept = GaussianDiffusion().alphas_cumprod[t][:, None, None, None].float()
        variance = kept * self.std**2 + 1 - kept
        return (1 - kept).sqrt() * (x - kept.sqrt() * self.mean) / variance


@pytest.mark.parametrize("steps", [3, 64, 600])
def test_ddim_takes_the_net_at_the_noise_that_is_there(steps):
    """Noise of deviation 1 is narrowed alike in every pixel, by the product of what its steps narrow it, by hand."""
    samples = Sampler(GaussianDiffusion(), "ddim", steps)(Normal(), torch.arange(8), None)
    kept = GaussianDiffusion().alphas_cumprod[torch.linspace(0, 999, steps, dtype=torch.float64).round().long()]
    a, b = kept.sqrt(), (1 - kept).sqrt()
    narrowed = 1.0
    for i in reversed(range(steps)):
        variance = a[i] ** 2 * Normal.std**2 + b[i] ** 2
        noise, data = b[i] / variance, (1 - b[i] ** 2 / variance) / a[i]  # per unit of what is left of the noise
        narrowed *= data if i == 0 else a[i - 1] * data + b[i - 1] * noise
    assert samples.std().item() == pytest.approx(float(narrowed), rel=0.03)
    assert samples.mean().item() == pytest.approx(Normal.mean, abs=0.01)


def test_ddim_is_that_of_diffusers_own_spacing_where_its_timesteps_are_evenly_spaced():
    """With trailing ones, of a number of steps that divides 1000, it steps to the timestep that it visits next."""
    scheduler = DDIMScheduler(trained_betas=GaussianDiffusion().betas.numpy(), timestep_spacing="trailing",
                              clip_sample=False)  # fmt: skip
    scheduler.set_timesteps(20)
    visited = scheduler.timesteps.flip(0)
    kept = GaussianDiffusion().alphas_cumprod[visited]
    process = GaussianDiffusion(1 - kept / torch.cat([kept.new_ones(1), kept[:-1]]), visited)
    steps = ddim(process)
    assert process.timesteps[steps.timesteps].tolist() == scheduler.timesteps.tolist()
    ours = theirs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for step, timestep in zip(steps.timesteps.tolist(), scheduler.timesteps, strict=True):
        noise = (ours * 0.9 + 0.05 * step).sin()
        ours = steps.step(noise, step, ours).prev_sample
        theirs = scheduler.step(noise, timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def dit() -> DiT:
    torch.manual_seed(1)
    net = DiT(4, patch_size=2, channels=2, classes=3, width=16, depth=2, heads=2).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("solver, steps, bf16", [
    *((solver, 12, False) for solver in SOLVERS), ("ddpm", 250, False), ("ddpm", 250, True), ("ddim", 50, True),
])  # fmt: skip
def test_a_sample_is_a_function_of_its_number(solver, steps, bf16, monkeypatch):
    net, sampler = dit(), Sampler(GaussianDiffusion(), solver, steps, guidance=1.5)
    monkeypatch.setattr(sampling, "PIECE", 8 * net.tokens)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together = []
    net.register_forward_pre_hook(lambda _, given: together.append(len(given[0])))
    labels = torch.arange(40) % 3
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        whole = sampler(net, torch.arange(40), labels)
        assert together[::steps] == [32, 32, 16]  # both predictions of each piece
        # Kernels may round otherwise for other numbers of rows: by the last bits of what they compute in.
        margin = {"atol": 2e-2 * whole.std().item(), "rtol": 0} if bf16 else {"atol": 1e-4, "rtol": 1e-4}
        for numbers in ([6, 2], [0, 1, 5], [3], [39, 16]):
            alone = sampler(net, torch.tensor(numbers), labels[numbers])
            torch.testing.assert_close(alone, whole[numbers], **margin)
        assert (whole[0] - whole[3]).abs().max() > 0.1  # the same class, another number
        other = Sampler(GaussianDiffusion(), solver, steps, guidance=1.5, seed=1)(net, torch.arange(7), labels[:7])
    assert (other - whole[:7]).abs().amax(dim=(1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_step_of_every_piece_is_a_sign_of_life(solver, monkeypatch):
    net, shares = dit(), []
    monkeypatch.setattr(sampling, "PIECE", 16 * net.tokens)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    Sampler(GaussianDiffusion(), solver, 4)(net, torch.arange(40), torch.arange(40) % 3, shares.append)
    assert shares == pytest.approx([step / 12 for step in range(1, 13)])


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
