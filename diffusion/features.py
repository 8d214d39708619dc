"""What the metrics see of an image: pooled and spatial features and class logits of a trained network."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.data.colour import normalised
from common.data.crop import fit
from common.data.images import ImageData
from common.data.loader import GlobalBatchData
from common.errors import InputError
from common.model import VisionTransformer
from common.training.checkpoints import read
from common.training.module import Experiment
from common.training.trained import load

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Extracted(NamedTuple):
    """Pooled features (B, features), spatial features (B, spatial_features) and logits (B, classes); fp32."""

    pooled: Tensor
    spatial: Tensor | None
    logits: Tensor


class Extractor(nn.Module, ABC):
    """A trained network that sees uint8 images (B, channels, H, W) in 0-255, of any size.

    Not to be kept on a LightningModule, whose checkpoints it would enter and whose `train` would switch it.

    Attributes:
        tags: the metrics that its features allow, and the tags that they are reported under.
        sha256: of the file of its weights.
    """

    name: str
    channels: int
    features: int
    spatial_features: int = 0
    classes: int
    sha256: str

    @property
    def tags(self) -> dict[str, str]:
        keys = ["fd", "classifier_score", "precision", "recall", "agreement"]
        return {key: f"{key}_{self.name}" for key in keys}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Extracted:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.channels:
            raise InputError(f"images: {images.dtype} of shape {tuple(images.shape)}; the extractor {self.name} takes "
                             f"uint8 (B, {self.channels}, H, W) in 0-255")
        with full_precision(images.device):
            return self.extract(images)

    @abstractmethod
    def extract(self, images: Tensor) -> Extracted:
        """The features of images that `forward` has checked."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32, whatever the Trainer was told: features in bf16 are other features."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
              torch.autocast(device.type, enabled=False)):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Inception(Extractor):
    """The Inception graph of 2015 in torch-fidelity's port, with its resize to 299 pixels, as TensorFlow 1 does it.

    Spatial features are the first seven channels of block Mixed_6d, which is TensorFlow's `mixed_6/conv`, flattened as
    rows, columns, channels, since stored `mu_s` and `sigma_s` are in that order. Logits are without bias.
    An image costs 11 GFLOP.

    Args:
        weights: the file that torch-fidelity publishes.

    Raises:
        InputError: no such file, with where to get it; a file that holds other weights.
    """

    name, channels, features, spatial_features, classes = "inception", 3, 2048, 2023, 1008
    tags = {"fd": "fid", "sfd": "sfid", "classifier_score": "inception_score", "precision": "precision",
            "recall": "recall"}

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # slow to import

        if not weights.is_file():
            raise InputError(f"{weights}: there is no such file, and nothing is downloaded; fetch {INCEPTION_URL} to "
                             "that place. Without it the run folder of a classifier can be named as the extractor")
        read(weights)  # refuses what is no dict of tensors, which torch-fidelity would unpickle
        try:
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{weights}: does not hold Inception's weights as torch-fidelity publishes them, "
                             f"{INCEPTION_URL} ({reason})") from error
        self.sha256 = sha256(weights)
        if self.sha256 != INCEPTION_SHA256:
            warnings.warn(f"{weights} is not the published file (sha256 {INCEPTION_SHA256[:8]}...): FID and the others "
                          "compare with published numbers only if its weights are those of 2015", stacklevel=2)
        self.net.Mixed_6d.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def extract(self, images: Tensor) -> Extracted:
        pooled, logits = self.net(images)
        return Extracted(pooled, self.spatial, logits)


class Classifier(Extractor):
    """A classifier of the suite: the pooled features that its head sees, and its logits.

    Images are prepared as those of its own evaluation, resized and cropped to the size that it was trained on.

    Args:
        name: of its run, which the metrics' tags carry.
        experiment: what was trained; its net is replaced.
        net: with trained weights.
        data: that it was trained on.
        sha256: of its checkpoint.
    """

    def __init__(self, name: str, experiment: Experiment, net: VisionTransformer, data: ImageData, sha256: str) -> None:
        super().__init__()
        self.name, self.data, self.sha256 = name, data, sha256
        self.channels, self.features, self.classes = net.channels, net.width, net.classes
        self.transform = experiment.transform
        self.head, net.head = net.head, nn.Identity()
        self.net = net
        self.eval()

    def extract(self, images: Tensor) -> Extracted:
        data = self.data
        images = fit(images.float() / 255, data.image_size, data.eval_crop, data.eval_interpolation).clamp(0, 1)
        images = normalised(images, images.new_tensor(data.mean), images.new_tensor(data.std))
        pooled = self.net(self.transform(images))
        return Extracted(pooled, None, self.head(pooled))


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a run folder of `python -m supervised`, its weights averaged where the run keeps an average.

    Raises:
        InputError: not a run folder, a run without a checkpoint, or of another task than classification.
    """
    if not folder.exists():
        raise InputError(f"extractor: there is no run folder {folder}; train a classifier of these images first (of "
                         "digits: python -m supervised fit --config supervised/configs/digits.yaml --model.patch_size "
                         "2), or name one that is there")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"extractor: {folder} is neither inception nor the run folder of a classifier")

    def check(experiment: Experiment, data: GlobalBatchData) -> None:
        if experiment.data_class is not ImageData or not hasattr(experiment, "transform"):
            raise InputError(f"extractor: {folder} is a run of {type(experiment).__name__}, which is no classification "
                             "of images")

    run = load(folder, "extractor", check)
    return Classifier(folder.resolve().name, run.experiment, run.net, run.data, sha256(run.checkpoint))


def sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
