"""Cancelled and wrong prompts: a clear message that names the input, and a server that goes on as if nothing had been."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.server_prompts import (
    SHORT,
    Prompt,
    add,
    inputs,
    keep,
    paper_rule,
    relink,
    run,
    titled,
    with_psld,
)
from support.tiny_checkpoints import write_checkpoint, write_controlnet

from dev.server import PromptFailed, Server


@pytest.fixture(autouse=True)
def usable_afterwards(server: Server, reference: np.ndarray) -> Iterator[None]:
    yield
    assert np.array_equal(run(server, with_psld("inpaint_box", SHORT)), reference)


def test_interrupt(server: Server) -> None:
    steps, sent = [], 0.0

    def interrupt(message: dict[str, Any]) -> None:
        nonlocal sent
        if message["type"] == "progress":
            steps.append(message["data"]["value"])
            if steps[-1] == 3:
                server.post("/interrupt")
                sent = time.monotonic()

    with pytest.raises(PromptFailed, match="SamplerCustomAdvanced: interrupted"):
        run(server, with_psld("inpaint_box"), on_message=interrupt)
    assert steps[-1] <= 5
    assert time.monotonic() - sent < 5


def mask_pattern(prompt: Prompt, width: int = 128, value: float = 0.0) -> str:
    """Let Missing Pixels take a stock mask, and return that mask's node."""
    mask = add(prompt, "mask", "SolidMask", value=value, width=width, height=128)
    operator = prompt[titled(prompt, "Operator")]
    operator["inputs"] = {"pattern": "mask", "pattern.mask": [mask, 0], "pattern.threshold": 0.5}
    return mask


def both_weights_zero(prompt: Prompt) -> None:
    paper_rule(prompt, omega=0.0, gamma=0.0)


def mask_as_operator(prompt: Prompt) -> None:
    inputs(prompt, "Measure (simulate)")["operator"] = [mask_pattern(prompt), 0]


def weight_out_of_range(prompt: Prompt) -> None:
    paper_rule(prompt, omega=1e6)


def no_operator(prompt: Prompt) -> None:
    del inputs(prompt, "Measure (simulate)")["operator"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (mask_as_operator, ("PosteriorMeasureSimulate", "operator", "MASK", "LINEAR_OPERATOR")),
        (weight_out_of_range, ("PosteriorSamplerPSLD", "rule.omega", "1000000.0 bigger than max of 100")),
        (no_operator, ("PosteriorMeasureSimulate", "Required input is missing", "operator")),
    ],
)
def test_refused_before_it_runs(server: Server, spoil: Callable[[Prompt], None], words: tuple[str, ...]) -> None:
    prompt = with_psld("inpaint_box", SHORT)
    spoil(prompt)
    with pytest.raises(PromptFailed, match="refused a part of the prompt"):  # the previews can run, and do
        server.run(prompt)
    with pytest.raises(PromptFailed, match="refused the prompt") as failed:  # nothing is left to run: HTTP 400
        server.run(keep(prompt, "Result"))
    assert all(word in str(failed.value) for word in words), failed.value


def mask_of_another_size(prompt: Prompt) -> None:
    """A painted one: half of a 64 x 128 mask."""
    empty = mask_pattern(prompt, width=64)
    dot = add(prompt, "dot", "SolidMask", value=1.0, width=32, height=32)
    painted = add(prompt, "painted", "MaskComposite", destination=[empty, 0], source=[dot, 0], x=0, y=0, operation="add")
    inputs(prompt, "Operator")["pattern.mask"] = [painted, 0]


def mask_of_nothing(prompt: Prompt) -> None:
    mask_pattern(prompt, width=64)


def blur_wider_than_the_picture(prompt: Prompt) -> None:
    values = {
        "kernel": "gaussian",
        "kernel.sigma": 60.0,
        "kernel.sigma_across": 0.0,
        "kernel.angle": 0.0,
        "boundary": "circular",
    }
    prompt[titled(prompt, "Operator")].update(class_type="PosteriorBlur", inputs=values)


def mask_over_everything(prompt: Prompt) -> None:
    mask_pattern(prompt, value=1.0)


def box_outside(prompt: Prompt) -> None:
    inputs(prompt, "Operator")["pattern.x"] = 100


def linked_weights_zero(prompt: Prompt) -> None:
    zero = add(prompt, "zero", "PrimitiveFloat", value=0.0)
    paper_rule(prompt, omega=[zero, 0], gamma=[zero, 0])


def colour_photo_as_grey(prompt: Prompt) -> None:
    grey = add(prompt, "grey", "PosteriorGrayscale", weights="Rec.709")
    measure = prompt[titled(prompt, "Measure (simulate)")]
    measure["class_type"] = "PosteriorMeasurementFromPhoto"
    measure["inputs"] = {"photo": measure["inputs"]["image"], "operator": [grey, 0], "noise": "entered", "noise.sigma": 0.0}


def empty_latent(prompt: Prompt, **size: int) -> None:
    inputs(prompt, "Sample")["latent_image"] = [add(prompt, "empty", "EmptyLatentImage", **size), 0]


def latent_of_another_size(prompt: Prompt) -> None:
    empty_latent(prompt, width=128, height=64, batch_size=1)


def latent_of_another_batch(prompt: Prompt) -> None:
    inputs(prompt, "Demo Pictures")["count"] = 2
    empty_latent(prompt, width=128, height=128, batch_size=3)


def picture_no_latent_has(prompt: Prompt) -> None:
    measure = inputs(prompt, "Measure (simulate)")
    size = {"upscale_method": "area", "width": 100, "height": 128, "crop": "disabled"}
    measure["image"] = [add(prompt, "resized", "ImageScale", image=measure["image"], **size), 0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (mask_of_another_size, ("PosteriorMeasureSimulate", "mask: is 64 x 128", "128 x 128")),
        (box_outside, ("PosteriorMeasureSimulate", "beyond the picture of 128 x 128")),
        (both_weights_zero, ("PosteriorSamplerPSLD", "omega, gamma: both are 0", "set one above 0")),
        (linked_weights_zero, ("PosteriorSamplerPSLD", "omega, gamma: both are 0")),
        (colour_photo_as_grey, ("PosteriorMeasurementFromPhoto", "photo: is in colour")),
        (mask_of_nothing, ("PosteriorMask", "mask: marks no pixel", "Mask Editor")),
        (blur_wider_than_the_picture, ("PosteriorMeasureSimulate", "more than the picture of 128 x 128", "sigma")),
        (mask_over_everything, ("PosteriorMask", "mask: covers the whole picture")),
        (latent_of_another_size, ("SamplerCustomAdvanced", "latent_image: got (4, 8, 16)", "(4, 16, 16)", "Start Latent")),
        (latent_of_another_batch, ("SamplerCustomAdvanced", "latent_image: got a batch of 3 for a measurement of 2")),
        (picture_no_latent_has, ("measurement:", "100 x 128", "multiples of 8")),
    ],
)
def test_fails_with_a_clear_message(server: Server, spoil: Callable[[Prompt], None], words: tuple[str, ...]) -> None:
    prompt = with_psld("inpaint_box", SHORT)
    spoil(prompt)
    with pytest.raises(PromptFailed) as failed:
        server.run(keep(prompt, "Result"))
    assert all(word in str(failed.value) for word in words), failed.value


def motion_blur(prompt: Prompt) -> None:
    kernel = {"length": 15.0, "angle": 30.0, "intensity": 0.0, "seed": 0}
    prompt[titled(prompt, "Operator")].update(
        class_type="PosteriorBlur",
        inputs={"kernel": "motion", **{f"kernel.{name}": value for name, value in kernel.items()}, "boundary": "replicate"},
    )


def test_pseudo_inverse_that_does_not_converge(server: Server) -> None:
    prompt = with_psld("super_resolution_x8", SHORT)
    motion_blur(prompt)
    paper_rule(prompt)
    with pytest.raises(PromptFailed, match=r"glue: the pseudo-inverse of this operator does not converge.*adjoint.*circular"):
        server.run(keep(prompt, "Result"))
    # What the message proposes works; and with a little noise Finish needs no exact solution.
    paper_rule(prompt, glue="adjoint")
    inputs(prompt, "Measure (simulate)")["noise.sigma"] = 0.01
    assert run(server, keep(prompt, "Result")).shape == (128, 128, 3)


# Broken models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(base: Path) -> Iterator[dict[str, str]]:
    """Names of files: a network of NaN, a ControlNet of NaN, a checkpoint with neither VAE nor CLIP, and another family's."""
    folders = {name: base / "models" / name for name in ("checkpoints", "controlnet")}
    folders["controlnet"].mkdir(exist_ok=True)
    paths = {
        "nan": write_checkpoint(folders["checkpoints"] / "nan.safetensors", "sd15", vae="box"),
        "sound": write_checkpoint(folders["checkpoints"] / "sound.safetensors", "sd15", vae="box"),
        "bare": write_checkpoint(folders["checkpoints"] / "bare.safetensors", "sd15", vae=None),
        "foreign": write_checkpoint(folders["checkpoints"] / "foreign.safetensors", "sd3"),
        "control": write_controlnet(folders["controlnet"] / "nan_control.safetensors"),
    }
    for name in ("nan", "control"):
        weights = load_file(paths[name])
        last = "model.diffusion_model.out.2.bias" if name == "nan" else "control_model.middle_block_out.0.bias"
        save_file({**weights, last: torch.full_like(weights[last], torch.nan)}, paths[name])
    yield {name: path.name for name, path in paths.items()}
    for path in paths.values():
        path.unlink()


def load(prompt: Prompt, file: str, *slots: int) -> str:
    """Take these outputs of the demo prior from a checkpoint."""
    checkpoint = add(prompt, "Load Checkpoint", "CheckpointLoaderSimple", ckpt_name=file)
    relink(prompt, titled(prompt, "Load Demo Prior"), checkpoint, slots)
    return checkpoint


def no_vae(prompt: Prompt, files: dict[str, str]) -> None:
    load(prompt, files["bare"], 2)


def no_clip(prompt: Prompt, files: dict[str, str]) -> None:
    load(prompt, files["bare"], 1)


def foreign_vae(prompt: Prompt, files: dict[str, str]) -> None:
    load(prompt, files["foreign"], 2)


def nan_model(prompt: Prompt, files: dict[str, str]) -> None:
    load(prompt, files["nan"], 0)


def nan_photo(prompt: Prompt, files: dict[str, str]) -> None:
    """Decoded from what a stock sampler makes of that model."""
    checkpoint = add(prompt, "Load Checkpoint", "CheckpointLoaderSimple", ckpt_name=files["nan"])
    text, empty = (
        [titled(prompt, "Positive Prompt"), 0],
        add(prompt, "e", "EmptyLatentImage", width=128, height=128, batch_size=1),
    )
    values = {"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": [checkpoint, 0], "positive": text, "negative": text, "latent_image": [empty, 0]}
    samples = add(prompt, "Stock Sample", "KSampler", **links, **values)
    decoded = add(prompt, "Stock Decode", "VAEDecode", samples=[samples, 0], vae=[titled(prompt, "Load Demo Prior"), 2])
    inputs(prompt, "Measure (simulate)")["image"] = [decoded, 0]


def video_latent(prompt: Prompt, files: dict[str, str]) -> None:
    video = add(prompt, "video", "EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1)
    inputs(prompt, "Sample")["latent_image"] = [video, 0]


def nan_later(prompt: Prompt, files: dict[str, str]) -> None:
    """A ControlNet takes part in the second half of the steps only, which are those of all noise levels."""
    inputs(prompt, "Scheduler")["denoise"] = 1.0
    load(prompt, files["sound"], 0, 2)
    net = add(prompt, "ControlNet", "ControlNetLoader", control_net_name=files["control"])
    texts = {"positive": [titled(prompt, "Positive Prompt"), 0], "negative": [titled(prompt, "Negative Prompt"), 0]}
    values = {"strength": 1.0, "start_percent": 0.5, "end_percent": 1.0}
    image = [titled(prompt, "Demo Pictures"), 0]
    applied = add(prompt, "Apply", "ControlNetApplyAdvanced", **texts, control_net=[net, 0], image=image, **values)
    inputs(prompt, "Guider").update(positive=[applied, 0], negative=[applied, 1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_vae, r"vae: there is no VAE in it; .* Load one with Load VAE"),
        (no_clip, r"CLIPTextEncode: .*clip input is invalid: None"),  # ComfyUI's own
        (foreign_vae, r"vae: its latents have 16 channels, the model's have 4; .*VAE that belongs to this model"),
        (nan_model, r"SamplerCustomAdvanced: .*step 1 of 4, sigma [\d.]+: the model returned NaN"),
        (nan_photo, r"PosteriorMeasureSimulate: .*image: has NaN"),
        (video_latent, r"SamplerCustomAdvanced: .*latent_image: has 5 dimensions"),
        (nan_later, r"step \d of 4, sigma [\d.]+: the model returned NaN.* step \d, is saved .* as posterior_unfinished_"),
    ],
)
def test_the_server_goes_on_after_broken_models(
    server: Server, base: Path, broken: dict[str, str], spoil: Callable[[Prompt, dict[str, str]], None], words: str
) -> None:
    prompt = with_psld("super_resolution_x8", 4)
    spoil(prompt, broken)
    before = set((base / "output").glob("*"))
    with pytest.raises(PromptFailed, match=words) as failed:
        server.run(keep(prompt, "Result"))
    new = set((base / "output").glob("*")) - before
    assert len(new) == (1 if spoil is nan_later else 0)
    for path in new:
        assert path.name in str(failed.value)
        with Image.open(path) as image:
            assert image.size == (128, 128)
            assert np.asarray(image).std() > 1
