"""--init_from in this study: the weights of a run or of a published net, all of which must fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.errors import InputError
from common.model import sincos_position
from common.runs import trained
from common.training.initialisation import content_of, print_report, weights_in
from diffusion.dit import DiT
from diffusion.published import load_autoencoder


def initialise_autoencoder(net: nn.Module, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Loads an autoencoder's weights: of a run of this study, or published. A foreign file does not tell its net's
    options, which are then those of `config`.
    """
    path = Path(source)
    foreign = path.is_file() and path.parent.name != "checkpoints"
    return _load(net, load_autoencoder(path, **(config if foreign else {})).state_dict(), source)


def initialise_dit(net: DiT, source: str, autoencoder_sha256: str | None) -> dict[str, Any]:
    """Loads a DiT's weights: of a run of this study, which must have been trained on the latents of this autoencoder,
    or of one that DiT's authors published or their code wrote. An average is taken where there is one.
    """
    content = content_of(source)
    if content.get("autoencoder_sha256", autoencoder_sha256) != autoencoder_sha256:
        raise InputError(f"--init_from: {source} was trained on the latents of another autoencoder than "
                         "data.autoencoder, which mean something else (or one of the two on pixels)")
    kept = "ema" if isinstance(content.get("ema"), dict) else "raw" if "loops" in content else "as published"
    if "loops" not in content and kept == "ema":
        content = content["ema"]
    beyond = content.get("beyond_shapes", {})
    for name, value in net.beyond_shapes().items():
        if beyond.get(name, value) != value:
            raise InputError(f"--init_from: {source} was trained with {name}={beyond[name]}, and this config's is "
                             f"{value}; the shapes of the weights do not tell, but what they compute does")
    weights = weights_in(content, "ema", source)
    report = _load(net, weights, source) | {"weights": kept}
    if net.position == "learned" and net.width % 4 == 0:
        fixed = sincos_position(net.grid, net.width, prefix=0)
        if net.pos_embed.detach().sub(fixed).abs().max() < 1e-3:
            report["position_prior"] = "sincos"  # of published checkpoints; learned positions have none
    return report


def _load(net: nn.Module, weights: dict[str, Tensor], source: str) -> dict[str, Any]:
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2]
        raise InputError(f"--init_from: {source} holds another net than this config's ({reason[:200]})") from error
    report = {"source": str(source), "trained": trained(source), "loaded": list(weights), "missing": [],
              "unexpected": [], "resampled": []}  # fmt: skip
    print_report(report)
    return report
