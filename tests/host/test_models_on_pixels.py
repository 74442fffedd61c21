"""Models that work on pixels: the samplers' exact forms, with ComfyUI's pixel_space VAE as with none."""

import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

SHAPE = (3, 32, 32)


class OnPixels:
    """The demo prior on pixels, as a user's graph has it, and measurements of its portraits."""

    def __init__(self, pack: ModuleType) -> None:
        self.pack, self.nodes = pack, pack.nodes
        self.model, clip, self.vae = self.nodes.demo.LoadDemoPrior.execute("pixels").args
        self.prompt = clip.encode_from_tokens_scheduled(clip.tokenize(""))

    def pictures(self, count: int) -> Tensor:
        return self.nodes.demo.DemoPictures.execute(0, count, "32 x 32").args[0]

    def measure(self, image: Tensor, bind: Any, sigma: float = 0.0) -> Any:
        recipe = self.nodes.types.OperatorRecipe("test", bind)
        return self.nodes.measurement.MeasureSimulate.execute(image, recipe, {"noise": "Gaussian", "sigma": sigma}, 0).args[0]

    def restore(self, measurement: Any, method: str = "C-PiGDM", quality: str = "fast") -> tuple[Tensor, float]:
        run = self.nodes.restore.Restore.execute
        return run(self.model, self.vae, self.prompt, measurement, method, quality, 0, 1.0).args

    def sample(self, sampler: Any, steps: int = 5) -> Tensor:
        """As SamplerCustom does; (1, 3, 32, 32) in [-1, 1]."""
        host = self.nodes.host
        sigmas = host.sigmas_of(self.model, steps, "ddim_uniform")
        return host.sample_latents(self.model, self.prompt, self.prompt, 1.0, sampler, sigmas, torch.zeros(1, *SHAPE), 0)


@pytest.fixture(scope="module")
def pixels(pack: ModuleType) -> OnPixels:
    import comfyui_posterior.nodes  # noqa: F401

    with torch.inference_mode():
        return OnPixels(pack)


@pytest.fixture
def box(pixels: OnPixels) -> Callable[[tuple[int, int, int]], Any]:
    keep = pixels.pack.operators.box_mask(SHAPE, (12, 14), (10, 9))
    return lambda shape: pixels.pack.operators.Mask(keep)


@torch.inference_mode()
def test_the_host_computes_what_the_network_does(pixels: OnPixels) -> None:
    """Every noise level, in ComfyUI's own UNet class, against the plain network."""
    from comfyui_posterior.prior.networks import denoise, load_pixels, noise_levels

    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    sigma = noise_levels().float()[[0, 200, 700, 999]]
    x = x * sigma[:, None, None, None]
    context, _ = pixels.prompt[0]
    expected = denoise(load_pixels(), x, sigma)
    given = pixels.model.model.apply_model(x, sigma, c_crossattn=context.expand(4, -1, -1))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["C-PiGDM", "PSLD"])
@torch.inference_mode()
def test_restore_takes_them(pixels: OnPixels, box: Callable, method: str) -> None:
    truth = pixels.pictures(2)
    measurement = pixels.measure(truth, box)
    image, residual = pixels.restore(measurement, method)
    keep = measurement.operator.A(torch.ones(1, *SHAPE))[0, 0] > 0
    assert residual == 0
    assert all(torch.equal(image[i][keep], truth[i][keep]) for i in range(2))


@pytest.mark.parametrize(("method", "gain"), [("C-PiGDM", 3.2), ("PSLD", 2.4)])
@torch.inference_mode()
def test_what_is_restored_is_nearer_to_the_truth(pixels: OnPixels, method: str, gain: float) -> None:
    """Portraits enlarged four times, against bicubic enlargement, mean over four."""
    truth = pixels.pictures(4)
    measurement = pixels.measure(truth, lambda shape: pixels.pack.operators.AreaDownscale(shape, 4), 0.02)
    image, _ = pixels.restore(measurement, method, "balanced")
    enlarged = interpolate(measurement.y.float() / 2 + 0.5, scale_factor=4, mode="bicubic").movedim(1, -1)
    psnr = [-10 * (picture.clamp(0, 1) - truth).square().mean((1, 2, 3)).log10().mean() for picture in (image, enlarged)]
    assert float(psnr[0] - psnr[1]) > gain  # measured: 3.48 and 2.81; C-PiGDM from the highest level 3.05


@torch.inference_mode()
def test_it_starts_where_the_noise_hides_the_hole(pixels: OnPixels, box: Callable, start_levels: list[float | None]) -> None:
    """Of 12 x 14 pixels of the state itself."""
    pixels.restore(pixels.measure(pixels.pictures(1), box))
    assert start_levels == pytest.approx([4.8])


WEIGHTS = [
    {"weight": "dual", "tau": 0.3, "eta": 2.0},
    {"weight": "paper", "w": 2.0, "jacobian": "vp", "eta": 0.0},
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=["dual", "paper"])
@torch.inference_mode()
def test_its_vae_is_as_good_as_none(pixels: OnPixels, box: Callable, weight: dict) -> None:
    """To the bit: with the pixel_space VAE, too, C-PiGDM takes its exact form in pixels, without steps through a decoder."""
    measurement = pixels.measure(pixels.pictures(1), box, 0.02)
    make = partial(pixels.nodes.samplers.SamplerCPiGDM.execute, measurement, "decoder", 2, 10, weight)
    with_vae, without = (pixels.sample(make(vae=vae).args[0]) for vae in (pixels.vae, None))
    assert torch.equal(with_vae, without)


@torch.inference_mode()
def test_a_blur_without_a_closed_form(pixels: OnPixels) -> None:
    """Functions of such an operator's spectrum would take thousands of iterations in each step: steps through the VAE do not."""
    operators = pixels.pack.operators
    truth = pixels.pictures(1)
    bind = lambda shape: operators.Blur(operators.motion_kernel(5.0, 30.0), shape, "reflect")  # noqa: E731
    measurement = pixels.measure(truth, bind, 0.004)
    assert not measurement.operator.exact
    make = partial(pixels.nodes.samplers.SamplerCPiGDM.execute, measurement, "decoder", 2, 100, vae=pixels.vae)
    latent = pixels.sample(make(WEIGHTS[0]).args[0])
    assert torch.equal(pixels.sample(make(WEIGHTS[0], vae=None).args[0]), latent)
    entries = measurement.y.numel()
    assert float(measurement.residual_norm(latent.double())) < 1.1 * measurement.sigma * entries**0.5
    assert pixels.restore(measurement)[0].shape == truth.shape
    weight = {"weight": "paper", "w": 2.0, "jacobian": "vp", "eta": 0.0}
    for vae in (pixels.vae, None):
        with pytest.raises(ValueError, match=r"^jacobian: works only for models on pixels and operators with a closed form"):
            make(weight, vae=vae)


@torch.inference_mode()
def test_bayes_without_the_jacobian_is_not_for_noisy_blurs(pixels: OnPixels) -> None:
    """There 13 dB were measured, far below the photo's own 30. From a small photo it gains."""
    operators, truth = pixels.pack.operators, pixels.pictures(1)
    make = partial(pixels.nodes.samplers.SamplerCPiGDM.execute, consistency="decoder", inner_steps=2, last_steps=10)
    weight = {"weight": "bayes", "tau": 0.3, "jacobian": "off", "eta": 0.0}
    blur = lambda shape: operators.Blur(operators.gaussian_kernel(1.0), shape, "reflect")  # noqa: E731
    noisy, clean = (pixels.measure(truth, blur, sigma) for sigma in (0.02, 0.0))
    for vae in (pixels.vae, None):
        with pytest.raises(
            ValueError, match=r"^weight: bayes without the Jacobian amplifies the noise of a blurred photo"
        ) as failed:
            make(noisy, weight=weight, vae=vae)
        assert ("connect its VAE" in str(failed.value)) == (vae is None)
        make(clean, weight=weight, vae=vae)
    small = pixels.measure(truth, lambda shape: operators.AreaDownscale(shape, 2), 0.02)
    image = pixels.sample(make(small, weight=weight, vae=pixels.vae).args[0], 10)
    large = interpolate((small.y + 1) / 2, size=truth.shape[1:3], mode="bicubic").movedim(1, -1)
    psnr = [-10 * float((v - truth).square().mean().log10()) for v in ((image.movedim(1, -1) + 1) / 2, large)]
    assert psnr[0] > psnr[1] + 1, psnr


@torch.inference_mode()
def test_a_picture_of_any_size(pixels: OnPixels) -> None:
    """Models on pixels cut pictures into patches: sides that do not fit are widened, for ComfyUI would pad from the other edge."""
    seen = []

    def note(apply: Callable, given: dict) -> Tensor:
        seen.append(tuple(given["input"].shape))
        return apply(given["input"], given["timestep"], **given["c"])

    truth = pixels.pictures(1)[:, :28, 2:32]
    measurement = pixels.measure(truth, lambda shape: pixels.pack.operators.AreaDownscale(shape, 2))
    plain, pixels.model = pixels.model, pixels.model.clone()
    pixels.model.set_model_unet_function_wrapper(note)
    try:
        image, residual = pixels.restore(measurement)
    finally:
        pixels.model = plain
    assert set(seen) == {(1, 3, 32, 32)}
    assert image.shape == truth.shape
    assert residual < 1e-6


@pytest.mark.parametrize(("sides", "said"), [((64, 32), "32 x 64"), ((40, 32), "32 x 64"), ((32, 32), ""), ((28, 30), "")])
@torch.inference_mode()
def test_a_size_that_the_prior_does_not_know_is_said(pixels: OnPixels, sides: tuple[int, int], said: str) -> None:
    """The run's own: the second is widened to whole patches of 32."""
    image = interpolate(pixels.pictures(1).movedim(-1, 1), size=sides).movedim(1, -1)
    measurement = pixels.measure(image, lambda shape: pixels.pack.operators.AreaDownscale(shape, 2))
    out = pixels.nodes.restore.Restore.execute(pixels.model, pixels.vae, pixels.prompt, measurement, "C-PiGDM", "fast", 0, 1.0)
    found = re.findall(
        r"the demo prior knows portraits of 32 x 32 pixels, and this run works on (.*), margins", out.ui["text"][0]
    )
    assert found == [said] * bool(said)


@pytest.mark.parametrize(
    ("size", "said"), [((128, 128), False), ((160, 128), False), ((168, 128), True), ((128, 96), True), ((256, 256), True)]
)
def test_how_far_a_size_may_be_off(pixels: OnPixels, size: tuple[int, int], said: bool) -> None:
    latents, _, _ = pixels.nodes.demo.LoadDemoPrior.execute("latents").args
    size_note = pixels.nodes.host.demo_models.size_note
    assert bool(size_note(latents.clone(), size)) == said
    latents.attachments.clear()  # as of any other model
    assert size_note(latents, size) == ""
    assert size_note(latents, (2048, 2048)) == ""
    assert size_note(latents, (3072, 2048)).startswith("this run works on 2048 x 3072 pixels at once")


@torch.inference_mode()
def test_the_precision_of_its_vae_does_not_matter(pixels: OnPixels, box: Callable) -> None:
    """bfloat16 on most GPUs, steps of 1/256 in a picture: Restore goes past it."""
    measurement = pixels.measure(pixels.pictures(1), box)
    expected, _ = pixels.restore(measurement)
    pixels.vae.vae_dtype, before = torch.bfloat16, pixels.vae.vae_dtype
    try:
        image, _ = pixels.restore(measurement)
    finally:
        pixels.vae.vae_dtype = before
    assert torch.equal(image, expected)
    assert 0 <= float(image.min()) < float(image.max()) <= 1


@torch.inference_mode()
def test_what_does_not_fit_is_refused(pixels: OnPixels, box: Callable) -> None:
    latents, _, vae = pixels.nodes.demo.LoadDemoPrior.execute().args
    measurement = pixels.measure(pixels.pictures(1), box)
    restore = pixels.nodes.restore.Restore.execute
    for model, other in ((pixels.model, vae), (latents, pixels.vae)):
        with pytest.raises(ValueError, match=r"^vae: its latents have \d channels, the model's have \d; connect the VAE"):
            restore(model, other, pixels.prompt, measurement, "C-PiGDM", "fast", 0, 1.0)
    large = pixels.measure(torch.rand(1, 64, 64, 3), lambda shape: pixels.pack.operators.Identity(shape), 0.1)
    sampler = pixels.nodes.samplers.SamplerPSLD.execute(large, {"rule": "line search", "omega": 0.8}, vae=pixels.vae).args[0]
    with pytest.raises(ValueError, match=r"^latent_image: got \(3, 32, 32\) .* but the measurement needs \(3, 64, 64\)"):
        pixels.sample(sampler)


@torch.inference_mode()
def test_memory_is_estimated(pixels: OnPixels, box: Callable) -> None:
    estimate = partial(pixels.nodes.memory.MemoryEstimate.execute, pixels.model, 1, False)
    measurement = pixels.measure(pixels.pictures(1), box)
    with_vae, without = (estimate(vae, measurement).args[:2] for vae in (pixels.vae, None))
    assert with_vae == without
    assert 0 < with_vae[1] <= with_vae[0] < 2
