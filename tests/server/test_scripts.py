"""The scripts of docs/scripts.md, as they stand there."""

import io
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.server_prompts import ROOT

from dev.server import Server
from prior.draw import draw


@pytest.fixture
def scripts(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """They, for this server, in a folder as a checkout is."""
    (tmp_path / "workflows" / "api").mkdir(parents=True)
    for path in (ROOT / "workflows" / "api").glob("*.json"):
        graph = json.loads(path.read_text())
        for node in graph.values():  # the checkpoints that it names are not here
            if node["class_type"] == "CheckpointLoaderSimple":
                node.update(class_type="PosteriorLoadDemoPrior", inputs={})
        (tmp_path / "workflows" / "api" / path.name).write_text(json.dumps(graph))
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scripts.md").read_text(encoding="utf-8"), re.DOTALL)
    return [script.replace("127.0.0.1:8188", server.address) for script in found]


def last_prompt(server: Server) -> dict[str, dict]:
    """The inputs of each node of the prompt that ran last, by title."""
    *_, last = server.get_json("/history").values()
    return {node["_meta"]["title"]: node["inputs"] for node in last["prompt"][2].values()}


def run(script: str) -> Image.Image:
    Path("script.py").write_text(script)
    runpy.run_path("script.py")
    return Image.open(io.BytesIO(Path("result_1.png").read_bytes()))


def with_demo_prior(script: str) -> str:
    """No checkpoint is here."""
    loader = '"CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"'
    assert loader in script
    return script.replace(loader, '"PosteriorLoadDemoPrior", prior="latents"')


def test_first_script(server: Server, scripts: list[str]) -> None:
    assert run(scripts[0]).size == (128, 128)
    assert last_prompt(server)["Operator"]["kernel.sigma"] == 2.0


def test_third_script_turns_a_template_into_a_graph_for_a_photo(server: Server, scripts: list[str]) -> None:
    Image.fromarray(draw(1_000_000)).crop((0, 0, 104, 80)).save("photo.png")
    begin, post = scripts[0].split("answer = ")
    assert run(begin + with_demo_prior(scripts[2]) + "answer = " + post).size == (104, 80)
    inputs = last_prompt(server)
    assert inputs["Load Image"]["image"].startswith("photo")
    assert inputs["Measurement from Photo"]["noise.sigma"] == 0.005
    assert "Compare" not in inputs


def test_fourth_script_fills_a_hole(server: Server, scripts: list[str]) -> None:
    photo = Image.fromarray(draw(1_000_000))
    photo.putalpha(Image.new("L", photo.size, 255))
    photo.paste((0, 0, 0, 0), (40, 48, 80, 72))
    photo.save("photo.png")
    begin, post = scripts[0].split("answer = ")
    result = np.asarray(run(begin + with_demo_prior(scripts[2]) + scripts[3] + "answer = " + post))
    given = np.asarray(photo)
    kept = given[..., 3] > 0
    assert np.array_equal(result[kept], given[..., :3][kept])
    assert last_prompt(server)["Hole"]["pattern"] == "mask"


def test_second_script_is_for_a_photo(server: Server, scripts: list[str]) -> None:
    Image.fromarray(draw(1_000_000)).crop((0, 0, 104, 80)).save("photo.png")
    begin, post = scripts[0].split("answer = ")
    result = run(begin.replace("deblur_gaussian.json", "sd3_deblur.json") + scripts[1] + "answer = " + post)
    assert result.size == (104, 80)
    inputs = last_prompt(server)
    assert inputs["Load Image"]["image"].startswith("photo")
    assert inputs["Positive Prompt"]["text"] == "photo of a harbour"


def test_last_script_restores_a_folder(
    server: Server, scripts: list[str], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PNG, a JPEG, one that is smaller than the blur, and a file that is no photo."""
    Path("photos").mkdir()
    first, second, third = (Image.fromarray(draw(1_000_000 + i)).crop((40, 40, 88, 80 + i)) for i in range(3))
    first.save("photos/a.png")
    second.save("photos/b.JPG", "JPEG")
    third.resize((16, 16)).save("photos/c.png")
    Path("photos/notes.txt").write_text("no photo")
    begin, _ = scripts[0].split("answer = ")
    begin = begin.replace("deblur_gaussian.json", "sd3_deblur.json")
    Path("script.py").write_text(begin + scripts[4])
    runpy.run_path("script.py")
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["a.png done", "b.JPG done"]
    assert said[2].startswith("c.png operator: ")
    found = {path.name: Image.open(path).size for path in (base / "output" / "restored").glob("*.png")}
    assert found == {"a_00001_.png": (48, 40), "b_00001_.png": (48, 41)}
