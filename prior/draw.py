"""Draw "avatar" portraits: the data that the demo prior is trained and measured on. Needs numpy and Pillow only.

A seed fixes a portrait through the order of its random draws. Adding, removing or moving one changes every picture, and with
them the data that the shipped weights know.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VALIDATION_SEED = 1_000_000  # portraits from this seed on are never trained on
SUPERSAMPLE = 3
GRID = 128.0  # shapes are placed in units of 1/128 of the side

Colour = tuple[int, int, int]
Fill = tuple[int, ...] | int
Random = np.random.Generator

SKINS = ((255, 224, 196), (241, 194, 150), (224, 172, 120), (198, 134, 86), (150, 98, 62), (104, 68, 44))
HAIRS = (
    (38, 28, 24),
    (84, 52, 30),
    (140, 84, 40),
    (206, 160, 84),
    (168, 60, 36),
    (150, 150, 156),
    (60, 70, 150),
    (190, 70, 130),
)
IRIS_HUES = (0.07, 0.3, 0.58, 0.6)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
EYE_WHITE, PUPIL, CLOSED_LID = (252, 252, 250), (15, 12, 12), (50, 30, 25)
DARK_BROW, LIP, OPEN_MOUTH, TEETH = (60, 42, 32), (150, 40, 45), (110, 20, 30), (250, 250, 250)
SKIN_SHADE, NOSE_SHADE, CHEEK, SHADOW = (60, 20, 10), (90, 30, 20), (230, 80, 90, 90), (20, 15, 30)

SHORT, LONG, BALD, BUN, CAP = range(5)
SIDES = (-1, 1)  # left and right in the picture


def draw(seed: int, size: int = 128) -> np.ndarray:
    """The portrait of a seed, (size, size, 3) uint8. Other versions of Pillow may draw edges slightly differently."""
    rng = np.random.default_rng(seed)
    side = size * SUPERSAMPLE
    hue = rng.random()
    picture = background(rng, hue, size).resize((side, side), Image.Resampling.BILINEAR)
    person = random_person(rng, hue)
    figure = Canvas(side)
    hair_behind(figure, person)
    clothes(figure, rng, person)
    head(figure, person)
    hair_in_front(figure, rng, person)
    face = eyes(figure, rng, person)
    brows(figure, rng, person, face)
    glasses(figure, rng, person, face)
    nose(figure, person, face)
    cheeks(figure, rng, person, face)
    mouth(figure, rng, person)
    cast_shadow(picture, figure, size)
    picture.paste(light(figure, rng), mask=figure.image.getchannel("A"))
    return np.array(picture.resize((size, size), Image.Resampling.BOX))


@dataclass(frozen=True)
class Person:
    """What the parts of a portrait have in common. (x, y) is the middle of the head, (rx, ry) its half axes, in grid units."""

    hue: float
    skin: Colour
    hair: Colour
    shirt: Colour
    x: float
    y: float
    rx: float
    ry: float
    style: int


@dataclass(frozen=True)
class Eyes:
    """Half the distance between the eyes, their height and their radius, in grid units."""

    dx: float
    y: float
    radius: float


class Canvas:
    """A transparent (or, for masks, black) picture that takes shapes in grid units, as corners or as centre and half axes."""

    def __init__(self, side: int, mode: str = "RGBA") -> None:
        self.unit = side / GRID
        self.show(Image.new(mode, (side, side)))

    def show(self, image: Image.Image) -> None:
        self.image = image
        self.pen = ImageDraw.Draw(image)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> list[float]:
        return [v * self.unit for v in (x0, y0, x1, y1)]

    def width(self, width: float) -> int:
        return int(width * self.unit)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Fill) -> None:
        self.pen.ellipse(self.box(x - rx, y - ry, x + rx, y + ry), fill=fill)

    def ring(self, x: float, y: float, radius: float, colour: Colour, width: float) -> None:
        box = self.box(x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse(box, outline=colour, width=self.width(width))

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Fill, radius: float = 0) -> None:
        self.pen.rounded_rectangle(self.box(x0, y0, x1, y1), radius=radius * self.unit, fill=fill)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, width: float) -> None:
        self.pen.line(self.box(x0, y0, x1, y1), fill=colour, width=self.width(width))

    def arc(self, corners: tuple[float, ...], degrees: tuple[float, float], colour: Colour, width: float) -> None:
        self.pen.arc(self.box(*corners), *degrees, fill=colour, width=self.width(width))

    def pie(self, corners: tuple[float, ...], degrees: tuple[float, float], fill: Colour) -> None:
        self.pen.pieslice(self.box(*corners), *degrees, fill=fill)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    red, green, blue = (int(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return red, green, blue


def background(rng: Random, hue: float, size: int) -> Image.Image:
    """A smooth gradient between two colours, linear or radial."""
    a = np.array(hsv(hue, rng.uniform(0.25, 0.65), rng.uniform(0.65, 0.98)), float)
    b = np.array(hsv(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.35, 0.8), rng.uniform(0.3, 0.65)), float)
    y, x = np.mgrid[0:size, 0:size] / (size - 1.0)
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * math.pi)
        t = ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)) / 1.2 + 0.5
    else:
        cx, cy = rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.6)
        t = np.hypot(x - cx, y - cy) / 0.95
    t = np.clip(t, 0, 1)[..., None]
    t = t * t * (3 - 2 * t)
    return Image.fromarray((a + (b - a) * t).astype(np.uint8))


def random_person(rng: Random, hue: float) -> Person:
    base = SKINS[rng.integers(len(SKINS))]
    red, green, blue = (int(np.clip(c + rng.uniform(-8, 8), 0, 255)) for c in base)
    return Person(
        hue=hue,
        skin=(red, green, blue),
        hair=HAIRS[rng.integers(len(HAIRS))],
        shirt=hsv(hue + rng.uniform(0.25, 0.75), rng.uniform(0.5, 0.85), rng.uniform(0.45, 0.9)),
        x=64 + rng.uniform(-6, 6),
        y=60 + rng.uniform(-4, 4),
        rx=rng.uniform(25, 31),
        ry=rng.uniform(31, 37),
        style=int(rng.integers(5)),
    )


def hair_behind(figure: Canvas, p: Person) -> None:
    if p.style == LONG:
        corners = (p.x - p.rx - 8, p.y - p.ry - 6, p.x + p.rx + 8, p.y + p.ry + 18)
        figure.rectangle(*corners, fill=mix(p.hair, BLACK, 0.25), radius=28)
    if p.style == BUN:
        figure.ellipse(p.x, p.y - p.ry - 9, 12, 11, p.hair)


def clothes(figure: Canvas, rng: Random, p: Person) -> None:
    """Shoulders, the neck on them, and for some a stripe across the shirt."""
    half = rng.uniform(42, 52)
    top = p.y + p.ry + 10
    figure.rectangle(p.x - half, top, p.x + half, 160, fill=p.shirt, radius=26)
    figure.rectangle(p.x - 10, p.y + p.ry - 8, p.x + 10, top + 8, fill=mix(p.skin, SKIN_SHADE, 0.22), radius=9)
    if rng.random() < 0.4:
        figure.rectangle(p.x - half + 6, top + 17, p.x + half - 6, top + 22, fill=mix(p.shirt, WHITE, 0.65))


def head(figure: Canvas, p: Person) -> None:
    for side in SIDES:
        figure.ellipse(p.x + side * p.rx, p.y + 4, 6, 8, mix(p.skin, SKIN_SHADE, 0.12))
    figure.ellipse(p.x, p.y, p.rx, p.ry, p.skin)


def hair_in_front(figure: Canvas, rng: Random, p: Person) -> None:
    if p.style in (SHORT, LONG, BUN):
        # A shape a little larger than the head, less the face and all that is below the eyes.
        mask = Canvas(figure.image.width, "L")
        mask.ellipse(p.x, p.y - 3, p.rx + 4, p.ry + 4, 255)
        parting = rng.uniform(-10, 10)
        mask.ellipse(p.x + parting, p.y + 14, p.rx * 1.02, p.ry * 1.02, 0)
        mask.rectangle(0, p.y + 6, GRID, GRID, fill=0)
        figure.image.paste((*p.hair, 255), mask=mask.image)
    elif p.style == CAP:
        colour = hsv(p.hue + rng.uniform(0.3, 0.7), 0.7, rng.uniform(0.5, 0.9))
        figure.pie((p.x - p.rx - 4, p.y - p.ry - 8, p.x + p.rx + 4, p.y + p.ry - 14), (180, 360), colour)
        side = 1 if rng.random() < 0.5 else -1
        back, front = p.x - side * (p.rx + 4), p.x + side * (p.rx + 18)
        figure.rectangle(min(back, front), p.y - 15, max(back, front), p.y - 9, fill=mix(colour, BLACK, 0.3), radius=3)


def eyes(figure: Canvas, rng: Random, p: Person) -> Eyes:
    e = Eyes(dx=p.rx * rng.uniform(0.40, 0.48), y=p.y + rng.uniform(0, 4), radius=rng.uniform(5.2, 6.6))
    iris = hsv(rng.choice(IRIS_HUES), rng.uniform(0.5, 0.9), rng.uniform(0.3, 0.7))
    gaze = rng.uniform(-1.6, 1.6)
    wink = rng.random() < 0.08
    for side in SIDES:
        x = p.x + side * e.dx
        if wink and side == 1:
            figure.arc((x - e.radius, e.y - e.radius * 0.6, x + e.radius, e.y + e.radius), (190, 350), CLOSED_LID, 2)
            continue
        figure.ellipse(x, e.y, e.radius, e.radius * 0.82, EYE_WHITE)
        figure.ellipse(x + gaze, e.y, e.radius * 0.58, e.radius * 0.58, iris)
        figure.ellipse(x + gaze, e.y, e.radius * 0.28, e.radius * 0.28, PUPIL)
        figure.ellipse(x + gaze + 1.2, e.y - 1.4, 0.9, 0.9, WHITE)
    return e


def brows(figure: Canvas, rng: Random, p: Person, e: Eyes) -> None:
    colour = DARK_BROW if p.style in (BALD, CAP) else p.hair
    tilt = rng.uniform(-2.5, 2.5)
    y = e.y - e.radius - rng.uniform(3, 5)
    for side in SIDES:
        inner, outer = p.x + side * (e.dx - e.radius), p.x + side * (e.dx + e.radius)
        figure.line(inner, y + tilt * 0.5, outer, y - tilt * 0.5, colour, 2.6)


def glasses(figure: Canvas, rng: Random, p: Person, e: Eyes) -> None:
    if rng.random() < 0.3:
        colour = hsv(rng.random(), 0.5, 0.25)
        radius = e.radius + 3.4
        for side in SIDES:
            figure.ring(p.x + side * e.dx, e.y, radius, colour, 2)
        figure.line(p.x - e.dx + radius, e.y, p.x + e.dx - radius, e.y, colour, 2)


def nose(figure: Canvas, p: Person, e: Eyes) -> None:
    figure.arc((p.x - 4, e.y + 3, p.x + 4, e.y + 13), (20, 160), mix(p.skin, NOSE_SHADE, 0.45), 2)


def cheeks(figure: Canvas, rng: Random, p: Person, e: Eyes) -> None:
    if rng.random() < 0.5:
        blush = Canvas(figure.image.width)
        for side in SIDES:
            blush.ellipse(p.x + side * (e.dx + 3), e.y + 12.5, 6, 4.5, CHEEK)
        figure.show(Image.alpha_composite(figure.image, blush.image))


def mouth(figure: Canvas, rng: Random, p: Person) -> None:
    """A smile, a flat mouth, a laugh with teeth, or an "o"."""
    y = p.y + p.ry * rng.uniform(0.50, 0.58)
    half = rng.uniform(8, 13)
    kind = rng.integers(4)
    if kind == 0:
        figure.arc((p.x - half, y - 7, p.x + half, y + 5), (15, 165), LIP, 2.6)
    elif kind == 1:
        figure.line(p.x - half * 0.8, y, p.x + half * 0.8, y, LIP, 2.6)
    elif kind == 2:
        figure.pie((p.x - half, y - 8, p.x + half, y + 8), (0, 180), OPEN_MOUTH)
        figure.rectangle(p.x - half * 0.75, y, p.x + half * 0.75, y + 2.4, fill=TEETH)
    else:
        figure.ellipse(p.x, y + 1, half * 0.42, half * 0.5, OPEN_MOUTH)


def cast_shadow(picture: Image.Image, figure: Canvas, size: int) -> None:
    """Darken the background under the figure's blurred outline, a little right and below."""
    outline = figure.image.getchannel("A").resize((size, size)).filter(ImageFilter.GaussianBlur(4))
    shade = outline.point(lambda v: int(v * 0.45)).resize(picture.size, Image.Resampling.BILINEAR)
    offset = int(3 * figure.unit)
    picture.paste(SHADOW, (offset, offset), shade)


def light(figure: Canvas, rng: Random) -> Image.Image:
    """The figure's colours, lit from the left or from the right."""
    ends = (1.06, 0.86) if rng.random() < 0.5 else (0.86, 1.06)
    lit = np.asarray(figure.image)[..., :3] * np.linspace(*ends, figure.image.width)[None, :, None]
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))
