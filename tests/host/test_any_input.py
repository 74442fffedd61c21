"""Whatever a graph hands to a node comes out right, or as an error that names the input."""

import itertools
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from support.any_input import (
    FOREIGN,
    LINKED,
    NO_PICTURE,
    Picture,
    Surface,
    any_number,
    input_names,
    names_an_input,
    prepared,
    realised,
)
from support.host_runs import SIZE, Host, Probe
from torch import Tensor

pytestmark = pytest.mark.timeout(5400)  # with --full

CASES = {
    # Those that run or trace networks.
    "PosteriorRestore": (12, 60),
    "PosteriorMemoryEstimate": (8, 60),
    "PosteriorDemoPictures": (5, 30),
    "PosteriorLoadDemoPrior": (3, 10),
    # Those that seldom have what they need: one way for each kind of photo.
    "PosteriorEstimateBlur": (60, 200),
}
# These read noise, stripes or blur from a photo and refuse most random pictures; that they come out is for their own tests to show.
READERS = ("PosteriorEstimateNoise", "PosteriorEstimateStripes", "PosteriorEstimateBlur")
NODES = [
    "PosteriorMask",
    "PosteriorDownscale",
    "PosteriorBlur",
    "PosteriorGrayscale",
    "PosteriorIdentity",
    "PosteriorEstimateNoise",
    "PosteriorEstimateStripes",
    "PosteriorEstimateBlur",
    "PosteriorMeasureSimulate",
    "PosteriorMeasurementFromPhoto",
    "PosteriorCombineMeasurements",
    "PosteriorSamplerPSLD",
    "PosteriorSamplerCPiGDM",
    "PosteriorStartLatent",
    "PosteriorRestore",
    "PosteriorUncertainty",
    "PosteriorMemoryEstimate",
    "PosteriorFinish",
    "PosteriorLoadDemoPrior",
    "PosteriorDemoPictures",
    "PosteriorConsistency",
    "PosteriorCompare",
    "PosteriorSaveMeasurement",
    "PosteriorLoadMeasurement",
]


@pytest.fixture(scope="module")
def surface(pack: ModuleType, hosts: Callable, load: Callable, tiny: Callable) -> Surface:
    surface = Surface(pack, prepared(hosts, load, tiny))
    for name in ("batch", "grey"):  # for Load Measurement to find
        all_nodes(pack)["PosteriorSaveMeasurement"].execute(surface.value("MEASUREMENT", name), f"surface/{name}")
    return surface


def all_nodes(pack: ModuleType) -> dict[str, Any]:
    return {node.define_schema().node_id: node for node in pack.nodes.NODES}


def test_no_node_is_left_out(pack: ModuleType) -> None:
    takes_something = {name for name, node in all_nodes(pack).items() if node.define_schema().inputs}
    assert takes_something <= {*NODES}


@pytest.mark.parametrize(
    ("message", "right"),
    [
        ("image: is transparent in places. Load it with Load Image", True),
        ("first, second: got sizes 3 and 4, expected the same", True),
        ("image: is 64 x 10; SSIM looks at windows of 11 x 11 pixels", False),
        ("photo: has no edges to measure", False),
        ("photo: nothing can be told of the set that people use", False),
        ("Expected all tensors to be on the same device: connect them", False),
    ],
)
def test_a_message_names_an_input_and_a_remedy(message: str, right: bool) -> None:
    assert names_an_input(message, {"image", "photo", "first", "second"}) == right


def test_one_above_its_range_is_drawn_of_what_is_lengthy(pack: ModuleType) -> None:
    (spec,) = (spec for spec in all_nodes(pack)["PosteriorRestore"].define_schema().inputs if spec.id == "samples")
    find(any_number(spec, True), lambda drawn: drawn == spec.max + 1)


def test_every_link_refuses_what_is_no_object_of_its_type(surface: Surface) -> None:
    """The drawn inputs have some of it; here is all, beside inputs that are right."""
    right = {kind: next(iter(known.values())) for kind, known in [*surface.made.items(), *surface.ready.items()] if known}
    right |= {"MEASUREMENT": surface.value("MEASUREMENT", "area"), "IMAGE": torch.rand(1, 32, 48, 3)}
    right |= {"MASK": torch.ones(1, 32, 48), "LATENT": {"samples": torch.zeros(1, 4, 4, 6)}}

    def links(specs: list[Any]) -> Iterator[Any]:
        for spec in specs:
            if spec.io_type in LINKED:
                yield spec
            for option in getattr(spec, "options", None) or []:
                yield from links(getattr(option, "inputs", []))

    def arguments(specs: list[Any], link: str, foreign: Any) -> dict[str, Any]:
        made = {}
        for spec in specs:
            if spec.id == link:
                made[link] = foreign
            elif spec.io_type == "COMFY_DYNAMICCOMBO_V3":
                option = next((option for option in spec.options if link in input_names(option.inputs)), spec.options[0])
                made[spec.id] = {spec.id: option.key, **arguments(option.inputs, link, foreign)}
            elif spec.io_type in LINKED and (not spec.optional or spec.id == "measurement"):
                made[spec.id] = right[spec.io_type]
            elif spec.io_type not in LINKED:
                made[spec.id] = spec.options[0] if spec.default is None else spec.default
        return made

    tried = set()
    for node in all_nodes(surface.pack).values():
        specs = node.define_schema().inputs
        for link, foreign in itertools.product(links(specs), FOREIGN):
            with torch.inference_mode(), pytest.raises(ValueError, match=f"^{link.id}: ") as refused:
                node.execute(**arguments(specs, link.id, foreign))
            assert names_an_input(str(refused.value), {link.id})
            tried.add(link.io_type)
    assert tried == {*LINKED}


@pytest.mark.parametrize("name", NODES)
def test_right_or_an_error_that_names_the_input(
    name: str,
    surface: Surface,
    count: Callable[[int, int], int],
    ran: Callable[[int], None],
    note: Callable[[str], None],
) -> None:
    node = all_nodes(surface.pack)[name]
    specs = node.define_schema().inputs
    messages: dict[str, int] = {}
    cases: list[bool] = []  # whether it came out

    @settings(
        max_examples=count(*CASES.get(name, (25, 130))),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        drawn = data.draw(surface.inputs(node), "inputs")
        arguments = realised(surface, drawn)
        before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
        with torch.inference_mode():
            try:
                outputs = node.execute(**arguments).args
            except (ValueError, torch.cuda.OutOfMemoryError) as refusal:
                message = str(refusal)
                assert names_an_input(message, input_names(specs)), message
                assert len(message) < 700
                summary = re.sub(r"-?\d[\d.e+-]*", "#", message)
                messages[summary] = messages.get(summary, 0) + 1
                cases.append(False)
                return
            check_outputs(node, arguments, outputs)
            images = [drawn[spec.id] for spec in specs if spec.io_type == "IMAGE" and drawn.get(spec.id) is not None]
            assert not any(isinstance(image, Picture) and image.content in NO_PICTURE for image in images)
        cases.append(True)
        for key, value in before.items():  # other nodes hold it too
            assert torch.equal(arguments[key].nan_to_num(), value.nan_to_num()), key

    run()
    ran(len(cases))
    note(f"{sum(cases)} of {len(cases)} came out")
    # A node that refuses everything would name its input, too.
    assert name in READERS or 20 * sum(cases) >= len(cases), messages
    for message, number in sorted(messages.items(), key=lambda item: -item[1]):
        note(f"{number} x {message}")


def check_outputs(node: Any, given: dict[str, Any], outputs: tuple[Any, ...]) -> None:
    """Finite, of the type that the schema says, and of no other size than the input asks for."""
    schema = node.define_schema()
    assert len(outputs) == len(schema.outputs)
    for output, value in zip(schema.outputs, outputs, strict=True):
        kind = output.io_type
        if kind == "IMAGE":
            assert value.ndim == 4
            assert value.shape[-1] == 3
            assert bool(value.isfinite().all())
        elif kind == "MASK":
            assert value.ndim == 3
            assert bool(((value >= 0) & (value <= 1)).all())
        elif kind == "FLOAT":
            assert isinstance(value, float)
            assert value == value  # no NaN
            assert output.id in ("relative", "sigmas", "psnr") or abs(value) < float("inf")
        elif kind == "LATENT":
            assert bool(value["samples"].isfinite().all())
        elif kind == "MEASUREMENT":
            assert bool(value.y.isfinite().all())
    sizes = SIZES.get(schema.node_id)
    if sizes is not None:
        for got, expected in sizes(given, outputs):
            assert tuple(got) == tuple(expected)


def height_and_width(shape: Any) -> tuple[int, ...]:
    return tuple(shape[-2:])


SIZES: dict[str, Callable[[dict[str, Any], tuple[Any, ...]], list[tuple[Any, Any]]]] = {
    "PosteriorMeasureSimulate": lambda given, out: [
        (out[0].operator.in_shape[1:], given["image"].shape[1:3]),
        (out[1].shape[1:3], out[0].y.shape[2:]),
        (out[2].shape[1:], given["image"].shape[1:3]),
        (out[1].shape[:1], given["image"].shape[:1]),
    ],
    "PosteriorMeasurementFromPhoto": lambda given, out: [
        (out[0].y.shape[2:], given["photo"].shape[1:3]),
        (out[0].y.shape[:1], given["photo"].shape[:1]),
        (out[1].shape[1:3], given["photo"].shape[1:3]),
        (out[2].shape[1:], out[0].operator.in_shape[1:]),
        (out[0].operator.in_shape[1:], restored_size(given["operator"].label, given["photo"].shape[1:3])),
    ],
    "PosteriorLoadMeasurement": lambda given, out: [
        (out[1].shape[:3], (len(out[0].y), *out[0].y.shape[2:])),
        (out[2].shape[1:], out[0].operator.in_shape[1:]),
    ],
    "PosteriorCombineMeasurements": lambda given, out: [(out[0].operator.in_shape, given["first"].operator.in_shape)],
    "PosteriorFinish": lambda given, out: [(out[0].shape[:3], given["image"].shape[:3])],
    "PosteriorRestore": lambda given, out: [
        (out[0].shape[1:3], given["measurement"].operator.in_shape[1:]),
        (out[0].shape[:1], (len(given["measurement"].y) * given.get("samples", 1),)),
    ],
    "PosteriorUncertainty": lambda given, out: [
        (
            v.shape[:3],
            (len(given["samples"]) // (given.get("per_photo") or len(given["samples"])), *given["samples"].shape[1:3]),
        )
        for v in out
    ],
    "PosteriorStartLatent": lambda given, out: [
        ([8 * n for n in out[0]["samples"].shape[2:]], given["measurement"].operator.in_shape[1:]),
        (out[0]["samples"].shape[:2], (len(given["measurement"].y), given["vae"].latent_channels)),
    ],
    "PosteriorEstimateStripes": lambda given, out: [(out[0].shape, given["photo"].shape[:3])],
    "PosteriorCompare": lambda given, out: [(out[0].shape[:3], three_beside(given["image"].shape[:3]))],
    "PosteriorConsistency": lambda given, out: [
        (out[0].shape[:3], three_beside((len(given["image"]), *enlarged(given["measurement"].y.shape[2:]))))
    ],
}


def restored_size(label: str, photo: Any) -> tuple[int, ...]:
    """Of the picture that a photo was made of; `label` is of a recipe of the surface."""
    factor = {"area": 2, "bicubic": 1.5}.get(label, 1)
    return tuple(int(factor * n) for n in photo)


def enlarged(size: Any) -> tuple[int, ...]:
    """Of a photo in Consistency's picture: a low one is shown about 128 pixels high."""
    return tuple(n * max(1, 128 // size[0]) for n in size)


def three_beside(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Batch, height and width of three pictures side by side, 4 pixels apart."""
    batch, height, width = shape
    return batch, height, 3 * width + 8


@st.composite
def any_run(draw: st.DrawFn, surface: Surface) -> dict[str, Any]:
    """A whole sampling run: model, VAE, measurement, latent and settings, mostly such that they fit."""
    measurement = draw(st.sampled_from(["area", "batch", "grey", "noise", "blur", "odd"]))
    made = surface.value("MEASUREMENT", measurement)
    fitting = (len(made.y), 4, *(side // 8 for side in made.operator.in_shape[1:]))
    shapes = [(1, 4, 2, 3), (1, 4, 2, 2), (2, 4, 2, 2), (1, 4, 3, 3), (1, 16, 2, 2), (1, 4, 2, 2, 2), (3, 4, 2, 3)]
    return {
        "model": draw(st.sampled_from([*["sd15"] * 6, "bad sd3"])),
        "vae": draw(st.sampled_from([*["sd15"] * 6, "bad sd3", "bad none", "bad not in the file", "bad video"])),
        "measurement": measurement,
        "latent": draw(st.sampled_from([*[fitting] * 14, *shapes])),
        "content": draw(st.sampled_from([*["0", "random", "random"] * 2, "NaN"])),
        "method": draw(st.sampled_from(["sample_psld", "sample_cpigdm"])),
        "steps": draw(st.integers(1, 2)),
        "prompt": draw(st.sampled_from([*["sd15"] * 6, "bad sd3", "bad NaN"])),
        "check_gradients": draw(st.booleans()),
    }


def test_whole_runs_come_out_right_or_name_what_does_not_fit(
    surface: Surface, count: Callable[[int, int], int], ran: Callable[[int], None], note: Callable[[str], None]
) -> None:
    """As SamplerCustomAdvanced runs them. The next run after any of them gives what it always gave."""
    host, samplers = surface.pack.nodes.host, surface.pack.samplers
    messages: dict[str, int] = {}

    def sample(given: dict[str, Any]) -> Tensor:
        measurement, vae = surface.value("MEASUREMENT", given["measurement"]), surface.value("VAE", given["vae"])
        through_network = given["method"] == "sample_psld"
        sampler = host.stock_sampler(
            getattr(samplers, given["method"]),
            measurement,
            vae,
            check_gradients=given["check_gradients"],
            network_gradient=through_network,
            **({"rule": "line_search", "gamma": 0.0} if through_network else {}),
        )
        h = Host(surface.pack, given["model"].removeprefix("bad "), surface.value("MODEL", given["model"]), vae)
        guider = h.guider(1.0, surface.value("CONDITIONING", given["prompt"]), surface.value("CONDITIONING", given["prompt"]))
        return h.sample(sampler, guider, given["steps"], Picture(given["latent"], given["content"]).tensor())

    good = {"model": "sd15", "vae": "sd15", "measurement": "area", "latent": (1, 4, 2, 3), "content": "random"}
    good |= {"method": "sample_psld", "steps": 1, "prompt": "sd15", "check_gradients": False}
    expected = sample(good)
    cases: list[bool] = []  # whether it came out

    @settings(
        max_examples=count(16, 200),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(any_run(surface))
    def run(drawn: dict[str, Any]) -> None:
        try:
            result = sample(drawn)
        except (ValueError, RuntimeError) as refusal:
            message = str(refusal)
        else:
            assert tuple(result.shape) == drawn["latent"]
            assert result.isfinite().all()
            cases.append(True)
            return
        cases.append(False)
        assert torch.equal(sample(good), expected)
        assert names_an_input(
            message, {"latent", "latent_image", "measurement", "vae", "positive", "model", "check_gradients"}
        ), message
        summary = re.sub(r"-?\d[\d.e+-]*", "#", message)
        messages[summary] = messages.get(summary, 0) + 1

    run()
    ran(len(cases))
    note(f"{sum(cases)} of {len(cases)} came out")
    assert 10 * sum(cases) >= len(cases), messages
    for message, number in sorted(messages.items(), key=lambda item: -item[1]):
        note(f"{number} x {message}")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sample_psld", {"rule": "line_search", "omega": 0.8, "gamma": 0.0}),
        ("sample_psld", {"omega": 1.0, "gamma": 0.1}),
        ("sample_cpigdm", {}),
    ],
)
def test_a_photo_that_is_met_from_the_start(method: str, options: dict[str, Any], hosts: Callable[..., Host]) -> None:
    """An even picture, a residual of 0 at each step: the guidance adds nothing, and divides by nothing."""
    h = hosts("sd15", vae="box")
    host, ops = h.pack.nodes.host, h.pack.operators
    even = Probe(lambda _, x, autoencoder, **given: autoencoder.decode(torch.zeros_like(x)))
    h.sample(h.sampler(even), steps=1)
    operator = ops.AreaDownscale((3, SIZE, SIZE), 8)
    measurement = ops.Measurement(operator.A(even.seen).clone(), operator)
    model = h.model.clone()
    model.set_model_unet_function_wrapper(lambda apply, given: 0 * given["input"])
    sampler = host.stock_sampler(
        getattr(h.pack.samplers, method), measurement, h.vae, network_gradient=method == "sample_psld", **options
    )
    result = Host(h.pack, "sd15", model, h.vae).sample(sampler, steps=3)
    assert float(result.abs().max()) < 1e-4
