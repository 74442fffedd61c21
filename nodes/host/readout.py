"""What a node says while it runs and afterwards, and whether the user wants it to stop."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..plot import residual_plot
from .internals import without

POINTS = 10  # of the curve that are shown


def throw_if_interrupted() -> None:
    """Raise the host's own exception when the user has cancelled."""
    import comfy.model_management as mm

    mm.throw_exception_if_processing_interrupted()


def show_text(node: Any, text: str) -> None:
    """Show a line or more on the node that is running; nothing happens where there is no server (in-process use)."""
    send_text(node_id(node), text)


def node_id(node: Any) -> str | None:
    """The id of the node that is running, when its schema asks for the hidden `unique_id`."""
    return getattr(getattr(node, "hidden", None), "unique_id", None)


def send_text(unique_id: str | None, text: str) -> bool:
    """Show a text on any node. False where this ComfyUI cannot."""
    with without("texts on nodes"):
        from server import PromptServer

        instance = getattr(PromptServer, "instance", None)
        if instance is not None and unique_id is not None:
            instance.send_progress_text(text, unique_id)
        return True
    return False


@without("pictures on nodes while they run")
def send_picture(unique_id: str | None, image: Tensor) -> None:
    """Show an IMAGE (1, H, W, 3) on a node that has run before, as ComfyUI shows what samplers preview.

    Only the page that asked gets it. On a node that is still running it would hide the pictures that the node itself will show.
    """
    from comfy_api import feature_flags
    from comfy_execution.progress import get_progress_state
    from PIL import Image
    from protocol import BinaryEventTypes
    from server import PromptServer

    instance = getattr(PromptServer, "instance", None)
    client = getattr(instance, "client_id", None)
    if unique_id is None or client is None:
        return
    run = get_progress_state()
    node = {
        "node_id": unique_id,
        "prompt_id": run.prompt_id,
        "display_node_id": run.dynprompt.get_display_node_id(unique_id),
        "parent_node_id": run.dynprompt.get_parent_node_id(unique_id),
        "real_node_id": run.dynprompt.get_real_node_id(unique_id),
    }
    knows = feature_flags.supports_feature(instance.sockets_metadata, client, "supports_preview_metadata")
    if knows and instance.last_node_id != node["display_node_id"]:
        picture = Image.fromarray((image[0] * 255).round().byte().cpu().numpy())
        instance.send_sync(BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, (("PNG", picture, None), node), client)


@dataclass
class Readout:
    """The progress of one run, shown on the sampler's node: the step, and how far A D(z0) is from the photo.

    Attributes:
        unique_id: of the node; None shows nothing.
        scale: residual norms (B,), [-1, 1] units, times this is the root mean square over measured values on the 0 to 1 scale.
        noise: of the photo, on the 0 to 1 scale.
        notes: lines that stay, for example about memory.
        title: stands before each step.
        curve: (step from 1, sigma, worst residual of the batch), so far.
    """

    unique_id: str | None
    scale: Tensor
    noise: float
    notes: list[str] = field(default_factory=list)
    title: str = ""
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Add a line that stays, once."""
        if line not in self.notes:
            self.notes.append(line)

    def begin(self) -> None:
        """Show what is known before the first step."""
        if self.notes:
            self._send("")

    def restart(self, line: str) -> None:
        """Begin again, and say why."""
        self.note(line)
        self.curve.clear()
        self._send("")

    def step(self, i: int, steps: int, sigma: float, residual: Tensor | None) -> None:
        """Take in one step of a sampler's callback.

        Args:
            sigma: the noise level of the step.
            residual: ||A D(z0) - y||, (B,), in [-1, 1] units, or None from a sampler that does not know.
        """
        line = f"{self.title}step {i + 1} of {steps}, sigma {sigma:.3g}"
        if residual is not None:
            worst = float((residual.detach().cpu() * self.scale).max())
            self.curve.append((i + 1, sigma, worst))
            line += f", |A x - y| {worst:.4f}{self._target()}"
        self._send(line)

    def summary(self) -> str:
        """The run in a few lines: the curve at about ten steps, and its lowest point."""
        if not self.curve:
            return ""
        last = len(self.curve) - 1
        shown = sorted({round(k * last / (POINTS - 1)) for k in range(POINTS)})
        points = "  ".join(f"{self.curve[k][0]}: {self.curve[k][2]:.4f}" for k in shown)
        step, _, value = min(self.curve, key=lambda point: point[2])
        return f"|A x - y| by step{self._target()}\n{points}\nlowest {value:.4f} at step {step}"

    def finish(self) -> None:
        """Leave the summary on the node, and the curve as a picture."""
        self._send(self.summary())
        plot = residual_plot([[value for _, _, value in self.curve]], self.noise)
        if plot is not None:
            send_picture(self.unique_id, plot)

    def _target(self) -> str:
        return f" (noise {self.noise:.3g})" if self.noise else ""

    def _send(self, line: str) -> None:
        if self.unique_id is not None and not send_text(
            self.unique_id, "\n".join(text for text in (line, *self.notes) if text)
        ):
            self.unique_id = None  # once is enough
