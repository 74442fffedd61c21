"""The SAMPLER: a sampler of samplers/ under any stock guider, scheduler and noise."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...samplers import State, measured
from . import guard
from .codec import Codec, Pixels, check_sizes, check_vae, works_on_pixels
from .demo_models import size_note
from .faults import (
    Course,
    MainMemoryFull,
    NotFinite,
    check_finite,
    naming_lack_of_memory,
    of_main_memory,
    stop_when_interrupted,
    stoppable_backward,
)
from .gradients import differentiable_options, gradients, normal_tensors
from .internals import naming_what_is_missing
from .loading import Loaded, control_networks, controls, resident
from .memory import GIB, Estimate, Plan, estimate, free_memory, out_of_memory, release_memory
from .readout import Readout, throw_if_interrupted
from .recompute import MODES, recomputing
from .refusals import check_attention, check_falling, refuse_unsupported, state_of

log = logging.getLogger("comfyui-posterior")


def stock_sampler(
    solve: Callable[..., Tensor],
    measurement: Any,
    vae: Any,
    memory: str = "auto",
    check_gradients: bool = False,
    unique_id: str | None = None,
    network_gradient: bool = True,
    lighter: dict[str, Any] | None = None,
    notes: list[str] | None = None,
    plan: Plan | None = None,
    title: str = "",
    **options: Any,
) -> Any:
    """A ComfyUI SAMPLER that runs `solve`, a sampler of samplers/, on any guider, scheduler and noise.

    Args:
        solve: a k-diffusion function with keywords `measurement` and `autoencoder`.
        measurement: what was observed, on any device.
        vae: a ComfyUI VAE, or None when the model works on pixels.
        memory: one of MODES, or "auto" for the quickest that fits. All give the same result.
        check_gradients: compare autograd with finite differences before the first step.
        unique_id: of the node that shows the progress.
        network_gradient: whether `solve` differentiates through the diffusion network, and not through the VAE alone. Without it the
            network may be quantised, cached or patched by what has no gradient.
        lighter: options of `solve` that replace those given when memory does not suffice for them in any mode; only with a VAE.
        notes: gets the lines that the run leaves on its node, about memory for example, for a node that shows a text of its own.
        plan: one for the runs of a node that are alike, so that memory is estimated and tried out once; each its own otherwise.
        title: stands before each step on the node.
        options: further keywords of `solve`.
    """
    from comfy.samplers import KSAMPLER

    given = {"memory": memory, "check_gradients": check_gradients, "unique_id": unique_id}
    given |= {"network_gradient": network_gradient, "lighter": lighter, "notes": notes, "plan": plan, "title": title}
    return KSAMPLER(run_on_host, {"solve": solve, "measurement": measurement, "vae": vae, "options": options, **given})


@naming_what_is_missing()
@naming_lack_of_memory()
def run_on_host(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    solve: Callable[..., Tensor],
    measurement: Any,
    vae: Any,
    options: dict[str, Any],
    memory: str = "auto",
    check_gradients: bool = False,
    unique_id: str | None = None,
    network_gradient: bool = True,
    lighter: dict[str, Any] | None = None,
    notes: list[str] | None = None,
    plan: Plan | None = None,
    title: str = "",
) -> Tensor:
    """What KSAMPLER calls: prepare the host, run `solve` in the k-state, give the state back as the host wants it."""
    throw_if_interrupted()  # before anything is estimated or loaded
    guider = model.inner_model
    model_options = extra_args["model_options"]
    refuse_unsupported(guider, x, model_options, network_gradient)
    state = state_of(guider.inner_model.model_sampling)
    check_falling(sigmas)
    if vae is not None:
        check_vae(vae, guider.inner_model.latent_format)
    check_sizes(x, measurement, vae)
    if works_on_pixels(vae) and (network_gradient or measurement.operator.exact):  # PSLD needs no closed form
        vae = None
    readout = Readout(unique_id, residual_scale(measurement), measurement.sigma / 2, [] if notes is None else notes, title)
    if line := size_note(guider.model_patcher, tuple(measurement.operator.in_shape[1:])):
        if line not in readout.notes:
            log.warning(line)
        readout.note(line)
        readout.begin()
    plan = Plan() if plan is None else plan
    by_encoder = vae is not None and not network_gradient and options.get("consistency") == "encoder"
    need, memory = needed(plan, guider, vae, x, network_gradient, not by_encoder), plan.mode or memory
    wanted = MODES[0] if memory == "auto" else memory
    room, least = (1e30, 0) if need is None else (need.activations(wanted), need.activations(MODES[-1]))

    with gradients(), resident(guider, vae, room, least, network_gradient) as loaded:
        if network_gradient:
            model_options = differentiable_options(model_options, bool(controls(guider)))
            for network in loaded.networks:
                check_attention(network, model_options["transformer_options"])
        extra_args = normal_tensors({key: value for key, value in extra_args.items() if key != "model_options"})
        extra_args["model_options"] = model_options
        for name in ("conds", "_uncond_conds"):  # the second is Guider_DualModel's
            if getattr(guider, name, None) is not None:
                setattr(guider, name, normal_tensors(getattr(guider, name)))
        model.latent_image, model.noise = normal_tensors((model.latent_image, model.noise))
        sigmas_k = state.sigmas_to_k(normal_tensors(sigmas))
        start = state.to_k(normal_tensors(x), sigmas_k[0])
        measurement = measurement.to(x.device, torch.float32, copy=True)
        # One photo for several latents: several samples of it.
        measurement = dataclasses.replace(measurement, y=measurement.y.expand(len(x), -1, -1, -1).contiguous())
        stop_when_interrupted(measurement.operator)
        codec = None
        if loaded.vae is not None:
            codec = Codec(loaded.vae, guider.inner_model.latent_format, vae.device, vae.vae_dtype)
        elif not (network_gradient or measurement.operator.exact):
            # Steps by gradients, as with the VAE pixel_space: an operator without a closed form is slow to invert, or cannot be.
            codec = Codec(Pixels(), guider.inner_model.latent_format, x.device, x.dtype)
        mask, of_the_step = extra_args.get("denoise_mask"), model_options.get("denoise_mask_function")
        if mask is not None and of_the_step is not None and len(sigmas) > 1:
            # The mask that Differential Diffusion has at each step is the model's. What it frees in the last one, guidance may move,
            # but not what the user has held altogether, which it frees there, too.
            last = of_the_step(sigmas[-2].expand(len(x)), mask, extra_options={"model": guider, "sigmas": sigmas})
            extra_args["denoise_mask"] = last * (mask > 0)
        denoise, course = denoiser(model, state, mask, network_gradient), Course(sigmas_k)

        def run(codec: Codec | None, options: dict[str, Any]) -> Tensor:
            course.begin()
            if check_gradients and codec is not None and not network_gradient and options.get("consistency") == "encoder":
                readout.note("gradient check: nothing to compare, as consistency encoder takes no gradient")
            elif check_gradients:
                sigma = sigmas_k[0].expand(len(start))
                if network_gradient:
                    precision = lowest_precision(guider.inner_model, codec)
                    glue = options.get("glue") if options.get("gamma") else None
                    line = guard.check_gradient(
                        lambda v: denoise(v, sigma, **extra_args), start, measurement, codec, precision, glue
                    )
                else:
                    with torch.no_grad():
                        denoised = denoise(start, sigma, **extra_args)
                    precision = torch.float32 if codec is None else codec.dtype
                    line = guard.check_gradient(lambda v: v, denoised, measurement, codec, precision)
                log.info(line)
                readout.note(line)
            return solve(
                denoise,
                start.clone(),
                sigmas_k,
                extra_args=extra_args,
                callback=host_callback(callback, state, readout, course),
                disable=disable,
                measurement=measurement,
                autoencoder=codec,
                **options,
            )

        size = tuple(measurement.operator.in_shape[1:])
        if not network_gradient:
            loaded = dataclasses.replace(loaded, networks=[])  # nothing of theirs is kept, so nothing is worth computing again
        try:
            with stoppable_backward():
                result = run_in_memory(run, codec, loaded, memory, options, lighter, plan, readout, size, x.device)
            check_finite(result, "the last correction made NaN or infinite values; lower omega or w, or try another precision")
        except NotFinite as error:
            raise course.ended(error, codec) from error
        if callback is not None and course.last is not None:
            callback({**course.last, "denoised": result})
        readout.finish()
        return state.from_k(result, sigmas_k[-1])


def run_in_memory(
    run: Callable[[Codec | None, dict[str, Any]], Tensor],
    codec: Codec | None,
    loaded: Loaded,
    memory: str,
    options: dict[str, Any],
    lighter: dict[str, Any] | None,
    plan: Plan,
    readout: Readout,
    size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Run in the mode asked for, and from the start again in the next lower one whenever memory runs out; at last `lighter`.

    The whole run and not the step: the result then is the lower mode's own, and a run mostly fails in its first step.
    """
    free, why = free_memory(device), ""
    if memory == "auto":
        memory = MODES[-1] if plan.need is None else plan.need.best(free)
        why = plan.unknown or ("" if free else "no memory is known to be free")
    if memory != MODES[0]:
        readout.note(f"memory: {memory}" + (f", for {why}" if why else ""))
    ways = [(f"in mode {mode}", mode, options) for mode in MODES[MODES.index(memory) :]]
    if codec is not None and lighter and any(options.get(name) != value for name, value in lighter.items()):
        said = " and ".join(f"{name} {value}" for name, value in lighter.items())
        ways.append((f"with {said}, which follows the photo less closely", MODES[-1], {**options, **lighter}))
        if plan.lighter:
            ways = ways[-1:]
            readout.note(f"memory: {ways[0][0]}, as for the photo before")
    while True:
        name, mode, given = ways.pop(0)
        try:
            with recomputing(mode, loaded.networks, loaded.vae):
                lean = codec if codec is None else dataclasses.replace(codec, recompute=mode == MODES[-1])
                return run(lean, given)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if not ways:
                raise _too_large(plan.need, size, free, device, error) from error
        # Out of the except clause, where the error no longer holds the tensors of the frames it went through.
        release_memory()
        plan.mode, plan.lighter = ways[0][1], ways[0][2] is not options
        note = f"out of memory {name}; started again {ways[0][0]}"
        log.warning(note)
        readout.restart(note)


def _too_large(
    need: Estimate | None, size: tuple[int, int], free: float, device: torch.device, error: Exception
) -> MainMemoryFull | torch.cuda.OutOfMemoryError:
    main = of_main_memory(error)
    text = f"{'main memory is full' if main else 'memory: out of memory'} even in mode {MODES[-1]} ({error})."
    if need is None or (main and device.type != "cpu"):  # of a device's memory is all that is known
        text += " A smaller picture or batch needs less"
    else:
        required = f"{need.activations(MODES[-1]) / GIB:.1f} GB beside {need.weights / GIB:.1f} GB of weights"
        text += f" This run needs about {required}; {free / GIB:.1f} GB were free. To make it fit: {need.advice(size, free, device)}"
    return MainMemoryFull(text) if main else torch.cuda.OutOfMemoryError(text)


def residual_scale(measurement: Any) -> Tensor:
    """What makes residual norms (B,), [-1, 1] units, root mean squares over measured values on the 0 to 1 scale; on the CPU."""
    counts = measured(measurement.operator, measurement.y).expand_as(measurement.y).flatten(1).sum(1)
    return 1 / (2 * counts.cpu().clamp(min=1).sqrt())


def needed(
    plan: Plan, guider: Any, vae: Any, x: Tensor, network_gradient: bool, decoder_gradient: bool = True
) -> Estimate | None:
    """The estimate for a guider's next run, the plan's after the first, or None where the model does not allow one."""
    if plan.need is not None or plan.unknown:
        return plan.need
    nets = tuple(dict.fromkeys(control_networks(guider)))
    # Guider_DualModel's, of which a pass takes what one of the first takes.
    second = getattr(guider, "uncond_inner", None)
    beside = () if second is None or second is guider.inner_model else (second,)
    given = (tuple(x.shape), passes(guider), nets, network_gradient, decoder_gradient, beside)
    try:
        plan.need = estimate(guider.inner_model, vae, *given)
    except RuntimeError as error:
        plan.unknown = str(error)
        log.warning("%s; memory auto means lowest for this run", error)
    return plan.need


def passes(guider: Any) -> int:
    """Network passes of a step: one for each conditioning, of the positive ones alone where the guider's own cfg of 1 skips the others."""
    from comfy.samplers import CFGGuider

    skips = (
        getattr(type(guider), "predict_noise", None) is CFGGuider.predict_noise  # others combine conditionings in their own way
        and math.isclose(guider.cfg, 1.0)
        and not guider.model_options.get("disable_cfg1_optimization", False)
    )
    return max(1, sum(len(group) for kind, group in guider.conds.items() if kind == "positive" or not skips))


def lowest_precision(model: Any, codec: Codec | None) -> torch.dtype:
    """Of the diffusion model's and the VAE's precisions, the one with the larger rounding."""
    kinds = [model.get_dtype_inference(), *([] if codec is None else [codec.dtype])]
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


def denoiser(model: Any, state: State, mask: Tensor | None, network_gradient: bool) -> Callable[..., Tensor]:
    """`model(x, sigma, **extra_args)` -> x0 in the k-state, around the host's model; without a gradient it is an error.

    Args:
        mask: what the host's model takes for `denoise_mask`.
        network_gradient: False where the model runs as under any other sampler.
    """

    def denoise(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        extra_args["denoise_mask"] = mask
        check_finite(
            x, "the guidance of the step before made NaN or infinite values; lower omega or w, or try another precision"
        )
        x_host = state.from_k(x, sigma.reshape(-1, 1, 1, 1))
        if network_gradient:
            denoised = model(x_host, state.sigma_from_k(sigma), **extra_args)
        else:
            with gradients(False):
                denoised = model(x_host, state.sigma_from_k(sigma), **extra_args)
            denoised = normal_tensors(denoised)
        if x.requires_grad and torch.is_grad_enabled() and not denoised.requires_grad:
            raise ValueError("model: its output has no gradient, for a patch or wrapper on it computes without one; remove it")
        check_finite(denoised, "the model returned NaN or infinite values; try a lower cfg or another precision")
        return denoised

    return denoise


def host_callback(
    callback: Callable[[dict[str, Any]], None] | None, state: State, readout: Readout, course: Course
) -> Callable[[dict[str, Any]], None]:
    """Progress, previews in the host's state and the node's read-out, and a stop within one step when the user cancels."""

    def report(step: dict[str, Any]) -> None:
        throw_if_interrupted()
        course.passed(step)
        readout.step(step["i"], course.steps, float(step["sigma"]), step.get("residual"))
        step = {**step, "x": state.from_k(step["x"], step["sigma"])}
        if step["i"] + 1 == course.steps and course.sigmas[-1] == 0:
            course.last = step  # to be shown with the result, which what the host keeps as denoised_output then is
        elif callback is not None:
            callback(step)

    return report
