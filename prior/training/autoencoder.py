"""Training of the autoencoder: reconstruction of crops, then of whole pictures, through noisy latents of unit variance."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..networks import Autoencoder, Block
from .loop import Task, save_sheet, save_weights

CROP = 64
NOISE = 0.1  # the largest standard deviation of noise on the latents: the decoder must bear what the UNet gets wrong
FREEZE = 0.6  # of the steps: until then each batch is normalised by itself, then by the running statistics
WHOLE = 0.88  # of the steps: until then crops, then whole pictures


def fresh() -> Autoencoder:
    """Blocks begin near the identity, and pictures as grey."""
    autoencoder = Autoencoder()
    for module in autoencoder.modules():
        if isinstance(module, Block):
            nn.init.normal_(module.conv[-1].weight, std=1e-2)
            nn.init.zeros_(module.conv[-1].bias)
    nn.init.constant_(autoencoder.decoder[-1].bias, 0.45)
    return autoencoder


def encode(encoder: nn.Module, pictures: Tensor, batch: int = 16) -> Tensor:
    """Latents of uint8 pictures."""
    with torch.no_grad():
        parts = [encoder((part.float() / 255).contiguous(memory_format=torch.channels_last)) for part in pictures.split(batch)]
    return torch.cat(parts)


def decode(decoder: nn.Module, latents: Tensor, batch: int = 16) -> Tensor:
    """Pictures in [0, 1]."""
    with torch.no_grad():
        parts = [decoder(part.contiguous(memory_format=torch.channels_last)) for part in latents.split(batch)]
    return torch.cat(parts).clamp(0, 1)


def psnr(pictures: Tensor, expected: Tensor) -> Tensor:
    """Of each picture, dB; both in [0, 1]."""
    return -10 * (pictures - expected).square().mean((1, 2, 3)).log10()


class TrainAutoencoder(Task):
    name = "autoencoder"

    def __init__(self, folder: Path, pictures: Tensor, validation: Tensor, batch: int) -> None:
        super().__init__()
        self.folder, self.pictures, self.validation, self.batch = folder, pictures, validation, batch
        self.network = fresh().to(memory_format=torch.channels_last)
        self.statistics = torch.zeros(8)
        self.running = {"mean": torch.zeros(4), "std": torch.ones(4), "batches": torch.zeros(1)}

    def loss(self, rng: torch.Generator, progress: float) -> tuple[Tensor, int]:
        whole_pictures = progress >= WHOLE
        batch = max(1, self.batch // 4) if whole_pictures else self.batch  # the pixels stay as many
        x = self.pictures[torch.randint(len(self.pictures), (batch,), generator=rng)]
        if not whole_pictures:
            places = torch.randint(x.shape[-1] - CROP + 1, (batch, 2), generator=rng).tolist()
            x = torch.stack([p[:, i : i + CROP, j : j + CROP] for p, (i, j) in zip(x, places, strict=True)])
        x = (x.float() / 255).contiguous(memory_format=torch.channels_last)
        z = self.network.encoder(x)
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) + 1e-5
        self.statistics = torch.cat([mean, std]).detach()
        if progress >= FREEZE:
            mean, std = self.running["mean"], self.running["std"]
        z = (z - mean[:, None, None]) / std[:, None, None]
        noise = NOISE * torch.rand(batch, 1, 1, 1, generator=rng) * torch.randn(z.shape, generator=rng)
        error = self.network.decoder(z + noise) - x
        edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
        # Far latents cost a little, for the decoder clamps them.
        return 12 * error.square().mean() + 0.1 * error.abs().mean() + 0.05 * edges + 1e-4 * z.pow(4).mean(), batch

    def share(self, statistics: Tensor) -> None:
        batches = self.running["batches"]
        keep = min(0.99, float(batches / (batches + 10)))
        self.running["mean"].lerp_(statistics[:4], 1 - keep)
        self.running["std"].lerp_(statistics[4:], 1 - keep)
        batches += 1

    def folded(self) -> Autoencoder:
        """A copy whose encoder gives latents of about mean 0 and variance 1 by itself; in float16, as it is shipped."""
        copy = Autoencoder()
        copy.load_state_dict(self.network.state_dict())
        with torch.no_grad():
            # The statistics that the decoder has learnt with: those of other pictures would tint what it gives.
            copy.encoder[-1].weight /= self.running["std"][:, None, None, None]
            copy.encoder[-1].bias.sub_(self.running["mean"]).div_(self.running["std"])
        return copy.half().float().to(memory_format=torch.channels_last)

    def report(self, final: bool) -> Mapping[str, float]:
        autoencoder = self.folded()
        validation = self.validation if final else self.validation[: max(1, len(self.validation) // 4)]
        z = encode(autoencoder.encoder, validation)
        out = decode(autoencoder.decoder, z)
        expected = validation.float() / 255
        n = min(16, len(out))
        save_sheet(torch.stack([expected[:n], out[:n]], 1).flatten(0, 1), self.folder / "autoencoder.png", min(8, 2 * n))
        save_weights(autoencoder.state_dict(), self.folder / "autoencoder.safetensors")
        each = psnr(out, expected)
        return {"psnr": float(each.mean()), "worst": float(each.min()), "largest_latent": float(z.abs().max())}
