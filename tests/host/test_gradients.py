"""Autograd through the real host equals finite differences, for every family and conditioning that is not refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_runs import Host, Probe, directional_derivatives, pull_back
from support.host_versions import needs, nodes_custom_sampler
from support.tiny_checkpoints import conditioning, write_controlnet, write_lora, write_sd3_controlnet
from torch import Tensor

MODERATE = torch.tensor([2.0, 1.0])
FLOW = torch.tensor([0.7, 0.3])
FAMILIES = ("sd15", "sd21v", "sdxl_vega", "sd3")
every_family = pytest.mark.parametrize("arch", FAMILIES)


@pytest.fixture(scope="module")
def sd15(hosts: Callable[..., Host]) -> Host:
    return hosts("sd15")


def assert_gradient(
    host: Host, sigmas: Tensor = MODERATE, tolerance: float = 0.01, batch: int = 1, step: float = 2e-3, **run: Any
) -> None:
    """Autograd is right where every activation is kept, and the same where they are computed again."""

    def seen(look: Callable, memory: str) -> Any:
        probe = Probe(look)
        sampler = host.pack.nodes.host.stock_sampler(probe, host.measurement(batch), host.vae, memory)
        host.sample(sampler, sigmas=sigmas, **run)
        return probe.seen

    differences, products, size = seen(lambda model, x, **_: directional_derivatives(model, x, step), "fastest")
    assert size > 0
    for difference, product in zip(differences, products, strict=True):
        assert abs(difference - product) <= tolerance * size, (differences, products)
    kept, *again = (seen(lambda model, x, **_: pull_back(model, x)[1], mode) for mode in host.pack.nodes.host.MODES)
    for gradient in again:
        torch.testing.assert_close(gradient, kept, rtol=0, atol=1e-6 * float(kept.abs().max()))


def moderate(arch: str) -> Tensor:
    return FLOW if arch == "sd3" else MODERATE


@every_family
def test_every_family(arch: str, hosts: Callable[..., Host]) -> None:
    assert_gradient(hosts(arch), moderate(arch))


def test_batch(sd15: Host) -> None:
    assert_gradient(sd15, batch=3, latent=sd15.latent(3))


@every_family
def test_area_and_mask_conditionings(arch: str, hosts: Callable[..., Host]) -> None:
    def only(seed: int, **where: Any) -> list:
        ((cond, options),) = conditioning(arch, seed)
        return [[cond, {**options, **where}]]

    host, mask = hosts(arch), torch.zeros(1, 64, 64)
    mask[:, 16:40, 8:56] = 1.0
    area, masked = only(1, area=(4, 4, 2, 2), strength=0.8), only(4, mask=mask, mask_strength=1.0)
    assert_gradient(host, moderate(arch), guider=host.guider(positive=area + masked + conditioning(arch, 5)))


def test_latent_noise_mask(sd15: Host) -> None:
    mask = torch.ones(1, 1, 64, 64)
    mask[..., :32] = 0
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert_gradient(sd15, noise_mask=mask, latent=latent)


@every_family
def test_lora(arch: str, hosts: Callable[..., Host], tmp_path: Path) -> None:
    import comfy.sd
    import comfy.utils

    host = hosts(arch)
    with torch.inference_mode():
        lora = comfy.utils.load_torch_file(str(write_lora(tmp_path / "lora.safetensors", arch)))
        model, _ = comfy.sd.load_lora_for_models(host.model, None, lora, 1.0, 0.0)
    assert len(model.patches) == len(lora) // 3  # none of its layers was passed over
    assert_gradient(Host(host.pack, arch, model, host.vae), moderate(arch))


@every_family
def test_controlnet(arch: str, hosts: Callable[..., Host], tmp_path: Path) -> None:
    import comfy.controlnet

    host = hosts(arch)
    with torch.inference_mode():
        path = tmp_path / "control.safetensors"
        net = comfy.controlnet.load_controlnet(
            str(write_sd3_controlnet(path) if arch == "sd3" else write_controlnet(path, arch))
        )
        hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        control = net.copy().set_cond_hint(hint, 1.0, (0.0, 1.0), vae=host.vae)
        conds = [[c, {**d, "control": control, "control_apply_to_uncond": True}] for c, d in conditioning(arch, 1)]

    def seen(guider: Any) -> Tensor:
        probe = Probe(lambda model, x, **_: model(x).detach())
        host.sample(host.sampler(probe), sigmas=moderate(arch), guider=guider)
        return probe.seen

    assert float((seen(host.guider(positive=conds)) - seen(host.guider())).abs().max()) > 1e-3  # it takes part
    assert_gradient(host, moderate(arch), guider=host.guider(positive=conds))


def test_t2i_adapter(sd15: Host, tmp_path: Path) -> None:
    """It has a network but no patcher, so that nothing else would make its weights normal."""
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter_light
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(Adapter_light(cin=192, channels=[320, 640, 1280, 1280], nums_rb=4).state_dict(), tmp_path / "adapter.safetensors")
    with torch.inference_mode():
        adapter = comfy.controlnet.load_controlnet(str(tmp_path / "adapter.safetensors"))
        hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        control = adapter.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
        conds = [[c, {**d, "control": control, "control_apply_to_uncond": True}] for c, d in conditioning("sd15", 1)]
    assert_gradient(sd15, guider=sd15.guider(positive=conds))


@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_two_models_in_one_guider(cfg: float, sd15: Host, tiny: Callable[..., Path], load: Callable) -> None:
    extras = nodes_custom_sampler()
    needs(hasattr(extras, "Guider_DualModel"), "Guider_DualModel")
    other = load(tiny("sd15", seed=1, vae=None))[0]
    guider = extras.Guider_DualModel(sd15.model, other)
    guider.set_conds(conditioning("sd15", 1), conditioning("sd15", 2))
    guider.set_cfg(cfg)
    assert_gradient(sd15, guider=guider)


def test_two_models_of_two_families_in_one_guider(sd15: Host, hosts: Callable[..., Host]) -> None:
    """Each prompt is that of its own model."""
    extras = nodes_custom_sampler()
    needs(hasattr(extras, "Guider_DualModel"), "Guider_DualModel")
    guider = extras.Guider_DualModel(sd15.model, hosts("sd21v").model)
    guider.set_conds(conditioning("sd15", 1), conditioning("sd21v", 2))
    for cfg in (1.0, 3.0):  # at 1 the second is left out
        guider.set_cfg(cfg)
        assert_gradient(sd15, guider=guider)
    estimates = []
    for second in (hosts("sd21v"), sd15):
        guider.uncond_inner = second.model.model
        guider.conds, guider.inner_model = {"positive": [{}], "negative": [{}]}, sd15.model.model
        plan = sd15.pack.nodes.host.memory.Plan()
        estimates.append(sd15.pack.nodes.host.plugin.needed(plan, guider, sd15.vae, sd15.latent(), True))
    assert estimates[0].weights > estimates[1].weights  # of both models, not of the first alone


def basic(h: Host) -> Any:
    guider = nodes_custom_sampler().Guider_Basic(h.model)
    guider.set_conds(conditioning("sd15", 1))
    return guider


def dual_cfg(h: Host) -> Any:
    guider = nodes_custom_sampler().Guider_DualCFG(h.model)
    guider.set_conds(*(conditioning("sd15", seed) for seed in (1, 2, 3)))
    guider.set_cfg(3.0, 2.0)
    return guider


def perp_neg(h: Host) -> Any:
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    guider = Guider_PerpNeg(h.model)
    guider.set_conds(*(conditioning("sd15", seed) for seed in (1, 2, 3)))
    guider.set_cfg(3.0, 1.0)
    return guider


@pytest.mark.parametrize("guider", [basic, dual_cfg, perp_neg])
def test_other_guiders(guider: Callable[[Host], Any], sd15: Host) -> None:
    assert_gradient(sd15, guider=guider(sd15))


@pytest.mark.parametrize(
    ("guider", "expected"),
    [(basic, 1), (dual_cfg, 3), (perp_neg, 3), (lambda h: h.guider(cfg=3.0), 2), (lambda h: h.guider(cfg=1.0), 1)],
)
def test_passes_of_a_step_are_counted_as_the_guider_makes_them(
    guider: Callable[[Host], Any], expected: int, sd15: Host
) -> None:
    batches: list[int] = []
    handle = sd15.model.model.diffusion_model.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    guider, counted = guider(sd15), []
    probe = Probe(lambda model, x, **_: (counted.append(sd15.pack.nodes.host.plugin.passes(guider)), model(x)))
    try:
        sd15.sample(sd15.sampler(probe), guider=guider, steps=1)
    finally:
        handle.remove()
    assert counted == [sum(batches)] == [expected]


@pytest.mark.parametrize("from_the_top", [False, True])
def test_rescale_cfg_and_zero_terminal_snr(from_the_top: bool, sd15: Host) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, RescaleCFG

    with torch.inference_mode():
        model = ModelSamplingDiscrete().patch(sd15.model, "v_prediction", True)[0]
        model = RescaleCFG().patch(model, 0.7)[0]
    top = float(model.get_model_object("model_sampling").sigma_max)
    assert top > 1000
    # Up there RescaleCFG rounds x0 to what float32 leaves of x, thousands of times larger: shorter steps would measure the rounding.
    run = {"sigmas": torch.tensor([top, 1.0]), "step": 1e-2} if from_the_top else {}
    assert_gradient(Host(sd15.pack, "sd15", model, sd15.vae), **run)


def cut_off_attention(monkeypatch: pytest.MonkeyPatch, overridable: bool) -> None:
    """A kernel whose output is off the graph, as sage's is, wherever SD 1.x's UNet calls attention."""
    import comfy.ldm.modules.attention as attention

    def cut_off(*args: Any, **kwargs: Any) -> Tensor:
        return attention.attention_pytorch(*args, **kwargs).detach()

    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.wrap_attn(cut_off) if overridable else cut_off)


def test_attention_without_a_gradient_is_overridden(sd15: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off_attention(monkeypatch, overridable=True)
    assert_gradient(sd15)


def test_gradient_is_wrong_without_the_override(sd15: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with the override and the refusal taken away the same comparison does not hold."""
    cut_off_attention(monkeypatch, overridable=True)
    plugin = sd15.pack.nodes.host.plugin
    monkeypatch.setattr(plugin, "differentiable_options", lambda options, has_control: {"transformer_options": {}, **options})
    monkeypatch.setattr(plugin, "check_attention", lambda network, options: None)
    with pytest.raises(AssertionError):
        assert_gradient(sd15)


def test_attention_that_cannot_be_overridden_is_refused(sd15: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off_attention(monkeypatch, overridable=False)
    probe = Probe(lambda model, x, **_: model(x))
    with pytest.raises(ValueError, match=r"attention \(.*cut_off, in comfy.ldm.modules.attention\) has no gradient"):
        sd15.sample(sd15.sampler(probe))
    assert probe.seen is None


def test_attention_that_cannot_be_tried_is_refused(sd15: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels for a GPU's half precision only."""
    import comfy.ldm.modules.attention as attention

    def picky(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("expected dtype half")

    monkeypatch.setattr(attention, "optimized_attention", picky)
    probe = Probe(lambda model, x, **_: model(x))
    with pytest.raises(
        ValueError, match=r"model: its attention \(.*picky, in .*\) fails on three small tensors \(expected dtype half\)"
    ):
        sd15.sample(sd15.sampler(probe))
    assert probe.seen is None


@pytest.mark.parametrize("detached", [True, False])
def test_replaced_attention(detached: bool, sd15: Host) -> None:
    """Another node's attn1: fine with a gradient, refused by name without one."""
    import comfy.ldm.modules.attention as attention

    def theirs(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        out = attention.attention_pytorch(q, k, v, extra["n_heads"])
        return out.detach() if detached else 0.5 * out

    model = sd15.model.clone()
    model.set_model_attn1_replace(theirs, "input", 1)
    host = Host(sd15.pack, "sd15", model, sd15.vae)
    if not detached:
        assert_gradient(host)
        return
    with pytest.raises(ValueError, match=r"replaces attn1 \('input', 1\) by .*theirs, which has no gradient"):
        host.sample(host.sampler(host.pack.samplers.sample_psld))


def test_blocks_see_the_options_of_their_own_call(sd15: Host) -> None:
    """A UNet writes its place into the options as it goes; when a block is computed again, it must read its own."""
    places = []

    def note(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        places.append((extra["block"], extra["block_index"], extra["transformer_index"]))
        return n * (1 + extra["transformer_index"]), context, value

    model = sd15.model.clone()
    model.set_model_attn1_patch(note)
    assert_gradient(Host(sd15.pack, "sd15", model, sd15.vae))
    assert set(places) == {(("input", 1), 0, 0)}


def test_nan_that_the_vae_is_given_is_not_laid_to_it(hosts: Callable[..., Host]) -> None:
    host = hosts("sd15")
    z = torch.full((1, 4, 8, 8), torch.nan)
    probe = Probe(lambda model, x, autoencoder, **_: autoencoder.decode(z))
    with pytest.raises(RuntimeError, match=r": what is given to the VAE has NaN or infinite values"):
        host.sample(host.sampler(probe), sigmas=MODERATE)


@pytest.mark.parametrize("codec", ["taesd", "kl"])
def test_autoencoder(codec: str, hosts: Callable[..., Host]) -> None:
    host = hosts("sd15", vae=codec)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def glue(autoencoder: Any) -> Callable[[Tensor], Tensor]:
        return lambda v: autoencoder.encode(autoencoder.decode(v))

    def look(model: Any, x: Tensor, autoencoder: Any, **_: Any) -> tuple:
        maps = (autoencoder.decode, glue(autoencoder))
        return [directional_derivatives(f, z) for f in maps], autoencoder.decode(z).detach(), pull_back(maps[1], z)[1]

    probe = Probe(look)
    host.sample(host.sampler(probe, memory="fastest"), sigmas=MODERATE)
    derivatives, image, kept = probe.seen
    for differences, products, size in derivatives:
        for difference, product in zip(differences, products, strict=True):
            assert abs(difference - product) <= 0.02 * size
    # The same picture as the stock decoder's, which clamps to [0, 1].
    with torch.inference_mode():
        stock = host.vae.decode(host.model.model.latent_format.process_out(z)).movedim(-1, 1)
    torch.testing.assert_close(((image + 1) / 2).clamp(0, 1), stock.clone(), rtol=0, atol=1e-4)

    for mode in ("balanced", "lowest"):
        probe = Probe(lambda model, x, autoencoder, **_: pull_back(glue(autoencoder), z)[1])
        host.sample(host.sampler(probe, memory=mode), sigmas=MODERATE)
        torch.testing.assert_close(probe.seen, kept, rtol=0, atol=1e-6 * float(kept.abs().max()))


def test_vae_without_a_gradient_is_refused(sd15: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = sd15.vae.first_stage_model.decode
    monkeypatch.setattr(sd15.vae.first_stage_model, "decode", lambda z: decode(z).detach())
    with pytest.raises(ValueError, match="vae: its output has no gradient"):
        sd15.sample(sd15.sampler(sd15.pack.samplers.sample_psld))
