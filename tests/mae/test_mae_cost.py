"""FLOPs and memory of a masked autoencoder against torch's own counter, measured activations and published numbers."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.benchmark.memory import kept_bytes
from common.data.loader import GlobalBatchData
from common.model.flops import parameters
from common.training.optim import Recipe
from common.training.trainer import Trainer
from mae import MaskedAutoencoder, Pretraining
from mae.cost import activation_bytes, decoder_flops, encoder_flops, forward_flops, visible_tokens


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("options", [
    {"image_size": 8, "patch_size": 1, "size": "nano", "decoder_width": 24, "decoder_depth": 2, "decoder_heads": 3},
    {"image_size": (8, 10), "patch_size": 2, "channels": 1, "width": 32, "depth": 1, "heads": 2, "position": "sincos"},
    {"image_size": 32, "patch_size": 8, "size": "tiny", "decoder_depth": 1, "qk_norm": True, "norm_pix_loss": "patch"},
])  # fmt: skip
def test_forward_flops_equal_torchs_counter(options, mask_ratio):
    net = MaskedAutoencoder(**options)
    images, noise = torch.randn(3, net.channels, *net.image_size), torch.rand(3, net.tokens)
    # The counter knows batched matrix products; the fused CPU kernel it would pass over.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as encoder:
            latent, _, ids_restore = net.forward_encoder(images, noise, mask_ratio)
        with FlopCounterMode(display=False) as decoder:
            net.forward_decoder(latent, ids_restore)
        with FlopCounterMode(display=False) as whole:
            net(images, noise, mask_ratio)
    assert latent.shape[1] == 1 + visible_tokens(net, mask_ratio)
    assert encoder.get_total_flops() == 3 * encoder_flops(net, mask_ratio)
    assert decoder.get_total_flops() == 3 * decoder_flops(net, mask_ratio)
    assert whole.get_total_flops() == 3 * forward_flops(net, mask_ratio)


@pytest.mark.parametrize("size, width, depth, heads, gigaflops, millions", [
    ("tiny", 512, 8, 16, 72.2, 31.38),
    ("small", 512, 8, 16, 81.0, 47.63),
    ("base", 512, 8, 16, 115.1, 111.99),
    ("tiny", 192, 4, 3, 10.2, 7.55),
    ("small", 384, 4, 6, 33.2, 29.33),
])  # fmt: skip
def test_cost_of_the_pixel_model_at_32x32(size, width, depth, heads, gigaflops, millions):
    """GFLOP of one image's forward at three quarters masked, and parameters, to the digits they are known to."""
    decoder = {"decoder_width": width, "decoder_depth": depth, "decoder_heads": heads}
    with torch.device("meta"):
        net = MaskedAutoencoder(32, 1, size=size, **decoder)
    assert round(forward_flops(net, 0.75) / 1e9, 1) == gigaflops
    assert round(parameters(net) / 1e6, 2) == millions


def kept_of_a_forward(net: MaskedAutoencoder, batch: int, autocast: bool) -> int:
    images, noise = torch.randn(batch, net.channels, *net.image_size), torch.rand(batch, net.tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return kept_bytes(lambda: net(images, noise, 0.75)[0], net.parameters())


def kept_bytes_of_an_image(net: MaskedAutoencoder, autocast: bool) -> float:
    """Of one image more: what autograd keeps of the weights under autocast is no image's."""
    return (kept_of_a_forward(net, 6, autocast) - kept_of_a_forward(net, 2, autocast)) / 4


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activation_bytes_equal_what_autograd_keeps(precision, qk_norm):
    options = {"image_size": 8, "patch_size": 1, "width": 128, "heads": 2, "decoder_width": 64, "decoder_heads": 2,
               "qk_norm": qk_norm}  # fmt: skip
    autocast = precision == "bf16-mixed"
    # The difference of two depths leaves the blocks of that half alone, without embeddings, prediction and loss.
    shallow = MaskedAutoencoder(depth=1, decoder_depth=1, **options)
    for deeper in ({"depth": 3, "decoder_depth": 1}, {"depth": 1, "decoder_depth": 3}):
        deep = MaskedAutoencoder(**deeper, **options)
        measured = kept_bytes_of_an_image(deep, autocast) - kept_bytes_of_an_image(shallow, autocast)
        formula = activation_bytes(deep, 0.75, precision) - activation_bytes(shallow, 0.75, precision)
        assert formula == pytest.approx(measured, rel=0.04)


class Pixels(GlobalBatchData):
    """As many pictures of 32x32 as CIFAR-100 has."""

    image_size, channels = (32, 32), 3

    def __init__(self) -> None:
        super().__init__(batch_size=4096)
        self.sets = {"train": torch.zeros(50_000), "val": torch.zeros(1)}


@pytest.fixture
def small_on_80_gb(monkeypatch: pytest.MonkeyPatch) -> Pretraining:
    """ViT-S/1 with the default decoder on one device under bf16-mixed, its data divided into micro-batches."""
    monkeypatch.setattr("common.training.module.device_memory", lambda device: 80 * 10**9)
    trainer = Trainer(accelerator="cpu", devices=1, precision="bf16-mixed", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    module, data = Pretraining(Recipe(lr=1e-3), size="small", patch_size=1), Pixels()
    module.trainer = data.trainer = trainer
    trainer.datamodule = data
    trainer.strategy.connect(module)
    data.setup("fit")
    return module


# 2 of 16 vectors in fp32 and 14 in bf16, of 1 + 256 tokens in 12 blocks and of 1 + 1024 in 8.
IMAGE = (2 * 4 + 14 * 2) * (12 * 257 * 384 + 8 * 1025 * 256)


def test_a_global_batch_of_4096_divides_into_micro_batches_that_fit(small_on_80_gb: Pretraining):
    module, data = small_on_80_gb, small_on_80_gb.trainer.datamodule
    net = module.build(data)
    weights = 22 * parameters(net)  # bytes: five numbers in fp32 and one in bf16
    assert module.images_that_fit(data) == (0.7 * 80e9 - weights) // IMAGE == 468
    assert (data.micro_batch, module.trainer.accumulate_grad_batches) == (256, 16)
    # What autograd keeps at this very size, outside the blocks too; a GPU needs room for the backward besides.
    measured = kept_of_a_forward(net, 2, autocast=True) - kept_of_a_forward(net, 1, autocast=True)
    assert 1 < measured / IMAGE < 1.06
    assert weights + data.micro_batch * measured < 0.5 * 80e9


def test_the_cost_of_a_training_step_counts_the_backward_twice(small_on_80_gb: Pretraining):
    with torch.device("meta"):
        net = small_on_80_gb.build(small_on_80_gb.trainer.datamodule)
    cost = small_on_80_gb.cost(net)
    assert cost.forward_flops == forward_flops(net, 0.75) and cost.training_flops == 3 * cost.forward_flops
    assert cost.activation_bytes == IMAGE and cost.tokens == 1024
