"""What a run will need, before it runs."""

import torch
from comfy_api.latest import io

from ..operators import Measurement
from . import host
from .pictures import shown
from .restore import CALLS
from .types import CATEGORY, MeasurementType


class MemoryEstimate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorMemoryEstimate",
            display_name="Memory Estimate",
            category=f"{CATEGORY}/samplers",
            description="How much memory a posterior sampler will need for this model and size, in each of its memory modes, and which "
            "of them auto would take now. Nothing is loaded or computed for it.",
            search_aliases=["VRAM", "out of memory", "OOM", "GPU memory", "will it fit"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the model, as on the sampler node."),
                MeasurementType.Input(
                    "measurement", optional=True, tooltip="Gives the size of the picture; or connect a latent."
                ),
                io.Latent.Input("latent", optional=True, tooltip="Gives the size when no measurement is connected."),
                io.Int.Input(
                    "batch",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Pictures restored at once. 0: as many as the measurement or the latent has. Restore takes them one by one: 1.",
                ),
                io.Boolean.Input(
                    "guidance",
                    default=True,
                    tooltip="Whether cfg is other than 1, which takes two passes of the network for each step.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(CALLS),
                    default="PSLD",
                    optional=True,
                    tooltip="PSLD keeps a gradient through network and VAE, C-PiGDM through the VAE's decoder only.",
                ),
            ],
            outputs=[
                io.Float.Output("fastest", tooltip="GB for model, VAE and gradients when every activation is kept."),
                io.Float.Output("lowest", tooltip="GB when as much as possible is computed again instead."),
                io.String.Output("text", tooltip="Both and more in words."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        batch: int,
        guidance: bool,
        vae: object = None,
        measurement: Measurement | None = None,
        latent: dict[str, torch.Tensor] | None = None,
        method: str = "PSLD",
    ) -> io.NodeOutput:
        shape = cls._latent_shape(model, vae, measurement, latent)
        shape = (batch or shape[0], *shape[1:])
        try:
            estimate = host.estimate(model.model, vae, shape, passes=2 if guidance else 1, network_gradient=method == "PSLD")
        except RuntimeError as error:
            raise ValueError(f"model: {error}") from error
        device = model.load_device
        room = host.room(device, estimate.weights)
        ratio = 1 if vae is None else vae.upscale_ratio
        height, width = (side * ratio for side in shape[2:])
        lines = [f"{method}, {width} x {height}, batch {shape[0]}, {'two passes' if guidance else 'one pass'} of the network"]
        lines += [f"{mode}: {estimate.gigabytes(mode):.2f} GB" for mode in host.MODES]
        lines.append(
            f"of it weights: {estimate.weights / host.GIB:.2f} GB; beside them free on {device}: {room / host.GIB:.2f} GB"
        )
        best = estimate.best(room)
        fits = estimate.fits(best, room)
        lines.append(f"auto takes {best}" if fits else f"does not fit: {estimate.advice((height, width), room, device)}")
        text = "\n".join(lines)
        return io.NodeOutput(estimate.gigabytes("fastest"), estimate.gigabytes("lowest"), text, ui=shown(cls, text=text))

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return float("nan")  # never the same: how much memory is free changes between runs

    @staticmethod
    def _latent_shape(
        model: object, vae: object, measurement: Measurement | None, latent: dict[str, torch.Tensor] | None
    ) -> tuple[int, int, int, int]:
        latent_format = model.model.latent_format
        channels = latent_format.latent_channels
        if vae is not None:
            host.check_vae(vae, latent_format)
        if measurement is not None:
            in_shape = measurement.operator.in_shape
            if vae is None:
                if in_shape[0] != channels:
                    raise ValueError("vae: is not connected, and this model does not work on pixels. Connect the model's VAE")
                return (len(measurement.y), *in_shape)
            multiple = host.side_multiple(vae, model)  # sides that are none are widened by Restore
            return (
                len(measurement.y),
                *host.latent_size(vae, (in_shape[0], *(-(-side // multiple) * multiple for side in in_shape[1:]))),
            )
        if latent is None:
            raise ValueError("measurement: is not connected, and neither is latent; one of them must give the size")
        if latent["samples"].ndim != 4:
            raise ValueError(f"latent: has {latent['samples'].ndim} dimensions; only latents of pictures work")
        count, got, height, width = latent["samples"].shape
        if got != channels and latent["samples"].any():  # ComfyUI gives an empty latent the model's channels
            raise ValueError(
                f"latent: is of {got} channels, the model's latents have {channels}; connect a latent of this model"
            )
        return count, channels, height, width


NODES = [MemoryEstimate]
