"""Sampler nodes, and the latent a sampler starts from."""

import torch
from comfy_api.latest import io

from ..operators import ConvergenceError, Measurement
from ..samplers import fill_unseen, sample_psld
from . import host
from .types import CATEGORY, MeasurementType, to_image


class SamplerPSLD(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorSamplerPSLD",
            display_name="PSLD Sampler",
            category=f"{CATEGORY}/samplers",
            description="Posterior sampling with latent diffusion (Rout et al., NeurIPS 2023), for SamplerCustomAdvanced with any guider "
            "and scheduler. Each step costs a gradient through model and VAE. It needs many steps: 100 give a picture, the paper "
            "takes 1000.",
            search_aliases=["posterior", "restore", "inverse problem", "DPS", "super resolution", "inpaint", "deblur"],
            inputs=[
                MeasurementType.Input("measurement", tooltip="What was observed; from a Measurement node."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The VAE of the model. Leave it out only for a model that works on pixels."
                ),
                io.Float.Input(
                    "omega",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Pull towards the photo, weight of |A x - y|. Too low ignores the photo, too high gives artefacts.",
                ),
                io.Float.Input(
                    "gamma",
                    default=0.1,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Gluing: keeps the picture where the VAE can represent it, seamless at a hole's edge. 0 is latent DPS.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Fresh noise each step: 0 is DDIM, 1 is DDPM.",
                ),
                io.Combo.Input(
                    "glue",
                    options=["pinv", "adjoint"],
                    default="pinv",
                    advanced=True,
                    tooltip="pinv: glue with the pseudo-inverse. adjoint: the letter of the paper, and for operators whose pseudo-inverse "
                    "does not converge.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="Connect it to SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, omega: float | None = None, gamma: float | None = None) -> bool | str:
        # Naming an input here takes its range check from ComfyUI; a linked one comes as None and is checked in execute.
        return cls._fault({"omega": omega, "gamma": gamma}) or True

    @classmethod
    def execute(
        cls, measurement: Measurement, omega: float, gamma: float, eta: float, glue: str, vae: object = None
    ) -> io.NodeOutput:
        if fault := cls._fault({"omega": omega, "gamma": gamma}):
            raise ValueError(fault)
        if vae is not None:
            host.latent_size(vae, measurement.operator.in_shape)
        if gamma > 0 and glue == "pinv" and not measurement.operator.exact:
            cls._try_pseudo_inverse(measurement)
        options = {"omega": omega, "gamma": gamma, "eta": eta, "glue": glue}
        return io.NodeOutput(host.stock_sampler(sample_psld, measurement, vae, **options))

    @staticmethod
    def _try_pseudo_inverse(measurement: Measurement) -> None:
        """Every step takes one: better to find out here that the iterations do not end."""
        try:
            measurement.operator.A_dagger(measurement.y)
        except ConvergenceError as fault:
            raise ValueError(
                f"glue: the pseudo-inverse of this operator does not converge ({fault}). Set glue to adjoint or gamma to 0; or, for a "
                "blur, its boundary to circular"
            ) from fault

    @staticmethod
    def _fault(weights: dict[str, float | None]) -> str:
        for name, value in weights.items():
            if value is not None and not 0 <= value <= 100:
                return f"{name}: got {value}, expected a number from 0 to 100"
        return "omega and gamma are both 0, which ignores the photo; set one above 0" if set(weights.values()) == {0} else ""


class StartLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorStartLatent",
            display_name="Start Latent",
            category=f"{CATEGORY}/samplers",
            description="The latent a posterior sampler starts from, with size and batch taken from the measurement.",
            search_aliases=["empty latent", "latent size", "start"],
            inputs=[
                MeasurementType.Input("measurement", tooltip="What was observed; from a Measurement node."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Combo.Input(
                    "start",
                    options=["noise", "measurement"],
                    default="noise",
                    tooltip="noise: an empty latent, the sampler starts from pure noise. measurement: the photo filled up by the "
                    "pseudo-inverse and encoded; the sampler adds its noise to it, useful with denoise below 1.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="Connect it to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, measurement: Measurement, vae: object, start: str) -> io.NodeOutput:
        size = host.latent_size(vae, measurement.operator.in_shape)
        if start == "noise":
            return io.NodeOutput({"samples": torch.zeros((len(measurement.y), *size))})
        return io.NodeOutput({"samples": vae.encode(to_image(fill_unseen(measurement)).clamp(0, 1))})


NODES = [SamplerPSLD, StartLatent]
