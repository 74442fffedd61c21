"""What the pack promises, for any input and any precision: kept pixels, A x = y, and models that come to no harm."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from support.host_runs import Host
from torch import Tensor

pytestmark = pytest.mark.timeout(5400)  # with --full

PROPERTY = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "phases": (Phase.generate, Phase.shrink),
    "suppress_health_check": list(HealthCheck),
}


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# After Finish -----------------------------------------------------------------------------------------------------------


def test_kept_pixels_are_exact_to_the_bit(pack: ModuleType, count: Callable[[int, int], int]) -> None:
    ops, finish = pack.operators, pack.nodes.finish.Finish.execute

    @settings(max_examples=count(40, 400), **PROPERTY)
    @given(
        st.integers(1, 2),
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.floats(0, 0.95),
        st.booleans(),
        st.booleans(),
        st.sampled_from([0.0, 0.5, 4.0]),
        st.integers(0, 99),
    )
    def run(batch: int, size: tuple[int, int], lost: float, each: bool, eight_bits: bool, feather: float, seed: int) -> None:
        photo = random_tensor(batch, *size, 3, seed=seed)
        if eight_bits:
            photo = (photo * 255).round() / 255
        assume(round(lost * math.prod(size)) < math.prod(size))  # a mask that loses everything is refused
        keep = ops.random_mask((3, *size), lost, seed, each)
        operator = ops.Mask(keep)
        measurement = ops.Measurement(operator.A(2 * photo.movedim(-1, 1).double() - 1), operator)
        result, residual = finish(3 * random_tensor(batch, *size, 3, seed=seed + 1) - 1, measurement, 0.05, feather).args
        kept = keep.expand(batch, 3, -1, -1).movedim(1, -1) > 0
        assert torch.equal(result[kept], photo[kept])
        assert residual == 0
        assert result.isfinite().all()

    run()


def test_exact_operators_are_met(pack: ModuleType, count: Callable[[int, int], int]) -> None:
    ops, finish = pack.operators, pack.nodes.finish.Finish.execute
    makers = {
        "area": lambda s: ops.AreaDownscale(s, 2),
        "bicubic": lambda s: ops.BicubicDownscale(s, 2),
        "bicubic 1.7": lambda s: ops.BicubicDownscale(s, 1.7),
        "lanczos": lambda s: ops.LanczosDownscale(s, 3),
        "grey": lambda s: ops.Grayscale(s, "709"),
        "blur": lambda s: ops.Blur(ops.gaussian_kernel(0.6), s),
        "blur, reflecting": lambda s: ops.Blur(ops.gaussian_kernel(0.6), s, "reflect"),
        "mask": lambda s: ops.Mask(ops.random_mask(s, 0.5, 1)),
        "identity": ops.Identity,
    }
    chains = [("grey", "area"), ("grey", "bicubic"), ("area", "mask"), ("bicubic", "grey")]

    def chained(names: tuple[str, ...], shape: tuple[int, int, int]) -> Any:
        first = makers[names[0]](shape)
        return first if len(names) == 1 else makers[names[1]](first.out_shape) @ first

    @settings(max_examples=count(40, 400), **PROPERTY)
    @given(
        st.sampled_from([*((name,) for name in makers), *chains]),
        st.integers(1, 2),
        st.tuples(st.integers(8, 40), st.integers(8, 40)),
        st.booleans(),
        st.integers(0, 99),
    )
    def run(names: tuple[str, ...], batch: int, size: tuple[int, int], constant: bool, seed: int) -> None:
        a = chained(names, (3, *size))
        assert a.exact
        truth = random_tensor(batch, *size, 3, seed=seed)
        if constant:
            truth = torch.full_like(truth, float(truth[0, 0, 0, 0]))
        measurement = ops.Measurement(a.A(2 * truth.movedim(-1, 1).double() - 1), a)
        result, residual = finish(random_tensor(batch, *size, 3, seed=seed + 1), measurement, 0.05).args
        assert residual <= 1e-4
        error = (measurement.operator.A(2 * result.movedim(-1, 1).double() - 1) - measurement.y).abs().max()
        assert float(error) / 2 <= 1e-4

    run()


# The guidance -----------------------------------------------------------------------------------------------------------

SIDE = 32  # pixels
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "PSLD, line search": ("sample_psld", {"rule": "line_search", "omega": 0.8, "gamma": 0.0, "last_steps": 3}),
    "C-PiGDM": ("sample_cpigdm", {"last_steps": 3}),
}


def measurement_of(h: Host, kind: str, sigma: float = 0.0) -> Any:
    ops = h.pack.operators
    operator = {
        "area": lambda: ops.AreaDownscale((3, SIDE, SIDE), 8),
        "mask": lambda: ops.Mask(ops.box_mask((3, SIDE, SIDE), (15, 14), (5, 7))),
        "blur": lambda: ops.Blur(ops.gaussian_kernel(2.0), (3, SIDE, SIDE)),
    }[kind]()
    truth = torch.nn.functional.interpolate(random_tensor(1, 3, 6, 6, seed=3), (SIDE, SIDE), mode="bicubic").clamp(0, 1) * 2 - 1
    return ops.Measurement(operator.A(truth), operator, sigma)


def sample(h: Host, method: str, measurement: Any, steps: int = 4, cfg: float = 1.0, **options: Any) -> Tensor:
    name, given = METHODS[method]
    solve = getattr(h.pack.samplers, name)
    sampler = h.pack.nodes.host.stock_sampler(
        solve, measurement, h.vae, network_gradient=name == "sample_psld", **{**given, **options}
    )
    return h.sample(sampler, guider=h.guider(cfg=cfg), steps=steps, latent=empty(h))


def empty(h: Host) -> Tensor:
    return torch.zeros(1, h.latent().shape[1], SIDE // 8, SIDE // 8)


def misfit(h: Host, latent: Tensor, measurement: Any) -> float:
    """|A x - y| of a decoded latent, root mean square on the 0 to 1 scale."""
    with torch.inference_mode():
        image = 2 * h.vae.decode(latent).movedim(-1, 1) - 1
        return float(measurement.residual_norm(image)) / 2 / measurement.y.numel() ** 0.5


def unguided(h: Host, steps: int, cfg: float) -> Tensor:
    import comfy.samplers

    return h.sample(comfy.samplers.sampler_object("euler"), guider=h.guider(cfg=cfg), steps=steps, latent=empty(h))


FOLLOWING: dict[str, tuple[str, dict[str, Any]]] = {
    **METHODS,
    "C-PiGDM, encoder": ("sample_cpigdm", {"last_steps": 3, "consistency": "encoder"}),
    "C-PiGDM, Bayes weight": ("sample_cpigdm", {"last_steps": 3, "weight": "bayes"}),
    "C-PiGDM, paper's weight": ("sample_cpigdm", {"last_steps": 3, "weight": "paper"}),
}


def following(h: Host, method: str, measurement: Any, residuals: list[float]) -> Any:
    """The stock SAMPLER of a method that also writes down |A D(x0) - y| at each step, root mean square on the 0 to 1 scale."""
    name, options = FOLLOWING[method]
    solve = getattr(h.pack.samplers, name)

    def noted(*given: Any, callback: Callable[[dict], None], **others: Any) -> Tensor:
        def note(step: dict) -> None:
            residuals.append(float(step["residual"]) / 2 / measurement.y.numel() ** 0.5)
            callback(step)

        return solve(*given, callback=note, **others)

    return h.pack.nodes.host.stock_sampler(noted, measurement, h.vae, network_gradient=name == "sample_psld", **options)


@pytest.mark.parametrize("method", FOLLOWING)
@pytest.mark.parametrize("kind", ["area", "mask", "blur"])
def test_the_last_correction_never_ends_further_from_the_photo(
    kind: str, method: str, hosts: Callable[..., Host], count: Callable[[int, int], int]
) -> None:
    """Than the network's own last estimate, from which DDIM would end, even where a network gone astray has saturated the decoder.

    PSLD by the paper's rule promises neither: its steps have one length, wherever they lead.
    """
    cases = [
        ("sd15", "box", 3, 1.0, 0.0),
        ("sd15", "taesd", 8, 3.0, 0.0),
        ("sd3", "taesd", 1, 1.0, 0.0),
        ("sd15", "box", 3, 1.0, 0.1),
    ]
    for arch, vae, steps, cfg, sigma in cases[: count(2, 4)]:
        h = hosts(arch, vae=vae)
        measurement, residuals = measurement_of(h, kind, sigma), []
        result = h.sample(following(h, method, measurement, residuals), guider=h.guider(cfg=cfg), steps=steps, latent=empty(h))
        guided = misfit(h, result, measurement)
        assert len(residuals) == steps
        assert guided <= residuals[-1] * (1 + 1e-5), (arch, vae, steps, cfg, sigma)
        if vae == "box" or steps == 1:  # else chance decides which of two runs astray ends nearer
            assert guided <= misfit(h, unguided(h, steps, cfg), measurement), (arch, vae, steps, cfg, sigma)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("cfg", "sigma", "steps"), [(30.0, 0.0, 2), (100.0, 0.0, 1), (0.0, 0.0, 2), (1.0, 2.0, 2), (1.0, 1e-6, 2)]
)
def test_extreme_settings_stay_finite(method: str, cfg: float, sigma: float, steps: int, hosts: Callable[..., Host]) -> None:
    h = hosts("sd15", vae="box")
    measurement = measurement_of(h, "area", sigma)
    result = sample(h, method, measurement, steps, cfg)
    assert result.isfinite().all()
    assert misfit(h, result, measurement) <= misfit(h, unguided(h, steps, cfg), measurement) or sigma > 1


@pytest.mark.parametrize(
    ("method", "options", "share"),
    [
        ("C-PiGDM", {"inner_steps": 1, "last_steps": 20}, 0.5),
        ("PSLD, line search", {"rule": "paper", "omega": 1.0, "gamma": 0.1, "last_steps": 1}, 0.7),
    ],
)
def test_a_thousand_steps(
    method: str, options: dict[str, Any], share: float, hosts: Callable[..., Host], count: Callable[[int, int], int]
) -> None:
    """As the paper takes them, with the smallest network; the last estimate agrees with the photo."""
    h = hosts("sd3", vae="box")
    measurement, steps = measurement_of(h, "area"), count(40, 1000)
    result = sample(h, method, measurement, steps, **options)
    assert result.isfinite().all()
    assert misfit(h, result, measurement) < share * misfit(h, unguided(h, 4, 1.0), measurement)


# Precision --------------------------------------------------------------------------------------------------------------


def test_precisions_of_model_and_vae(
    hosts: Callable[..., Host], tiny: Callable[..., Path], count: Callable[[int, int], int]
) -> None:
    """Every pair of precisions follows the photo about as well as float32 does."""
    import comfy.sd
    import comfy.utils

    reference, path = hosts("sd15"), str(tiny("sd15"))
    measurement = measurement_of(reference, "area")
    expected = {method: misfit(reference, sample(reference, method, measurement, 2), measurement) for method in METHODS}
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    first = [(half, brain, "PSLD, line search"), (brain, half, "C-PiGDM"), (half, half, "PSLD, line search")]
    rest = [case for case in itertools.product((half, brain, single), (half, brain, single), METHODS) if case not in first]
    for model_dtype, vae_dtype, method in [*first, *rest][: count(3, 18)]:
        with torch.inference_mode():
            model = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, model_options={"dtype": model_dtype})[0]
            weights = comfy.utils.load_torch_file(path)
            weights = comfy.utils.state_dict_prefix_replace(weights, {"first_stage_model.": ""}, filter_keys=True)
            vae = comfy.sd.VAE(sd=weights, dtype=vae_dtype)
        assert model.model.diffusion_model.out[2].weight.dtype == model_dtype
        assert next(vae.first_stage_model.parameters()).dtype == vae_dtype
        h = Host(reference.pack, "sd15", model, vae)
        result = sample(h, method, measurement, 2)
        assert result.dtype == torch.float32
        assert result.isfinite().all()
        worse = misfit(reference, result, measurement) / expected[method]
        assert worse < 1.2, (model_dtype, vae_dtype, method, worse)


# Others -----------------------------------------------------------------------------------------------------------------


def test_stock_samplers_give_the_same_pictures_before_and_after(
    hosts: Callable[..., Host], count: Callable[[int, int], int]
) -> None:
    """All of ComfyUI's samplers, bit by bit, with a run of each of ours in between."""
    import comfy.samplers

    h = hosts("sd15")
    preferred = ["euler", "dpmpp_2m", "uni_pc", "ddim", "heun"]
    names = [*preferred, *(n for n in comfy.samplers.SAMPLER_NAMES if n not in preferred)][: count(5, 1000)]

    def pictures() -> dict[str, Tensor]:
        return {name: h.sample(comfy.samplers.sampler_object(name), guider=h.guider(), steps=3) for name in names}

    before = pictures()
    for method in METHODS:
        sample(h, method, measurement_of(h, "area"), steps=1)
    after = pictures()
    assert {name for name in names if not torch.equal(before[name], after[name])} == set()
