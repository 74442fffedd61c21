"""What a graph can hand to a node: inputs drawn from a node's own schema, mostly good, some bad, and what must come of them.

ComfyUI checks widgets against their ranges, but nothing that comes over a link: every number here may be out of range, and
every tensor of another size, with NaN, or empty.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from support.tiny_checkpoints import conditioning
from torch import Tensor

SIDES = (1, 2, 3, 5, 8, 9, 16, 17, 24, 40, 64)
WILD = (-1.0, -1e30, 1e30, 1e9, math.nan, math.inf, -math.inf, 0.0)
LENGTHY = {"samples": 3}  # more of the same only takes longer: 64 samples of 50 calls are minutes
LINKED = ("IMAGE", "MASK", "LATENT", "CONDITIONING", "MODEL", "VAE", "MEASUREMENT", "LINEAR_OPERATOR")
NO_PICTURE = ("NaN", "infinite", "255", "1e10")  # contents that a node has to refuse
FOREIGN = (0.5, "a cat", {"samples": 0.5})  # what comes over a link from a node of another pack that calls its type the same
HOSTILE = (
    "", ".", "a", "../x", "a/../../x", "/etc/passwd", "/etc/passwd [output]", "../../input [temp]", "x\0y", "%date%", "a" * 250, "a" * 300 + "/b", "~", "C:\\x",
    "\\\\host\\share", "x.safetensors", "../x.safetensors [output]", "x.safetensors [temp]", "x [nowhere]",
)  # fmt: skip
# What is expected, what to do at the start of a part of the sentence, or which node to look at.
REMEDY = re.compile(
    r"\bexpected\b|\bone of\b|\bmust (be|give|reach)\b|\bis needed\b|\bonly\b.* works?\b|\bwent wrong\b"
    r"|[;.,] (or |for that )?(Apply|Choose|Connect|Crop|Divide|Draw|Encode|Give|Invert|Leave|Load|Lower|Measure|Paint|Raise|Remove|Set"
    r"|Start|Take|Use)\b",
    re.IGNORECASE,
)


@dataclass(repr=False)
class Surface:
    """What the nodes of a pack are given.

    Attributes:
        ready: by socket type, objects by name; those whose name starts with "bad" come up rarely.
    """

    pack: ModuleType
    ready: dict[str, dict[str, Any]]
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe, ops = self.pack.nodes.types.OperatorRecipe, self.pack.operators
        recipes = {
            "identity": recipe("noise only", ops.Identity),
            "area 2": recipe("area", lambda s: ops.AreaDownscale(s, 2), lambda s: (s[0], 2 * s[1], 2 * s[2])),
            "bicubic 1.5": recipe(
                "bicubic",
                lambda s: ops.BicubicDownscale(s, 1.5),
                lambda s: (s[0], *(math.floor(n * 1.5 + 1e-6) for n in s[1:])),
            ),
            "grey": recipe("grey", lambda s: ops.Grayscale(s, "709")),
            "blur": recipe("blur", lambda s: ops.Blur(ops.gaussian_kernel(0.5), s, "reflect")),
            "motion": recipe("motion", lambda s: ops.Blur(ops.motion_kernel(4.0, 30.0), s, "replicate")),
            "random": recipe("random", lambda s: ops.Mask(ops.random_mask(s, 0.4, 1), channels=s[0])),
        }
        recipes["grey, blur, random"] = recipes["random"].after(recipes["blur"].after(recipes["grey"]))
        self.made["LINEAR_OPERATOR"] = recipes
        self.made["IMAGE"] = photos()
        self.made["MEASUREMENT"] = {}
        for name, (operator, sigma, *shape) in {
            "1 x 1": ("identity", 0.0, 1, 1, 1),
            "1 x 17": ("random", 0.05, 1, 1, 17),
            "area": ("area 2", 0.0, 1, 16, 24),
            "odd": ("random", 0.0, 1, 13, 18),
            "batch": ("area 2", 0.02, 2, 16, 16),
            "bicubic": ("bicubic 1.5", 0.0, 1, 24, 16),
            "grey": ("grey, blur, random", 0.01, 1, 16, 16),
            "noise": ("identity", 1.0, 1, 16, 16),
            "blur": ("motion", 0.01, 1, 24, 24),
        }.items():
            batch, height, width = shape
            x = 2 * torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(len(name))).double() - 1
            bound = recipes[operator].bind((3, height, width))
            self.made["MEASUREMENT"][name] = ops.Measurement(bound.A(x), bound, 2 * sigma)

    def inputs(self, node: Any) -> st.SearchStrategy[dict[str, Any]]:
        """Keyword arguments for a node's `execute`."""
        return _all(self, node.define_schema().inputs)

    def value(self, kind: str, name: str) -> Any:
        """The object behind a drawn name."""
        return {**self.made.get(kind, {}), **self.ready.get(kind, {})}[name]


@dataclass(frozen=True)
class Picture:
    """A tensor by the numbers that make it, which a failing example can print."""

    shape: tuple[int, ...]
    content: str
    dtype: str = "float32"
    seed: int = 0

    def tensor(self) -> Tensor:
        tensor = torch.rand(self.shape, generator=torch.Generator().manual_seed(self.seed))
        if self.content == "NaN":
            tensor.view(-1)[-1:] = math.nan
        elif self.content == "infinite":
            tensor.view(-1)[:1] = math.inf
        elif self.content == "wide":
            tensor = tensor * 8 - 4
        elif self.content != "random":
            tensor = torch.full(self.shape, float(self.content))
        return tensor.to(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Named:
    """One of the prepared objects."""

    kind: str
    name: str


def photos() -> dict[str, Tensor]:
    """Photos of which the calibration nodes can tell what happened to them."""
    rows, columns = torch.meshgrid(torch.arange(72.0), torch.arange(72.0), indexing="ij")
    waves = 0.5 + 0.2 * (rows / 9).sin() * (columns / 7).cos()
    striped = waves.clone()
    striped[6::12] = 0
    grain = 0.5 + 0.05 * torch.randn(72, 72, generator=torch.Generator().manual_seed(0))
    edge = 0.5 + 0.3 * torch.erf((columns - 16.3 + 0.2 * rows) / 2**0.5 / 2)[:33, :33]
    star = 0.1 + 0.8 * (-((rows - 16) ** 2 + (columns - 17) ** 2) / 2 / 1.5**2).exp()[:33, :33]
    named = {"striped": striped, "grain": grain, "edge": edge, "star": star}
    return {name: image[None, ..., None].expand(1, -1, -1, 3).clamp(0, 1) for name, image in named.items()}


def _pictures(last: tuple[int, ...], usual: tuple[int, ...] | None) -> st.SearchStrategy[Picture]:
    @st.composite
    def make(draw: st.DrawFn) -> Picture:
        batch = draw(st.sampled_from([1, 1, 1, 2, 3]))
        sides = draw(st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES)))
        shape: tuple[int, ...] = (batch, *sides)
        if usual and draw(st.integers(0, 5)) < 5:
            shape = usual
        if last:
            shape += (draw(st.sampled_from(last)),)
        if _bad(draw):
            shape = draw(st.sampled_from([shape[1:], (1, *shape), (0, *shape[1:]), (*shape[:-1], 5)]))
        content = draw(st.sampled_from(["random", "random", "random", "0", "1", "0.5", "wide"]))
        if _bad(draw):
            content = draw(st.sampled_from(NO_PICTURE))
        dtype = draw(st.sampled_from(["float32", "float32", "float32", "float16", "float64"]))
        return Picture(shape, content, dtype, draw(st.integers(0, 9)))

    return make()


def _bad(draw: st.DrawFn) -> bool:
    return draw(st.integers(0, 9)) == 9


@st.composite
def _latents(draw: st.DrawFn) -> dict[str, Picture]:
    channels = draw(st.sampled_from([4, 4, 4, 16, 3]))
    sides = draw(st.tuples(st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 3, 8])))
    shape: tuple[int, ...] = (draw(st.sampled_from([1, 1, 2])), channels, *sides)
    if _bad(draw):
        shape = (*shape[:2], 2, *sides)  # of a video
    return {"samples": Picture(shape, draw(st.sampled_from(["0", "random", "random", "NaN"])), "float32", 1)}


@st.composite
def any_number(draw: st.DrawFn, spec: Any, whole: bool) -> float | int:
    """For an INT or a FLOAT: mostly in its range."""
    low, high = (spec.min if spec.min is not None else -1e6), (spec.max if spec.max is not None else 1e6)
    if _bad(draw):
        wild = draw(st.sampled_from([low - 1, high + 1, *WILD]))
        return int(wild) if whole and math.isfinite(wild) else wild if not whole else -(2**70)
    high = LENGTHY.get(spec.id, high)
    near = min(high, max(low, (spec.default or 0) * 4 + 8))  # what people choose; the whole range may be 16384 wide
    if whole:
        return draw(
            st.one_of(st.integers(int(low), int(near)), st.sampled_from([int(low), int(high), spec.default or int(low)]))
        )
    inside = st.floats(low, near, allow_nan=False)
    return draw(st.one_of(inside, st.sampled_from([low, high, spec.default if spec.default is not None else low])))


@st.composite
def _one(draw: st.DrawFn, surface: Surface, spec: Any, usual: tuple[int, ...] | None) -> Any:
    kind = spec.io_type
    if draw(st.integers(0, 40)) == 23:
        return None  # what a node before it gives that has nothing to give
    if kind in LINKED and draw(st.integers(0, 20)) == 13:
        return draw(st.sampled_from(FOREIGN))
    if kind == "IMAGE":
        if spec.id == "photo" and draw(st.booleans()):
            return Named(kind, draw(st.sampled_from([*surface.made[kind]])))
        return draw(_pictures((3, 3, 3, 3, 3, 3, 1, 4), usual))
    if kind == "MASK":
        return draw(_pictures((), usual))
    if kind == "LATENT":
        return draw(_latents())
    if kind in ("FLOAT", "INT"):
        return draw(any_number(spec, kind == "INT"))
    if kind == "BOOLEAN":
        return draw(st.booleans())
    if kind == "STRING":
        return draw(st.sampled_from(HOSTILE))
    if kind == "COMBO":
        # The server takes names that are not on its list where a node looks at them itself.
        unknown = HOSTILE if spec.id == "file" else ["X"] if _bad(draw) else []
        return draw(st.sampled_from([*spec.options, *unknown]))
    if kind == "COMFY_DYNAMICCOMBO_V3":
        option = draw(st.sampled_from(spec.options))
        if _bad(draw):
            return {spec.id: "X"}
        return {spec.id: option.key, **draw(_all(surface, option.inputs))}
    wanted = _bad(draw)
    known = [*surface.made.get(kind, {}), *surface.ready.get(kind, {})]
    names = [name for name in known if name.startswith("bad") == wanted] or known
    if not names:
        raise NotImplementedError(f"no inputs of type {kind} to give to {spec.id}; say here what a graph can connect")
    return Named(kind, draw(st.sampled_from(names)))


@st.composite
def _all(draw: st.DrawFn, surface: Surface, specs: list[Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    usual = draw(st.sampled_from([None, (1, 24, 40), (2, 16, 17)]))
    for spec in sorted(specs, key=lambda spec: spec.io_type != "MEASUREMENT"):
        if spec.optional and draw(st.booleans()):
            continue
        value = given[spec.id] = draw(_one(surface, spec, usual))
        # What comes after it mostly fits.
        if isinstance(value, Picture):
            usual = value.shape[:3]
        elif isinstance(value, Named) and value.kind == "MEASUREMENT":
            measurement = surface.value(value.kind, value.name)
            usual = (len(measurement.y), *measurement.operator.in_shape[1:])
    return given


def realised(surface: Surface, given: Any) -> Any:
    """The arguments themselves, for a drawn description of them."""
    if isinstance(given, Picture):
        return given.tensor()
    if isinstance(given, Named):
        return surface.value(given.kind, given.name)
    if isinstance(given, dict):
        return {key: realised(surface, value) for key, value in given.items()}
    return given


def input_names(specs: list[Any]) -> set[str]:
    """Names of inputs, and of those behind the choices of a dynamic one."""
    names = set()
    for spec in specs:
        names.add(spec.id)
        for option in getattr(spec, "options", None) or []:
            names |= input_names(getattr(option, "inputs", []))
    return names


def names_an_input(message: str, names: set[str]) -> bool:
    """Whether a message is about an input, or about several, and says what to do: "mask: is ...; invert it", "first, second: ..."."""
    subject, _, said = message.partition(":")
    return bool(REMEDY.search(said)) and all(part in names for part in subject.split(" (")[0].split(", "))


def prepared(hosts: Callable[..., Any], load: Callable, tiny: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """Tiny models of two families, and the VAEs that users connect by mistake."""
    import comfy.sd

    sd15, sd3 = hosts("sd15", vae="box"), hosts("sd3")
    with torch.inference_mode():
        video = comfy.sd.VAE(sd={"decoder.22.bias": torch.zeros(3), "decoder.1.weight": torch.zeros(256, 16, 3, 3)})
    text, extra = conditioning("sd15", 1)[0]
    return {
        "MODEL": {"sd15": sd15.model, "sd15 again": sd15.model, "bad sd3": sd3.model},
        "VAE": {
            "sd15": sd15.vae, "sd15 again": sd15.vae, "bad sd3": sd3.vae, "bad none": None, "bad video": video,
            "bad not in the file": load(tiny("sd15", vae=None))[2],
        },
        "CONDITIONING": {
            "sd15": conditioning("sd15", 1), "sd15 again": conditioning("sd15", 2), "bad sd3": conditioning("sd3", 1),
            "bad empty": [], "bad NaN": [[text * math.nan, extra]],
        },
    }  # fmt: skip
