"""NaN at any stage: a message that names step and sigma, and the last good estimate is kept."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.fault_runs import METHODS, Spoilt, run, unfinished, unharmed
from support.host_runs import Host, layer_of
from torch import Tensor


def eight_bits(h: Host, denoised: Tensor) -> np.ndarray:
    """The picture of what a callback was given, through the host's own VAE node."""
    if h.vae is None:
        image = (denoised.movedim(1, -1) + 1) / 2
    else:
        with torch.inference_mode():
            image = h.vae.decode(h.model.model.latent_format.process_out(denoised))
    return (image.clamp(0, 1) * 255).numpy()


@pytest.mark.parametrize(
    ("method", "arch", "batch", "pixels"),
    [
        *((method, "sd15", 1, False) for method in METHODS),
        ("C-PiGDM", "sd15", 2, False),
        ("C-PiGDM", "sd15", 1, True),
        ("C-PiGDM", "sd3", 1, False),
    ],
)
def test_nan_from_the_model_names_step_and_sigma_and_saves_the_last_good_estimate(
    method: str, arch: str, batch: int, pixels: bool, hosts: Callable[..., Host]
) -> None:
    from PIL import Image

    host = hosts(arch)
    if pixels:
        host = dataclasses.replace(host, vae=None)  # its latents are the pictures, with 4 channels
    ops, steps, before = host.pack.operators, [], unfinished()
    photo = ops.Measurement(torch.zeros(1, 4, 4, 4), ops.AreaDownscale((4, 8, 8), 2)) if pixels else host.measurement()
    given = {"measurement": photo, "steps": 3, "latent": host.latent(batch)}
    with unharmed(host):
        expected = run(host, method, **given)
        with Spoilt(layer_of(host, "network"), {3}), pytest.raises(RuntimeError) as failed:
            run(host, method, **given, callback=lambda i, denoised, *_: steps.append(denoised.clone()))
        assert torch.equal(run(host, method, **given), expected)
    sigma = float(host.pack.nodes.host.sigmas_of(host.model, 3, "normal")[2])
    sigma = sigma / (1 - sigma) if arch == "sd3" else sigma  # the samplers' own, as on the node
    said = re.fullmatch(
        r"step 3 of 3, sigma ([\d.]+): the model returned NaN.*step 2, is saved in .* as (.*)", str(failed.value)
    )
    assert said, failed.value
    assert abs(float(said[1]) - sigma) < 0.01 * sigma
    pictures = sorted(unfinished() - before)
    assert said[2].split(" to ") == [path.name for path in pictures]
    first, last = (eight_bits(host, denoised) for denoised in steps)
    assert len(pictures) == len(last) == batch
    assert np.abs(first - last).max() > 3  # another step's picture is another
    for path, right in zip(pictures, last, strict=True):
        with Image.open(path) as image:
            assert np.abs(np.asarray(image).astype(float) - right).max() <= 1.01


def test_nan_in_the_first_step_says_that_there_is_nothing_to_save(h: Host) -> None:
    before = unfinished()
    with (
        Spoilt(layer_of(h, "network"), {1}),
        pytest.raises(RuntimeError, match=r"step 1 of 2, sigma [\d.]+: .*nothing to save"),
    ):
        run(h, "C-PiGDM")
    assert unfinished() == before


@pytest.mark.parametrize("method", METHODS)
def test_nan_from_the_vae_is_not_laid_to_the_model(method: str, h: Host) -> None:
    with (
        Spoilt(layer_of(h, "decode"), set(range(1, 1000))),
        pytest.raises(RuntimeError, match=r"step 1 of 2, sigma [\d.]+: the VAE returned NaN.*--fp32-vae"),
    ):
        run(h, method)


def test_messages_are_whole_sentences(h: Host) -> None:
    with Spoilt(layer_of(h, "network"), {2}), pytest.raises(RuntimeError) as failed:
        run(h, "C-PiGDM")
    assert not re.search(r"\(\)|None|  |\.\.", str(failed.value))
