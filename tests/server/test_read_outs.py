"""Measurements as files, the read-out nodes, and what nodes show, through the real server."""

import contextlib
import io
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websocket
from PIL import Image
from support.server_prompts import SHORT, Prompt, add, inputs, keep, picture, titled, with_psld

from dev.server import PromptFailed, Server
from operators import load_measurement, save_measurement

SIGMA = 0.05


def degraded(**noise: Any) -> Prompt:
    """Demo Pictures, black and white, then blurred, then smaller, with noise."""
    given = noise or {"noise": "Gaussian", "noise.sigma": SIGMA}
    prompt: Prompt = {}
    nodes = {
        "Truth": ("PosteriorDemoPictures", {"first": 0, "count": 2}),
        "Grey": ("PosteriorGrayscale", {"weights": "Rec.709"}),
        "Blur": ("PosteriorBlur", {"kernel": "disk", "kernel.radius": 1.5, "boundary": "reflect"}),
        "Small": ("PosteriorDownscale", {"method": "area", "method.factor": 2}),
        "Measure": ("PosteriorMeasureSimulate", {"seed": 1, **given}),
    }
    for key, (title, (kind, values)) in enumerate(nodes.items(), 1):
        prompt[str(key)] = {"class_type": kind, "inputs": values, "_meta": {"title": title}}
    inputs(prompt, "Blur")["operator"] = [titled(prompt, "Grey"), 0]
    inputs(prompt, "Small")["operator"] = [titled(prompt, "Blur"), 0]
    inputs(prompt, "Measure").update(image=[titled(prompt, "Truth"), 0], operator=[titled(prompt, "Small"), 0])
    return prompt


def saving(prefix: str = "measurements/test") -> Prompt:
    prompt = degraded()
    add(prompt, "Save", "PosteriorSaveMeasurement", measurement=[titled(prompt, "Measure"), 0], filename_prefix=prefix)
    return prompt


def loading(file: Any) -> Prompt:
    prompt = degraded()
    load = add(prompt, "Load", "PosteriorLoadMeasurement", file=file)
    consistency(prompt, load, [titled(prompt, "Truth"), 0])
    return keep(prompt, "Consistency", "Value 1", "Value 2", "Value 3")


def consistency(prompt: Prompt, measurement: str, image: list[Any]) -> None:
    node = add(prompt, "Consistency", "PosteriorConsistency", image=image, measurement=[measurement, 0], gain=5.0)
    for slot in (1, 2, 3):
        add(prompt, f"Value {slot}", "PreviewAny", source=[node, slot])


def values(outputs: dict[str, Any], prompt: Prompt, slots: tuple[int, ...]) -> list[str]:
    return [outputs[titled(prompt, f"Value {slot}")]["text"][0] for slot in slots]


@pytest.fixture(scope="module")
def file(server: Server) -> str:
    """A measurement that was saved, as Load Measurement names it."""
    prompt = saving()
    (entry,) = server.run(prompt)[titled(prompt, "Save")]["measurements"]
    return f"{entry['subfolder']}/{entry['filename']} [output]"


def test_a_saved_measurement_is_listed_and_loads(server: Server, file: str) -> None:
    """At once, without a restart; and the truth agrees with it as it does with the photo that was saved."""
    options = server.get_json("/object_info/PosteriorLoadMeasurement")["PosteriorLoadMeasurement"]["input"]["required"]["file"]
    assert file in options[1]["options"]
    prompt = loading(file)
    outputs = server.run(prompt)
    relative, sigmas, agrees = values(outputs, prompt, (1, 2, 3))
    assert 0.02 < float(relative) < 0.3
    assert 0.95 < float(sigmas) < 1.05
    assert agrees == "True"
    assert outputs[titled(prompt, "Load")]["text"] == ["noise 0.05"]
    assert picture(server, outputs, prompt, "Load").shape == (128, 128, 3)  # 64 x 64, shown enlarged
    text = outputs[titled(prompt, "Consistency")]["text"][0]
    assert [line.split(":")[0] for line in text.split("\n")] == ["picture 1", "picture 2"]
    assert text.count("agrees within the noise") == 2
    assert picture(server, outputs, prompt, "Consistency").shape == (16 + 128, 3 * 128 + 8, 3)  # names above


def test_a_changed_file_is_read_again(server: Server, base: Path, file: str) -> None:
    path = base / "output" / file.removesuffix(" [output]")
    first, again, changed = (loading(file) for _ in range(3))
    reused: list[str] = []

    def note(message: dict[str, Any]) -> None:
        if message["type"] == "execution_cached":
            reused.extend(message["data"]["nodes"])

    server.run(first)
    server.run(again, note)
    assert titled(again, "Load") in reused
    reused.clear()
    measurement = load_measurement(path)
    save_measurement(path, type(measurement)(measurement.y, measurement.operator, 2 * measurement.sigma))
    outputs = server.run(changed, note)
    assert titled(changed, "Load") not in reused
    assert outputs[titled(changed, "Load")]["text"] == ["noise 0.1"]


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "nothing.safetensors [output]"])
def test_files_that_are_not_listed_are_refused_before_the_run(server: Server, name: str) -> None:
    with pytest.raises(PromptFailed, match=r"refused the prompt: PosteriorLoadMeasurement: Value not in list: file"):
        server.run(loading(name))


def test_nothing_is_saved_outside_the_output_folder(server: Server, base: Path) -> None:
    before = set(base.rglob("*.safetensors"))
    with pytest.raises(PromptFailed, match=r"PosteriorSaveMeasurement: .*filename_prefix: got '../up', expected a name within"):
        server.run(saving("../up"))
    assert set(base.rglob("*.safetensors")) == before


def test_compare(server: Server) -> None:
    prompt = degraded()
    inputs(prompt, "Measure")["operator"] = [titled(prompt, "Blur"), 0]
    pictures = {"image": [titled(prompt, "Measure"), 1], "truth": [titled(prompt, "Truth"), 0]}
    node = add(prompt, "Compare", "PosteriorCompare", brightest=0.2, **pictures)
    for slot in (1, 2):
        add(prompt, f"Value {slot}", "PreviewAny", source=[node, slot])
    outputs = server.run(prompt)
    psnr, ssim = map(float, values(outputs, prompt, (1, 2)))
    assert 10 < psnr < 30
    assert 0 < ssim < 1
    lines = outputs[node]["text"][0].split("\n")
    assert len(lines) == 2
    assert psnr == pytest.approx(np.mean([float(line.split()[3]) for line in lines]), abs=0.01)
    assert picture(server, outputs, prompt, "Compare").shape == (16 + 128, 3 * 128 + 8, 3)  # names above


def test_poisson_noise_and_its_estimate(server: Server) -> None:
    prompt = degraded(**{"noise": "Poisson", "noise.peak": 200.0})
    inputs(prompt, "Truth")["first"] = 2  # two of nearly one brightness, which a batch with Poisson noise must be
    photo = [titled(prompt, "Measure"), 1]
    inputs(prompt, "Measure")["operator"] = [add(prompt, "None", "PosteriorIdentity"), 0]
    given = {"photo": photo, "operator": [titled(prompt, "None"), 0], "noise": "estimated"}
    own = add(prompt, "Own", "PosteriorMeasurementFromPhoto", **given)
    consistency(prompt, own, photo)
    outputs = server.run(prompt)
    (said,) = outputs[titled(prompt, "Measure")]["text"]
    assert said.endswith("root mean square; sqrt(v / 200) for a value v")
    simulated = float(said.removeprefix("simulated, noise ").partition(",")[0])
    estimates = [float(line.split()[1]) for line in outputs[own]["text"][0].split("\n")]
    assert len(estimates) == 2
    # Photons make no one sigma; what is estimated is that of the flattest parts.
    assert all(0.5 * simulated < value < 1.5 * simulated for value in estimates)


def test_every_operator_measurement_finish_and_statistics_node_shows_a_picture(server: Server) -> None:
    prompt = degraded()
    truth, measure = [titled(prompt, "Truth"), 0], titled(prompt, "Measure")
    add(prompt, "Mask", "PosteriorMask", pattern="random", **{f"pattern.{k}": v for k, v in HOLES.items()})
    add(prompt, "None", "PosteriorIdentity")
    striped = {"operator": [titled(prompt, "Mask"), 0], "image": truth, "noise": "Gaussian", "noise.sigma": SIGMA, "seed": 2}
    other = add(prompt, "Other", "PosteriorMeasureSimulate", **striped)
    own = {"photo": truth, "operator": [titled(prompt, "None"), 0], "noise": "entered", "noise.sigma": 0.02}
    add(prompt, "Own", "PosteriorMeasurementFromPhoto", **own)
    both = add(prompt, "Both", "PosteriorCombineMeasurements", first=[measure, 0], second=[other, 0])
    finish = {"error": 0.05, "feather": 4.0, "measurement": [both, 0], "image": truth}
    add(prompt, "Finish", "PosteriorFinish", **finish)
    add(prompt, "Statistics", "PosteriorUncertainty", samples=truth)
    kinds = ("Grey", "Blur", "Small", "Mask", "None", "Measure", "Other", "Own", "Both", "Finish", "Statistics")
    for title in kinds:
        inputs(prompt, title)["run"] = "shown"  # what ComfyUI takes from its cache shows nothing anew
        add(prompt, f"{title}, shown", "PreviewAny", source=[titled(prompt, title), 0])
    outputs = server.run(prompt)
    for title in kinds:
        assert picture(server, outputs, prompt, title).std() > 1, title
    assert len(outputs[titled(prompt, "Statistics")]["images"]) == 2  # mean and map


HOLES = {"fraction": 0.5, "per_channel": False, "seed": 0}


def previews(server: Server, prompt: Prompt, **features: bool) -> list[tuple[str, Image.Image]]:
    """Run a prompt as a page with these features; the pictures with the node they belong to, as they arrive."""
    client, pictures = uuid.uuid4().hex, []
    with contextlib.closing(websocket.create_connection(f"ws://{server.address}/ws?clientId={client}", timeout=600)) as ws:
        ws.send(json.dumps({"type": "feature_flags", "data": features}))
        body = {"prompt": prompt, "client_id": client, "extra_data": {"preview_method": "none"}}
        prompt_id = json.loads(server.post("/prompt", body))["prompt_id"]
        while True:
            message = ws.recv()
            if isinstance(message, bytes):
                if int.from_bytes(message[:4], "big") == WITH_NODE:
                    end = 8 + int.from_bytes(message[4:8], "big")
                    node = json.loads(message[8:end])
                    assert node["prompt_id"] == prompt_id
                    pictures.append((node["display_node_id"], Image.open(io.BytesIO(message[end:]))))
                continue
            found = json.loads(message)
            if found["type"] == "executing" and found["data"]["node"] is None and found["data"]["prompt_id"] == prompt_id:
                return pictures


WITH_NODE = 4  # the kind of a binary message with a picture for one node


def test_the_sampler_node_shows_the_residual_of_every_step(server: Server) -> None:
    prompt = keep(with_psld("super_resolution_x8", SHORT), "Result")
    inputs(prompt, "Noise")["run"] = "plot"
    ((node, plot),) = previews(server, prompt, supports_preview_metadata=True)
    assert node == titled(prompt, "PSLD Sampler")
    assert plot.size == (480, 270)
    blue = (np.asarray(plot.convert("RGB")) == (31, 119, 180)).all(-1).any(0)
    assert blue.sum() > 380  # a curve over the whole width
    inputs(prompt, "Noise")["run"] = "no plot"
    assert previews(server, prompt) == []  # a page, or a program, that does not know such pictures
