"""The networks of the demo prior: a slim SD1.x UNet and a slim TAESD. Imports torch and safetensors only.

Latents are (B, 4, H/8, W/8) and *scaled*: of about unit variance, the space the UNet lives in. (ComfyUI's LATENT of the same
picture is this divided by 0.18215.) Images are (B, 3, H, W) in [-1, 1]; H and W are multiples of 16.

Keys of the weights file: `unet.*` as in SD1.x checkpoints without the cross-attention (`attn2`, `norm2`), for the prior is
unconditional; `encoder.*` and `decoder.*` as in TAESD, with fewer blocks and narrower layers.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("avatars.safetensors")
PIXEL_WEIGHTS = Path(__file__).with_name("pixels.safetensors")
CHANNELS = 64
MULTIPLIERS, PIXEL_MULTIPLIERS = (1, 2), (1, 1, 2)  # of the channels: on latents and on pixels
PIXEL_SIDE = 32  # of the pictures that the pixel prior knows
HEADS = 8
WIDTHS, BLOCKS = (24, 32, 64, 64), (0, 1, 2, 3)  # of the slim TAESD, from full resolution down to 1/8
STOCK_WIDTHS, STOCK_BLOCKS = (64, 64, 64, 64), (1, 3, 3, 3)


# Diffusion --------------------------------------------------------------------------------------------------------------


def alphas_cumprod() -> Tensor:
    """The cumulative alphas of SD1.x's "scaled linear" schedule, (1000,) float64, decreasing."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def noise_levels() -> Tensor:
    """Sigma of each of the 1000 timesteps in the k-state x = x0 + sigma * eps, (1000,) float64, 0.029 to 14.6."""
    alphas = alphas_cumprod()
    return ((1 - alphas) / alphas).sqrt()


def denoise(unet: nn.Module, x: Tensor, sigma: float | Tensor) -> Tensor:
    """Denoised x0 of x = x0 + sigma * eps, as ComfyUI computes it: at the timestep whose sigma is nearest. Differentiable.

    x: (B, 4, h, w) scaled latents. sigma: a positive number or (B,). `partial(denoise, unet)` is a model for our samplers.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
    levels = noise_levels().to(x.device)
    t = (sigma[:, None].log() - levels.log()).abs().argmin(1)
    sigma = sigma.to(x.dtype)[:, None, None, None]
    return x - sigma * unet(x / (1 + sigma**2).sqrt(), t)


# UNet -------------------------------------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of t at geometrically falling frequencies. t: (B,) -> (B, channels) float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


class ResBlock(nn.Module):
    """Two convolutions and a skip; the timestep is added between them."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        # The Identity holds the place of SD's dropout, so that keys agree.
        self.out_layers = nn.Sequential(group_norm(out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class SelfAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, tokens, channels) -> same."""
        q, k, v = (project(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v))
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, 2)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """One transformer block over the pixels of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.Sequential(TransformerBlock(channels))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        return x + self.proj_out(self.transformer_blocks(tokens).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    """Layers in sequence, of which the residual blocks also take the timestep."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """Predicts eps from the variance-preserving state sqrt(a) x0 + sqrt(1 - a) eps, a = alphas_cumprod()[t]. Unconditional.

    One residual block per resolution, self-attention at the lowest one. Keys are those of SD1.x.

    Args:
        channels: at the full resolution. A multiple of 32.
        multipliers: of the channels, one for each resolution; each is half of the one before.
        pixels: channels of the input and of eps: 4 for latents, 3 for RGB.
    """

    def __init__(self, channels: int = CHANNELS, multipliers: Sequence[int] = MULTIPLIERS, pixels: int = 4) -> None:
        super().__init__()
        self.channels = channels
        e = 4 * channels
        widths = [channels * m for m in multipliers]
        lowest = len(widths) - 1
        self.time_embed = nn.Sequential(nn.Linear(channels, e), nn.SiLU(), nn.Linear(e, e))
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(pixels, channels, 3, padding=1))])
        c, skips = channels, [channels]
        for i, d in enumerate(widths):
            self.input_blocks.append(Stage(ResBlock(c, d, e), *([Transformer(d)] if i == lowest else [])))
            c = d
            skips.append(c)
            if i < lowest:
                self.input_blocks.append(Stage(Downsample(c)))
                skips.append(c)
        self.middle_block = Stage(ResBlock(c, c, e), Transformer(c), ResBlock(c, c, e))
        # Each takes what the last one gave, joined with the output of an input block, the latest first.
        self.output_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            d = widths[i]
            for last in (False, True):
                layers = [ResBlock(c + skips.pop(), d, e)]
                if i == lowest:
                    layers.append(Transformer(d))
                if last and i > 0:
                    layers.append(Upsample(d))
                self.output_blocks.append(Stage(*layers))
                c = d
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), nn.Conv2d(c, pixels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, pixels, h, w), h and w multiples of 2 per halving; t: (B,) timesteps 0 to 999 -> eps, as x."""
        embedding = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], 1), embedding)
        return self.out(x)


# Autoencoder ------------------------------------------------------------------------------------------------------------


def conv(channels: int, out: int, **options: int | bool) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, **options)


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def level(width: int, blocks: int, stock: int) -> list[nn.Module]:
    """The blocks of one resolution. A ReLU, a block of zeros, stands for each that stock TAESD has more: keys stay the same."""
    return [nn.ReLU() for _ in range(stock - blocks)] + [Block(width) for _ in range(blocks)]


class Encoder(nn.Sequential):
    """TAESD's encoder: images in [0, 1] -> scaled latents. Widths and numbers of blocks go from full resolution to 1/8."""

    def __init__(self, widths: Sequence[int] = WIDTHS, blocks: Sequence[int] = BLOCKS) -> None:
        layers = [conv(3, widths[0]), *level(widths[0], blocks[0], STOCK_BLOCKS[0])]
        for i in (1, 2, 3):
            layers += [conv(widths[i - 1], widths[i], stride=2, bias=False), *level(widths[i], blocks[i], STOCK_BLOCKS[i])]
        super().__init__(*layers, conv(widths[3], 4))


class Decoder(nn.Sequential):
    """TAESD's decoder: scaled latents -> images in [0, 1], not clamped. Widths and numbers of blocks as for the encoder."""

    def __init__(self, widths: Sequence[int] = WIDTHS, blocks: Sequence[int] = BLOCKS) -> None:
        layers = [SoftClamp(), conv(4, widths[3]), nn.ReLU()]
        for i in (3, 2, 1):
            layers += level(widths[i], blocks[i], STOCK_BLOCKS[i])
            layers += [nn.Upsample(scale_factor=2), conv(widths[i], widths[i - 1], bias=False)]
        super().__init__(*layers, *level(widths[0], blocks[0], STOCK_BLOCKS[0]), conv(widths[0], 3))


class Autoencoder(nn.Module):
    """Between images (B, 3, H, W) in [-1, 1] and scaled latents (B, 4, H/8, W/8). Deterministic, differentiable both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def encode(self, image: Tensor) -> Tensor:
        return self.encoder(image * 0.5 + 0.5)

    def decode(self, latent: Tensor) -> Tensor:
        """Not clamped: values a little outside [-1, 1] occur."""
        return self.decoder(latent) * 2 - 1


def load(path: str | Path = WEIGHTS) -> tuple[UNet, Autoencoder]:
    """The trained networks on the CPU, float32, in evaluation mode, without gradients of the weights."""
    state = {key: value.float() for key, value in load_file(path).items()}
    # Built without memory and then given the file's tensors: nothing is initialised, and torch's random state stays as it is.
    with torch.device("meta"):
        unet, autoencoder = UNet(), Autoencoder()
    unet_keys = [key for key in state if key.startswith("unet.")]
    unet.load_state_dict({key.removeprefix("unet."): state.pop(key) for key in unet_keys}, assign=True)
    autoencoder.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False), autoencoder.eval().requires_grad_(False)


def load_pixels(path: str | Path = PIXEL_WEIGHTS) -> UNet:
    """The trained UNet on pictures of 32 x 32 pixels, (B, 3, 32, 32) in [-1, 1], as `load` gives the one on latents."""
    state = {key.removeprefix("unet."): value.float() for key, value in load_file(path).items()}
    with torch.device("meta"):
        unet = UNet(multipliers=PIXEL_MULTIPLIERS, pixels=3)
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)
