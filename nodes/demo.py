"""The demo prior and its pictures: everything runs as installed, and one swapped node brings in the user's own model."""

import torch
from comfy_api.latest import io
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..prior.draw import VALIDATION_SEED, draw
from ..prior.export import LATENT_SCALE, comfy_unet_state, comfy_vae_state
from ..prior.networks import PIXEL_SIDE, Autoencoder, load, load_pixels
from . import host
from .types import CATEGORY

SIDE = 128  # of the portraits as drawn
PRIORS = ("latents", "pixels")
SIZES = {f"{side} x {side}": side for side in (SIDE, PIXEL_SIDE)}


class RawLatents(torch.nn.Module):
    """The autoencoder on ComfyUI's LATENT, which is the scaled latent divided by 0.18215."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def encode(self, image: Tensor) -> Tensor:
        return self.autoencoder.encode(image) / LATENT_SCALE

    def decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z * LATENT_SCALE)


class LoadDemoPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorLoadDemoPrior",
            display_name="Load Demo Prior",
            category=f"{CATEGORY}/demo",
            description="A small diffusion model of drawn portraits that comes with this pack, so that its templates run as "
            "installed. Replace this node by Load Checkpoint to use your own Stable Diffusion.",
            search_aliases=["demo model", "checkpoint", "example model", "pixel model"],
            inputs=[
                io.Combo.Input(
                    "prior",
                    options=list(PRIORS),
                    default=PRIORS[0],
                    optional=True,  # graphs made before there were two stay valid
                    tooltip="latents: of portraits 128 x 128, as Stable Diffusion works. pixels: of portraits 32 x 32, without a VAE in "
                    "between; at other sizes both give wrong pictures, and the run says so.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model, of the SD 1.x family."),
                io.Clip.Output(tooltip="A text encoder that ignores the text: this model was trained without."),
                io.Vae.Output(tooltip="Its VAE; for pixels ComfyUI's pixel_space."),
            ],
        )

    @classmethod
    def execute(cls, prior: str = PRIORS[0]) -> io.NodeOutput:
        if prior == "pixels":
            model = host.slim_sd15(comfy_unet_state(load_pixels().state_dict()), PIXEL_SIDE)
            return io.NodeOutput(model, host.null_clip(), host.pixel_vae())
        unet, autoencoder = load()
        model = host.slim_sd15(comfy_unet_state(unet.state_dict()), SIDE)
        vae = host.picture_vae(RawLatents(autoencoder), comfy_vae_state(autoencoder.state_dict()))
        return io.NodeOutput(model, host.null_clip(), vae)


class DemoPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorDemoPictures",
            display_name="Demo Pictures",
            category=f"{CATEGORY}/demo",
            description="Drawn portraits that the demo prior has never seen. Replace this node by Load Image for your own.",
            search_aliases=["example image", "test picture", "portrait"],
            inputs=[
                io.Int.Input("first", default=0, min=0, max=999_999, tooltip="Number of the first portrait."),
                io.Int.Input("count", default=1, min=1, max=64, tooltip="How many portraits, as one batch."),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=next(iter(SIZES)),
                    optional=True,
                    tooltip="Width x height in pixels: 128 x 128 for the demo prior of latents, 32 x 32 for that of pixels.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The portraits.")],
        )

    @classmethod
    def execute(cls, first: int, count: int, size: str = next(iter(SIZES))) -> io.NodeOutput:
        drawn = torch.stack([torch.from_numpy(draw(VALIDATION_SEED + first + i)) for i in range(count)]).float() / 255
        small = avg_pool2d(drawn.movedim(-1, 1), SIDE // SIZES[size])  # a mean of pixels, as in the training
        return io.NodeOutput(small.movedim(1, -1).contiguous())


NODES = [LoadDemoPrior, DemoPictures]
