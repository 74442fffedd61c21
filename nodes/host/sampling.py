"""A whole sampling run inside one node, as the stock nodes would do it."""

from typing import Any

import torch
from torch import Tensor

from .internals import without
from .refusals import state_of

# The model's time, as its `timestep` counts it, below the level that the filled photo needs, in as many equal parts as there are
# steps, and the middle of each. Schedulers of the host spend calls where the filled photo says more than the network can, and one on
# sigma_min, where nothing is left to tell: benchmarks/results/latent_tuning.md has what that cost.
MIDPOINTS = "midpoints"


def sigmas_of(model: Any, steps: int, scheduler: str, start: float | None = None) -> Tensor:
    """Noise levels for a MODEL, (steps + 1,), the last 0.

    Args:
        scheduler: one of the host's, or MIDPOINTS.
        start: sigma of the k-state, for data of unit variance, that MIDPOINTS begin below; None is the highest.

    Raises:
        ValueError: a scheduler that the host does not have, or that makes no such list for this model.
    """
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    if scheduler == MIDPOINTS:
        first, last = (float(sampling.timestep(level)) for level in (sampling.sigma_max, sampling.sigma_min))
        if start is not None:
            wanted = torch.tensor(start * getattr(sampling, "sigma_data", 1.0))
            first = _time_of(sampling, float(state_of(sampling).sigma_from_k(wanted)), first, last)
        times = first + (last - first) * (torch.arange(steps) + 0.5) / steps
        return torch.cat([torch.stack([sampling.sigma(t) for t in times]).cpu().float(), torch.zeros(1)])
    try:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"scheduler: {scheduler!r} makes no {steps} steps for this model ({error}); choose another") from error
    return sigmas.cpu()


def _time_of(sampling: Any, level: float, high: float, low: float) -> float:
    """The time between two at which the model's noise level is `level`, or the first. A flow's `timestep` is not that: it knows no shift."""

    def below(time: float) -> bool:
        return float(sampling.sigma(torch.tensor(time))) < level

    if below(high):
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return high


def schedulers() -> list[str]:
    """Names for `sigmas_of`, the default first."""
    import comfy.samplers

    with without("a choice of schedulers"):
        return [MIDPOINTS, *comfy.samplers.SCHEDULER_NAMES]
    return [MIDPOINTS]


def sample_latents(
    model: Any,
    positive: Any,
    negative: Any,
    cfg: float,
    sampler: Any,
    sigmas: Tensor,
    latent: Tensor,
    seed: int,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Sample as SamplerCustom does.

    Args:
        model, positive, negative, sampler: MODEL, CONDITIONING twice and SAMPLER.
        cfg: 1 leaves the negative one out.
        sigmas: the host's noise levels.
        latent: (B, c, h, w), unscaled; zeros start from noise alone.
        seed: of the noise, drawn on the CPU.
        part: which run of how many that one progress bar is for, from 0.

    Returns:
        (B, c, h, w), unscaled.
    """
    import comfy.model_management
    import comfy.sample
    import comfy.samplers

    preview, bar = None, True
    with without("previews of Restore"):
        import latent_preview

        number, count = part
        steps = len(sigmas) - 1
        of_one = latent_preview.prepare_callback(model, count * steps)

        def preview(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            of_one(number * steps + step, x0, x, count * steps)

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
