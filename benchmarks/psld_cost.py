"""What a PSLD step costs beside the sum of its parts, and how much memory each mode needs beside one naive graph.

    python benchmarks/psld_cost.py

Through the real ComfyUI in this process. On the CPU: SD 1.5's UNet (860 M weights) and KL autoencoder (84 M) at full size, random
weights, float32, guidance (two passes), one thread.

Speed: a step of `sample_psld` by each rule in mode fastest, and network, decoder and encoder alone (forward and backward), all in turn,
again and again; the ratio is taken within each round, and its median reported. Seconds are the process's own, of one thread: the
machine is shared.

Memory: every mode in a process of its own. The peak is the resident set's high-water mark during one step, less the resident
set before it, which holds the weights; glibc gives back every freed block at once (MALLOC_MMAP_THRESHOLD_). `naive` is the step
as one graph, the norms' gradient taken with respect to x in one go, as the paper's program does. `short` is mode auto where half
of what `fastest` needs is free.

With a CUDA device, also SD 1.5 at 512 x 512 and SDXL at 1024 x 1024 at full size, float16, VAE in bfloat16: peak of PyTorch's
allocator with the weights, and seconds for each step.

Prints a markdown table and writes it to results/psld_cost.md.
"""

import argparse
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # in place of this folder

SIDE, ROUNDS = 128, 7  # pixels; of the speed part
MEMORY_SIDE = 256
GIB = 2**30
ATTEMPTS = ("naive", "fastest", "balanced", "lowest", "short")


# The same step, by parts and as one graph -------------------------------------------------------------------------------


def halves(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of one part."""
    v = torch.randn(function(x).shape, generator=torch.Generator().manual_seed(0)).to(x)

    def call() -> Tensor:
        given = x.detach().requires_grad_()
        return torch.autograd.grad(function(given), given, v)[0]

    return call


def naive_step(model: Callable, x: Tensor, measurement: Any, autoencoder: Any) -> Tensor:
    """Algorithm 2's gradient from a single graph."""
    x = x.detach().requires_grad_()
    denoised = model(x)
    image = autoencoder.decode(denoised)
    residual = measurement.y - measurement.operator.A(image)
    glued = autoencoder.encode(image + measurement.operator.A_dagger(residual))
    loss = residual.flatten(1).norm(dim=1) + 0.1 * (glued - denoised).flatten(1).norm(dim=1)
    return torch.autograd.grad(loss.sum(), x)[0]


class Bench:
    """A model and a VAE in ComfyUI, and a measurement of their size."""

    def __init__(self, pack: ModuleType, model: Any, vae: Any, side: int, arch: str = "sd15") -> None:
        self.pack, self.model, self.vae, self.side, self.arch = pack, model, vae, side, arch
        operator = pack.operators.AreaDownscale((3, side, side), 8)
        y = torch.rand(1, *operator.out_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.measurement = pack.operators.Measurement(y, operator)

    def run(self, solve: Callable[..., Tensor], memory: str, steps: int = 1, callback: Callable | None = None) -> None:
        """Run `solve` under the stock guider, cfg 3."""
        import comfy.sample
        import comfy.samplers
        from support.tiny_checkpoints import conditioning

        with torch.inference_mode():
            guider = comfy.samplers.CFGGuider(self.model)
            guider.set_conds(conditioning(self.arch, 1), conditioning(self.arch, 2))
            guider.set_cfg(3.0)
            latent = torch.zeros(1, 4, self.side // 8, self.side // 8)
            noise = comfy.sample.prepare_noise(latent, 0)
            sampler = self.pack.nodes.host.stock_sampler(solve, self.measurement, self.vae, memory)
            sigmas = torch.linspace(2.0, 1.0, steps + 1)
            guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=0)


def full_networks(pack: ModuleType, family: str, side: int, dtype: torch.dtype, vae_dtype: torch.dtype) -> Bench:
    """The stock networks at full size with random weights."""
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE
    from support.full_networks import base_model, kl_network

    device = mm.get_torch_device()
    model = ModelPatcher(base_model(family, dtype, "cpu"), load_device=device, offload_device=mm.unet_offload_device())
    vae = VAE(sd=kl_network(torch.float32, "cpu").state_dict(), dtype=vae_dtype)
    # Never paged: there is no file to load a twin from.
    vae.patcher = ModelPatcher(vae.first_stage_model, load_device=vae.device, offload_device=vae.patcher.offload_device)
    return Bench(pack, model, vae, side, "sdxl" if family == "SDXL" else "sd15")


def on_cpu(pack: ModuleType, side: int) -> Bench:
    return full_networks(pack, "SD15", side, torch.float32, torch.float32)


# Speed ------------------------------------------------------------------------------------------------------------------


PARTS = {"paper": ("network", "decode", "encode"), "line search": ("network", "decode", "plain decode")}


def speed(bench: Bench) -> dict[str, float]:
    """Median seconds of the steps and of their parts, and for each rule the median of the rounds' ratios.

    A step of the line search decodes once with a gradient and once, at its end, without.
    """
    psld = bench.pack.samplers.sample_psld
    times: dict[str, list[float]] = {}

    def solve(model: Callable, x: Tensor, sigmas: Tensor, extra_args: Any, **given: Any) -> Tensor:
        def denoise(v: Tensor) -> Tensor:
            return model(v, sigmas[0].expand(len(v)), **extra_args)

        codec = given["autoencoder"]
        image = torch.zeros(1, 3, bench.side, bench.side)
        calls = {
            "paper": lambda: psld(model, x, sigmas[:2], extra_args, **given),
            "line search": lambda: psld(model, x, sigmas[:2], extra_args, rule="line_search", gamma=0.0, **given),
            "plain decode": lambda: plainly(codec.decode, x),
            "network": halves(denoise, x),
            "decode": halves(codec.decode, x),
            "encode": halves(codec.encode, image),
        }
        for call in calls.values():
            call()
        for round_ in range(ROUNDS):
            # The step first and last in turn, so that a machine that slows down favours neither.
            for name in sorted(calls, reverse=bool(round_ % 2)):
                before = time.process_time()
                calls[name]()
                times.setdefault(name, []).append(time.process_time() - before)
        return x

    bench.run(solve, "fastest")
    found = {name: statistics.median(values) for name, values in times.items()}
    for rule, parts in PARTS.items():
        ratios = [whole / sum(each) for whole, *each in zip(times[rule], *(times[part] for part in parts), strict=True)]
        found[f"{rule} / parts"] = statistics.median(ratios)
    return found


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return function(x)


# Memory -----------------------------------------------------------------------------------------------------------------


def status(name: str) -> int:
    """A figure of this process in bytes: VmRSS or VmHWM."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak(bench: Bench, attempt: str) -> dict[str, float]:
    """Bytes that one step takes beside what is there before it, and its seconds."""
    import comfy.model_management as mm

    found: dict[str, float] = {}
    host = bench.pack.nodes.host
    estimate = host.estimate(bench.model.model, bench.vae, (1, 4, bench.side // 8, bench.side // 8))
    if attempt == "short":
        mm.get_free_memory = lambda *_, **__: int(0.5 * estimate.activations("fastest") / host.memory.USABLE)

    def solve(model: Callable, x: Tensor, sigmas: Tensor, extra_args: Any, **given: Any) -> Tensor:
        codec = given["autoencoder"]
        with torch.no_grad():
            small = torch.zeros(1, 4, 8, 8)
            codec.encode(codec.decode(small))  # code and tables that the first call brings in
        before = status("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        start = time.process_time()
        if attempt == "naive":
            naive_step(lambda v: model(v, sigmas[0].expand(len(v)), **extra_args), x, given["measurement"], codec)
        else:
            bench.pack.samplers.sample_psld(model, x, sigmas[:2], extra_args, **given)
        found.update(seconds=time.process_time() - start, peak=status("VmHWM") - before)
        return x

    bench.run(solve, {"naive": "fastest", "short": "auto"}.get(attempt, attempt))
    mode = {"naive": "fastest", "short": estimate.best(mm.get_free_memory())}.get(attempt, attempt)
    return found | {"weights": estimate.weights, "estimate": estimate.activations(mode), "mode": mode}


def peaks() -> dict[str, dict[str, Any]]:
    """Every attempt in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = {}
    for attempt in ATTEMPTS:
        command = [sys.executable, __file__, "--peak", attempt]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[attempt] = json.loads(done.stdout.splitlines()[-1])
    return found


# CUDA -------------------------------------------------------------------------------------------------------------------


def full_size(
    pack: ModuleType, family: str, side: int, memory: str, steps: int = 4, dtype: torch.dtype = torch.float16
) -> dict[str, float]:
    """The stock networks with random weights on the compute device: peak of its allocator, and seconds for each step."""
    import comfy.model_management as mm

    bench = full_networks(pack, family, side, dtype, torch.bfloat16)
    device, model, vae = mm.get_torch_device(), bench.model, bench.vae
    moments: list[float] = []
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def tick(*_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    bench.run(pack.samplers.sample_psld, memory, steps, tick)
    estimate = pack.nodes.host.estimate(model.model, vae, (1, 4, side // 8, side // 8))
    found = {"seconds": (moments[-1] - moments[0]) / (len(moments) - 1), "estimate": estimate.gigabytes(memory)}
    return found | {"peak": torch.cuda.max_memory_allocated() / GIB if cuda else float("nan")}


# The table --------------------------------------------------------------------------------------------------------------


def start(*arguments: str) -> tuple[Any, ModuleType]:
    """ComfyUI and the pack in this process, and what keeps ComfyUI's folder alive."""
    from support.in_process import load_pack, start_comfyui

    return start_comfyui(*arguments), load_pack()


def report(times: dict[str, float], found: dict[str, dict[str, Any]]) -> list[str]:
    naive = found["naive"]["peak"]
    weights = found["naive"]["weights"]

    def cell(part: str, parts: tuple[str, ...]) -> str:
        return f"{times[part]:.2f}" if part in parts else "-"

    lines = [
        "## Time of a step",
        "",
        f"{SIDE} x {SIDE} pixels, float32; median of {ROUNDS} rounds, CPU seconds.",
        "",
        "| rule | whole step | network | decode | encode | plain decode | step / sum of its parts |",
        "|---" * 7 + "|",
        *(
            f"| {rule} | {times[rule]:.2f} | {times['network']:.2f} | {times['decode']:.2f} | {cell('encode', parts)} | "
            f"{cell('plain decode', parts)} | {times[f'{rule} / parts']:.3f} |"
            for rule, parts in PARTS.items()
        ),
        "",
        "## Memory of a step",
        "",
        f"{MEMORY_SIDE} x {MEMORY_SIDE} pixels, float32, batch 1; weights {weights / GIB:.2f} GB. GB is 2^30 bytes. *With weights* is "
        "what a device that holds nothing else would need.",
        "",
        "| attempt | peak, GB | / naive | with weights, GB | / naive | estimate / measured | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for attempt, one in found.items():
        name = f"auto, memory short ({one['mode']})" if attempt == "short" else attempt
        whole = one["peak"] + weights
        cells = [
            f"{one['peak'] / GIB:.2f}",
            f"{one['peak'] / naive:.2f}",
            f"{whole / GIB:.2f}",
            f"{whole / (naive + weights):.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {one['estimate'] / one['peak']:.2f} | {one['seconds']:.1f} |")
    return lines


def gpu_report(pack: ModuleType) -> list[str]:
    if not torch.cuda.is_available():
        return ["", "## GPU", "", "No CUDA device: the full-size networks were not run."]
    lines = ["", "## GPU", "", f"{torch.cuda.get_device_name()}, float16, VAE bfloat16, batch 1, cfg 3.", ""]
    lines += ["| network | mode | peak with weights, GB | estimate, GB | seconds / step |", "|---|---|---|---|---|"]
    for family, side in (("SD15", 512), ("SDXL", 1024)):
        for memory in pack.nodes.host.MODES:
            one = full_size(pack, family, side, memory)
            cells = f"{one['peak']:.2f} | {one['estimate']:.2f} | {one['seconds']:.2f}"
            lines.append(f"| {family} {side} x {side} | {memory} | {cells} |")
    return lines


def machine() -> str:
    """Processor and versions, in a line."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.processor())
    version = importlib.import_module("comfyui_version").__version__
    return f"{cpu}, 1 thread; Python {platform.python_version()}, torch {torch.__version__}, ComfyUI {version}"


def main() -> None:
    """Print the table and write it down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", choices=ATTEMPTS, help="measure one attempt in this process, and print it as JSON")
    attempt = parser.parse_args().peak
    torch.set_num_threads(1)
    if attempt is not None:
        folder, pack = start("--cpu")
        print(json.dumps(peak(on_cpu(pack, MEMORY_SIDE), attempt)))
        return
    found = peaks()
    gpu = torch.cuda.is_available()
    folder, pack = start(*([] if gpu else ["--cpu"]))  # noqa: RUF059 - the folder lives as long as its object
    lines = ["# PSLD: time and memory of a step", "", f"{machine()}. Made by `benchmarks/psld_cost.py`, which says how.", ""]
    lines += [*report(speed(on_cpu(pack, SIDE)), found), *gpu_report(pack)]
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks" / "results" / "psld_cost.md").write_text(text)


if __name__ == "__main__":
    main()
