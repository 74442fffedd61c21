"""The tiny checkpoints are what they say, seen through the real ComfyUI's own loaders, samplers and nodes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.tiny_checkpoints import SPECS, conditioning, write_checkpoint, write_controlnet, write_lora
from torch import Tensor

ARCHS = {  # model_config, BaseModel, model_type, as ComfyUI calls them
    "sd15": ("SD15", "BaseModel", "EPS"),
    "sd21v": ("SD20", "BaseModel", "V_PREDICTION"),
    "sdxl_vega": ("Segmind_Vega", "SDXL", "EPS"),
    "sdxl": ("SDXL", "SDXL", "EPS"),
    "sd3": ("SD3", "SD3", "FLOW"),
}


@pytest.fixture(autouse=True)
def _as_a_node() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def _nothing_is_missing(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A weight that a loader misses is only logged, and stays what the memory happened to hold."""
    yield
    said = [record.getMessage() for when in ("setup", "call") for record in caplog.get_records(when)]
    assert not [text for text in said if any(word in text.lower() for word in ("missing", "not loaded", "left over"))]


def sample(comfy: ModuleType, model: Any, arch: str, sampler: Any = None, positive: list | None = None) -> Tensor:
    """Two steps of a stock sampler at 64 x 64 pixels, guidance 3."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or conditioning(arch, seed=1), conditioning(arch, seed=2))
    guider.set_cfg(3.0)
    latent = torch.zeros(1, SPECS[arch].latent_channels, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    return guider.sample(noise, latent, sampler or comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_architecture_is_recognised_and_samples(
    arch: str, comfy: ModuleType, tiny: Callable[..., Path], load: Callable
) -> None:
    model, clip, vae = load(tiny(arch))
    config, base, model_type = ARCHS[arch]
    assert type(model.model.model_config).__name__ == config
    assert type(model.model).__name__ == base
    assert model.model.model_type == comfy.model_base.ModelType[model_type]
    assert clip is None
    assert vae.latent_channels == SPECS[arch].latent_channels
    assert all(weight.is_inference() for weight in model.model.diffusion_model.parameters())

    latent = sample(comfy, model, arch)
    assert latent.shape == (1, SPECS[arch].latent_channels, 8, 8)
    assert latent.isfinite().all()
    assert latent.std() > 0.1
    assert not torch.equal(latent, sample(comfy, model, arch, positive=conditioning(arch, seed=3)))  # the prompt matters
    image = vae.decode(latent)
    assert image.shape == (1, 64, 64, 3)
    assert vae.encode(image).shape == latent.shape


@pytest.mark.parametrize("arch", ["sd15", "sd21v"])
def test_two_levels(arch: str, comfy: ModuleType, tiny: Callable[..., Path], load: Callable) -> None:
    model, _, vae = load(tiny(arch, levels=2, vae=None))
    assert type(model.model.model_config).__name__ == ARCHS[arch][0]
    assert model.model.model_config.unet_config["num_res_blocks"] == [1, 1]
    assert vae.first_stage_model is None
    assert sample(comfy, model, arch).isfinite().all()


def test_float16_file(comfy: ModuleType, tiny: Callable[..., Path], load: Callable) -> None:
    full, half = (load(tiny("sd15", dtype=dtype))[0] for dtype in (torch.float32, torch.float16))
    assert half.model.diffusion_model.dtype == torch.float32  # what ComfyUI makes of it on a CPU
    torch.testing.assert_close(sample(comfy, half, "sd15"), sample(comfy, full, "sd15"), rtol=0.05, atol=0.05)


def test_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    files = [write_checkpoint(tmp_path / f"{i}", "sd3", vae=None, seed=seed).read_bytes() for i, seed in enumerate((0, 0, 1))]
    assert files[0] == files[1] != files[2]


def test_text_encoder(comfy: ModuleType, tiny: Callable[..., Path], load: Callable) -> None:
    model, clip, _ = load(tiny("sd15", clip=True, vae=None, dtype=torch.float16))
    positive, other = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", "two dogs"))
    assert positive[0][0].shape == conditioning("sd15")[0][0].shape
    latents = [sample(comfy, model, "sd15", positive=prompt) for prompt in (positive, other)]
    assert latents[0].isfinite().all()
    assert not torch.equal(*latents)


@pytest.mark.parametrize("arch", ["sd15", "sd3"])
def test_box_codec_is_box_mean_and_nearest_upsampling(arch: str, tiny: Callable[..., Path], load: Callable) -> None:
    vae = load(tiny(arch, vae="box"))[2]
    image = torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    image[0, :8, :8], image[1, -8:, -8:] = 0.0, 1.0
    mean = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
    upsampled = mean.repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)

    latent = vae.encode(image)
    channels = [c % 3 for c in range(SPECS[arch].latent_channels)]
    torch.testing.assert_close(latent, 5 * (2 * mean[:, channels] - 1), rtol=0, atol=2e-5)
    torch.testing.assert_close(vae.decode(latent), upsampled, rtol=0, atol=4e-6)


def test_box_codec_is_affine_beyond_the_range_of_images(tiny: Callable[..., Path], load: Callable) -> None:
    codec = load(tiny("sd15", vae="box"))[2].first_stage_model
    image = 10 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 5  # [-1, 1] is the nominal range
    mean = torch.nn.functional.avg_pool2d(image, 8)
    torch.testing.assert_close(codec.encode(image)[:, :3], 5 * mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        codec.decode(codec.encode(image)), mean.repeat_interleave(8, -1).repeat_interleave(8, -2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("arch", ["sd15", "sd3"])
def test_kl_codec(arch: str, tiny: Callable[..., Path], load: Callable) -> None:
    vae = load(tiny(arch, vae="kl"))[2]
    assert type(vae.first_stage_model).__name__ == "AutoencoderKL"
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    latent = vae.encode(image)
    assert latent.shape == (1, SPECS[arch].latent_channels, 8, 8)
    torch.testing.assert_close(vae.encode(image), latent)  # the mode, not a sample
    decoded = vae.decode(latent)
    assert decoded.shape == image.shape
    assert decoded.isfinite().all()
    assert decoded.std() > 0.1


@pytest.mark.parametrize(("arch", "of_normal_prior"), [("sd21v", True), ("sd15", False)])
def test_denoiser_with_a_zero_last_layer(
    arch: str, of_normal_prior: bool, comfy: ModuleType, tiny: Callable[..., Path], load: Callable
) -> None:
    seen = []

    def record(model: Callable, x: Tensor, sigmas: Tensor, extra_args: dict, **_: Any) -> Tensor:
        for sigma in (0.05, 0.7, 3.0, 14.0):
            seen.append((x * sigma, sigma, model(x * sigma, x.new_full((len(x),), sigma), **extra_args)))
        return x

    sample(comfy, load(tiny(arch, zero_out=True))[0], arch, comfy.samplers.KSAMPLER(record))
    assert len(seen) == 4
    for x, sigma, denoised in seen:
        torch.testing.assert_close(denoised, x / (1 + sigma**2) if of_normal_prior else x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["sd15", "sd21v", "sdxl_vega"])
def test_lora_applies(arch: str, comfy: ModuleType, tiny: Callable[..., Path], load: Callable, tmp_path: Path) -> None:
    model = load(tiny(arch))[0]
    lora = comfy.utils.load_torch_file(str(write_lora(tmp_path / "lora.safetensors", arch)))
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(with_lora.patches) == 3
    plain = sample(comfy, model, arch)
    changed = sample(comfy, with_lora, arch)
    assert changed.isfinite().all()
    assert (changed - plain).abs().max() > 0.01 * plain.abs().max()
    torch.testing.assert_close(sample(comfy, model, arch), plain)  # taken out again


@pytest.mark.parametrize("levels", [1, 2])
def test_controlnet_applies(levels: int, comfy: ModuleType, tiny: Callable[..., Path], load: Callable, tmp_path: Path) -> None:
    from nodes import ControlNetApplyAdvanced

    model = load(tiny("sd15", levels=levels, vae=None))[0]
    controlnet = comfy.controlnet.load_controlnet(str(write_controlnet(tmp_path / "control.safetensors", levels=levels)))
    assert isinstance(controlnet, comfy.controlnet.ControlNet)

    def controlled(strength: float, seed: int) -> Tensor:
        image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))
        conds = conditioning("sd15", seed=1), conditioning("sd15", seed=2)
        positive, _ = ControlNetApplyAdvanced().apply_controlnet(*conds, controlnet, image, strength, 0.0, 1.0)
        return sample(comfy, model, "sd15", positive=positive)

    plain, one, other = controlled(0.0, 0), controlled(1.0, 0), controlled(1.0, 1)
    assert one.isfinite().all()
    assert (one - plain).abs().max() > 0.01 * plain.abs().max()
    assert (one - other).abs().max() > 0.001 * plain.abs().max()  # and it depends on its picture
