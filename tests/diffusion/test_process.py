"""The diffusion process against closed forms in fp64, torch.distributions and diffusers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from common.errors import InputError
from diffusion import GaussianDiffusion
from diffusion.process import discretised_log_likelihood, normal_divergence

BETAS = np.linspace(1e-4, 0.02, 1000)
KEPT = np.cumprod(1 - BETAS)  # the share of the data's variance in x_t
T = torch.tensor([0, 1, 2, 250, 998, 999])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise and an output of 3 channels and 3 levels for each of the steps in T."""
    return normal(6, 3, 4, 5), normal(6, 3, 4, 5, seed=1), normal(6, 6, 4, 5, seed=2)


def close(actual: Tensor, expected: np.ndarray, error: float = 1e-5) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected).float(), atol=error, rtol=error)


def fp64(images: Tensor) -> np.ndarray:
    return images.double().numpy()


def posterior(x0: np.ndarray, x_t: np.ndarray, t: int) -> tuple[np.ndarray, float]:
    """Mean and variance of x_{t-1} by Bayes' rule: its prior given x0 times the likelihood of x_t."""
    if t == 0:
        return x0, 0.0
    prior, likelihood = 1 / (1 - KEPT[t - 1]), (1 - BETAS[t]) / BETAS[t]
    variance = 1 / (prior + likelihood)
    return variance * (prior * KEPT[t - 1] ** 0.5 * x0 + likelihood * x_t / (1 - BETAS[t]) ** 0.5), variance


def least_variance(t: int) -> float:
    return posterior(np.zeros(1), np.zeros(1), max(t, 1))[1]


# Forward


def test_the_schedule_is_linear():
    process = GaussianDiffusion()
    assert process.steps == 1000 and process.timesteps.tolist() == list(range(1000))
    torch.testing.assert_close(process.betas, torch.tensor(BETAS), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.alphas_cumprod, torch.tensor(KEPT), rtol=1e-12, atol=0)
    assert process.alphas_cumprod[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


def test_noise_is_added_and_taken_away():
    process, (x0, noise, _) = GaussianDiffusion(), batch()
    x_t, kept = process.q_sample(x0, T, noise), KEPT[T][:, None, None, None]
    close(x_t, kept**0.5 * fp64(x0) + (1 - kept) ** 0.5 * fp64(noise))
    # At t = 999 the data are 1/157 of the noise.
    torch.testing.assert_close(process.predict_x0(x_t, T, noise), x0, atol=1e-4, rtol=0)


def test_the_noise_of_many_steps_is_that_of_each_step_after_the_other():
    betas = torch.tensor([0.1, 0.2, 0.5])
    process, x = GaussianDiffusion(betas), normal(1, 1, 200, 500)
    for beta, seed in zip(betas, (1, 2, 3), strict=True):
        x = (1 - beta).sqrt() * x + beta.sqrt() * normal(*x.shape, seed=seed)
    x0 = normal(1, 1, 200, 500)
    at_once = process.q_sample(x0, torch.tensor([2]), normal(*x.shape, seed=4))
    for sample in (x, at_once):
        assert (sample * x0).mean() == pytest.approx(0.6, abs=0.01) and sample.var() == pytest.approx(1, abs=0.02)


def test_the_posterior_is_that_of_bayes():
    process, (x0, x_t, _) = GaussianDiffusion(), batch()
    mean, log_variance = process.q_posterior(x0, x_t, T)
    for index, t in enumerate(T.tolist()):
        close(mean[index], posterior(fp64(x0[index]), fp64(x_t[index]), t)[0])
    assert log_variance.shape == (6, 1, 1, 1)
    close(log_variance.flatten(), np.log([least_variance(t) for t in T.tolist()]))


# Reverse


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0, 2.0, None])
def test_the_predicted_step_back(level):
    process, (_, x_t, output) = GaussianDiffusion(), batch()
    output = output[:, :3] if level is None else torch.cat([output[:, :3], torch.full((6, 3, 4, 5), level)], dim=1)
    mean, log_variance = process.p_mean_variance(output, x_t, T)
    level = 1.0 if level is None else level
    for index, t in enumerate(T.tolist()):
        noisy, noise = fp64(x_t[index]), fp64(output[index, :3])
        x0 = (noisy - (1 - KEPT[t]) ** 0.5 * noise) / KEPT[t] ** 0.5
        close(mean[index], posterior(x0, noisy, t)[0], 1e-4)
        expected = math.log(least_variance(t)) * (1 - level) / 2 + math.log(BETAS[t]) * (1 + level) / 2
        assert log_variance[index].flatten().tolist() == pytest.approx([expected] * 60, rel=1e-5)


@pytest.mark.parametrize("steps", [None, 250, 10])
def test_a_step_back_is_that_of_diffusers(steps):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="linear", variance_type="learned_range", clip_sample=False,
                              timestep_spacing="linspace")  # fmt: skip
    process = GaussianDiffusion()
    if steps:
        scheduler.set_timesteps(steps)
        process = process.respaced(steps)
    _, x_t, output = batch()
    for place in (0, 1, process.steps // 2, process.steps - 1):
        t, noise = process.timesteps[place], normal(6, 3, 4, 5, seed=place)
        ours = process.p_sample(output, x_t, torch.full((6,), place), noise)
        theirs = scheduler.step(output, t.item(), x_t, torch.Generator().manual_seed(place)).prev_sample
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)  # their constants are computed in fp32
        diffused = process.q_sample(x_t, torch.full((6,), place), noise)
        torch.testing.assert_close(diffused, scheduler.add_noise(x_t, noise, t[None]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1000, 250])
def test_the_best_prediction_brings_noise_back_to_the_data(steps):
    """Of normal data the best prediction of the noise is known: 64 x 64 pixels of mean 0.5 and deviation 0.3."""
    process = GaussianDiffusion().respaced(steps)
    x = normal(1, 1, 64, 64)
    for place in reversed(range(process.steps)):
        kept = KEPT[process.timesteps[place]]
        prediction = (1 - kept) ** 0.5 * (x - kept**0.5 * 0.5) / (kept * 0.3**2 + 1 - kept)
        x = process.p_sample(prediction, x, torch.tensor([place]), normal(1, 1, 64, 64, seed=place))
    assert x.mean().item() == pytest.approx(0.5, abs=0.015) and x.std().item() == pytest.approx(0.3, rel=0.04)


# Respacing


def test_250_of_1000_steps_are_spaced_as_published():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(250)
    timesteps = GaussianDiffusion().respaced(250).timesteps.tolist()
    assert timesteps == scheduler.timesteps.flip(0).tolist()
    assert timesteps[:3] == [0, 4, 8] and timesteps[-4:] == [987, 991, 995, 999]


def test_an_odd_number_of_steps_is_rounded_as_published():
    # Ten strides of 49.95 are 499.49999999999994 when added up; the product would be 499.5, and round to 500.
    assert GaussianDiffusion().respaced(21).timesteps.tolist() == [
        0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 499, 549, 599, 649, 699, 749, 799, 849, 899, 949, 999,
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [2, 21, 250, 1000])
def test_a_respaced_process_has_the_noise_of_its_timesteps(steps):
    process = GaussianDiffusion().respaced(steps)
    assert process.steps == len(process.timesteps) == steps
    torch.testing.assert_close(process.alphas_cumprod, torch.tensor(KEPT)[process.timesteps], rtol=1e-12, atol=0)
    x0, noise = normal(steps, 1, 1, 2), normal(steps, 1, 1, 2, seed=1)
    expected = GaussianDiffusion().q_sample(x0, process.timesteps, noise)
    torch.testing.assert_close(process.q_sample(x0, torch.arange(steps), noise), expected)


def test_a_respaced_process_can_be_respaced():
    twice = GaussianDiffusion().respaced(250).respaced(4)
    assert twice.timesteps.tolist() == [0, 333, 666, 999]
    torch.testing.assert_close(twice.alphas_cumprod, torch.tensor(KEPT)[twice.timesteps], rtol=1e-12, atol=0)


# Training


def test_the_loss_by_hand():
    """Every image's two terms, in fp64; the likelihood of t = 0 by the published approximation."""
    process, (x0, noise, output) = GaussianDiffusion(), batch()
    x0[0] = (127.5 * x0[0].clamp(-1, 1)).round() / 127.5  # grey values, of which some are the first and the last
    # At t = 0 an x0 far from the prediction has the floor's probability: predictions as of a trained net.
    output[:, :3] = noise + 0.3 * output[:, :3]
    mse, vb = process.training_losses(output, x0, T, noise)
    assert mse.shape == vb.shape == (6,)
    for index, t in enumerate(T.tolist()):
        x, e, predicted, level = map(fp64, (x0[index], noise[index], output[index, :3], output[index, 3:]))
        assert mse[index].item() == pytest.approx(((predicted - e) ** 2).mean(), rel=1e-5)
        x_t = KEPT[t] ** 0.5 * x + (1 - KEPT[t]) ** 0.5 * e
        guess, _ = posterior((x_t - (1 - KEPT[t]) ** 0.5 * predicted) / KEPT[t] ** 0.5, x_t, t)
        log_variance = (1 - level) / 2 * math.log(least_variance(t)) + (1 + level) / 2 * math.log(BETAS[t])
        if t:
            true, variance = posterior(x, x_t, t)
            nats = (log_variance - math.log(variance) - 1 + (variance + (true - guess) ** 2) / np.exp(log_variance)) / 2
        else:
            lower, upper = ((x - guess + edge / 255) / np.exp(log_variance / 2) for edge in (-1, 1))
            lower, upper = ((1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2 for z in (lower, upper))
            lower, upper = np.where(x < -0.999, 0, lower), np.where(x > 0.999, 1, upper)
            nats = -np.log(np.maximum(upper - lower, 1e-12))
            assert (x < -0.999).any() and (x > 0.999).any() and (nats < 20).all()
        assert vb[index].item() == pytest.approx(nats.mean() / math.log(2), rel=1e-4, abs=1e-6), t


def test_the_bound_is_zero_for_the_true_noise_and_the_posterior_variance():
    process, (x0, noise, _) = GaussianDiffusion(), batch()
    mse, vb = process.training_losses(torch.cat([noise, -torch.ones_like(noise)], dim=1), x0, T, noise)
    assert not mse.any() and vb[0] > 1  # at t = 0 the data's discretisation remains
    assert vb[1:].abs().max() < 1e-5


def test_the_bound_teaches_the_variance_alone():
    process, (x0, noise, output) = GaussianDiffusion(), batch()
    output[:, :3] = noise + 0.3 * output[:, :3]
    for term, learned, fixed in [(0, slice(0, 3), slice(3, 6)), (1, slice(3, 6), slice(0, 3))]:
        prediction = output.clone().requires_grad_()
        process.training_losses(prediction, x0, T, noise)[term].sum().backward()
        assert not prediction.grad[:, fixed].any()
        assert prediction.grad[:, learned].abs().amax(dim=(1, 2, 3)).min() > 0  # at every step


def test_without_a_learned_variance_the_loss_is_that_of_the_noise():
    process, (x0, noise, output) = GaussianDiffusion(), batch()
    mse, vb = process.training_losses(output[:, :3], x0, T, noise)
    assert torch.equal(mse, process.training_losses(output, x0, T, noise)[0])
    assert torch.equal(vb, torch.zeros(6))


def test_the_divergence_is_that_of_torch():
    mean, log_variance, other_mean, other_log_variance = (normal(50, seed=seed) for seed in range(4))
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(other_mean, (other_log_variance / 2).exp()))
    torch.testing.assert_close(normal_divergence(mean, log_variance, other_mean, other_log_variance), expected)


@pytest.mark.parametrize("mean", [-1.5, -1.0, 0.003, 0.4, 1.0])
@pytest.mark.parametrize("deviation", [0.005, 0.1, 1.0])
def test_the_likelihood_is_a_distribution_over_256_grey_values(mean, deviation):
    grey = torch.arange(256) / 127.5 - 1
    probability = discretised_log_likelihood(grey, torch.full((256,), mean), torch.tensor(deviation).log()).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    edges = torch.cat([torch.tensor([-math.inf]), (grey[1:] + grey[:-1]) / 2, torch.tensor([math.inf])])
    exact = Normal(mean, deviation).cdf(edges).diff()
    torch.testing.assert_close(probability, exact, atol=4e-4, rtol=0)
    assert probability.min() >= 0.999e-12


# Precision and devices


def test_autocast_and_bf16_change_nothing_but_the_rounding_of_what_comes_in():
    process, (x0, noise, output) = GaussianDiffusion(), batch()
    x0, noise, output = x0.bfloat16(), noise.bfloat16(), output.bfloat16()

    def everything(x0: Tensor, noise: Tensor, output: Tensor) -> list[Tensor]:
        x_t = process.q_sample(x0, T, noise)
        return [x_t, process.predict_x0(x_t, T, noise), *process.p_mean_variance(output, x_t, T),
                process.p_sample(output, x_t, T, noise), *process.training_losses(output, x0, T, noise)]  # fmt: skip

    expected = everything(x0.float(), noise.float(), output.float())
    with torch.autocast("cpu", torch.bfloat16):
        actual = everything(x0, noise, output)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_sampling_in_inference_mode_does_not_spoil_training():
    process, (x0, noise, output) = GaussianDiffusion(), batch()
    with torch.inference_mode():
        process.p_sample(output, x0, T, noise)
    output.requires_grad_()
    sum(process.training_losses(output, x0, T, noise)).mean().backward()
    assert output.grad.isfinite().all()


# Mistakes


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_numbers_of_steps_that_cannot_be_are_named(steps):
    with pytest.raises(InputError, match=f"sampling steps={steps} must be between 2 and the 1000 of training"):
        GaussianDiffusion().respaced(steps)


@pytest.mark.parametrize("betas, got", [([0.1], r"1, outside \[\]"), ([0.1, 0.0], r"2, outside \[0.0\]"),
                                         ([1.0, 0.1], r"2, outside \[1.0\]"),
                                         ([0.1, math.nan], r"2, outside \[nan\]")])  # fmt: skip
def test_betas_that_are_no_variances_are_named(betas, got):
    with pytest.raises(InputError, match=f"two or more variances between 0 and 1, both excluded; got {got}"):
        GaussianDiffusion(torch.tensor(betas))
