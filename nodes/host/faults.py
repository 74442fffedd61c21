"""A run that ends on its way: cancelled, also in a backward pass or a solve, short of memory, or with NaN from a network."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...operators import LinearOperator, Measurement
from .internals import without
from .readout import throw_if_interrupted


class NotFinite(RuntimeError):
    """NaN or infinite values where no picture comes of them."""


def check_finite(tensor: Tensor, message: str) -> None:
    """Raise NotFinite with this message."""
    if not bool(torch.isfinite(tensor).all()):
        raise NotFinite(message)


class MainMemoryFull(MemoryError):
    """A lack of main memory, in words."""


def of_main_memory(error: Exception) -> bool:
    """Whether an error says that main memory is full, and not a device's."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Inside, a lack of main memory is an error in words. Of a lack on a device ComfyUI says itself what helps, and unloads models.

    Raises:
        MainMemoryFull: PyTorch or Python could not allocate.
    """
    try:
        yield
    except MainMemoryFull:
        raise
    except (RuntimeError, MemoryError) as error:
        if not of_main_memory(error):
            raise
        raise MainMemoryFull(f"main memory is full ({error}); smaller or fewer pictures need less") from error


def stoppable_backward() -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, a backward pass notices a cancelled run at each layer, as ComfyUI's layers do on the way forward."""

    def save(tensor: Tensor) -> tuple[Tensor, int]:
        alias = tensor.detach()  # the tensor itself would be held by its own history
        return alias, alias._version

    def read(saved: tuple[Tensor, int]) -> Tensor:
        throw_if_interrupted()
        tensor, version = saved
        if tensor._version != version:  # what PyTorch says when there are no hooks
            raise RuntimeError("a tensor needed for the gradient has been modified by an inplace operation")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(save, read)


def stoppable(measurement: Measurement, dtype: torch.dtype | None = None) -> Measurement:
    """A copy on the CPU that notices a cancelled run, also within the iterations of a solve."""
    own = measurement.to("cpu", dtype or measurement.y.dtype, copy=True)
    stop_when_interrupted(own.operator)
    return own


def stop_when_interrupted(operator: LinearOperator) -> None:
    """Let an operator, the run's own copy, and those in it notice a cancelled run, also within the iterations of a solve."""
    # No way back to the operator itself: its tables on a device then go with the run, and not with a garbage collection.
    itself, forward = weakref.ref(operator), type(operator)._forward

    def watched(x: Tensor) -> Tensor:
        throw_if_interrupted()
        return forward(itself(), x)

    for value in list(vars(operator).values()):
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, LinearOperator):
                stop_when_interrupted(part)
    operator._forward = watched


class Course:
    """How far a run has come: what is left of it when it ends in NaN."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas.tolist()
        self.steps = len(self.sigmas) - 1
        self.begin()

    def begin(self) -> None:
        """Forget an attempt that ran out of memory."""
        self.done = 0
        self.denoised: Tensor | None = None
        self.last: dict[str, Any] | None = None  # the callback's last step, once there

    def passed(self, step: dict[str, Any]) -> None:
        """Take in one step of a sampler's callback."""
        self.done, self.denoised = step["i"] + 1, step["denoised"]

    def ended(self, error: NotFinite, codec: Any) -> NotFinite:
        """The error with the step it happened in and its sigma; the last good estimate of the picture is saved."""
        step = min(self.done, self.steps - 1)
        where = f"step {step + 1} of {self.steps}, sigma {self.sigmas[step]:.3g}: {error}"
        if self.denoised is None:
            return NotFinite(f"{where}. No step was finished, so that there is nothing to save")
        return NotFinite(f"{where}. {self._save(codec)}")

    def _save(self, codec: Any) -> str:
        try:
            with torch.no_grad():
                image = self.denoised if codec is None else codec.decode(self.denoised)
        except (RuntimeError, MemoryError) as second:  # NaN here too, no memory
            return f"The last good estimate could not be saved ({second})"
        pictures = ((image.float().cpu() + 1) / 2).movedim(1, -1)
        return f"The last good estimate, of step {self.done}, {saved(pictures.split(1))}"


def saved(images: Sequence[Tensor]) -> str:
    """Save IMAGEs of a run that did not end into ComfyUI's output folder, one by one, and say so: "is saved ...", or that it is not.

    Whatever goes wrong with it: the run's own end is what counts.
    """
    names: list[str] = []
    fault = ""
    try:
        with without("saving what a run had done"):
            from comfy_api.latest import io, ui

            for image in images:
                files = ui.ImageSaveHelper.save_images(image.clamp(0, 1), "posterior_unfinished", io.FolderType.output, None)
                names += [entry["filename"] for entry in files]
    except Exception as error:  # no room on the disk, no memory
        fault = f" ({error})"
    kept = (
        f"is saved in ComfyUI's output folder as {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "") if names else ""
    )
    rest = f"could not be saved{fault}" if len(names) < sum(map(len, images)) else ""
    return ", the rest ".join(part for part in (kept, rest) if part)
