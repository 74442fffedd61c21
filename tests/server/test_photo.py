"""The user's own photo: it is the measurement, not something to degrade again."""

import re

import numpy as np
from support.server_prompts import SHORT, Prompt, add, inputs, keep, paper_rule, picture, run, titled, with_psld

from dev.server import Server


def own_photo(prompt: Prompt) -> None:
    """Measurement from Photo in place of Measure (simulate), whose degraded picture now plays the photo."""
    simulate = titled(prompt, "Measure (simulate)")
    given = {"photo": [simulate, 1], "operator": [titled(prompt, "Operator"), 0], "noise": "entered", "noise.sigma": 0.0}
    own = add(prompt, "own", "PosteriorMeasurementFromPhoto", **given)
    for title, name in (("PSLD Sampler", "measurement"), ("Start Latent", "measurement"), ("Finish", "measurement")):
        inputs(prompt, title)[name] = [own, 0]


def residuals(outputs: dict, prompt: Prompt) -> list[float]:
    return [float(value) for value in re.findall(r"-> (\S+)", outputs[titled(prompt, "Finish")]["text"][0])]


def test_small_photo_becomes_a_large_picture(server: Server) -> None:
    """16 x 16 in, 128 x 128 out, which made smaller again is the photo; the same picture as from the simulation."""
    # Each step makes more of the rounding of a photo in float32: after ten of the published rule some processors are 5 of 255 apart.
    # The line search makes visible differences of it at once: its decoder is piecewise linear.
    simulated, own = with_psld("super_resolution_x8", 4), with_psld("super_resolution_x8", 4)
    for prompt in (simulated, own):
        paper_rule(prompt)
    own_photo(own)
    inputs(own, "Noise")["again"] = "own"
    outputs = server.run(own)
    result = picture(server, outputs, own, "Result")
    assert result.shape == (128, 128, 3)
    assert max(residuals(outputs, own)) <= 1e-4
    difference = result.astype(int) - run(server, simulated)
    assert int(np.abs(difference).max()) <= 2


def test_what_stands_under_the_mask_does_not_matter(server: Server) -> None:
    """A photo with a scribble in the hole gives the same result as one with grey there."""
    grey, scribble = with_psld("inpaint_box", SHORT), with_psld("inpaint_box", SHORT)
    own_photo(grey)
    own_photo(scribble)
    inputs(scribble, "own")["photo"] = [titled(scribble, "Demo Pictures"), 0]  # here the truth itself
    pictures = [run(server, keep(prompt, "Result")) for prompt in (grey, scribble)]
    assert np.array_equal(*pictures)


def test_two_photos_of_one_picture(server: Server) -> None:
    """A sharp black-and-white photo and a small colour one, together: both are met, and the result nearly is the truth."""
    prompt = with_psld("super_resolution_x8", SHORT)
    truth, small = inputs(prompt, "Measure (simulate)")["image"], titled(prompt, "Measure (simulate)")
    grey = add(prompt, "grey", "PosteriorGrayscale", weights="Rec.709")
    measure = {"image": truth, "operator": [grey, 0], "noise": "Gaussian", "noise.sigma": 0.0, "seed": 0}
    sharp = add(prompt, "sharp", "PosteriorMeasureSimulate", **measure)
    both = add(prompt, "both", "PosteriorCombineMeasurements", first=[sharp, 0], second=[small, 0])
    for title in ("PSLD Sampler", "Start Latent", "Finish"):
        inputs(prompt, title)["measurement"] = [both, 0]
    outputs = server.run(prompt)
    assert max(residuals(outputs, prompt)) <= 1e-4
    error = picture(server, outputs, prompt, "Result").astype(float) - picture(server, outputs, prompt, "Truth")
    assert float(np.sqrt((error**2).mean())) < 12  # of 255
