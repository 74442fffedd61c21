"""The autoencoder between scaled latents and images in [-1, 1], and whether it fits the model and the measurement."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .faults import check_finite
from .internals import without
from .readout import throw_if_interrupted
from .recompute import recomputed

# Pixels: ComfyUI's models on pixels cut a picture into patches, of 16 in PixelDiT, and pad what does not fit from the opposite edge.
PATCH = 32


@dataclass(frozen=True, eq=False)
class Codec:
    """A VAE's network called directly, in the scaled latents the diffusion model works in.

    `VAE.decode` and `VAE.encode` must not be used here: they clamp in place (no gradient where it matters), move the result
    to the CPU, and on lack of memory fall back to tiles without a gradient and without a word.
    """

    network: torch.nn.Module
    latent_format: Any
    device: torch.device
    dtype: torch.dtype
    recompute: bool = False  # keep only the input of a call, and run it again in the backward pass

    def decode(self, z: Tensor) -> Tensor:
        """(B, c, h, w) scaled latents -> (B, 3, H, W) in [-1, 1], not clamped."""
        return self._run(self.network.decode, self.latent_format.process_out(z)).to(z)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, c, h, w) scaled latents: the mean, without sampling."""
        return self.latent_format.process_in(self._run(self.network.encode, image).to(image))

    def _run(self, function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        throw_if_interrupted()
        check_finite(given, "what is given to the VAE has NaN or infinite values; the correction towards the photo went astray")
        result = (recomputed(function) if self.recompute else function)(given.to(self.device, self.dtype))
        if given.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            raise ValueError("vae: its output has no gradient; a node that patches the VAE computes without one, remove it")
        check_finite(result, "the VAE returned NaN or infinite values; start ComfyUI with --fp32-vae, or use another VAE")
        return result


class Pixels(torch.nn.Module):
    """The network of a `Codec` for models that work on pixels, without a VAE: what is decoded is what there is."""

    def decode(self, z: Tensor) -> Tensor:
        return z

    def encode(self, image: Tensor) -> Tensor:
        return image


def check_vae(vae: Any, latent_format: Any = None) -> None:
    """Refuse a VAE that is missing, is not a picture VAE in [-1, 1], or has other channels than the model."""
    if getattr(vae, "first_stage_model", None) is None:
        raise ValueError("vae: there is no VAE in it; the checkpoint carries none. Load one with Load VAE")
    ratio = getattr(vae, "upscale_ratio", None)
    if vae.latent_dim != 2 or not isinstance(ratio, int):
        raise ValueError("vae: it is a video or audio VAE; a picture VAE (SD 1.x, SD 2.x, SDXL, SD3, Flux) is needed")
    ends = [float(vae.process_input(torch.tensor(value))) for value in (0.0, 1.0)]
    if vae.output_channels != 3 or ends != [-1.0, 1.0]:
        raise ValueError(
            "vae: it does not work on RGB pictures in [-1, 1]; a picture VAE (SD 1.x, SD 2.x, SDXL, SD3, Flux) is needed"
        )
    if latent_format is not None and vae.latent_channels != latent_format.latent_channels:
        raise ValueError(
            f"vae: its latents have {vae.latent_channels} channels, the model's have {latent_format.latent_channels}; "
            "connect the VAE that belongs to this model to the PSLD Sampler, C-PiGDM Sampler or Restore node"
        )


def works_on_pixels(vae: Any) -> bool:
    """Whether this is ComfyUI's "pixel_space" VAE, for models whose latents are pictures in [-1, 1].

    It changes nothing but the precision (bfloat16 on most GPUs), and clamps what it decodes.
    """
    with without("VAE for models that work on pixels"):
        from comfy.pixel_space_convert import PixelspaceConversionVAE

        return isinstance(getattr(vae, "first_stage_model", None), PixelspaceConversionVAE)
    return False


def latent_size(vae: Any, in_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of the latent whose decoded picture has shape in_shape; refuse a size no latent has."""
    check_vae(vae)
    channels, height, width = in_shape
    ratio = vae.upscale_ratio
    if channels != 3:
        raise ValueError(f"measurement: the restored picture has {channels} channels; this VAE makes RGB pictures, with 3")
    if height % ratio or width % ratio:
        raise ValueError(
            f"measurement: the restored picture would be {width} x {height}, but this VAE makes pictures whose sides are multiples of "
            f"{ratio}. Crop or pad the photo so that they become so, for example {-(-width // ratio) * ratio} x "
            f"{-(-height // ratio) * ratio}; with a downscale operator the photo's own sides are that divided by the factor"
        )
    return vae.latent_channels, height // ratio, width // ratio


def side_multiple(vae: Any, model: Any) -> int:
    """What the sides of a picture must be multiples of, for the VAE and for the model's patches.

    The host fills a patch that reaches over the edge from the opposite one, whose pixels would show there.
    """
    check_vae(vae)
    if works_on_pixels(vae):
        return PATCH
    patch = getattr(model.model.diffusion_model, "patch_size", 1)
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    return vae.upscale_ratio * (patch if isinstance(patch, int) else 1)


def check_sizes(x: Tensor, measurement: Any, vae: Any) -> None:
    """Refuse a latent whose decoded picture is not the one the measurement was made of."""
    in_shape = measurement.operator.in_shape
    expected = tuple(in_shape) if vae is None else latent_size(vae, in_shape)
    if tuple(x.shape[1:]) != expected:
        if vae is None:
            raise ValueError(
                f"vae: is not connected to the sampler node, and latent_image, {tuple(x.shape[1:])} (channels, height, width), is not a "
                f"picture of pixels, {expected}, which a model without a VAE works on. Connect the VAE"
            )
        wanted = f"the measurement needs {expected}. Take the latent from a Start Latent node with the sampler's VAE"
        raise ValueError(f"latent_image: got {tuple(x.shape[1:])} (channels, height, width), but {wanted}")
    if len(measurement.y) not in (1, len(x)):
        raise ValueError(f"latent_image: got a batch of {len(x)} for a measurement of {len(measurement.y)}; they must be equal")
