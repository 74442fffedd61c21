"""Operators without a closed form: conjugate gradients for A^+ and prox, Lanczos for functions of A A^T.

Every solver works on a batch with one set of scalars for each image, and freezes an image when it is done, so that a batch
equals single runs. The iterations run in float64 whatever the input (where the device has it): in float32 they stall near a
relative residual of 1e-5. Gradients do not walk through iterations: each map here is linear, and so is its transpose,
which is another solve.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .base import Delegate, LinearOperator, Spectral
from .dense import Dense

LinearMap = Callable[[Tensor], Tensor]
Context = torch.autograd.function.FunctionCtx

TOLERANCE = 1e-6  # what every result reaches, or an error says that it does not
MAX_ITERATIONS = 3000
DENSE_SIZE = 1024  # values of a picture up to which one SVD of the matrix is cheaper than iterations


class ConvergenceError(RuntimeError):
    """An iteration did not reach its tolerance."""


class IterativeOperator(Delegate):
    """An operator given by `_forward` and `_adjoint` alone.

    The work is `Krylov`'s, or for small pictures that of the operator's own matrix.
    """

    exact = False

    @property
    def form(self) -> LinearOperator:
        """What computes all but A and A_adjoint."""
        return self._dense or Krylov(self)

    @functools.cached_property
    def _dense(self) -> Dense | None:
        n, m = torch.Size(self.in_shape).numel(), torch.Size(self.out_shape).numel()
        if self.batch > 1 or max(n, m) > DENSE_SIZE:
            return None
        with torch.no_grad():
            columns = self._forward(torch.eye(n, dtype=torch.float64).unflatten(1, self.in_shape))
        dense = Dense(columns.flatten(1).T, self.in_shape, self.out_shape)
        dense.precision = self.precision
        return dense

    @functools.cached_property
    def _norm(self) -> float:
        return self._largest((self.batch, *self.in_shape))

    def _largest(self, shape: tuple[int, ...]) -> float:
        """The largest singular value, from a start of this shape."""
        with torch.inference_mode(False), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            start = torch.randn(shape, generator=generator, dtype=torch.float64)
            largest = 0.0
            for alpha, beta in _tridiagonals(lambda u: self._adjoint(self._forward(u)), start):
                before, largest = largest, float(torch.linalg.eigvalsh(_tridiagonal(alpha, beta)).max())
                if largest - before <= TOLERANCE * largest:
                    return largest**0.5
        raise ConvergenceError(f"norm of {self!r}: still moves after {CHECKPOINTS[-1]} iterations")


class Krylov(LinearOperator):
    """The calculus of an operator by iterations.

    A_dagger reaches ||A x - y|| <= 1e-6 ||y||, or leaves only residual that A can hardly explain, ||A^T r|| <= 1e-6 ||A|| ||r||
    (singular values below 1e-6 of the largest are null, as in the closed forms). prox_l2 reaches a relative residual of 1e-6
    in its normal equations. gram and spectral stop when a quarter more iterations change the result by less than 1e-6.

    Raises:
        ConvergenceError: when a result cannot be had to that tolerance.
    """

    exact = False

    def __init__(self, operator: IterativeOperator) -> None:
        self.in_shape, self.out_shape, self.batch = operator.in_shape, operator.out_shape, operator.batch
        self.precision = operator.precision
        self.operator = operator

    def _forward(self, x: Tensor) -> Tensor:
        return self.operator._forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator._adjoint(y)

    def _aim(self, v: Tensor) -> float:
        """What is tried for; TOLERANCE is what must be reached."""
        return 1e-12 if v.dtype == self.precision == torch.float64 else TOLERANCE / 2

    def _pinv(self, y: Tensor) -> Tensor:
        solve = functools.partial(_least_squares, self._forward, self._adjoint, aim=self._aim(y))
        solve_transposed = functools.partial(_least_squares, self._adjoint, self._forward, aim=self._aim(y))
        return _linear(y, solve, solve_transposed)

    def _project(self, x: Tensor) -> Tensor:
        return self._pinv(self._forward(x))

    def _project_range(self, y: Tensor) -> Tensor:
        return self._forward(self._pinv(y))

    def _prox(self, z: Tensor, y: Tensor, gamma: float) -> Tensor:
        def solve(v: Tensor) -> Tensor:
            return _conjugate_gradients(lambda u: u + gamma * self._forward(self._adjoint(u)), v, self._aim(z))

        return z + gamma * self._adjoint(_linear(y - self._forward(z), solve, solve))

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        def apply(v: Tensor) -> Tensor:
            return _lanczos_function(lambda u: self._forward(self._adjoint(u)), v, h, self._aim(y))

        return _linear(y, apply, apply)

    def _spectral(self, x: Tensor, f: Spectral) -> Tensor:
        def apply(v: Tensor) -> Tensor:
            return _lanczos_function(lambda u: self._adjoint(self._forward(u)), v, f, self._aim(x))

        return _linear(x, apply, apply)

    def norm(self) -> float:
        """Largest singular value of A, to about 1e-6."""
        return self.operator._norm


class _Linear(torch.autograd.Function):
    """A linear map whose gradient is its transpose, by another call of its own."""

    @staticmethod
    def forward(v: Tensor, apply: LinearMap, transpose: LinearMap) -> Tensor:
        if not bool(torch.isfinite(v).all()):
            raise ValueError("input: got NaN or infinite values, which no iteration can solve for")
        return apply(v)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, LinearMap, LinearMap], output: Tensor) -> None:
        ctx.maps = inputs[1:]

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:
        apply, transpose = ctx.maps
        return _Linear.apply(gradient, transpose, apply), None, None

    @staticmethod
    def jvp(ctx: Context, tangent: Tensor, *_: None) -> Tensor:
        return _Linear.apply(tangent, *ctx.maps)

    @staticmethod
    def vmap(info: object, in_dims: tuple, v: Tensor, apply: LinearMap, transpose: LinearMap) -> tuple[Tensor, int]:
        v = v.movedim(in_dims[0], 0)
        return _Linear.apply(v.flatten(0, 1), apply, transpose).unflatten(0, v.shape[:2]), 0


def _linear(v: Tensor, apply: LinearMap, transpose: LinearMap) -> Tensor:
    """apply(v) in float64, or float32 on a device that has no other; differentiable, in v's dtype."""
    wide = v.double() if v.device.type != "mps" else v
    return _Linear.apply(wide, apply, transpose).to(v.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each image, (B, 1, 1, 1)."""
    return (a * b).sum((1, 2, 3), keepdim=True)


def _norm_of(v: Tensor) -> Tensor:
    return _dot(v, v).sqrt()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0; NaN stays NaN, so that it never passes for a result."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _least_squares(forward: LinearMap, adjoint: LinearMap, y: Tensor, aim: float) -> Tensor:
    """The x of least norm among those of least ||A x - y||, by conjugate gradients on A^T A x = A^T y (CGLS)."""
    r, s = y, adjoint(y)
    x, p, s2, size = torch.zeros_like(s), s, _dot(s, s), torch.zeros_like(_dot(s, s))

    def done(r: Tensor, s: Tensor, tolerance: float) -> Tensor:
        """The two tests of Paige and Saunders (LSQR, 1982); `size` is the best estimate yet of ||A||."""
        return (_norm_of(r) <= tolerance * _norm_of(y)) | (_norm_of(s) <= tolerance * size * _norm_of(r))

    for _ in range(MAX_ITERATIONS):
        finished = done(r, s, aim)
        if bool(finished.all()):
            break
        q = forward(p)
        q2 = _dot(q, q)
        size = torch.maximum(size, _ratio(q2, _dot(p, p)).sqrt())
        step = torch.where(finished, 0.0, _ratio(s2, q2))
        x, r = x + step * p, r - step * q
        s = adjoint(r)
        before, s2 = s2, _dot(s, s)
        p = s + _ratio(s2, before) * p
    r = y - forward(x)
    if not bool(done(r, adjoint(r), TOLERANCE).all()):
        missed = float(_ratio(_norm_of(r), _norm_of(y)).max())
        raise ConvergenceError(
            f"A_dagger: relative residual {missed:.1e} after {MAX_ITERATIONS} iterations, wanted {TOLERANCE:g}; "
            "the operator is too ill-conditioned for a pseudo-inverse, use prox_l2 with the noise level"
        )
    return x


def _conjugate_gradients(apply: LinearMap, b: Tensor, aim: float) -> Tensor:
    """apply^-1 b for a positive definite map, to a relative residual."""
    x, r = torch.zeros_like(b), b
    p, r2, goal = r, _dot(r, r), aim * _norm_of(b)
    for _ in range(MAX_ITERATIONS):
        finished = r2.sqrt() <= goal
        if bool(finished.all()):
            break
        q = apply(p)
        step = torch.where(finished, 0.0, _ratio(r2, _dot(p, q)))
        x, r = x + step * p, r - step * q
        before, r2 = r2, _dot(r, r)
        p = r + _ratio(r2, before) * p
    missed = float(_ratio(_norm_of(b - apply(x)), _norm_of(b)).max())
    if not missed <= TOLERANCE:
        raise ConvergenceError(
            f"prox_l2: relative residual {missed:.1e} after {MAX_ITERATIONS} iterations, wanted {TOLERANCE:g}"
        )
    return x


# Steps after which Lanczos looks at what it has: a quarter more each time, so that the looking costs little.
CHECKPOINTS = tuple(int(8 * 1.25**k) for k in range(26))


def _lanczos(apply: LinearMap, start: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Orthonormal q_j and the coefficients alpha_j, beta_j of apply(q_j) = beta_{j-1} q_{j-1} + alpha_j q_j + beta_j q_{j+1}."""
    q, previous, beta = _ratio(start, _norm_of(start)), torch.zeros_like(start), torch.zeros_like(_norm_of(start))
    size = beta
    while True:
        w = apply(q) - beta * previous
        alpha = _dot(w, q)
        w = w - alpha * q
        beta, size = _norm_of(w), torch.maximum(size, alpha.abs())
        # An invariant subspace is complete: what is left is rounding, and the sequence ends with zeros.
        beta = torch.where(beta > 1e-13 * size, beta, 0.0)
        yield q, alpha, beta
        previous, q = q, _ratio(w, beta)


def _tridiagonals(apply: LinearMap, start: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The coefficients of Lanczos so far, (B, m) each, at every checkpoint."""
    alphas, betas = [], []
    for _, alpha, beta in itertools.islice(_lanczos(apply, start), CHECKPOINTS[-1]):
        alphas.append(alpha.flatten())
        betas.append(beta.flatten())
        if len(alphas) in CHECKPOINTS:
            yield torch.stack(alphas, 1), torch.stack(betas, 1)


def _tridiagonal(alpha: Tensor, beta: Tensor) -> Tensor:
    """(B, m) coefficients -> (B, m, m) symmetric matrices."""
    return torch.diag_embed(alpha) + torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)


def _lanczos_function(apply: LinearMap, v: Tensor, f: Spectral, aim: float) -> Tensor:
    """f(M) v for a positive semidefinite map M = apply: ||v|| Q f(T) e_1.

    Two passes, one for T and one for the sum over q_j, so that no basis is kept.
    """
    weights = v.new_zeros(len(v), 1)
    change = v.new_full((len(v),), float("inf"))
    finished = torch.zeros_like(change, dtype=torch.bool)
    for alpha, beta in _tridiagonals(apply, v):
        values, vectors = torch.linalg.eigh(_tridiagonal(alpha, beta))
        # A null eigenvalue comes out as rounding, whose square root, say, would no longer be small.
        values = torch.where(values > 1e-14 * values.amax(1, keepdim=True), values, 0.0)
        latest = (vectors * (f(values) * vectors[:, 0])[:, None]).sum(-1)
        weights = torch.nn.functional.pad(weights, (0, latest.shape[1] - weights.shape[1]))
        before, change = change, torch.linalg.vector_norm(latest - weights, dim=1)
        size = torch.linalg.vector_norm(latest, dim=1)
        # Where float64 cannot reach the aim the change grows again, and what was there before is better.
        finished = finished | ((change >= before) & (before <= TOLERANCE * size))
        weights = torch.where(finished[:, None], weights, latest)
        finished = finished | (change <= aim * size)
        if bool(finished.all()):
            break
    else:
        raise ConvergenceError(
            f"gram or spectral: still changes by {float((change / size).max()):.1e} after {CHECKPOINTS[-1]} iterations, "
            f"wanted {TOLERANCE:g}; the function is not smooth enough for this operator"
        )
    total = torch.zeros_like(v)
    for (q, _, _), weight in zip(_lanczos(apply, v), weights.T, strict=False):
        total = total + weight.reshape(-1, 1, 1, 1) * q
    return _norm_of(v) * total
