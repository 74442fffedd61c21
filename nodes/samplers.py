"""Sampler nodes, and the latent a sampler starts from."""

import torch
from comfy_api.latest import io

from ..operators import ConvergenceError, Measurement
from ..samplers import fill_unseen, sample_cpigdm, sample_psld
from . import host
from .measurement import blurs
from .types import CATEGORY, MeasurementType, to_image

LIGHTER = {"consistency": "encoder"}  # of C-PiGDM, where memory does not suffice for a gradient through the decoder

LIGHTER_TEXT = (
    "Where not even that fits, C-PiGDM goes on with consistency encoder, which follows the photo less closely, and says so."
)
REFUSED_TEXT = "Where not even that fits, an error says what would."


def run_inputs(beyond: str) -> list[io.Input]:
    """Inputs of every sampler node: how a run is done, not what comes out. beyond: what happens where no memory suffices."""
    return [
        io.Combo.Input(
            "memory",
            options=["auto", "fastest", "lowest"],
            default="auto",
            optional=True,
            advanced=True,
            tooltip="How much memory the gradients may take; the result is the same. auto: the quickest way that fits into free memory. "
            f"lowest: computes much of it twice or more, up to twice as slow. {beyond} The Memory Estimate node shows what each needs.",
        ),
        io.Boolean.Input(
            "check_gradients",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Before the first step, compare the gradient with finite differences, and stop if a patch on the model or the VAE "
            "makes it wrong. Costs about as much as two to four steps, with gluing twice that.",
        ),
    ]


class SamplerPSLD(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        eta = io.Float.Input(
            "eta",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
            tooltip="Fresh noise each step: 0 is DDIM, 1 is DDPM.",
        )
        line_search = [
            io.Float.Input(
                "omega",
                default=0.8,
                min=0.05,
                max=2.0,
                step=0.05,
                tooltip="Share of the found step that is taken. Lower is smoother, above 1 overshoots.",
            ),
            io.Int.Input(
                "inner_steps",
                default=1,
                min=1,
                max=50,
                advanced=True,
                tooltip="Steps through the VAE's decoder for each network call. More follow the photo sooner, and cost time.",
            ),
            io.Int.Input(
                "last_steps",
                default=10,
                min=1,
                max=200,
                advanced=True,
                tooltip="The same in the last step. More bring |A x - y| down where many single pixels are missing.",
            ),
            eta,
        ]
        paper = [
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
            eta,
            io.Combo.Input(
                "glue",
                options=["pinv", "adjoint", "goodness"],
                default="pinv",
                advanced=True,
                tooltip="pinv: glue with the pseudo-inverse. adjoint: the letter of the paper, and for operators whose pseudo-inverse "
                "does not converge. goodness: no photo in this term, only what the VAE can represent (GML-DPS).",
            ),
        ]
        return io.Schema(
            node_id="PosteriorSamplerPSLD",
            display_name="PSLD Sampler",
            category=f"{CATEGORY}/samplers",
            description="Posterior sampling with latent diffusion (Rout et al., NeurIPS 2023), for SamplerCustomAdvanced with any guider "
            "and scheduler. Each step costs a gradient through model and VAE.",
            search_aliases=["posterior", "restore", "inverse problem", "DPS", "super resolution", "inpaint", "deblur"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                MeasurementType.Input("measurement", tooltip="What was observed; from a Measurement node."),
                io.DynamicCombo.Input(
                    "rule",
                    options=[
                        io.DynamicCombo.Option("line search", line_search),
                        io.DynamicCombo.Option("paper", paper),
                    ],
                    tooltip="How long a step is. line search: found anew at each step; 20 to 50 steps are enough from Start Latent's measurement with denoise .4, from noise alone 100. paper: fixed weights, "
                    "as published; wants 100 to 1000 steps.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of the model. For a model that works on pixels: pixel_space, from Load VAE.",
                ),
                *run_inputs(REFUSED_TEXT),
            ],
            outputs=[io.Sampler.Output(tooltip="Connect it to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, measurement: Measurement, rule: dict, memory: str = "auto", check_gradients: bool = False, vae: object = None
    ) -> io.NodeOutput:
        options = dict(rule)
        kind = options.pop("rule")
        if vae is not None:
            host.latent_size(vae, measurement.operator.in_shape)
        if kind == "line search":
            options.update(rule="line_search", gamma=0.0)
        elif options["omega"] == options["gamma"] == 0:
            raise ValueError("omega, gamma: both are 0, which ignores the photo; set one above 0")
        elif options["gamma"] > 0 and options["glue"] == "pinv" and not measurement.operator.exact:
            cls._try_pseudo_inverse(measurement)
        run = {"memory": memory, "check_gradients": check_gradients, "unique_id": host.node_id(cls)}
        return io.NodeOutput(host.stock_sampler(sample_psld, measurement, vae, **run, **options))

    @staticmethod
    def _try_pseudo_inverse(measurement: Measurement) -> None:
        """Every step takes one: better to find out here that the iterations do not end."""
        try:
            own = host.stoppable(measurement)
            own.operator.A_dagger(own.y)
        except ConvergenceError as fault:
            raise ValueError(
                f"glue: the pseudo-inverse of this operator does not converge ({fault}). Set glue to adjoint or gamma to 0; or, for a "
                "blur, its boundary to circular"
            ) from fault


class SamplerCPiGDM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tau = io.Float.Input(
            "tau",
            default=1.0,
            min=0.01,
            max=100.0,
            step=0.05,
            advanced=True,
            tooltip="Standard deviation of the pictures the model knows, in units of its latents; about 1 for all of Stable Diffusion. Set "
            ".3 for models that work on pixels.",
        )

        def eta(default: float) -> io.Float.Input:
            return io.Float.Input(
                "eta",
                default=default,
                min=0.0,
                max=5.0,
                step=0.1,
                advanced=True,
                tooltip="Fresh noise each step: 0 is DDIM, 1 is DDPM. With weight dual and few steps more than that is better: it forgets "
                "what an early step got wrong, from 2 on nearly all noise is fresh; with 1 samples differ more. The others were published with 0.",
            )

        jacobian = io.Combo.Input(
            "jacobian",
            options=["off", "k", "vp"],
            default="off",
            advanced=True,
            tooltip="Add the network's Jacobian, at the price of a gradient through it; vp is the paper's. Only for models on pixels. On the demo "
            "prior it led far astray with weight bayes from the highest noise level on.",
        )
        w = io.Float.Input(
            "w",
            default=15.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            tooltip="Strength; for models on pixels the paper takes 15 for photos without noise and 2 for noisy ones, for latents take 15 for both. "
            "0 ignores the photo.",
        )
        return io.Schema(
            node_id="PosteriorSamplerCPiGDM",
            display_name="C-PiGDM Sampler",
            category=f"{CATEGORY}/samplers",
            description="Conditional conjugate integrators (Pandey, Yang and Mandt, NeurIPS 2024), for SamplerCustomAdvanced with any guider "
            "and scheduler: 5 to 20 steps, without a gradient through the diffusion model.",
            search_aliases=[
                "posterior",
                "restore",
                "inverse problem",
                "PiGDM",
                "DDNM",
                "super resolution",
                "inpaint",
                "deblur",
            ],
            hidden=[io.Hidden.unique_id],
            inputs=[
                MeasurementType.Input("measurement", tooltip="What was observed; from a Measurement node."),
                io.Combo.Input(
                    "consistency",
                    options=["decoder", "encoder"],
                    default="decoder",
                    tooltip="How a latent is brought to agree with the photo. decoder: gradients through the VAE's decoder, better. encoder: "
                    "decode, correct, encode; no gradients at all, least memory.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=4,
                    min=1,
                    max=50,
                    tooltip="For latents: consistency steps through the VAE for each network call; only one while the picture is mostly noise "
                    "(sigma above 4 tau). More follow the photo more closely, and cost time.",
                ),
                io.Int.Input(
                    "last_steps",
                    default=10,
                    min=1,
                    max=200,
                    advanced=True,
                    tooltip="The same after the last call. More bring |A x - y| down where many single pixels are missing.",
                ),
                io.DynamicCombo.Input(
                    "weight",
                    options=[
                        io.DynamicCombo.Option("dual", [tau, eta(2.0)]),
                        io.DynamicCombo.Option("bayes", [tau, jacobian, eta(0.0)]),
                        io.DynamicCombo.Option("paper", [w, jacobian, eta(0.0)]),
                    ],
                    tooltip="How strong the guidance is at each noise level. dual: remembers from step to step what is still missing. bayes: "
                    "exact for a Gaussian prior, on pixels with noise only with the Jacobian. paper: as published.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of the model. For a model that works on pixels: pixel_space, from Load VAE.",
                ),
                *run_inputs(LIGHTER_TEXT),
            ],
            outputs=[io.Sampler.Output(tooltip="Connect it to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        measurement: Measurement,
        consistency: str,
        inner_steps: int,
        last_steps: int,
        weight: dict,
        memory: str = "auto",
        check_gradients: bool = False,
        vae: object = None,
    ) -> io.NodeOutput:
        options = {"consistency": consistency, "inner_steps": inner_steps, "last_steps": last_steps, **weight}
        jacobian = weight.get("jacobian", "off") != "off"
        if vae is not None:
            host.latent_size(vae, measurement.operator.in_shape)
        closed = (vae is None or host.works_on_pixels(vae)) and measurement.operator.exact
        hint = "; for a model on latents connect its VAE" if vae is None else ""
        if jacobian and not closed:
            raise ValueError(f"jacobian: works only for models on pixels and operators with a closed form; set it to off{hint}")
        if weight["weight"] == "bayes" and closed and blurs(measurement.operator) and not jacobian and measurement.sigma > 0:
            # Where A nearly loses a direction the noise is amplified, which |A x - y| does not show.
            raise ValueError(
                "weight: bayes without the Jacobian amplifies the noise of a blurred photo on a model that works on pixels; set it to "
                f"dual{hint}"
            )
        run = {"memory": memory, "check_gradients": check_gradients, "unique_id": host.node_id(cls)}
        run |= {"network_gradient": jacobian, "lighter": LIGHTER}
        return io.NodeOutput(host.stock_sampler(sample_cpigdm, measurement, vae, **run, **options))


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
                    tooltip="noise: an empty latent, the sampler starts from pure noise. measurement: the photo, what it lacks filled "
                    "in smoothly, encoded; the sampler adds its noise to it, useful with denoise below 1: .4 is as Restore has it, .6 for large holes.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="Connect it to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, measurement: Measurement, vae: object, start: str) -> io.NodeOutput:
        size = host.latent_size(vae, measurement.operator.in_shape)
        if start == "noise":
            return io.NodeOutput({"samples": torch.zeros((len(measurement.y), *size))})
        return io.NodeOutput({"samples": vae.encode(to_image(fill_unseen(host.stoppable(measurement))).clamp(0, 1))})


NODES = [SamplerPSLD, SamplerCPiGDM, StartLatent]
