"""Our PSLD against the outputs of the PSLD authors' own program (LituRout/PSLD @d734647), step by step in float64."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.analytic import GaussianMixture
from torch import Tensor

from samplers import sample_psld

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def load(name: str) -> SimpleNamespace:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        values = {k: arrays[k].item() if arrays[k].ndim == 0 else torch.from_numpy(arrays[k]) for k in arrays.files}
    return SimpleNamespace(**values)


class ReferenceOperator:
    """The reference program's operator: dense A, and what it uses as "transpose", which is not the adjoint.

    It is the identity for the box and nearest upsampling by 4 for super-resolution. The program also adds fresh noise to
    A x in the measurement term (not in the gluing term); `noise` reproduces that, our sampler has no such thing.
    """

    def __init__(self, run: SimpleNamespace) -> None:
        self.a, self.task, self.noise = run.A, run.task, torch.zeros_like(run.y)

    def A(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.a.T).reshape(self.noise.shape) + self.noise

    def A_adjoint(self, y: Tensor) -> Tensor:
        y = y + self.noise
        return y if self.task == "box" else y.repeat_interleave(4, -1).repeat_interleave(4, -2)


class ToyAutoencoder:
    def __init__(self, toy: SimpleNamespace, tanh: bool) -> None:
        self.toy, self.tanh = toy, tanh

    def decode(self, z: Tensor) -> Tensor:
        image = z.flatten(1) @ self.toy.Wd.T + self.toy.bd
        return (image.tanh() if self.tanh else image).reshape(len(z), *self.toy.image_shape.tolist())

    def encode(self, image: Tensor) -> Tensor:
        flat = image.flatten(1)
        flat = flat.clamp(-0.999, 0.999).atanh() if self.tanh else flat
        return (flat @ self.toy.We.T + self.toy.be).reshape(len(image), *self.toy.latent_shape.tolist())


@pytest.mark.parametrize("name", ["box_linear", "box_tanh_noisy", "sr4_tanh", "sr4_tanh_gamma0_LDPS"])
def test_each_step_equals_the_reference_program(name: str) -> None:
    run, toy = load(f"psld_{name}"), load("psld_toy_model")
    prior = GaussianMixture(toy.pi, toy.mu, toy.s2, toy.U, toy.g)
    operator = ReferenceOperator(run)
    measurement = SimpleNamespace(y=run.y, operator=operator)
    autoencoder = ToyAutoencoder(toy, run.decoder == "tanh")

    # The files list timesteps in ascending order, the trajectory in sampling order.
    alphas = torch.as_tensor(run.ddim_alphas).flip(0)
    alphas_prev = torch.as_tensor(run.ddim_alphas_prev).flip(0)
    assert run.steps == len(alphas) == 20
    for i, (a, a_prev) in enumerate(zip(alphas, alphas_prev, strict=True)):
        operator.noise = run.noiser_sigma * run.meas_noise_draws[i]
        sigmas = torch.stack([((1 - a) / a).sqrt(), ((1 - a_prev) / a_prev).sqrt()])
        seen = []
        x = sample_psld(
            lambda x, sigma: prior.denoise(x, sigma),
            run.z_traj[i] / a.sqrt(),
            sigmas,
            callback=seen.append,
            measurement=measurement,
            autoencoder=autoencoder,
            omega=run.omega,
            gamma=run.gamma,
            eta=run.eta,
            glue="adjoint",
        )
        torch.testing.assert_close(seen[0]["denoised"], run.pred_z0[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(x * a_prev.sqrt(), run.z_traj[i + 1], rtol=0, atol=1e-6)
