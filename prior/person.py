"""Who is drawn: what the parts of a portrait have in common."""

import math
from dataclasses import dataclass

import numpy as np

from .canvas import Colour, Points, mix

Random = np.random.Generator

SKINS = ((250, 220, 194), (240, 198, 158), (226, 174, 124), (198, 138, 92), (152, 102, 68), (106, 72, 50))
HAIRS = (
    (40, 30, 26),
    (84, 54, 34),
    (140, 88, 46),
    (212, 168, 92),
    (172, 68, 42),
    (158, 156, 160),
    (64, 76, 156),
    (190, 78, 136),
)
BALD, SHORT, FRINGE, LONG, CURLY, BUN, CAP, BEANIE = range(8)
HATS = (CAP, BEANIE)


@dataclass(frozen=True)
class Person:
    """What the parts of a portrait have in common.

    The head is drawn around (0, 0) with half axes (rx, ry), then tilted by `roll`, scaled by `scale` and moved to (x, y), all in
    grid units. `turn` from -1 to 1 moves the face sideways; `light` is the direction that the light comes from.
    """

    hue: float
    skin: Colour
    hair: Colour
    style: int
    x: float
    y: float
    scale: float
    roll: float
    turn: float
    rx: float
    ry: float
    jaw: float
    light: tuple[float, float]
    contrast: float

    def outline(self, grow: float = 0.0) -> Points:
        """The head's outline, an ellipse with a jaw, `grow` units larger."""
        angle = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        x, y = np.cos(angle), np.sin(angle)
        return np.stack([(self.rx + grow) * x * (1 - self.jaw * np.maximum(y, 0) ** 2), (self.ry + grow) * y], 1)

    @property
    def face_x(self) -> float:
        """The middle of the face, in the head's own units."""
        return 0.24 * self.rx * self.turn


def between(rng: Random, palette: tuple[Colour, ...]) -> Colour:
    """A colour on the way from one of the palette to the next."""
    place = rng.uniform(0, len(palette) - 1)
    return mix(palette[int(place)], palette[int(place) + 1], place % 1)


def random_person(rng: Random) -> Person:
    angle = rng.uniform(-math.pi, 0)  # from the left, over the top, to the right
    return Person(
        hue=rng.random(),
        skin=between(rng, SKINS),
        hair=mix(HAIRS[rng.integers(len(HAIRS))], (128, 110, 96), rng.uniform(0, 0.22)),
        style=int(rng.integers(8)),
        x=64 + rng.uniform(-7, 7),
        y=58 + rng.uniform(-4, 5),
        scale=rng.uniform(0.84, 1.18),
        roll=rng.uniform(-0.17, 0.17),
        turn=rng.uniform(-1, 1),
        rx=rng.uniform(25, 29),
        ry=rng.uniform(31, 35),
        jaw=rng.uniform(-0.02, 0.26),
        light=(math.cos(angle), math.sin(angle)),
        contrast=rng.uniform(0.1, 0.34),
    )
