"""C-PiGDM differentiates through the VAE's decoder only: what the diffusion network cannot differentiate does not matter to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.host_runs import Host, Probe, Scarce, layer_of
from support.host_versions import needs


def cpigdm(h: Host, memory: str = "auto", lighter: dict[str, str] | None = None, **options: Any) -> Any:
    given = {"network_gradient": False, "lighter": lighter, "consistency": "decoder", **options}
    return h.pack.nodes.host.stock_sampler(h.pack.samplers.sample_cpigdm, h.measurement(), h.vae, memory, **given)


def test_a_network_without_a_gradient_will_do(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    expected = h.sample(cpigdm(h))
    model, h.model = h.model, h.model.clone()
    try:
        h.model.set_model_unet_function_wrapper(
            lambda apply, given: apply(given["input"], given["timestep"], **given["c"]).detach()
        )
        assert torch.equal(h.sample(cpigdm(h, check_gradients=True)), expected)
        with pytest.raises(ValueError, match="has no gradient"):
            h.sample(h.sampler(h.pack.samplers.sample_psld))
    finally:
        h.model = model


def test_quantised_weights_will_do(hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    import comfy.model_management as mm
    from comfy.quant_ops import QuantizedTensor

    # 0.18.2 alone lists a model's weights before it loads them, which the comfy-kitchen of the newest host does not bear.
    needs(not hasattr(mm, "module_mmap_residency"), "quantised weights together with the newest comfy-kitchen")
    h = hosts("sd15")
    layer = h.model.model.diffusion_model.time_embed[0]
    weight = layer._parameters["weight"]
    with torch.inference_mode():  # as the host loads it
        quantised = QuantizedTensor.from_float(weight.detach().clone(), "TensorCoreFP8E4M3Layout")
    try:
        layer._parameters["weight"] = torch.nn.Parameter(quantised.dequantize().to(weight), requires_grad=False)
        expected = h.sample(cpigdm(h))
        layer._parameters["weight"] = torch.nn.Parameter(quantised, requires_grad=False)
        # As the host's own mixed-precision layers do, of which a tiny checkpoint has none.
        layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight.dequantize().to(x), layer.bias.to(x))
        assert torch.equal(h.sample(cpigdm(h)), expected)
        assert "memory auto" not in caplog.text  # the estimate copes
        with pytest.raises(ValueError, match="quantised"):
            h.sample(h.sampler(h.pack.samplers.sample_psld))
    finally:
        layer._parameters["weight"] = weight
        vars(layer).pop("forward", None)


def test_the_estimate_leaves_the_network_out(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    shape = tuple(h.latent().shape)
    estimates = [h.pack.nodes.host.estimate(h.model.model, h.vae, shape, network_gradient=g) for g in (True, False)]
    (decoder,) = estimates[1].stages
    assert decoder == estimates[0].stages[1]
    network = estimates[0].stages[0]
    assert 0 < estimates[1].forward <= min(h.model.model.memory_required((2, *shape[1:])), network.saved + 2 * network.largest)
    for mode in h.pack.nodes.host.MODES:
        assert estimates[1].activations(mode) == max(
            estimates[1].forward, h.pack.nodes.host.memory.Estimate(0, (decoder,)).activations(mode)
        )


def test_its_networks_are_called_as_the_host_calls_them(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    blocks = h.pack.nodes.host.recompute.blocks(h.model.model.diffusion_model)

    def look(*_: Any, **__: Any) -> int:
        return sum("forward" in vars(block) for block in blocks)

    seen = []
    for network_gradient in (True, False):
        probe = Probe(look)
        h.sample(h.sampler(probe, memory="lowest", network_gradient=network_gradient), steps=1)
        seen.append(probe.seen)
    assert seen == [len(blocks), 0]


def test_out_of_memory_falls_to_the_encoder_and_says_so(hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    h = hosts("sd15")
    lighter = {"consistency": "encoder"}
    expected = h.sample(cpigdm(h, **lighter))
    with Scarce(layer_of(h, "decode"), {1, 2, 3}):
        result = h.sample(cpigdm(h, "fastest", lighter))
    assert torch.equal(result, expected)
    said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert said[-1] == (
        "out of memory in mode lowest; started again with consistency encoder, which follows the photo less closely"
    )
    with Scarce(layer_of(h, "decode"), {1, 2, 3}), pytest.raises(torch.cuda.OutOfMemoryError, match="even in mode lowest"):
        h.sample(cpigdm(h, "fastest"))
    with Scarce(layer_of(h, "decode"), {1}), pytest.raises(torch.cuda.OutOfMemoryError, match="even in mode lowest"):
        h.sample(cpigdm(h, "lowest", lighter, **lighter))  # it is what runs already
