"""The k-state x = x0 + sigma eps, and the host states that map to it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class State:
    """Between a host's state at the host's own sigma and the k-state.

    The eps, v-prediction and EDM families are in the k-state already (flow False). A rectified flow has x_s = (1 - s) x0 + s eps,
    so that sigma = s / (1 - s) and x = x_s (1 + sigma).

    Attributes:
        flow: whether the host's state is that of a rectified flow.
    """

    flow: bool

    # At s = 1 the k-state is infinite; this is near enough for a network's sinusoids of 1000 s, and far enough for float32.
    LAST_S = 1 - 1e-6

    def sigmas_to_k(self, sigmas: Tensor) -> Tensor:
        """The host's noise levels -> sigma, finite."""
        if not self.flow:
            return sigmas
        s = sigmas.cpu().double().clamp(max=self.LAST_S)  # not every device has float64
        return (s / (1 - s)).to(sigmas)

    def sigma_from_k(self, sigma: Tensor) -> Tensor:
        """sigma -> the host's noise level."""
        return sigma / (1 + sigma) if self.flow else sigma

    def to_k(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The host's state at sigma (broadcastable) -> the k-state."""
        return x * (1 + sigma) if self.flow else x

    def from_k(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The k-state at sigma (broadcastable) -> the host's state."""
        return x / (1 + sigma) if self.flow else x
