"""From noise to samples: the trained net's process run backwards, or a faster solver of the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from common.errors import InputError
from common.randomness import normal, uniform
from diffusion.dit import DiT
from diffusion.process import GaussianDiffusion

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

SolverName = Literal["ddpm", "ddim", "dpm++"]
PIECE = 1024  # tokens at once on each thread of a CPU, so that they stay in its core's cache


class Sampler:
    """Generates sample `i` as a function of (seed, i) and its label, whatever else is in the batch.

    Args:
        process: that the net was trained on.
        solver: `ddpm` takes respaced ancestral steps with the learned variance, as ADM and DiT; `ddim` (Song et al.
            2021), the same ones without noise, and `dpm++` (Lu et al. 2022, second order) are diffusers'.
        steps: of the process that are visited.
        guidance: scale of classifier-free guidance; 1 is without, at half the cost.
        guidance_channels: how many of the first channels are guided; DiT's published numbers guide 3.
        seed: of the noise.
    """

    def __init__(
        self,
        process: GaussianDiffusion,
        solver: SolverName = "ddpm",
        steps: int = 250,
        guidance: float = 1.0,
        guidance_channels: int = 3,
        seed: int = 0,
    ) -> None:
        if not 2 <= steps <= process.steps:
            raise InputError(f"model.predict.steps: {steps} are not between 2 and the {process.steps} of training")
        self.process, self.solver, self.steps = process, solver, steps
        self.visited = process.respaced(steps)  # once: on a GPU its constants are copied there
        self.guidance, self.guidance_channels, self.seed = guidance, guidance_channels, seed

    def record(self) -> dict[str, Any]:
        """What samples depend on beside the net."""
        spacing = "linspace" if self.solver == "dpm++" else "respaced as by ADM"
        return {"solver": self.solver, "steps": self.steps, "spacing": spacing, "guidance": self.guidance,
                "guidance_channels": self.guidance_channels, "seed": self.seed}  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, net: DiT, numbers: Tensor, labels: Tensor | None, beat: Callable[[float], None] = lambda share: None
    ) -> Tensor:
        """Samples (B, C, H, W), normalised as the net was trained.

        Args:
            numbers: of the samples (B,).
            labels: their classes (B,); none where the net has no classes.
            beat: called after every step of the solver with the share of them all that is done, a sign of life.
        """
        on_cpu = numbers.device.type == "cpu"
        piece = max(1, PIECE * torch.get_num_threads() // net.tokens) if on_cpu else len(numbers)
        pieces = numbers.split(piece)
        labels_of_pieces = [None] * len(pieces) if labels is None else labels.split(piece)
        steps = count(1)

        def stepped() -> None:
            beat(next(steps) / (self.steps * len(pieces)))

        return torch.cat([self._piece(net, *some, stepped) for some in zip(pieces, labels_of_pieces, strict=True)])

    def _piece(self, net: DiT, numbers: Tensor, labels: Tensor | None, stepped: Callable[[], None]) -> Tensor:
        x = self.noise("sample", numbers, (net.channels, *net.input_size))
        if self.solver == "ddpm":
            return self._ancestral(net, x, numbers, labels, stepped)
        return self._scheduled(net, x, labels, stepped)

    def noise(self, stream: str, numbers: Tensor, shape: tuple[int, ...], *keys: int) -> Tensor:
        """Standard normal draws (B, *shape), a row for each number."""
        return normal(stream, self.seed, *keys, numbers, n=torch.Size(shape).numel()).view(len(numbers), *shape)

    def predicted(self, net: DiT, x: Tensor, timestep: int, labels: Tensor | None) -> Tensor:
        t = torch.full((len(x),), timestep, device=x.device)
        if self.guidance == 1:
            return net(x, t, labels).float()
        return net.forward_with_guidance(x, t, labels, self.guidance, self.guidance_channels)

    def _ancestral(
        self, net: DiT, x: Tensor, numbers: Tensor, labels: Tensor | None, stepped: Callable[[], None]
    ) -> Tensor:
        process = self.visited
        for step in reversed(range(self.steps)):
            output = self.predicted(net, x, int(process.timesteps[step]), labels)
            t = torch.full((len(x),), step, device=x.device)
            x = process.p_sample(output, x, t, self.noise("sample step", numbers, x.shape[1:], step))
            stepped()
        return x

    def _scheduled(self, net: DiT, x: Tensor, labels: Tensor | None, stepped: Callable[[], None]) -> Tensor:
        if self.solver == "ddim":
            process, scheduler = self.visited, ddim(self.visited)
        else:
            process, scheduler = self.process, dpm_solver(self.process, self.steps)
        for step in scheduler.timesteps.tolist():
            noise = self.predicted(net, x, int(process.timesteps[step]), labels)[:, : net.channels]
            x = scheduler.step(noise, step, x).prev_sample
            stepped()
        return x


def ddim(visited: GaussianDiffusion) -> DDIMScheduler:
    """diffusers' DDIM, which takes every step of a process.

    It is given the respaced one, since its own spacing steps back by a fixed number of timesteps, which are not those
    that an evenly spaced process visits: the net would be told of another noise than its input has.
    """
    from diffusers import DDIMScheduler  # costs 4 s

    scheduler = DDIMScheduler(visited.steps, clip_sample=False)
    scheduler.alphas_cumprod = visited.alphas_cumprod  # not of fp32 betas: where steps are few, the last is nearly 1
    scheduler.set_timesteps(visited.steps)
    return scheduler


def dpm_solver(process: GaussianDiffusion, steps: int) -> DPMSolverMultistepScheduler:
    """diffusers' DPM-Solver++, which takes so many steps of a process, evenly spaced."""
    from diffusers import DPMSolverMultistepScheduler  # costs 4 s

    scheduler = DPMSolverMultistepScheduler(trained_betas=process.betas.numpy(), timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    return scheduler


def labels_of(numbers: Tensor, classes: list[int], seed: int) -> Tensor:
    """The class of each sample, drawn uniformly from `classes` as a function of (seed, number)."""
    chosen = (uniform("sample class", seed, numbers, n=1)[:, 0] * len(classes)).long()
    return torch.tensor(classes, device=numbers.device)[chosen]

