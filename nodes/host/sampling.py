"""A whole sampling run inside one node, as the stock nodes would do it."""

from typing import Any

from torch import Tensor

from .internals import without

DEFAULT_SCHEDULER = "ddim_uniform"


def sigmas_of(model: Any, steps: int, scheduler: str) -> Tensor:
    """The host's noise levels for a MODEL, (steps + 1,), the last 0.

    Raises:
        ValueError: a scheduler that the host does not have, or that makes no such list for this model.
    """
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    try:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"scheduler: {scheduler!r} makes no {steps} steps for this model ({error}); choose another") from error
    return sigmas.cpu()


def schedulers() -> list[str]:
    """Names of the host's schedulers."""
    import comfy.samplers

    with without("a choice of schedulers"):
        return list(comfy.samplers.SCHEDULER_NAMES)
    return [DEFAULT_SCHEDULER]


def sample_latents(
    model: Any,
    positive: Any,
    negative: Any,
    cfg: float,
    sampler: Any,
    sigmas: Tensor,
    latent: Tensor,
    seed: int,
) -> Tensor:
    """Sample as SamplerCustom does.

    Args:
        model, positive, negative, sampler: MODEL, CONDITIONING twice and SAMPLER.
        cfg: 1 leaves the negative one out.
        sigmas: the host's noise levels.
        latent: (B, c, h, w), unscaled; zeros start from noise alone.
        seed: of the noise, drawn on the CPU.

    Returns:
        (B, c, h, w), unscaled.
    """
    import comfy.model_management
    import comfy.sample
    import comfy.samplers

    preview, bar = None, True
    with without("previews of Restore"):
        import latent_preview

        preview = latent_preview.prepare_callback(model, len(sigmas) - 1)
    with without("the switch for progress bars"):
        import comfy.utils

        bar = comfy.utils.PROGRESS_BAR_ENABLED
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    samples = guider.sample(
        comfy.sample.prepare_noise(latent, seed),
        latent,
        sampler,
        sigmas,
        denoise_mask=None,
        callback=preview,
        disable_pbar=not bar,
        seed=seed,
    )
    return samples.to(comfy.model_management.intermediate_device())
