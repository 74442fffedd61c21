"""Colours, curves, and a picture that takes them in units of its own. Needs numpy and Pillow only."""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

GRID = 128.0  # shapes are placed in units of 1/128 of the side

Colour = tuple[int, int, int]
Points = np.ndarray  # (N, 2): x to the right and y down


class Canvas:
    """A picture, at first transparent, that takes shapes in grid units or, after `place`, in those of a figure."""

    def __init__(self, side: int, mode: str = "RGBA", colour: Colour | int = 0) -> None:
        self.unit = side / GRID
        self.matrix, self.offset = np.eye(2) * self.unit, np.zeros(2)
        self.image = Image.new(mode, (side, side), colour)
        self.pen = ImageDraw.Draw(self.image)

    def place(self, x: float, y: float, scale: float, roll: float = 0.0) -> None:
        """Draw from here on around (x, y), `scale` times as large, tilted by `roll` radians."""
        c, s = math.cos(roll), math.sin(roll)
        self.matrix = np.array([[c, s], [-s, c]]) * (self.unit * scale)
        self.offset = np.array([x, y]) * self.unit

    def mask(self) -> "Canvas":
        """An empty mask that places shapes as this canvas does."""
        other = Canvas(self.image.width, "L")
        other.matrix, other.offset = self.matrix, self.offset
        return other

    def layer(self, colour: Colour) -> "Canvas":
        """A picture of one colour that places shapes as this canvas does."""
        other = Canvas(self.image.width, "RGB", colour)
        other.matrix, other.offset = self.matrix, self.offset
        return other

    def pixels(self, points: Points) -> list[tuple[float, float]]:
        return [(x, y) for x, y in (np.asarray(points, float) @ self.matrix + self.offset).tolist()]

    def polygon(self, points: Points, fill: Colour | int) -> None:
        self.pen.polygon(self.pixels(points), fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour | int) -> None:
        self.polygon(ellipse(x, y, rx, ry), fill)

    def line(self, points: Points, fill: Colour | int, width: float) -> None:
        pixels = max(1, round(width * float(np.linalg.norm(self.matrix[0]))))
        self.pen.line(self.pixels(points), fill=fill, width=pixels, joint="curve" if pixels > 3 else None)

    def paint(self, mask: "Canvas", fill: "Colour | Canvas", strength: float = 1.0) -> None:
        """Lay a colour, or another canvas, over this one where the mask is set."""
        alpha = mask.image if strength == 1 else mask.image.point(lambda v: int(v * strength))
        self.image.paste((*fill, 255) if isinstance(fill, tuple) else fill.image, mask=alpha)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    red, green, blue = (int(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return red, green, blue


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    angle = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def curve(start: tuple[float, float], bend: tuple[float, float], end: tuple[float, float], points: int = 14) -> Points:
    """A quadratic Bezier curve."""
    t = np.linspace(0, 1, points)[:, None]
    return (1 - t) ** 2 * np.array(start) + 2 * t * (1 - t) * np.array(bend) + t**2 * np.array(end)
