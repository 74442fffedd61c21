"""check_gradients, through the real guider: quiet on every healthy model, and loud where a part has no gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_runs import Host
from support.tiny_checkpoints import conditioning, write_controlnet, write_lora
from torch import Tensor

MODERATE = torch.tensor([2.0, 1.0])


def check(
    h: Host,
    caplog: pytest.LogCaptureFixture,
    sigmas: Tensor | None = MODERATE,
    batch: int = 1,
    guider: Any = None,
    factor: int = 8,
    **run: Any,
) -> str:
    """Sample with the guard on, taking no step; returns what it says in the log."""
    sampler = h.pack.nodes.host.stock_sampler(stand_still, h.measurement(batch, factor), h.vae, check_gradients=True, **run)
    h.sample(sampler, guider=guider, sigmas=sigmas, latent=h.latent(batch))
    return caplog.messages[-1]


def stand_still(model: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def with_model(h: Host, model: Any) -> Host:
    return Host(h.pack, h.arch, model, h.vae)


@pytest.mark.parametrize("arch", ["sd15", "sd21v", "sdxl_vega", "sd3"])
@pytest.mark.parametrize("sigmas", [torch.tensor([0.6, 0.3]), None])
def test_passes_on_healthy_models(
    arch: str, sigmas: Tensor | None, hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    """From the middle of a schedule, and from its start."""
    caplog.set_level("INFO")
    assert "gradient check passed" in check(hosts(arch), caplog, sigmas)


@pytest.mark.parametrize("codec", ["kl", "box"])
def test_passes_on_other_autoencoders(codec: str, hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert "gradient check passed" in check(hosts("sd15", vae=codec), caplog)


def test_passes_in_mode_lowest_with_a_batch(hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert "gradient check passed" in check(hosts("sd15"), caplog, batch=2, memory="lowest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_passes_in_half_precision(dtype: torch.dtype, hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    h = hosts("sd15")
    model = h.model.clone()
    model.set_model_compute_dtype(dtype)
    said = check(with_model(h, model), caplog)
    assert "gradient check passed" in said


def test_passes_with_lora_and_controlnet(hosts: Callable[..., Host], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import comfy.controlnet
    import comfy.sd
    import comfy.utils

    caplog.set_level("INFO")
    h = hosts("sd15")
    with torch.inference_mode():
        lora = comfy.utils.load_torch_file(str(write_lora(tmp_path / "lora.safetensors")))
        model, _ = comfy.sd.load_lora_for_models(h.model, None, lora, 0.3, 0.0)
        net = comfy.controlnet.load_controlnet(str(write_controlnet(tmp_path / "control.safetensors")))
        hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        control = net.copy().set_cond_hint(hint, 0.3, (0.0, 1.0))
        conds = [[c, {**d, "control": control, "control_apply_to_uncond": True}] for c, d in conditioning("sd15", 1)]
    h = with_model(h, model)
    assert "gradient check passed" in check(h, caplog, guider=h.guider(positive=conds))


def detached_uncond(given: dict[str, Any]) -> Tensor:
    """Classifier-free guidance as some nodes write it, to save memory."""
    uncond = given["uncond"].detach()
    return uncond + given["cond_scale"] * (given["cond"] - uncond)


@pytest.mark.parametrize(
    ("arch", "dtype"), [("sd15", torch.float32), ("sd15", torch.bfloat16), ("sd21v", torch.float32), ("sd3", torch.float32)]
)
def test_catches_guidance_that_is_half_detached(
    arch: str, dtype: torch.dtype, hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    h = hosts(arch)
    model = h.model.clone()
    model.set_model_compute_dtype(dtype)
    model.set_model_sampler_cfg_function(detached_uncond)
    with pytest.raises(
        ValueError, match=r"check_gradients: autograd's derivative of \|A x - y\| is .* finite differences give"
    ):
        check(with_model(h, model), caplog, torch.tensor([0.6, 0.3]))


def rounded(given: dict[str, Any]) -> Tensor:
    """Rounding with a straight-through gradient, as of a quantised model."""
    denoised = given["denoised"]
    return denoised + (denoised.round() - denoised).detach()


def test_catches_rounding_with_a_straight_through_gradient(
    hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    h = hosts("sd15")
    model = h.model.clone()
    model.set_model_sampler_post_cfg_function(rounded)
    with pytest.raises(ValueError, match=r"check_gradients: .*finite differences"):
        check(with_model(h, model), caplog)


def test_catches_a_vae_that_is_half_detached(
    hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = hosts("sd15", vae="box")
    decode = h.vae.first_stage_model.decode
    monkeypatch.setattr(h.vae.first_stage_model, "decode", lambda z: 0.5 * decode(z) + 0.5 * decode(z).detach())
    with pytest.raises(ValueError, match="check_gradients: autograd's derivative"):
        check(h, caplog)


GLUING = {"gamma": 0.1, "glue": "pinv"}


@pytest.mark.parametrize("codec", ["kl", "box"])
def test_passes_with_gluing(codec: str, hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert "gradient check passed" in check(hosts("sd15", vae=codec), caplog, **GLUING)


def test_catches_an_encoder_that_is_half_detached(
    hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes part in gluing, and in nothing else."""
    caplog.set_level("INFO")
    h = hosts("sd15", vae="box")
    encode = h.vae.first_stage_model.encode
    monkeypatch.setattr(h.vae.first_stage_model, "encode", lambda x: 0.5 * encode(x) + 0.5 * encode(x).detach())
    assert "gradient check passed" in check(h, caplog)
    with pytest.raises(ValueError, match=r"check_gradients: autograd's derivative of \|E\(x_glued\) - z\|"):
        check(h, caplog, factor=16, **GLUING)


def test_is_off_unless_asked_for(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    model = h.model.clone()
    model.set_model_sampler_cfg_function(detached_uncond)
    h.sample(h.sampler(stand_still), guider=with_model(h, model).guider(), sigmas=MODERATE)


def test_leaves_the_run_as_it_is(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    plain, guarded = (
        h.sample(h.sampler(h.pack.samplers.sample_psld, check_gradients=asked, eta=0.5), steps=2) for asked in (False, True)
    )
    assert torch.equal(guarded, plain)
