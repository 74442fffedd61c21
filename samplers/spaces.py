"""Where C-PiGDM's guidance acts: in pixels with noise, in pixels without, or on latents."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .held import reachable
from .latent_consistency import closer, match_by_decoder, match_by_encoder, residual_of, spread_of
from .pixels import contradicts, corrected, expected_error, noise_norm
from .steps import Autoencoder, per_image

Spectral = Callable[[Tensor], Tensor]

# sigma over tau, above which x0 is a blur: more than one consistency step gained nothing on average on the demo prior.
EARLY = 4.0


class Space:
    """Where the guidance acts: the innovation of x0, functions h(A A^T) and A^T that act on innovations, f(A^T A) on states.

    As it stands here the pseudo-inverse, or its stand-in, is in the innovation: all that is seen has eigenvalue 1.

    Attributes:
        noise: standard deviation of the innovation's noise.
        top: the largest eigenvalue.
        free: how much of a move the state takes, 0 where it is held, broadcastable to it. None: all of it.
    """

    noise, top = 0.0, 1.0
    free: Tensor | None = None

    def innovation(self, x0: Tensor, prior_mean: Tensor, sigma: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """What the measurement says of x0, and ||A x0 - y||, (B,).

        prior_mean: of x0 given x without y, like x0; latents stay near it where there is noise.
        """
        raise NotImplementedError

    def apply(self, x: Tensor, f: Spectral) -> Tensor:
        raise NotImplementedError

    def gram(self, v: Tensor, h: Spectral) -> Tensor:
        return _at(h, 1.0, v) * v

    def adjoint(self, v: Tensor) -> Tensor:
        return self.freed(v)

    def full(self, innovation: Tensor) -> Tensor:
        """The change of x0 that meets y."""
        return self.freed(innovation)

    def freed(self, move: Tensor) -> Tensor:
        return move if self.free is None else self.free * move


class NoisyPixels(Space):
    """Pixel space with noise: everything depends on the eigenvalues of A A^T."""

    def __init__(self, measurement: Any, free: Tensor | None = None) -> None:
        self.operator, self.y, self.noise, self.free = measurement.operator, measurement.y, measurement.sigma, free
        self.measurement = measurement
        self.top = self.operator.norm() ** 2

    def innovation(self, x0: Tensor, prior_mean: Tensor, sigma: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        residual = self.y - self.operator.A(x0)
        return residual, torch.linalg.vector_norm(residual.flatten(1), dim=1)

    def settled(self, x0: Tensor, error: float, target: Tensor) -> Tensor:
        """`target`, x0 corrected for errors of this size; or where x0 is too near to y for that, x0 corrected for what its residual shows."""
        wrong = contradicts(x0, self.measurement, error)
        if not bool(wrong.any()):
            return target
        errors = expected_error(x0, self.measurement).tolist()
        means = [corrected(x0, self.measurement, i, shown) for i, shown in enumerate(errors)]
        return torch.where(per_image(wrong, x0), x0 + self.freed(torch.cat(means) - x0), target)

    def gram(self, v: Tensor, h: Spectral) -> Tensor:
        return self.operator.gram(v, _wide(h))

    def adjoint(self, v: Tensor) -> Tensor:
        return self.freed(self.operator.A_adjoint(v))

    def full(self, innovation: Tensor) -> Tensor:
        return self.freed(self.operator.A_dagger(innovation))

    def apply(self, x: Tensor, f: Spectral) -> Tensor:
        return self.operator.spectral(x, _wide(f))


class ExactPixels(Space):
    """Pixel space without noise: the innovation is A^+ (y - A x0)."""

    def __init__(self, measurement: Any, free: Tensor | None = None) -> None:
        self.operator, self.y, self.free = measurement.operator, measurement.y, free

    def innovation(self, x0: Tensor, prior_mean: Tensor, sigma: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        residual = self.y - self.operator.A(x0)
        return self.operator.A_dagger(residual), torch.linalg.vector_norm(residual.flatten(1), dim=1)

    def apply(self, x: Tensor, f: Spectral) -> Tensor:
        part = self.operator.project(x)
        return _at(f, 1.0, x) * part + _at(f, 0.0, x) * (x - part)


class Latents(Space):
    """Latent space: the innovation is a move of z0 towards A D(z) = y, near what the prior says, in the last step not below the noise.

    Args:
        inner_steps: consistency steps where sigma is at most EARLY tau; above it is one.
        tau: standard deviation of the latents around their mean.
        stop: share of the noise at which steps before the last end, at the latest.
        free: how much of a move latents take, 0 where they are held, broadcastable to them. None: all of it.
    """

    def __init__(
        self,
        measurement: Any,
        autoencoder: Autoencoder,
        consistency: str,
        inner_steps: int,
        last_steps: int,
        tau: float,
        stop: float,
        free: Tensor | None = None,
    ) -> None:
        self.whole, self.autoencoder, self.consistency = measurement, autoencoder, consistency
        self.measurement = measurement = reachable(measurement, free) if consistency == "decoder" else measurement
        self.inner_steps, self.last_steps, self.tau, self.stop = inner_steps, last_steps, tau, stop
        self.free = free
        self.noise_norm = noise_norm(measurement)

    def innovation(self, x0: Tensor, prior_mean: Tensor, sigma: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        steps = self.last_steps if last else self.inner_steps if sigma <= EARLY * self.tau else 1
        if self.consistency == "decoder":
            near = (prior_mean, spread_of(sigma, self.tau))
            goal = self.noise_norm if last else self.stop * self.noise_norm
            target, fit = match_by_decoder(x0, self.measurement, self.autoencoder, steps, goal, near, last, free=self.free)
        else:
            target, fit = match_by_encoder(x0, self.measurement, self.autoencoder, steps)
            target = x0 + self.freed(target - x0)
        if last:
            target = closer(target, x0, fit, self.measurement, self.autoencoder, self.noise_norm)
        return target - x0, fit if self.measurement is self.whole else residual_of(x0, self.whole, self.autoencoder)

    def adjoint(self, v: Tensor) -> Tensor:
        return v  # the innovation is free of what is held

    def full(self, innovation: Tensor) -> Tensor:
        return innovation

    def apply(self, x: Tensor, f: Spectral) -> Tensor:
        return _at(f, 1.0, x) * x


def _wide(f: Spectral) -> Spectral:
    """f evaluated in float64, where the device has it: eigenvalues range over twelve decades."""
    return lambda values: f(values if values.device.type == "mps" else values.double()).to(values)


def _at(f: Spectral, value: float, like: Tensor) -> Tensor:
    """f of one eigenvalue."""
    return f(torch.tensor(value, dtype=torch.float64)).to(like)
