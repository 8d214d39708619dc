"""The Gaussian diffusion process (Ho et al. 2020) with a learned variance (Nichol and Dhariwal 2021), as in DiT.

Shapes: B batch, C channels, H x W latent pixels; x0 are the data, and x_t (B, C, H, W) the data at step t (B,), which
counts from 0: x_t at t = 0 holds the noise of one step. An `output` is a net's prediction: the noise in C channels
and, where it learns the variance, C further ones. All of it is computed in fp32, from constants that are in fp64.
"""

from __future__ import annotations

import math
from itertools import accumulate, repeat

import torch
from torch import Tensor

from common.errors import InputError


class GaussianDiffusion:
    """A Markov chain of Gaussian noise and its learned reverse. Noise and steps always come from the caller.

    `betas`, `alphas_cumprod` and `timesteps` (T,) lie on the CPU; what is computed lies where its `t` does.

    Args:
        betas: variance (T,) of the noise that each step adds; by default 1000 from 1e-4 to 0.02, evenly spaced.
        timesteps: what a net is told at each step (T,); by default 0 .. T - 1. See `respaced`.

    Raises:
        InputError: fewer than two betas, or one that is not in (0, 1).
    """

    def __init__(self, betas: Tensor | None = None, timesteps: Tensor | None = None) -> None:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64) if betas is None else betas.double()
        wrong = betas[~((betas > 0) & (betas < 1))]
        if len(betas) < 2 or len(wrong):
            raise InputError(f"betas must be two or more variances between 0 and 1, both excluded; got {len(betas)}, "
                             f"outside {wrong[:3].tolist()}")
        self.steps = len(betas)
        self.timesteps = torch.arange(self.steps) if timesteps is None else timesteps
        self.betas = betas
        self.alphas_cumprod = (1 - betas).cumprod(0)
        kept = self.alphas_cumprod
        kept_before = torch.cat([kept.new_ones(1), kept[:-1]])
        posterior_variance = betas * (1 - kept_before) / (1 - kept)
        self._constants = {
            "data": kept.sqrt(),
            "noise": (1 - kept).sqrt(),
            "x0_from_x_t": kept.rsqrt(),
            "x0_from_noise": (1 / kept - 1).sqrt(),
            "mean_from_x0": betas * kept_before.sqrt() / (1 - kept),
            "mean_from_x_t": (1 - kept_before) * (1 - betas).sqrt() / (1 - kept),
            # The last step back has no variance, and so no logarithm of one: that of the step before is taken.
            "posterior_log_variance": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
            "log_beta": betas.log(),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def _at(self, name: str, t: Tensor) -> Tensor:
        """A constant at each sample's step, (B, 1, 1, 1)."""
        if t.device not in self._on_device:
            self._on_device[t.device] = {k: values.float().to(t.device) for k, values in self._constants.items()}
        return self._on_device[t.device][name][t][:, None, None, None]

    def respaced(self, steps: int) -> GaussianDiffusion:
        """The process that visits only `steps` of these, evenly spaced from the first to the last, as ADM's and DiT's.

        Its x_t have the noise of this process at `timesteps[t]`, which is what a net trained on this one must be told.
        """
        if not 2 <= steps <= self.steps:
            raise InputError(f"sampling steps={steps} must be between 2 and the {self.steps} of training")
        # A running sum, as theirs: for some odd numbers of steps its rounding differs from that of a product.
        stride = (self.steps - 1) / (steps - 1)
        visited = torch.tensor([round(place) for place in accumulate(repeat(stride, steps - 1), initial=0.0)])
        kept = self.alphas_cumprod[visited]
        betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
        return GaussianDiffusion(betas, self.timesteps[visited])

    # Forward

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Data with the noise of steps 0 .. t: x_t."""
        return self._at("data", t) * x0.float() + self._at("noise", t) * noise.float()

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and log variance (B, 1, 1, 1) of x_{t-1}, given x_t and the data.

        At t = 0 the variance is zero; its logarithm is that of t = 1.
        """
        mean = self._at("mean_from_x0", t) * x0.float() + self._at("mean_from_x_t", t) * x_t.float()
        return mean, self._at("posterior_log_variance", t)

    # Reverse

    def predict_x0(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The data that `noise` was added to, if it is that of x_t."""
        return self._at("x0_from_x_t", t) * x_t.float() - self._at("x0_from_noise", t) * noise.float()

    def p_mean_variance(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, both (B, C, H, W), of x_{t-1} as a net predicts it from x_t; nothing is clipped.

        The further channels of the output, -1 .. 1, interpolate the log variance between the posterior's and beta's;
        without them it is beta's.
        """
        noise, level = split(output, x_t)
        mean, least = self.q_posterior(self.predict_x0(x_t, t, noise), x_t, t)
        if level is None:
            return mean, self._at("log_beta", t).expand_as(mean)
        share = (level + 1) / 2
        return mean, share * self._at("log_beta", t) + (1 - share) * least

    def p_sample(self, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1} from x_t and standard normal `noise`; at t = 0 the predicted mean, without noise."""
        mean, log_variance = self.p_mean_variance(output, x_t, t)
        return mean + (t > 0)[:, None, None, None] * (0.5 * log_variance).exp() * noise.float()

    # Training

    def training_losses(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the loss per image, (B,) each, for the output at `q_sample(x0, t, noise)`.

        Their sum is DiT's loss: the mean squared error of the noise, and the term of the variational bound, unscaled,
        through which the variance alone is learned. The latter is zero where no variance is learned.
        """
        predicted, level = split(output, x0)
        mse = (predicted - noise.float()).square().mean(dim=(1, 2, 3))
        if level is None:
            return mse, torch.zeros_like(mse)
        frozen = torch.cat([predicted.detach(), level], dim=1)
        return mse, self.variational_bound(frozen, x0, self.q_sample(x0, t, noise), t)

    def variational_bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The term of the bound on -log p(x0) that belongs to step t, in bits per dimension: (B,).

        The divergence of the predicted x_{t-1} from the posterior's; at t = 0 the negative log-likelihood of x0 as one
        of 256 grey values in [-1, 1]. DiT takes it so of latents too, which are neither.
        """
        mean, log_variance = self.p_mean_variance(output, x_t, t)
        divergence = normal_divergence(*self.q_posterior(x0, x_t, t), mean, log_variance)
        likelihood = discretised_log_likelihood(x0.float(), mean, 0.5 * log_variance)
        nats = torch.where(t == 0, -likelihood.mean(dim=(1, 2, 3)), divergence.mean(dim=(1, 2, 3)))
        return nats / math.log(2)


def split(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A net's output in fp32, as the noise and what interpolates the variance, if it has channels for that."""
    channels = x.shape[1]
    assert output.shape[1] in (channels, 2 * channels), f"{output.shape[1]} outputs for {channels} channels"
    output = output.float()
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None


def normal_divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence, in nats, of normal distributions from others, elementwise."""
    ratio = log_variance - other_log_variance
    return 0.5 * (ratio.exp() - ratio - 1 + (mean - other_mean).square() * (-other_log_variance).exp())


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability, in nats, of grey values under a normal distribution over 256 bins of [-1, 1], elementwise.

    The bins of the first and the last value reach to infinity. Ho et al. (2020), with their tanh in place of the
    normal distribution function and a floor of 1e-12 under each probability.
    """
    centred, precision = x - mean, (-log_scale).exp()
    below_upper = normal_cdf((centred + 1 / 255) * precision)
    below_lower = normal_cdf((centred - 1 / 255) * precision)
    probability = torch.where(x < -0.999, below_upper,
                              torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower))  # fmt: skip
    return probability.clamp(min=1e-12).log()


def normal_cdf(x: Tensor) -> Tensor:
    """The standard normal distribution function by tanh, to 0.0003."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
