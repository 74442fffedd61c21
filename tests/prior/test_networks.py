"""The shipped weights in our networks: as good as they were measured, and the same noise levels as ComfyUI's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from prior import networks
from prior.networks import Autoencoder, UNet, alphas_cumprod, denoise, noise_levels

ROOT = Path(__file__).resolve().parents[2]
Prior = tuple[UNet, Autoencoder]


def test_autoencoder_round_trip(prior: Prior, pictures: Tensor) -> None:
    _, autoencoder = prior
    latents = autoencoder.encode(pictures[:8])
    assert latents.shape == (8, 4, 16, 16)
    assert float(latents.std()) == pytest.approx(1, abs=0.15)
    error = (autoencoder.decode(latents).clamp(-1, 1) - pictures[:8]) / 2
    psnr = -10 * error.square().mean((1, 2, 3)).log10()
    assert float(psnr.mean()) >= 32.5, psnr  # measured: 33.1


def eps_mse(unet: UNet, x: Tensor) -> float:
    """At timesteps that cover all evenly."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(5, 994, len(x)).long()
    alpha = alphas_cumprod()[t].float()[:, None, None, None]
    return float((unet(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t) - noise).square().mean())


def test_unet_predicts_the_noise(prior: Prior, pictures: Tensor) -> None:
    unet, autoencoder = prior
    assert eps_mse(unet, autoencoder.encode(pictures)) <= 0.0705  # measured: 0.0683


def test_pixel_unet_predicts_the_noise(pictures: Tensor) -> None:
    assert eps_mse(networks.load_pixels(), avg_pool2d(pictures, 4)) <= 0.0144  # measured: 0.0139


def test_noise_levels_are_those_of_stable_diffusion() -> None:
    levels = noise_levels()
    assert levels.shape == (1000,)
    assert bool((levels.diff() > 0).all())
    assert [float(levels[0]), float(levels[-1])] == pytest.approx([0.029167, 14.6146], rel=1e-4)


def test_denoise_takes_the_nearest_timestep() -> None:
    class Spy(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.x, self.t = x, t
            return torch.ones_like(x)

    spy, x = Spy(), torch.randn(4, 4, 2, 2, dtype=torch.float64)
    sigma = torch.cat([noise_levels()[[0, 17, 999]] * 1.001, torch.tensor([1e3])])
    denoised = denoise(spy, x, sigma)
    sigma = sigma[:, None, None, None]
    assert spy.t.tolist() == [0, 17, 999, 999]
    assert torch.allclose(spy.x, x / (1 + sigma**2).sqrt())
    assert torch.allclose(denoised, x - sigma)


def test_denoise_is_per_image_and_differentiable(prior: Prior) -> None:
    unet, _ = prior
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = denoise(unet, x, torch.tensor([0.1, 5.0]))
    single = torch.cat([denoise(unet, x[:1], 0.1), denoise(unet, x[1:], 5.0)])
    assert torch.allclose(batch, single, atol=1e-5)
    (gradient,) = torch.autograd.grad(batch[0].sum(), x)
    assert float(gradient[0].abs().max()) > 0
    assert float(gradient[1].abs().max()) == 0


def test_loading_leaves_no_trace(prior: Prior) -> None:
    before = torch.get_rng_state()
    for network in (*networks.load(), networks.load_pixels()):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), before)


def test_imports_inside_a_package_and_without_comfyui(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "prior").symlink_to(ROOT / "prior")
    program = """
import sys
import pack.prior.draw, pack.prior.export
pack.prior.networks.load()
assert not {"prior", "comfy", "folder_paths"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
