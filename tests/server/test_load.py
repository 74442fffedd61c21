"""Many prompts on one server, two at a time, and a server that is killed: nothing grows, nothing mixes, nothing is lost."""

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import websocket
from support.server_prompts import Prompt, add, picture, titled

from dev.server import Server, running
from dev.setup_host import prepare
from operators import load_measurement

pytestmark = pytest.mark.timeout(5400)  # with --full

CHOICE = {
    "box": ("PosteriorMask", {"pattern": "box", "pattern.x": 40, "pattern.y": 36, "pattern.width": 40, "pattern.height": 44}),
    "area": ("PosteriorDownscale", {"method": "area", "method.factor": 8}),
    "grey": ("PosteriorGrayscale", {"weights": "Rec.709"}),
    "blur": ("PosteriorBlur", {
        "kernel": "gaussian", "kernel.sigma": 2.0, "kernel.sigma_across": 0.0, "kernel.angle": 0.0, "boundary": "circular",
    }),
}  # fmt: skip
SIDES, METHODS = (64, 72, 96), ("C-PiGDM", "PSLD")
FIRST = [*itertools.product(SIDES, METHODS)]  # of the first prompts


def task(number: int, save: str | None = None, quality: str = "fast") -> Prompt:
    """One of many: the operator, the size, the noise, the method and the seed depend on the number. Most are small and quick."""
    draw = random.Random(number)
    kind = draw.choice([*CHOICE])
    side, method = draw.choice([SIDES[0], *SIDES]), draw.choice([METHODS[0], METHODS[0], *METHODS])
    if save:
        method = METHODS[0]
    elif number < len(FIRST):
        side, method = FIRST[number]
    prompt: Prompt = {"1": {"class_type": "PosteriorLoadDemoPrior", "inputs": {}, "_meta": {"title": "Prior"}}}
    whole = add(prompt, "Whole", "PosteriorDemoPictures", first=number % 7, count=1)
    size = {"width": side, "height": side, "upscale_method": "area", "crop": "disabled"}
    photo = add(prompt, "Truth", "ImageScale", image=[whole, 0], **size)
    operator = add(prompt, "Operator", CHOICE[kind][0], **{
        key: value // 2 if key in ("pattern.x", "pattern.y", "pattern.width", "pattern.height") else value
        for key, value in CHOICE[kind][1].items()
    })  # fmt: skip
    sigma = 0.02 if kind == "blur" else draw.choice([0.0, 0.03])
    noise = {"noise": "Gaussian", "noise.sigma": sigma, "seed": number}
    measure = add(prompt, "Measure", "PosteriorMeasureSimulate", image=[photo, 0], operator=[operator, 0], **noise)
    text = add(prompt, "Text", "CLIPTextEncode", clip=["1", 1], text="")
    given = {"method": method, "quality": quality, "seed": number, "cfg": 1.0, "memory": draw.choice(["auto", "lowest"])}
    links = {"model": ["1", 0], "vae": ["1", 2], "positive": [text, 0], "measurement": [measure, 0]}
    restore = add(prompt, "Restore", "PosteriorRestore", **links, **given)
    add(prompt, "Result", "PreviewImage" if save is None else "SaveImage", images=[restore, 0])
    if save is not None:
        prompt[str(max(map(int, prompt)))]["inputs"]["filename_prefix"] = save
        add(prompt, "Save", "PosteriorSaveMeasurement", measurement=[measure, 0], filename_prefix=f"measurements/{save}")
    return prompt


def result(server: Server, prompt: Prompt) -> np.ndarray:
    return picture(server, server.run(prompt), prompt, "Result")


class Client:
    """One of several pages: runs a prompt in a thread, and keeps the ids of the prompts it is told about."""

    def __init__(self, server: Server, prompt: Prompt) -> None:
        self.server, self.prompt, self.prompts = server, prompt, set()
        self.picture: np.ndarray | None = None
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        outputs = self.server.run(self.prompt, self.hear)
        self.picture = picture(self.server, outputs, self.prompt, "Result")

    def hear(self, message: dict[str, Any]) -> None:
        told = message.get("data", {})
        if "prompt_id" in told:
            self.prompts.add(told["prompt_id"])
        if message["type"] == "execution_cached":
            assert titled(self.prompt, "Restore") not in told["nodes"]


def memory(server: Server) -> int:
    server.post("/free", {"free_memory": True, "unload_models": False})  # the host's own caches of results are not ours
    time.sleep(2)
    return psutil.Process(server.process.pid).memory_info().rss


@pytest.fixture(scope="module")
def comfyui() -> Path:
    return prepare()["comfyui"]


def test_many_prompts(
    server: Server, base: Path, comfyui: Path, count: Callable[[int, int], int], note: Callable[[str], None], tmp_path: Path
) -> None:
    """Memory does not grow, two clients do not mix, and the results are those of a fresh server.

    Memory goes up and down by 1 % as allocators have it: medians of five readings at each end. How much of each prompt has to stay
    to be seen is noted: the 200 of `make test-full` show a thirtieth of what the few of `make test` do.
    """
    warm, number = count(12, 40), count(17, 200)
    assert warm - 5 >= len(FIRST)  # each size has been run with each method before the first reading
    results, levels = {}, {}
    for i in range(number):
        results[i] = result(server, task(i))
        if warm - 5 <= i < warm or number - 5 <= i:
            levels[i] = memory(server) / 2**20
    before, after = (statistics.median(part) for part in (list(levels.values())[:5], list(levels.values())[5:]))
    least = 0.02 * before / (number - warm)
    note(f"memory of the server: {before:.0f} MiB after {warm} prompts, {after:.0f} MiB after {number}")
    note(f"what keeps {least:.2f} MiB of each prompt or more is seen")
    assert after <= 1.02 * before, levels

    assert np.array_equal(result(server, task(0)), results[0])
    pair = {i: Client(server, task(i)) for i in (1001, 1002)}  # prompts that this server has not seen
    for client in pair.values():
        client.thread.start()
    for client in pair.values():
        client.thread.join()
    assert [len(client.prompts) for client in pair.values()] == [1, 1]  # each hears of its own prompt alone
    assert set.isdisjoint(*(client.prompts for client in pair.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as the first one has
        with running(server.process.args[0], comfyui, base, tmp_path / "second.log", "--cpu") as fresh:
            again = [*range(0, number - 1, max(4, number // 20)), number - 1]
            assert [i for i in again if not np.array_equal(result(fresh, task(i)), results[i])] == []
            assert all(np.array_equal(result(fresh, task(i)), client.picture) for i, client in pair.items())
            killed_while_it_samples(fresh, base)


def killed_while_it_samples(server: Server, base: Path) -> None:
    """What was finished before is whole on the disk: the picture, and the measurement, which loads."""
    from PIL import Image

    done = task(1, save="killed")
    expected = result(server, done)
    steps: list[Any] = []

    def kill(message: dict[str, Any]) -> None:
        if message["type"] == "progress" and not steps:
            steps.append(message)
            server.process.kill()

    with pytest.raises((OSError, ValueError, websocket.WebSocketException)):  # however the connection breaks
        server.run(task(2, save="killed", quality="best"), kill)
    assert server.process.wait(30) == -9
    pictures = sorted((base / "output").glob("killed*.png"))
    assert [np.array_equal(np.asarray(Image.open(path)), expected) for path in pictures] == [True]
    files = sorted((base / "output" / "measurements").glob("killed*"))
    assert files
    for path in files:
        assert path.suffix == ".safetensors"
        assert load_measurement(path).y.isfinite().all()
