"""The configs of autoencoders: what they resolve to, and what their comments promise."""

from typing import Any

import pytest
from forked import ROOT

from common.identity import flatten
from common.training.cli import StudyCLI
from diffusion.autoencoder import Autoencoder
from diffusion.discriminator import PatchDiscriminator
from diffusion.objective import Adversary, Objective, Players, step_cost
from diffusion.perceptual import LPIPS

CONFIGS = {path.stem: path for path in sorted((ROOT / "diffusion" / "configs").glob("autoencoder_*.yaml"))}


def resolved(name: str, *overrides: str) -> dict[str, Any]:
    return flatten(StudyCLI("diffusion", ["fit", "--config", str(CONFIGS[name]), *overrides], run=False).resolved)


@pytest.mark.parametrize("kind, overrides, said", [
    ("vq", {}, "VQ 21 h"), ("kl", {"multipliers": (1, 2, 4, 4), "attention": "middle"}, "KL 26 h"),
])  # fmt: skip
def test_the_hours_in_the_paper_s_comment_are_those_counted(kind, overrides, said):
    def parts() -> Players:
        return Players(Autoencoder(kind, **overrides), PatchDiscriminator(3, (256, 256)), LPIPS())

    cost = step_cost(Objective(Adversary()), parts, 3, (256, 256))
    hours = cost.training_flops * 20 * (1_281_167 // 32 * 32) / 790e12 / 3600
    assert said in CONFIGS["autoencoder_imagenet256"].read_text()
    assert float(said.split()[1]) == pytest.approx(hours, abs=0.5)
    assert 32 * cost.saved_bytes < 0.7 * 141e9 - 1.5e9  # the batch fits on one H200, as the comment says


def test_the_milestone_is_the_last_before_the_discriminator_starts():
    options = resolved("autoencoder_imagenet256")
    [milestone], start, steps = options["checkpoint.milestones"], options["model.adversary.start"], 1_281_167 // 32
    assert options["data.batch_size"] == 32 and milestone * steps < start <= (milestone + 1) * steps


@pytest.mark.parametrize("name", CONFIGS)
def test_it_parses_into_a_folder_of_its_name(name):
    assert resolved(name)["run_name"] == f"{name}-s0"
    text = CONFIGS[name].read_text().split("model:")[0]
    assert f"python -m diffusion fit --config diffusion/configs/{name}.yaml" in text
    assert "--model.kind kl" in text and "Expected:" in text
    assert resolved(name, "--model.kind", "kl")["model.kind"] == "kl"


def test_the_paper_s_is_the_published_recipe():
    config = resolved("autoencoder_imagenet256")
    published = {
        "kind": "vq", "channels": 4, "codebook_size": 16384, "base": 128, "multipliers": [1, 2, 2, 4], "res_blocks": 2,
        "beta": 0.25, "perceptual": "lpips", "perceptual_weight": 1.0, "codebook_weight": 1.0, "kl_weight": 1e-6,
        "adversary.weight": 0.8, "adversary.start": 250_001, "adversary.width": 64, "adversary.layers": 3,
        "adversary.norm": "batch", "optim.betas": [0.5, 0.9], "optim.weight_decay": 0.0, "optim.schedule": "constant",
    }  # fmt: skip
    assert {key: config[f"model.{key}"] for key in published} == published
    assert config["model.optim.base_lr"] * config["data.batch_size"] / 256 == pytest.approx(
        4.5e-6 * config["data.batch_size"]
    )
    assert (config["data.image_size"], config["trainer.precision"]) == (256, "bf16-mixed")
    assert config["trainer.sync_batchnorm"] is True
