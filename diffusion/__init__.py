"""The third case study: image generation by a diffusion Transformer on latents or pixels (paper, section 4.3)."""

from diffusion.dit import DiT
from diffusion.generation import Generation
from diffusion.latent_data import LatentData
from diffusion.process import GaussianDiffusion
from diffusion.vqgan import AutoencoderTraining

__all__ = ["AutoencoderTraining", "DiT", "GaussianDiffusion", "Generation", "LatentData"]
