"""What a template or blueprint is, as a description, and the graphs that several of them share. dev/templates.py has them all.

A node names only the inputs that are linked or differ from their default.
"""

from dataclasses import dataclass, field
from typing import Any

Link = tuple[str, int]  # title of another node and its output; in a blueprint also a socket and 0


@dataclass(frozen=True)
class Node:
    """One node: its class, title, column, and inputs, each a value or a link.

    Nodes of a column are stacked in the order of the description; links run to a column further right.
    """

    type: str
    title: str
    column: int
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """A workflow. `before` and `after` are the titles of the nodes whose pictures become its thumbnail."""

    name: str
    note: str
    nodes: list[Node]
    before: str = "Measure (simulate)"
    after: str = "Result"


@dataclass(frozen=True)
class Blueprint:
    """A subgraph for the node library: what goes in and out, and which widgets of its nodes it shows, as (title, name)."""

    name: str
    description: str
    sockets: dict[str, str]
    nodes: list[Node]
    outputs: dict[str, Link]
    widgets: list[tuple[str, str]]


LOADER = "Load Demo Prior"
MODEL, CLIP, VAE = ((LOADER, i) for i in range(3))
TRUTH = ("Demo Pictures", 0)
MEASUREMENT, DEGRADED, LOST = (("Measure (simulate)", i) for i in range(3))


def picture(title: str, column: int, source: Link) -> Node:
    return Node("PreviewImage", title, column, {"images": source})


def degraded(operators: list[Node], pictures: tuple[int, int], sigma: float, column: int = 1) -> list[Node]:
    """The demo prior, its pictures (number of the first, and how many), and what the operator titled Operator makes of them."""
    measure = {"image": TRUTH, "operator": ("Operator", 0), "noise.sigma": sigma}
    return [
        Node("PosteriorLoadDemoPrior", LOADER, 0),
        Node("PosteriorDemoPictures", "Demo Pictures", 0, dict(zip(("first", "count"), pictures, strict=True))),
        *operators,
        Node("CLIPTextEncode", "Positive Prompt", column, {"clip": CLIP, "text": ""}),
        Node("PosteriorMeasureSimulate", "Measure (simulate)", column, measure),
    ]


def stock_graph(
    operators: list[Node],
    sampler: Node,
    *,
    steps: int,
    pictures: tuple[int, int],
    sigma: float = 0.0,
    hole: bool = False,
    denoise: float = 1.0,
) -> list[Node]:
    """ComfyUI's own guider, scheduler and SamplerCustomAdvanced around one of our samplers."""
    guider = {"model": MODEL, "positive": ("Positive Prompt", 0), "negative": ("Negative Prompt", 0), "cfg": 1.0}
    scheduler = {"model": MODEL, "scheduler": "ddim_uniform", "steps": steps, "denoise": denoise}
    start = {"start": "measurement"} if denoise < 1 else {}  # noise that does not hide everything needs something under it
    sample = {
        "noise": ("Noise", 0),
        "guider": ("Guider", 0),
        "sampler": (sampler.title, 0),
        "sigmas": ("Scheduler", 0),
        "latent_image": ("Start Latent", 0),
    }
    shown = [
        Node("MaskToImage", "Hole Picture", 2, {"mask": LOST}),
        picture("Hole", 4, ("Hole Picture", 0)),
    ]
    return [
        *degraded(operators, pictures, sigma),
        Node("CLIPTextEncode", "Negative Prompt", 1, {"clip": CLIP, "text": ""}),
        Node("CFGGuider", "Guider", 2, guider),
        Node("RandomNoise", "Noise", 2),
        Node("BasicScheduler", "Scheduler", 2, scheduler),
        sampler,
        Node("PosteriorStartLatent", "Start Latent", 2, {"measurement": MEASUREMENT, "vae": VAE, **start}),
        Node("SamplerCustomAdvanced", "Sample", 3, sample),
        Node("VAEDecode", "Decode", 4, {"samples": ("Sample", 0), "vae": VAE}),
        Node("PosteriorFinish", "Finish", 5, {"image": ("Decode", 0), "measurement": MEASUREMENT}),
        Node("SaveImage", "Result", 6, {"images": ("Finish", 0), "filename_prefix": "posterior"}),
        picture("Measurement", 3, DEGRADED),
        picture("Truth", 3, TRUTH),
        *(shown if hole else []),
    ]


def psld() -> Node:
    return Node("PosteriorSamplerPSLD", "PSLD Sampler", 2, {"measurement": MEASUREMENT, "vae": VAE})


def cpigdm() -> Node:
    return Node("PosteriorSamplerCPiGDM", "C-PiGDM Sampler", 2, {"measurement": MEASUREMENT, "vae": VAE})


def one_node(operators: list[Node], *, first: int, sigma: float = 0.0, **restore: Any) -> list[Node]:
    """The Restore node; the operators may fill columns 0 and, when they follow one another, more."""
    column = 1 + max(node.column for node in operators)
    result = ("Restore", 0)
    gain = min(10.0, round(0.2 / sigma)) if sigma else 10.0  # noise enlarged to a fifth of the range at most: no confetti
    return [
        *degraded(operators, (first, 1), sigma, column),
        Node("PosteriorRestore", "Restore", column + 1, restored(**restore)),
        Node(
            "PosteriorConsistency",
            "Consistency",
            column + 2,
            {"image": result, "measurement": MEASUREMENT, "gain": float(gain)},
        ),
        Node("PosteriorCompare", "Compare", column + 2, {"image": result, "truth": TRUTH}),
        Node("SaveImage", "Result", column + 3, {"images": result, "filename_prefix": "posterior"}),
    ]


def restored(**values: Any) -> dict[str, Any]:
    links = {"model": MODEL, "vae": VAE, "positive": ("Positive Prompt", 0), "measurement": MEASUREMENT}
    return {**links, **values}


def operator(node_type: str, column: int = 0, title: str = "Operator", **inputs: Any) -> Node:
    """An operator node; `kernel__sigma` stands for the input kernel.sigma."""
    return Node(node_type, title, column, {name.replace("__", "."): value for name, value in inputs.items()})


def own_photo(checkpoint: str, prompt: str, operators: list[Node], *, sigma: float = 0.0, **restore: Any) -> list[Node]:
    """A user's photo, with a checkpoint of ComfyUI's own loader and a prompt. The Operator stands in column 1."""
    measure = {"photo": ("Load Image", 0), "operator": ("Operator", 0), "noise.sigma": sigma}
    model, clip, vae = (("Load Checkpoint", i) for i in range(3))
    inputs = {
        "model": model,
        "vae": vae,
        "positive": ("Positive Prompt", 0),
        "negative": ("Negative Prompt", 0),
        "measurement": ("Measurement from Photo", 0),
        **restore,
    }
    return [
        Node("CheckpointLoaderSimple", "Load Checkpoint", 0, {"ckpt_name": checkpoint}),
        Node("LoadImage", "Load Image", 0, {"image": "example.png"}),
        *operators,
        Node("CLIPTextEncode", "Positive Prompt", 1, {"clip": clip, "text": prompt}),
        Node("CLIPTextEncode", "Negative Prompt", 1, {"clip": clip, "text": ""}),
        Node("PosteriorMeasurementFromPhoto", "Measurement from Photo", 2, measure),
        Node("PosteriorRestore", "Restore", 3, inputs),
        Node(
            "PosteriorConsistency",
            "Consistency",
            4,
            {"image": ("Restore", 0), "measurement": ("Measurement from Photo", 0)},
        ),
        Node("SaveImage", "Result", 5, {"images": ("Restore", 0), "filename_prefix": "posterior"}),
    ]


def blueprint(name: str, description: str, sigma: float, node: Node, widgets: list[str], mask: bool = False) -> Blueprint:
    """One operator, Measurement from Photo, and Restore."""
    restore = {key: (key, 0) for key in ("model", "vae", "positive", "negative")}
    return Blueprint(
        name,
        description,
        {
            "photo": "IMAGE",
            **({"mask": "MASK"} if mask else {}),
            "model": "MODEL",
            "vae": "VAE",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
        },
        [
            node,
            Node(
                "PosteriorMeasurementFromPhoto",
                "Measurement from Photo",
                1,
                {"photo": ("photo", 0), "operator": ("Operator", 0), "noise.sigma": sigma},
            ),
            Node("PosteriorRestore", "Restore", 2, {**restore, "measurement": ("Measurement from Photo", 0)}),
        ],
        {"image": ("Restore", 0), "residual": ("Restore", 1)},
        [
            *(("Operator", widget) for widget in widgets),
            ("Measurement from Photo", "noise.sigma"),
            *(("Restore", widget) for widget in ("quality", "seed", "cfg")),
        ],
    )
