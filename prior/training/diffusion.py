"""Training of a UNet: to predict the noise on latents, or on small pictures."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..networks import ResBlock, Transformer, UNet, alphas_cumprod
from .loop import Task, save_sheet, save_weights

MAX_SNR = 5.0  # min-SNR weighting (Hang et al. 2023)


def fresh(multipliers: tuple[int, ...], pixels: int) -> UNet:
    """Residual branches and the output begin at zero."""
    unet = UNet(multipliers=multipliers, pixels=pixels)
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.out_layers[-1].weight)
        elif isinstance(module, Transformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.out[-1].weight)
    nn.init.zeros_(unet.out[-1].bias)
    return unet


def noisy(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    a = alphas_cumprod().float()[t][:, None, None, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


@torch.no_grad()
def eps_mse(unet: nn.Module, x: Tensor, batch: int = 32) -> Tensor:
    """Error of the predicted noise, of each of (N, C, h, w), at timesteps that cover 5 to 994 evenly; the noise is fixed."""
    rng = torch.Generator().manual_seed(1)
    t = torch.linspace(5, 994, len(x)).long()[torch.randperm(len(x), generator=rng)]
    noise = torch.randn(x.shape, generator=rng)
    parts = zip(noisy(x, noise, t).split(batch), t.split(batch), noise.split(batch), strict=True)
    return torch.cat([(unet(xt, time) - eps).square().mean((1, 2, 3)) for xt, time, eps in parts])


@torch.no_grad()
def ddim(
    unet: nn.Module, shape: tuple[int, ...], steps: int = 25, seed: int = 0, limit: float = 4.0, eta: float = 0.0
) -> Tensor:
    """Samples by DDIM (Song et al. 2021), x0 limited to -limit..limit; with eta 1 by DDPM, the fresh noise from the same seed."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng)
    alphas = torch.cat([alphas_cumprod().float(), torch.ones(1)])
    times = [*torch.linspace(999, 0, steps).long().tolist(), -1]
    for now, after in pairwise(times):
        a, b = alphas[now], alphas[after]
        eps = unet(x, torch.full((len(x),), now))
        x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-limit, limit)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        fresh = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        x = b.sqrt() * x0 + (1 - b - fresh**2).sqrt() * eps
        if eta:
            x = x + fresh * torch.randn(shape, generator=rng)
    return x


class TrainUNet(Task):
    """A UNet on what fits in memory: x (N, C, h, w), of about unit variance or in [-1, 1].

    Args:
        show: from samples to pictures in [0, 1].
        samples: how many on the last sheet, a multiple of 8; a quarter of them on those before.
        limit: samples are kept in -limit..limit.
        extra: what the export holds besides `unet.*`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        multipliers: tuple[int, ...],
        x: Tensor,
        validation: Tensor,
        batch: int,
        show: Callable[[Tensor], Tensor],
        samples: int,
        limit: float,
        extra: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.folder, self.name, self.x, self.validation, self.batch = folder, name, x, validation, batch
        self.show, self.samples, self.limit, self.extra = show, samples, limit, extra
        self.network = fresh(multipliers, x.shape[1])
        snr = alphas_cumprod() / (1 - alphas_cumprod())
        weights = snr.clamp(max=MAX_SNR) / snr
        self.weights = (weights / weights.mean()).float()

    def loss(self, rng: torch.Generator, progress: float) -> tuple[Tensor, int]:
        x = self.x[torch.randint(len(self.x), (self.batch,), generator=rng)]
        # One timestep from each of `batch` equal ranges.
        t = ((torch.arange(self.batch) + torch.rand(self.batch, generator=rng)) / self.batch * 1000).long().clamp(max=999)
        noise = torch.randn(x.shape, generator=rng)
        each = (self.network(noisy(x, noise, t), t) - noise).square().mean((1, 2, 3))
        return (each * self.weights[t]).mean(), self.batch

    def report(self, final: bool) -> Mapping[str, float]:
        state = {f"unet.{key}": value for key, value in self.network.state_dict().items()}
        save_weights({**state, **self.extra}, self.folder / f"{self.name}.safetensors")
        n = self.samples if final else max(8, self.samples // 4)
        samples = ddim(self.network, (n, *self.x.shape[1:]), limit=self.limit)
        save_sheet(self.show(samples), self.folder / f"{self.name}.png")
        validation = self.validation if final else self.validation[: max(1, len(self.validation) // 4)]
        return {"eps_mse": float(eps_mse(self.network, validation).mean())}
