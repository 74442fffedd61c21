"""The exported shapes compute what the slim networks compute."""

import pytest
import torch
from torch import Tensor, nn

from prior.export import comfy_unet_state, comfy_vae_state, stock_checkpoint, widen
from prior.networks import Autoencoder, UNet

Prior = tuple[UNet, Autoencoder]
State = dict[str, Tensor]


def wide_unet(state: State) -> UNet:
    with torch.device("meta"):
        unet = UNet(320)
    unet.load_state_dict(state, assign=True)
    return unet.requires_grad_(False)


@pytest.fixture(scope="module")
def eps(prior: Prior) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and what the slim UNet predicts."""
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 400, 990])
    return x, t, prior[0](x, t)


def test_widened_unet_is_the_slim_one(prior: Prior, eps: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, expected = eps
    assert float((wide_unet(widen(prior[0].state_dict(), 5))(x, t) - expected).abs().max()) <= 1e-4


def test_stock_checkpoint(eps: tuple[Tensor, Tensor, Tensor]) -> None:
    state = stock_checkpoint()
    wide = {name: value.shape for name, value in state.items()}
    assert wide["model.diffusion_model.input_blocks.0.0.weight"] == (320, 4, 3, 3)
    assert wide["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"] == (640, 768)
    assert wide["first_stage_model.taesd_decoder.1.weight"] == (64, 4, 3, 3)
    assert wide["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert {value.dtype for value in state.values() if value.ndim} == {torch.float16}
    assert float(state["first_stage_model.vae_scale"]) == pytest.approx(0.18215)

    # Rounding the widened weights to float16 costs next to nothing, for the slim ones are float16 too.
    prefix = "model.diffusion_model."
    unet = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix) and "2.to_" not in k}
    x, t, expected = eps
    error = wide_unet({k: v for k, v in unet.items() if ".norm2." not in k})(x, t) - expected
    assert float(10 * (expected.square().mean() / error.square().mean()).log10()) >= 80


def test_cross_attention_is_complete_and_zero(prior: Prior) -> None:
    state = prior[0].state_dict()
    added = {k: v for k, v in comfy_unet_state(state).items() if k not in state}
    assert len(added) == 7 * 4  # four transformers
    assert not any(bool(value.any()) for value in added.values())


def taesd() -> nn.ModuleDict:
    """TAESD as published (and as in ComfyUI's taesd.py), without the clamp, which has no weights."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + x)

    def conv(n: int, out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
        return nn.Conv2d(n, out, 3, stride, 1, bias=bias)

    def blocks() -> list[nn.Module]:
        return [Block(), Block(), Block()]

    down, up = [], []
    for _ in range(3):
        down += [conv(64, 64, stride=2, bias=False), *blocks()]
        up += [*blocks(), nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]
    encoder = nn.Sequential(conv(3, 64), Block(), *down, conv(64, 4))
    decoder = nn.Sequential(nn.Identity(), conv(4, 64), nn.ReLU(), *up, Block(), conv(64, 3))
    return nn.ModuleDict({"taesd_encoder": encoder, "taesd_decoder": decoder})


def test_padded_taesd_is_the_slim_one(prior: Prior, pictures: Tensor) -> None:
    _, autoencoder = prior
    state = comfy_vae_state(autoencoder.state_dict())
    assert (float(state.pop("vae_scale")), float(state.pop("vae_shift"))) == pytest.approx((0.18215, 0))
    stock = taesd().requires_grad_(False)
    stock.load_state_dict(state)
    latents = autoencoder.encode(pictures[:2])
    assert torch.allclose(stock["taesd_encoder"]((pictures[:2] + 1) / 2), latents, atol=1e-5)
    images = stock["taesd_decoder"](3 * torch.tanh(latents / 3)) * 2 - 1
    assert torch.allclose(images, autoencoder.decode(latents), atol=1e-5)
