"""Our C-PiGDM, PiGDM and DPS against the outputs of the C-PiGDM authors' own program (mandt-lab/c-pigdm @11a5b2b)."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.analytic import GaussianMixture
from torch import Tensor

from operators import Dense, Measurement
from samplers import State, sample_cpigdm, sample_psld

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SHAPE = (3, 8, 8)


def load(name: str) -> SimpleNamespace:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        values = {k: arrays[k].item() if arrays[k].ndim == 0 else torch.from_numpy(arrays[k]) for k in arrays.files}
    return SimpleNamespace(**values)


@pytest.fixture(scope="module")
def prior() -> GaussianMixture:
    gmm = load("prior_gmm")
    return GaussianMixture(gmm.pi, gmm.mu, gmm.s2, gmm.U, gmm.g)


def measured(run: SimpleNamespace, images: int) -> Measurement:
    operator = Dense(run.H, SHAPE, (1, 1, len(run.H)))
    return Measurement(run.y.double().reshape(1, 1, 1, -1).expand(images, -1, -1, -1).contiguous(), operator)


def picture(flat: Tensor) -> Tensor:
    return flat.double().reshape(-1, *SHAPE)


# The program computes in float32 in its transformed coordinates, whose inverse magnifies rounding by 1 / E: in the first step by
# up to 10^5. Integrated in float64 with its own quadratures (the Phi arrays), that step misses its trajectory by 3e-5 for
# bicubic2, by 4e-4 for sr4 (w = 15) and by 1e-5 for the box; its quadratures add 9e-5 for bicubic2. All other steps agree to 1e-5.
FIRST = {"cpgdm_bicubic2_nfe5": [2e-4, 2e-5], "cpgdm_sr4_nfe5": [5e-4], "cpgdm_inp_box_nfe5_lam0.2": [2e-5]}


@pytest.mark.parametrize("name", ["cpgdm_bicubic2_nfe5", "cpgdm_inp_box_nfe5", "cpgdm_inp_box_nfe5_lam0.2", "cpgdm_sr4_nfe5"])
def test_each_step_of_cpigdm(name: str, prior: GaussianMixture) -> None:
    """x_vp = mu x in the program's variance-preserving space."""
    run = load(name)
    sigmas, measurement = run.std_t / run.mu_t, measured(run, 4)
    tolerances = FIRST.get(name, [])
    assert run.nfe == 5
    for i in range(run.nfe):
        seen = []
        x = sample_cpigdm(
            prior.denoise,
            picture(run.x_traj[i] / run.mu_t[i]),
            sigmas[i : i + 2],
            callback=seen.append,
            measurement=measurement,
            weight="paper",
            w=run.hp_w,
            lam=run.hp_lam,
            jacobian="vp",
        )
        torch.testing.assert_close(seen[0]["denoised"], picture(run.x0_pred[i]), rtol=0, atol=1e-5)
        tolerance = tolerances[i] if i < len(tolerances) else 1e-5
        torch.testing.assert_close(x * run.mu_t[i + 1], picture(run.x_traj[i + 1]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["pgdmc_inp_box_nfe5", "pgdmc_sr4_nfe5"])
def test_each_step_of_continuous_pigdm(name: str, prior: GaussianMixture) -> None:
    """The program takes Euler steps of constant guidance w in its time t; ours are steps in sigma of guidance w / (1 + sigma^2).

    One is the other with w (1 + sigma^2) (dsigma/dt) dt / (sigma - sigma_next) in place of w; dsigma/dt = (1 + sigma^2) beta / 2 sigma.
    """
    run = load(name)
    sigmas, measurement = run.std_t / run.mu_t, measured(run, 4)
    for i in range(run.nfe):
        s, t = sigmas[i], sigmas[i + 1]
        speed = (1 + s**2) * run.beta_t[i] / (2 * s)
        w = run.hp_w * (1 + s**2) * speed * (run.t_fwd[i] - run.t_fwd[i + 1]) / (s - t)
        x = sample_cpigdm(
            prior.denoise,
            picture(run.x_traj[i] / run.mu_t[i]),
            sigmas[i : i + 2],
            measurement=measurement,
            weight="paper",
            w=float(w),
            integrator="euler",
            jacobian="k",
        )
        torch.testing.assert_close(x * run.mu_t[i + 1], picture(run.x_traj[i + 1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["flow_PGDM_in2_box_nfe5_st0.2", "flow_PGDM_sr4_nfe5_st0.2"])
def test_each_step_of_flow_pigdm(name: str, prior: GaussianMixture) -> None:
    """The flow's program: x_s = (1 - s) x0 + s eps, Euler steps in s, r^2 = s^2 / (s^2 + (1 - s)^2), which is tau = 1."""
    run, state = load(name), State(flow=True)
    levels = torch.cat([1 - run.t, torch.zeros(1, dtype=torch.float64)])
    sigmas, measurement = state.sigmas_to_k(levels), measured(run, 4)
    for i in range(run.nfe):
        x = sample_cpigdm(
            prior.denoise,
            state.to_k(picture(run.model_in[i]), sigmas[i]),
            sigmas[i : i + 2],
            measurement=measurement,
            weight="bayes",
            tau=1.0,
            integrator="euler",
            jacobian="k",
        )
        last = i == run.nfe - 1
        expected = picture(run.x_final if last else run.model_in[i + 1])
        # Stored in float32, where the state is up to 5.
        torch.testing.assert_close(state.from_k(x, sigmas[i + 1]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dps_inp_box_nfe5", "dps_sr4_nfe5"])
def test_each_step_of_dps(name: str, prior: GaussianMixture) -> None:
    """DPS is a setting of `sample_psld`; the program's step is grad ||.||^2 / ||.||, twice the gradient of the norm; eta = 0."""
    run = load(name)
    alphas = run.ddpm_alphas.double()[torch.cat([run.ts.flip(0) + 1, torch.zeros(1, dtype=torch.long)])]
    sigmas, measurement = ((1 - alphas) / alphas).sqrt(), measured(run, 4)
    assert run.nfe == len(run.model_in) == 5
    for i in range(run.nfe):
        x = sample_psld(
            prior.denoise,
            picture(run.model_in[i]) / alphas[i].sqrt(),
            sigmas[i : i + 2],
            measurement=measurement,
            omega=2 * run.hp_grad_term_weight,
            gamma=0.0,
        )
        expected = run.model_in[i + 1] if i < run.nfe - 1 else run.x_traj[-1]
        torch.testing.assert_close(x * alphas[i + 1].sqrt(), picture(expected), rtol=0, atol=1e-5)
