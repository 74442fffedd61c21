"""How fast the operators are, beside what the machine allows, the plainest torch code for the same, and deepinv.

    python benchmarks/operators.py

One CPU thread, 3 channels, float32. All functions of an operator are timed in turn, in another order each round. A time is the
20th percentile over the rounds, a ratio the median over the rounds of ours to theirs in the same round, with its quartiles: this
machine is shared, and only ratios within one run mean anything. "floor" is what cannot be avoided: a copy of the same bytes,
the bare FFT pair, or torch's own fused primitive. "plain" is the simplest exact torch code, without checks, for one shape and
precision. deepinv 0.5 takes part when it can be imported (for example
from `pip install --target DIR deepinv` and PYTHONPATH=DIR). Prints a markdown table and writes it to results/operators.md.
"""

import importlib
import os
import pathlib
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Run as a script, this folder stands first on the path and its operators.py would shadow the package.
sys.path[0] = str(ROOT)

from operators import (  # noqa: E402
    AreaDownscale,
    BicubicDownscale,
    Blur,
    Grayscale,
    LinearOperator,
    Mask,
    gaussian_kernel,
    random_mask,
)

Call = Callable[[], Tensor]
SECONDS = 10.0  # for each operator
METHODS = ("A", "A_adjoint", "A_dagger")


def measure(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Milliseconds of each call, round by round, all of them interleaved; a slow one takes part in the first rounds only."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # tables and plans are made once
    order = list(calls)
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        random.shuffle(order)  # each call finds the caches as another one left them, and no call is always next to the same one
        for name in order:
            if sum(times[name]) > 1e3 * SECONDS / 4:
                continue  # a slow one has had its share
            before = time.perf_counter()
            calls[name]()
            times[name].append(1e3 * (time.perf_counter() - before))
    return times


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def cell(ours: list[float], theirs: list[float] | None) -> str:
    """Their time, and ours to theirs: median and quartiles over the rounds that both took part in."""
    if not theirs:
        return "absent"
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    low, middle, high = (percentile(ratios, share) for share in (0.25, 0.5, 0.75))
    return f"{percentile(theirs, 0.2):.2f} (**{middle:.2f}**, {low:.2f} to {high:.2f})"


def fft_pair(x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])


def rows(n: int) -> dict[str, tuple[LinearOperator, dict[str, Call], str, Callable[[], object]]]:
    """Name -> (operator, floors and plain forms of its methods, what the floor is, deepinv's operator)."""
    shape = (3, n, n)
    # As with our own forms, one picture for A and another for the two ways back: how warm the caches are counts here.
    x, small, gray = torch.randn(1, *shape), torch.randn(1, 3, n // 4, n // 4), torch.randn(1, 1, n, n)
    y, two_planes = torch.randn(1, *shape), torch.randn(1, 2, n, n)
    keep, keep_small = random_mask(shape, 0.5), random_mask((3, n // 4, n // 4), 0.5)
    kernel, size = gaussian_kernel(3.0, 61), {256: 320, 512: 576}[n]
    padded = torch.randn(1, 3, size, size)
    mask_bytes = torch.randn(7 * n * n // 2)  # picture and mask are read, a picture is written: 7 planes, half of them each way
    transfer = torch.fft.rfft2(torch.randn(n, n))
    bicubic, blur = BicubicDownscale(shape, 4), Blur(kernel, shape, "reflect")
    r, c = (table.value.float() for table in (bicubic.rows, bicubic.columns))
    inverse = torch.linalg.pinv(bicubic.rows.value).float()
    b = blur.form.rows.value.float()
    u, _, vt = (table.float() for table in torch.linalg.svd(blur.form.rows.value))
    factors = torch.randn(n, n)
    weights = torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]

    def physics(name: str, *args: object, **kwargs: object) -> object:
        return getattr(importlib.import_module("deepinv").physics, name)(*args, **kwargs)

    taps = kernel.float()[None, None]
    return {
        "mask": (
            Mask(keep),
            {
                **{f"floor {method}": mask_bytes.clone for method in METHODS},
                "plain A": lambda: x * keep,
                "plain A_adjoint": lambda: y * keep,
                "plain A_dagger": lambda: y * keep,
            },
            "copy of as many bytes",
            lambda: physics("Inpainting", shape, mask=keep[0].expand(3, -1, -1)),
        ),
        "area x4": (
            AreaDownscale(shape, 4),
            {
                "floor A": lambda: avg_pool2d(x, 4),
                "floor A_adjoint": lambda: interpolate(small, scale_factor=4),
                "floor A_dagger": lambda: interpolate(small, scale_factor=4),
                "plain A": lambda: avg_pool2d(x, 4),
                "plain A_adjoint": lambda: interpolate(small / 16, scale_factor=4),
                "plain A_dagger": lambda: interpolate(small, scale_factor=4),
            },
            "avg_pool2d, interpolate",
            lambda: None,
        ),
        "mask @ area x4": (
            Mask(keep_small) @ AreaDownscale(shape, 4),
            {
                "floor A": lambda: avg_pool2d(x, 4),
                "floor A_adjoint": lambda: interpolate(small, scale_factor=4),
                "floor A_dagger": lambda: interpolate(small, scale_factor=4),
                "plain A": lambda: avg_pool2d(x, 4) * keep_small,
                "plain A_adjoint": lambda: interpolate(small * keep_small / 16, scale_factor=4),
                "plain A_dagger": lambda: interpolate(small * keep_small, scale_factor=4),
            },
            "avg_pool2d, interpolate",
            lambda: None,
        ),
        "grayscale": (
            Grayscale(shape),
            {
                **{f"floor {method}": two_planes.clone for method in METHODS},
                "plain A": lambda: conv2d(x, weights[None]),
                "plain A_adjoint": lambda: gray * weights,
                "plain A_dagger": lambda: gray * weights,
            },
            "copy of as many bytes",
            lambda: physics("Decolorize"),
        ),
        "circular blur 61": (
            Blur(kernel, shape),
            {
                **{f"floor {method}": lambda: fft_pair(x) for method in METHODS},
                "plain A": lambda: torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=(n, n)),
                "plain A_adjoint": lambda: torch.fft.irfft2(torch.fft.rfft2(y) * transfer, s=(n, n)),
                "plain A_dagger": lambda: torch.fft.irfft2(torch.fft.rfft2(y) * transfer, s=(n, n)),
            },
            "rfft2 + irfft2",
            lambda: physics("BlurFFT", shape, filter=taps),
        ),
        "bicubic x4": (
            bicubic,
            {
                **{
                    f"floor {method}": lambda: interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True)
                    for method in METHODS
                },
                "plain A": lambda: r @ x @ c.T,
                "plain A_adjoint": lambda: r.T @ small @ c,
                "plain A_dagger": lambda: inverse @ small @ inverse.T,
            },
            "antialiased interpolate",
            lambda: physics("Downsampling", shape, filter="bicubic", factor=4, padding="circular"),
        ),
        "gaussian blur 61, reflect": (
            blur,
            {
                **{f"floor {method}": lambda: fft_pair(padded) for method in METHODS},
                "plain A": lambda: b @ x @ b.T,
                "plain A_adjoint": lambda: b.T @ x @ b,
                "plain A_dagger": lambda: vt.T @ (factors * (u.T @ x @ u)) @ vt,
            },
            "rfft2 + irfft2, padded",
            lambda: physics("Blur", filter=taps, padding="reflect", use_fft=True),
        ),
    }


def table(n: int) -> list[str]:
    """The markdown lines of one picture size."""
    lines = []
    for name, (operator, plain, what, physics) in rows(n).items():
        x = torch.randn(1, *operator.in_shape)
        y = operator.A(x)
        calls = {
            "ours A": lambda operator=operator, x=x: operator.A(x),
            "ours A_adjoint": lambda operator=operator, y=y: operator.A_adjoint(y),
            "ours A_dagger": lambda operator=operator, y=y: operator.A_dagger(y),
            **plain,
        }
        other = peer(physics)
        if other is not None:
            z = other.A(x)
            calls["deepinv A"] = lambda other=other, x=x: other.A(x)
            calls["deepinv A_adjoint"] = lambda other=other, z=z: other.A_adjoint(z)
            calls["deepinv A_dagger"] = lambda other=other, z=z: other.A_dagger(z)
        with torch.no_grad():
            times = measure(calls)
        for method in METHODS:
            ours = times[f"ours {method}"]
            cells = [cell(ours, times.get(f"{column} {method}")) for column in ("plain", "floor", "deepinv")]
            lines.append(f"| {name} | {n} | {method} | {percentile(ours, 0.2):.2f} | " + " | ".join(cells) + f" | {what} |")
            print(lines[-1], flush=True)
    return lines


def peer(physics: Callable[[], object]) -> object | None:
    """deepinv's operator, or None where it is not installed or has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return physics()
        except ImportError:
            return None


def machine() -> str:
    """Processor and versions, in a line."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    try:
        deepinv = importlib.import_module("deepinv").__version__
    except ImportError:
        deepinv = "not installed"
    cpu = f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, 1 thread"
    return f"{cpu}; Python {platform.python_version()}, torch {torch.__version__}, deepinv {deepinv}"


HEAD = """\
# Operators: speed

{machine}.

Milliseconds for 3 channels, float32, batch 1 (20th percentile over interleaved rounds). In brackets ours to theirs: **median**
over the rounds, and quartiles; below 1 ours is faster. The machine is shared, so compare within rows only, and read two forms as
equal where the quartiles hold 1. *plain* is the simplest exact torch code for the same map, without a check of anything; *floor* is
what cannot be avoided, named at the right.

| operator | size | method | ours | plain | floor | deepinv | floor |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print the table and write it down."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    head = HEAD.format(machine=machine())
    print(head)
    lines = [head, *table(256), *table(512)]
    (ROOT / "benchmarks" / "results" / "operators.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
