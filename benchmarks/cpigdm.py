"""What C-PiGDM costs beside the networks it calls.

    python benchmarks/cpigdm.py

Step: one step of `sample_cpigdm` on the demo prior's networks (128 x 128, decoder consistency, 4 inner steps, as shipped), beside the sum of
its parts: a call of the UNet, for each inner step a decode with its vector-Jacobian product, and a plain decode at the end.

Integrator: E, theta and Psi for every eigenvalue of a circular blur of a 512 x 512 picture, in float64, beside one call of an SD 1.5
UNet at 64 x 64. The network is built here in plain torch with random weights: SD 1.5's channels, levels, residual blocks and
self-attention, but no cross-attention, so that it is a little cheaper than the real one, to our disadvantage.

CPU seconds of this process on one thread; everything that is compared takes turns, each ratio is taken within a round, and its
median reported, because the machine is shared. Prints markdown and writes it to results/cpigdm_cost.md.
"""

import functools
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of this folder, whose operators.py would shadow the package

from operators import AreaDownscale, Blur, Measurement, gaussian_kernel  # noqa: E402
from prior.networks import ResBlock, Transformer, denoise, load  # noqa: E402
from samplers import sample_cpigdm  # noqa: E402
from samplers.weights import Bayes, Paper, psi, pull  # noqa: E402

Call = Callable[[], object]


def rounds(calls: dict[str, Call], n: int) -> list[dict[str, float]]:
    """CPU seconds of each call in each of n rounds; the order turns round every time."""
    for call in calls.values():
        call()
    found = []
    for i in range(n):
        times = {}
        for name in sorted(calls, reverse=bool(i % 2)):
            before = time.process_time()
            calls[name]()
            times[name] = time.process_time() - before
        found.append(times)
    return found


# Step -------------------------------------------------------------------------------------------------------------------


def step_rows() -> list[str]:
    unet, autoencoder = load()
    model = functools.partial(denoise, unet)
    inner = 4
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([3.0])

    def decode_vjp() -> None:
        v = z.clone().requires_grad_()
        image = autoencoder.decode(v)
        torch.autograd.grad(image, v, torch.ones_like(image))

    @torch.no_grad()
    def network() -> Tensor:
        return model(z, sigma)

    @torch.no_grad()
    def decode() -> Tensor:
        return autoencoder.decode(z)

    lines = []
    for name, operator in (
        ("area x4", AreaDownscale((3, 128, 128), 4)),
        ("blur", Blur(gaussian_kernel(2.0), (3, 128, 128), "reflect")),
    ):
        y = operator.A(autoencoder.decode(z)).detach() + 0.5
        for weight in ("dual", "bayes"):

            def step(measurement: Measurement = Measurement(y, operator, 0.02), weight: str = weight) -> Tensor:  # noqa: B008
                options = {"weight": weight, "inner_steps": inner, "last_steps": inner}
                return sample_cpigdm(
                    model, z, torch.tensor([3.0, 1.0]), measurement=measurement, autoencoder=autoencoder, **options
                )

            times = rounds({"step": step, "network": network, "vjp": decode_vjp, "decode": decode}, 31)
            sums = [t["network"] + inner * t["vjp"] + t["decode"] for t in times]
            ratio = statistics.median(t["step"] / total for t, total in zip(times, sums, strict=True))
            cells = [1e3 * statistics.median(t[key] for t in times) for key in ("step", "network", "vjp", "decode")]
            lines.append(f"| {name} | {weight} | " + " | ".join(f"{c:.0f}" for c in cells) + f" | **{ratio:.3f}** |")
            print(lines[-1], flush=True)
    return lines


# Integrator -------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """The layers of SD 1.5's UNet without its cross-attention: channels 320 x (1, 2, 4, 4), two residual blocks a level."""

    def __init__(self) -> None:
        super().__init__()
        width, levels, embedding = 320, (1, 2, 4, 4), 1280
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = width, [width]
        for i, factor in enumerate(levels):
            for _ in range(2):
                self.down.append(self.pair(channels, width * factor, embedding, i < 3))
                channels = width * factor
                skips.append(channels)
            if i < 3:
                self.down.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        self.middle = nn.ModuleList(
            [self.pair(channels, channels, embedding, True), self.pair(channels, channels, embedding, False)]
        )
        for i, factor in reversed(list(enumerate(levels))):
            for j in range(3):
                self.up.append(self.pair(channels + skips.pop(), width * factor, embedding, i < 3))
                channels = width * factor
                if i > 0 and j == 2:
                    self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1)))
        self.last = nn.Conv2d(channels, 4, 3, padding=1)
        self.embedding = nn.Parameter(torch.zeros(1, embedding))

    @staticmethod
    def pair(channels: int, out: int, embedding: int, attention: bool) -> nn.ModuleList:
        return nn.ModuleList([ResBlock(channels, out, embedding), *([Transformer(out)] if attention else [])])

    def apply_pair(self, pair: nn.ModuleList, x: Tensor) -> Tensor:
        x = pair[0](x, self.embedding)
        return pair[1](x) if len(pair) > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = [x]
        for layer in self.down:
            x = self.apply_pair(layer, x) if isinstance(layer, nn.ModuleList) else layer(x)
            skips.append(x)
        for pair in self.middle:
            x = self.apply_pair(pair, x)
        for layer in self.up:
            x = self.apply_pair(layer, torch.cat([x, skips.pop()], 1)) if isinstance(layer, nn.ModuleList) else layer(x)
        return self.last(x)


def integrator_rows() -> list[str]:
    with torch.no_grad():
        network = Network().eval()
        x = torch.randn(1, 4, 64, 64)
        blur = Blur(gaussian_kernel(3.0, 61), (3, 512, 512), "circular")
        values = blur.as_fourier()._eigenvalues.value
        s, t = torch.tensor(3.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        n, variance = 0.04**2, 0.9

        def dual() -> None:
            _ = 1 / (values * variance + n)
            _ = ((values * s**2 + n) / (values * t**2 + n)).sqrt()

        calls: dict[str, Call] = {"network": lambda: network(x), "dual: both functions of a step": dual}
        for name, weight in (("Bayes", Bayes(0.3, 0.04)), ("paper", Paper(2.0, 0.04))):
            calls[f"{name}: E and theta"] = lambda weight=weight: pull(weight, s, t)(values)
            calls[f"{name}: Psi"] = lambda weight=weight: psi(weight, s, t, 1.0, False)(values)
        times = rounds(calls, 3)
    lines = []
    for name in calls:
        seconds = statistics.median(t[name] for t in times)
        share = statistics.median(t[name] / t["network"] for t in times)
        lines.append(f"| {name} | {1e3 * seconds:.0f} | {100 * share:.2f} % |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the tables and write them down."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    lines = [
        "# C-PiGDM: cost beside the networks",
        "",
        f"{models[0] if models else platform.processor()}, 1 thread; Python {platform.python_version()}, torch {torch.__version__}. Made "
        "by `benchmarks/cpigdm.py`, which says how.",
        "",
        "## Step, milliseconds",
        "",
        "| operator | weight | step | UNet | decode and vjp | decode | step / (UNet + 4 (decode and vjp) + decode) |",
        "|---|---|---|---|---|---|---|",
        *step_rows(),
        "",
        "## Integrator for the 512 x 257 eigenvalues of a circular blur at 512 x 512",
        "",
        "| | ms | of a network call |",
        "|---|---|---|",
        *integrator_rows(),
    ]
    (ROOT / "benchmarks" / "results" / "cpigdm_cost.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
