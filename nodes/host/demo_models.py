"""MODEL, CLIP and VAE objects around the demo prior's small networks."""

from typing import Any

import torch
from torch import Tensor

KNOWS = "posterior_knows"  # attachment of a MODEL: side in pixels of the pictures that it was trained on
TOLERATED = 1.25  # between that side and a run's: small margins and crops need no warning
LARGE = 2048**2  # pixels, of other models; those of SD 1.x to SD3 were trained on 512 x 512 to 1024 x 1024


def slim_sd15(unet_state: dict[str, Tensor], side: int) -> Any:
    """A MODEL around ComfyUI's own SD 1.x UNet at another width, with nothing registered in ComfyUI.

    Args:
        unet_state: keys and shapes of an SD 1.x UNet, without a prefix; of 4 channels for SD's latents, of 3 for pictures in [-1, 1].
        side: of the pictures that it was trained on, pixels; runs at other sizes say so in their read-out.
    """
    import comfy.latent_formats
    import comfy.model_detection as detection
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models import SD15

    width, channels = unet_state["input_blocks.0.0.weight"].shape[:2]

    class Slim(SD15):
        unet_config = {**SD15.unet_config, "model_channels": width}
        # ComfyUI has no plainer format of pixels than that of its first model on them.
        latent_format = comfy.latent_formats.ChromaRadiance if channels == 3 else SD15.latent_format

    config = Slim(detection.detect_unet_config(unet_state, ""))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(unet_state, "", device=mm.unet_offload_device())
    model.load_model_weights(dict(unet_state), "")
    # Never paged: it is small, and then it needs no twin.
    patcher = ModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    patcher.set_attachments(KNOWS, side)
    return patcher


def size_note(patcher: Any, size: tuple[int, int]) -> str:
    """What to say of a run's (height, width) that a demo prior does not know, or hardly any other model; "" for all others."""
    side = patcher.attachments.get(KNOWS)
    if side is None and size[0] * size[1] > LARGE:
        return (
            f"this run works on {size[1]} x {size[0]} pixels at once, far more than a model of pictures of 512 x 512 to 1024 x 1024 knows: it "
            "takes long and much memory, and subjects may repeat. Take a smaller photo, a part of it, or a lower factor"
        )
    if side is None or max(*size, side) <= TOLERATED * min(*size, side):
        return ""
    return (
        f"the demo prior knows portraits of {side} x {side} pixels, and this run works on {size[1]} x {size[0]}, margins included: the "
        f"result can agree with the photo and still be a wrong picture. Give it pictures of {side} x {side}, or take your own model"
    )


def picture_vae(network: torch.nn.Module, taesd_state: dict[str, Tensor]) -> Any:
    """A VAE, float32, around a network with `encode` and `decode` between RGB in [-1, 1] and raw latents.

    Args:
        network: used in place of the one ComfyUI builds.
        taesd_state: a stock TAESD of the same latents, from which ComfyUI sets up everything around the network.
    """
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    vae = VAE(sd=taesd_state, dtype=torch.float32)
    # Convolutions this narrow run a third faster in channels_last.
    vae.first_stage_model = network.to(vae.patcher.offload_device, torch.float32, memory_format=torch.channels_last)
    mm.archive_model_dtypes(network)
    vae.patcher = ModelPatcher(network, load_device=vae.device, offload_device=vae.patcher.offload_device)
    return vae


def pixel_vae() -> Any:
    """ComfyUI's own VAE for models that work on pixels; Load VAE has it as "pixel_space"."""
    from comfy.sd import VAE

    return VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)


def null_clip(channels: int = 768) -> Any:
    """A CLIP that takes any text and gives zeros: for a model that was trained without text."""
    from comfy.sd import CLIP
    from comfy.sd1_clip import SD1Tokenizer

    class NullText(torch.nn.Module):
        def __init__(self, device: Any, dtype: Any, model_options: dict[str, Any]) -> None:
            super().__init__()
            self.dtypes = {torch.float32}

        def set_clip_options(self, options: dict[str, Any]) -> None:
            pass

        def reset_clip_options(self) -> None:
            pass

        def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor]:
            length = sum(len(chunk) for chunk in tokens["l"])
            return torch.zeros((1, length, channels)), torch.zeros((1, channels))

    class Target:
        params: dict[str, Any] = {}
        clip = NullText
        tokenizer = SD1Tokenizer

    return CLIP(Target, model_options={"dtype": torch.float32})
