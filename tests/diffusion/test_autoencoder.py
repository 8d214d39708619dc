"""The autoencoder: quantiser, KL, scale and shift, against hand computations and independent formulas."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer

from common.errors import InputError
from diffusion import autoencoder
from diffusion.autoencoder import Autoencoder

TINY = {"base": 8, "groups": 4, "multipliers": (1, 2), "res_blocks": 1, "codebook_size": 32, "attention": "middle"}


def tiny(kind: str = "vq", **options) -> Autoencoder:
    torch.manual_seed(0)
    net = Autoencoder(kind, **{**TINY, **options})
    if kind == "vq":
        torch.nn.init.normal_(net.model.quantize.embedding.weight)  # spread as trained codes are
    return net


def with_codes(codes: list[list[float]], **options) -> Autoencoder:
    net = tiny(channels=len(codes[0]), codebook_size=len(codes), **options)
    net.model.quantize.embedding.weight.data = torch.tensor(codes)
    return net


# Shapes and precision


@pytest.mark.parametrize("kind, moments", [("vq", 4), ("kl", 8)])
def test_shapes_on_images_that_are_not_square(kind, moments):
    net = tiny(kind, image_channels=1)
    images = torch.rand(3, 1, 8, 12) * 2 - 1
    assert net.factor == 2 and net.channels == 4 and net.kind == kind
    assert net.moments(images).shape == (3, moments, 4, 6)
    made = net(images, torch.randn(3, 4, 4, 6))
    assert made.images.shape == images.shape and made.latents.shape == (3, 4, 4, 6)
    if kind == "vq":
        assert made.codebook_loss.shape == () and made.kl is None and made.indices.shape == (3, 4, 6)
    else:
        assert made.codebook_loss is None and made.kl.shape == (3,) and made.indices is None


def test_the_published_sizes():
    with torch.device("meta"):
        vq = Autoencoder()
        kl = Autoencoder("kl", multipliers=(1, 2, 4, 4), attention="middle")
        demo = Autoencoder(base=16, groups=8, multipliers=(1, 2), image_channels=1, codebook_size=64)
    assert (vq.factor, vq.channels, demo.factor) == (8, 4, 2)
    assert vq.model.quantize.embedding.weight.shape == (16384, 4)
    # Costs are counted without computing.
    assert vq(torch.empty(2, 3, 64, 96, device="meta")).indices.shape == (2, 8, 12)
    # Stable Diffusion's published autoencoder: 83,653,863 weights in 248 tensors.
    assert (sum(p.numel() for p in kl.model.parameters()), len(kl.model.state_dict())) == (83_653_863, 248)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_every_parameter_receives_a_gradient(kind):
    net = tiny(kind, attention="coarsest")
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    made = net(images, torch.randn(2, 4, 4, 4))
    loss = (made.images - images).square().mean() + (made.codebook_loss if kind == "vq" else made.kl.mean())
    loss.backward()
    # A constant added to all keys moves no attention: that gradient is 0 but for rounding.
    silent = [name for name, p in net.named_parameters()
              if (p.grad is None or not p.grad.any()) and not name.endswith("to_k.bias")]
    assert not silent


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_training_and_use_are_the_same_computation(kind):
    net, images, noise = tiny(kind), torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 4, 4)
    made = net(images, noise)
    latents = net.sample(net.moments(images), noise)
    torch.testing.assert_close(made.latents, latents)
    torch.testing.assert_close(made.images, net.decode(latents))


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_under_autocast_all_but_the_convolutions_is_fp32(kind):
    net, images = tiny(kind), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        made = net(images, torch.randn(2, 4, 4, 4))
        moments = net.moments(images)
    assert made.images.dtype == torch.bfloat16  # autocast was on
    assert moments.dtype == made.latents.dtype == torch.float32
    assert (made.codebook_loss if kind == "vq" else made.kl).dtype == torch.float32


# The quantiser


@pytest.mark.parametrize("autocast", [False, True])
def test_the_nearest_code_where_latents_lie_far_from_0(autocast, monkeypatch):
    """Codes 100 from the origin: |z|^2 + |e|^2 - 2ze in fp32 errs in 7 % of these cells, bf16 in nearly all."""
    monkeypatch.setattr(autoencoder, "QUANTISED_AT_ONCE", 100)  # the last piece is a part
    torch.manual_seed(1)
    codes, latents = torch.randn(512, 4) + 100, torch.randn(2, 4, 16, 16) + 100
    net = with_codes(codes.tolist())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chosen, _, indices = net.quantise(latents)
    distances = (latents.double().movedim(1, -1)[..., None, :] - codes.double()).square().sum(-1)
    assert torch.equal(indices, distances.argmin(-1))
    torch.testing.assert_close(chosen, codes[indices].movedim(-1, 1))


def test_the_gradient_passes_straight_through_the_codes():
    net = with_codes([[0.0, 0.0], [1.0, 1.0]])
    latents = torch.tensor([0.9, 0.2]).view(1, 2, 1, 1).requires_grad_()
    chosen, _, indices = net.quantise(latents)
    (chosen * torch.tensor([3.0, -5.0]).view(1, 2, 1, 1)).sum().backward()
    assert indices.item() == 1
    assert latents.grad.flatten().tolist() == [3.0, -5.0]
    assert net.model.quantize.embedding.weight.grad is None


@pytest.mark.parametrize("legacy, on_latents, on_codes", [(False, 0.25, 1.0), (True, 1.0, 0.25)])
def test_both_terms_of_the_codebook_loss_by_hand(legacy, on_latents, on_codes):
    """z = (3, 1), nearest code e = (1, 0): (z - e)^2 has the mean 2.5, and d/dz of it is (z - e) = (2, 1)."""
    net = with_codes([[1.0, 0.0], [9.0, 9.0]], legacy=legacy)
    latents = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
    _, loss, _ = net.quantise(latents)
    loss.backward()
    assert loss.item() == pytest.approx(1.25 * 2.5)
    assert latents.grad.flatten().tolist() == pytest.approx([on_latents * 2, on_latents * 1])
    codes = net.model.quantize.embedding.weight.grad
    assert codes[0].tolist() == pytest.approx([-on_codes * 2, -on_codes * 1])
    assert not codes[1].any()


@pytest.mark.parametrize("legacy", [False, True])
def test_the_quantiser_equals_that_of_diffusers(legacy):
    net = tiny(legacy=legacy, beta=0.4)
    theirs = VectorQuantizer(32, 4, beta=0.4, legacy=legacy, sane_index_shape=True)
    theirs.embedding.weight.data = net.model.quantize.embedding.weight.data.clone()
    latents = torch.randn(2, 4, 3, 5)
    expected, expected_loss, (_, _, expected_indices) = theirs(latents)
    chosen, loss, indices = net.quantise(latents)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(chosen, expected)
    torch.testing.assert_close(loss, expected_loss)


def test_vq_decodes_codes_and_draws_nothing():
    net = tiny()
    latents = torch.randn(2, 4, 4, 4)
    nearby = net.quantise(latents)[0] + 1e-4
    torch.testing.assert_close(net.decode(latents), net.decode(nearby))
    assert net.sample(latents, torch.randn(2, 4, 4, 4)) is latents


# KL


def test_kl_is_that_of_normal_distributions_in_nats_of_an_image():
    net, moments = tiny("kl"), torch.randn(3, 8, 5, 5)
    mean, logvar = moments.chunk(2, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, logvar.mul(0.5).exp()), normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(net._kl(moments), expected)


def test_kl_samples_with_the_callers_noise_and_clamps_the_variance():
    net = tiny("kl", channels=1)
    mean, noise = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, -1.0, 2.0, 1.0])
    logvar = torch.tensor([0.0, math.log(4.0), 99.0, -99.0])
    moments = torch.stack([mean, logvar])[None, :, None]  # (1, 2, 1, 4)
    sampled = net.sample(moments, noise.view(1, 1, 1, 4)).flatten()
    torch.testing.assert_close(sampled, torch.tensor([2.0, 0.0, 3.0 + 2 * math.exp(10.0), 4.0 + math.exp(-15.0)]))
    assert net.sample(moments).flatten().tolist() == mean.tolist()


# Scale and shift


def test_measured_latents_have_no_mean_and_unit_variance():
    net = tiny()
    spread, centre = torch.tensor([0.1, 1.0, 2.0, 5.0]).view(4, 1, 1), torch.tensor([7.0, -3.0, 0.0, 100.0])
    moments = torch.randn(50, 4, 6, 6) * spread + centre.view(4, 1, 1)
    net.measure(moments.split(16))  # batches of different sizes weigh by their images
    latents = net.normalise(moments)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert latents.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    # One scale: the channels keep their proportions.
    torch.testing.assert_close(latents.std((0, 2, 3)) / latents.std((0, 2, 3))[1], spread.flatten(),
                               rtol=0.1, atol=0)
    torch.testing.assert_close(net.denormalise(latents), moments, rtol=1e-5, atol=1e-4)
    before = net.scale.clone()
    net.measure([moments])
    torch.testing.assert_close(net.scale, before)


def test_the_variance_of_kl_latents_is_that_of_means_and_draws():
    """Means -1 and 1 (variance 1), each drawn with variance 3: standard deviation 2."""
    net = tiny("kl", channels=1)
    mean = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1) + 5.0
    net.measure([torch.cat([mean, torch.full_like(mean, math.log(3.0))], 1)])
    assert net.scale.item() == pytest.approx(0.5)
    assert net.shift.flatten().tolist() == pytest.approx([5.0])


def test_unmeasured_latents_stay_as_they_are_and_the_scale_is_saved():
    net, latents = tiny(), torch.randn(2, 4, 3, 3)
    assert torch.equal(net.normalise(latents), latents) and torch.equal(net.denormalise(latents), latents)
    net.measure([latents])
    other = tiny()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.normalise(latents), net.normalise(latents))
    assert not torch.equal(net.normalise(latents), latents)


def test_a_scale_that_cannot_be_measured():
    with pytest.raises(InputError, match="at least one image"):
        tiny().measure([])
    for value in (0.0, 0.3, math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="standard deviation"):
            tiny().measure([torch.full((3, 4, 2, 2), value)])
    rounding = torch.full((3, 4, 2, 2), 5.0)
    rounding[0] = 5.0000005
    with pytest.raises(FloatingPointError, match="collapsed"):
        tiny().measure([rounding])


# Fingerprint


def test_the_fingerprint_tells_all_that_latents_depend_on():
    def differently(change) -> str:
        net = tiny()
        change(net)
        return net.fingerprint()

    def last_bit(net):
        weight = net.model.encoder.conv_in.weight.data.view(-1)
        weight[3] = weight[3].nextafter(torch.tensor(9.0))

    prints = [
        tiny().fingerprint(),
        tiny(groups=2).fingerprint(),  # the same weights in the same shapes
        differently(last_bit),
        differently(lambda net: net.scale.fill_(2.0)),
        differently(lambda net: net.shift[1].fill_(2.0)),
        tiny("kl").fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    # The losses' weights and a way through a state dict change nothing.
    assert tiny(beta=0.5, legacy=True).fingerprint() == prints[0]
    again = Autoencoder(**TINY)
    again.load_state_dict(tiny().state_dict())
    assert again.fingerprint() == prints[0]


# Mistakes


@pytest.mark.parametrize("options, said", [
    ({"kind": "vae"}, "model.kind='vae' is not known; choose one of vq, kl"),
    ({"attention": "all"}, "model.attention='all' is not known"),
    ({"channels": 0}, "model.channels=0 must be at least 1"),
    ({"codebook_size": 0}, "model.codebook_size=0 must be at least 1"),
    ({"multipliers": ()}, "model.multipliers=[] must name at least one level"),
    ({"multipliers": (1, 0)}, "model.multipliers=[1, 0] must name at least one level, each at least 1"),
    ({"base": 16, "groups": 12}, "model.groups=12 does not divide base=16; groups=4 does"),
    ({"beta": -1.0}, "model.beta=-1.0 must be at least 0"),
])
def test_options_that_make_no_net(options, said):
    with pytest.raises(InputError) as error:
        Autoencoder(**{**TINY, **options})
    assert said in str(error.value)


@pytest.mark.parametrize("shape, said", [
    ((1, 1, 8, 8), "images of 1 channels do not fit image_channels=3"),
    ((1, 3, 8, 9), "images of 8x9 pixels cannot be reduced by 2"),
])
def test_images_that_do_not_fit(shape, said):
    with pytest.raises(InputError, match=said):
        tiny().moments(torch.zeros(shape))
