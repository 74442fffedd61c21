"""Draw portraits: the data that the demo prior is trained and measured on. Needs numpy and Pillow only.

A seed fixes a portrait through the order of its random draws. Adding, removing or moving one changes every picture, and with
them the data that the weights know. Position, size, tilt and turn of the head, the light, hair, beards, clothes and hats vary;
strands, knits and weaves carry detail finer than a pixel of a four times smaller picture.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .canvas import GRID, Canvas, Colour, Points, curve, ellipse, hsv, mix
from .person import BALD, BUN, CAP, CURLY, FRINGE, HATS, LONG, SHORT, Person, Random, random_person

VALIDATION_SEED = 1_000_000  # portraits from this seed on are never trained on
SUPERSAMPLE = 3

IRISES = ((96, 58, 28), (70, 120, 60), (62, 104, 160), (110, 120, 130))
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
EYE_WHITE, PUPIL, LASH = (250, 250, 248), (16, 12, 12), (44, 28, 24)
LIP, OPEN_MOUTH, TEETH = (172, 58, 62), (104, 22, 32), (250, 248, 244)
SKIN_SHADE, BLUSH, FRAME, SHADOW = (84, 30, 24), (226, 92, 92), (38, 34, 44), (20, 15, 30)
SIDES = (-1, 1)  # left and right in the picture
DOWN = np.array([0.0, 1.0])


def draw(seed: int, size: int = 128) -> np.ndarray:
    """The portrait of a seed, (size, size, 3) uint8. Other versions of Pillow may draw edges slightly differently."""
    rng = np.random.default_rng(seed)
    person = random_person(rng)
    picture = background(rng, person, size)
    figure = Canvas(size * SUPERSAMPLE)
    hair_behind(figure, rng, person)
    clothes(figure, rng, person)
    figure.place(person.x, person.y, person.scale, person.roll)
    head(figure, rng, person)
    face = eyes(figure, rng, person)
    nose(figure, rng, person, face)
    mouth(figure, rng, person)
    hair_in_front(figure, rng, person)
    brows(figure, rng, person, face)
    glasses(figure, rng, person, face)
    portrait = figure.image.resize((size, size), Image.Resampling.BOX)
    cast_shadow(picture, portrait, person)
    picture.paste(lit(portrait, person), mask=portrait.getchannel("A"))
    return np.array(picture)


@dataclass(frozen=True)
class Eyes:
    """The eyes' middles, left and right, and their half axes, in the head's own units."""

    left: tuple[float, float]
    right: tuple[float, float]
    width: float
    height: float


def background(rng: Random, p: Person, size: int) -> Image.Image:
    """A smooth gradient of two colours; on some a wall of soft stripes, or lights out of focus."""
    a = np.array(hsv(p.hue, rng.uniform(0.2, 0.6), rng.uniform(0.6, 0.95)), float)
    b = np.array(hsv(p.hue + rng.uniform(-0.12, 0.12), rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.6)), float)
    y, x = np.mgrid[0:size, 0:size] / (size - 1.0)
    t = 0.5 - ((x - 0.5) * p.light[0] + (y - 0.5) * p.light[1]) / 1.3
    kind = rng.integers(7)
    if kind == 5:
        t += 0.08 * np.tanh(2 * np.sin(2 * math.pi * (x * rng.integers(5, 9) + rng.random())))
    if kind == 6:
        for _ in range(5):
            cx, cy, r = rng.uniform(0, 1), rng.uniform(0, 0.8), rng.uniform(0.06, 0.13)
            t -= 0.16 / (1 + np.exp(np.clip((np.hypot(x - cx, y - cy) - r) * 90, -40, 40)))
    t = np.clip(t, 0, 1)[..., None]
    return Image.fromarray((a + (b - a) * t * t * (3 - 2 * t)).astype(np.uint8))


def strands(figure: Canvas, mask: Canvas, lines: list[Points], colour: Colour, width: float) -> None:
    """Fill the mask with hair: its colour, with the lines in turn lighter and darker."""
    layer = figure.layer(colour)
    tones = (mix(colour, WHITE, 0.05), mix(colour, BLACK, 0.1))
    for i, points in enumerate(lines):
        layer.line(points, tones[i % 2], width)
    figure.paint(mask, layer)


def wave(x: float, top: float, bottom: float, swing: float, phase: float) -> Points:
    """A lock of hair that hangs down from (x, top)."""
    y = np.linspace(top, bottom, 16)
    return np.stack([x + swing * np.sin(phase + (y - top) / 7), y], 1)


def curls(figure: Canvas, rng: Random, outline: Points, hole: Points | None, colour: Colour) -> None:
    """Curly hair: a scalloped outline, filled with small rings."""
    mask = figure.mask()
    mask.polygon(outline, 255)
    for x, y in outline[::2]:
        mask.ellipse(x, y, 4, 4, 255)
    if hole is not None:
        mask.polygon(hole, 0)
    (left, top), (right, bottom) = outline.min(0), outline.max(0)
    rings, shift = [], rng.uniform(0, 5, 2)
    for row, y in enumerate(np.arange(top - 6, bottom + 6, 4.6)):
        for x in np.arange(left - 8, right + 8, 5.2):
            rings.append(ellipse(x + shift[0] + 2.6 * (row % 2), y + shift[1], 2.1, 1.9)[:26:2])
    strands(figure, mask, rings, colour, 0.9)


def hair_behind(figure: Canvas, rng: Random, p: Person) -> None:
    """The hair that the head covers."""
    figure.place(p.x, p.y, p.scale, p.roll)
    if p.style == LONG:
        half, bottom = p.rx + rng.uniform(5, 9), p.ry + rng.uniform(2, 22)
        mask = figure.mask()
        mask.ellipse(0, -6, half, p.ry + 4, 255)
        mask.polygon(
            np.array(
                [
                    (-half, -6),
                    (half, -6),
                    (half + 2, bottom - 4),
                    (half - 6, bottom),
                    (6 - half, bottom),
                    (-half - 2, bottom - 4),
                ]
            ),
            255,
        )
        swing, phase = rng.uniform(0, 2.2), rng.uniform(0, 6)
        lines = [wave(x, -p.ry - 12, bottom + 4, swing, phase) for x in np.arange(-half - 3, half + 4, 1.9)]
        strands(figure, mask, lines, mix(p.hair, BLACK, 0.22), 0.8)
    if p.style == CURLY:
        grow = rng.uniform(6, 13)
        curls(figure, rng, p.outline(grow) * (1, 0.86) - 7 * DOWN, None, mix(p.hair, BLACK, 0.12))
    if p.style == BUN:
        x, y, radius = rng.uniform(-8, 8), -p.ry - 8, rng.uniform(9, 12)
        mask = figure.mask()
        mask.ellipse(x, y, radius, radius * 0.92, 255)
        lines = [curve((x - radius, y + d), (x, y + 2.4 * d - 3), (x + radius, y + d)) for d in np.arange(-radius, radius, 1.7)]
        strands(figure, mask, lines, mix(p.hair, BLACK, 0.1), 0.8)


def clothes(figure: Canvas, rng: Random, p: Person) -> None:
    """Shoulders in a patterned cloth, and the neck on them."""
    figure.place(p.x + 2 * p.turn, p.y, p.scale)
    half, top, drop = rng.uniform(40, 50), p.ry + rng.uniform(8, 12), rng.uniform(5, 11)
    bottom = (GRID - p.y) / p.scale + 4
    colour = hsv(p.hue + rng.uniform(0.25, 0.75), rng.uniform(0.35, 0.8), rng.uniform(0.4, 0.9))
    right = np.concatenate([curve((9, top - 2), (half - 8, top + 1), (half, top + drop + 6)), [(half + 4, bottom)]])
    mask = figure.mask()
    mask.polygon(np.concatenate([right, (right * (-1, 1))[::-1]]), 255)
    cloth = figure.layer(colour)
    weave(cloth, rng, colour, half, top, bottom)
    figure.paint(mask, cloth)
    neck = mix(p.skin, SKIN_SHADE, 0.26)
    figure.polygon(
        np.array([(-10, p.ry - 12), (10, p.ry - 12), (10.5, top), (0, top + rng.uniform(6, 13)), (-10.5, top)]), neck
    )
    trim = mix(colour, BLACK, 0.3) if rng.random() < 0.5 else mix(colour, WHITE, 0.5)
    if rng.random() < 0.6:
        figure.line(curve((-11, top - 2), (0, top + 18), (11, top - 2)), trim, 3)


def weave(cloth: Canvas, rng: Random, colour: Colour, half: float, top: float, bottom: float) -> None:
    """Plain, stripes, checks, dots or a knit."""
    kind = rng.integers(6)
    other = mix(colour, WHITE, rng.uniform(0.08, 0.18)) if rng.random() < 0.6 else mix(colour, BLACK, rng.uniform(0.08, 0.16))
    step, start = rng.uniform(5.5, 8.5), rng.random()
    across = np.arange(-10, 10) + start
    if kind in (1, 2):
        for y in top + step * np.arange(0, 8) + step * start:
            cloth.line(np.array([(-half - 6, y), (half + 6, y)]), other, step * 0.36)
    if kind == 2:
        for x in across * step:
            cloth.line(np.array([(x, top - 6), (x, bottom)]), mix(colour, other, 0.6), step * 0.36)
    if kind == 3:
        for row in range(8):
            for x in (across + 0.5 * (row % 2)) * step * 1.25:
                cloth.ellipse(x, top + (row + start) * step, step * 0.24, step * 0.24, other)
    if kind == 4:
        for i in range(-26, 26):
            x = (i + start) * 2.1
            y = np.arange(top - 6, bottom + 3, 1.5)
            cloth.line(np.stack([x + 0.7 * (np.arange(len(y)) % 2), y], 1), mix(colour, BLACK, 0.08), 0.8)


def head(figure: Canvas, rng: Random, p: Person) -> None:
    """Ears and the head, shaded as a ball in the light, with red cheeks or a beard on some."""
    for side in SIDES:
        x = side * (p.rx - 0.5) - 2.2 * p.turn
        figure.ellipse(x, 3, 5.2, 7.2, mix(p.skin, SKIN_SHADE, 0.14))
        figure.ellipse(x + side * 0.4, 3, 2.6, 4.2, mix(p.skin, SKIN_SHADE, 0.3))
    if p.style != CURLY and rng.random() < 0.3:
        gem = hsv(rng.random(), 0.5, 0.95)
        for side in SIDES:
            figure.ellipse(side * (p.rx + 0.5) - 2.2 * p.turn, 12, 1.9, 1.9, gem)
    mask = figure.mask()
    mask.polygon(p.outline(), 255)
    x, y = np.meshgrid(*[np.arange(0, figure.image.width, SUPERSAMPLE) + SUPERSAMPLE / 2] * 2)
    place = (np.stack([x, y], -1) - figure.offset) @ np.linalg.inv(figure.matrix) / (p.rx, p.ry)
    depth = np.sqrt(np.clip(1.15 - (place**2).sum(-1), 0, None))
    c, s = math.cos(p.roll), math.sin(p.roll)
    light = np.array([p.light[0] * c - p.light[1] * s, p.light[0] * s + p.light[1] * c])
    shade = 1 + p.contrast * (0.9 * place @ light + 0.7 * depth - 0.9)
    ball = Image.fromarray(np.clip(shade[..., None] * p.skin, 0, 255).astype(np.uint8))
    figure.image.paste(ball.resize(figure.image.size, Image.Resampling.BILINEAR), mask=mask.image)
    if rng.random() < 0.4:
        cheeks = figure.mask()
        for side in SIDES:
            cheeks.ellipse(p.face_x + side * 0.5 * p.rx, 11, 6, 4.5, 255)
        figure.paint(cheeks, mix(p.skin, BLUSH, 0.45), 0.6)
    if p.style in (BALD, SHORT, *HATS) and rng.random() < 0.45:
        beard(figure, rng, p)


def beard(figure: Canvas, rng: Random, p: Person) -> None:
    x, top = p.face_x, rng.uniform(2, 8)
    mask = figure.mask()
    mask.polygon(p.outline(1.2), 255)
    mask.polygon(np.array([(-60, -60), (60, -60), (60, top), (-60, top)]), 0)
    mask.ellipse(x, top - 2, p.rx * 0.84, 13, 0)
    mask.ellipse(x, p.ry * 0.47, 11, 4, 255)
    lines = [curve((x + 0.8 * a, 4), (x + a, 20), (x + 1.05 * a, p.ry + 4)) for a in np.arange(-p.rx - 4, p.rx + 5, 1.9)]
    strands(figure, mask, lines, mix(p.hair, BLACK, 0.12), 0.8)


def eyes(figure: Canvas, rng: Random, p: Person) -> Eyes:
    width, height = rng.uniform(5.2, 6.6), rng.uniform(3.7, 5.2)
    dx, y = p.rx * rng.uniform(0.41, 0.47), rng.uniform(-1, 3)
    near, far = 1 + 0.1 * p.turn, 1 - 0.1 * p.turn
    e = Eyes((p.face_x - dx * near, y), (p.face_x + dx * far, y), width, height)
    iris = mix(IRISES[rng.integers(len(IRISES))], BLACK, rng.uniform(0, 0.3))
    gaze = np.array([rng.uniform(-1.4, 1.4) + 0.5 * p.turn, rng.uniform(-0.7, 0.7)])
    closed = rng.random()
    for side, middle in ((-1, e.left), (1, e.right)):
        x, y = middle
        if closed < 0.03 or (closed < 0.08 and side == 1):
            figure.line(curve((x - width, y), (x, y + height * 0.9), (x + width, y)), LASH, 1.8)
            continue
        figure.ellipse(x, y, width, height, EYE_WHITE)
        for radius, colour in ((0.62, iris), (0.3, PUPIL)):
            disc = ellipse(*gaze, radius * 5.6, radius * 5.6)
            lid = height * np.sqrt(np.clip(1 - (disc[:, 0] / width) ** 2, 0, 1))  # the eye's edge above and below
            figure.polygon(np.stack([x + disc[:, 0], y + np.clip(disc[:, 1], -lid, lid)], 1), colour)
        figure.ellipse(x + gaze[0] + 1.3, y + gaze[1] - 1.4, 0.9, 0.9, WHITE)
        lid = ellipse(x, y, width + 0.3, height + 0.3)[20:]
        figure.line(np.concatenate([lid, ellipse(x, y, width + 0.3, height + 0.3)[:1]]), LASH, 1.5)
    return e


def nose(figure: Canvas, rng: Random, p: Person, e: Eyes) -> None:
    x, y, half = p.face_x + 2.6 * p.turn, e.left[1] + rng.uniform(9, 12), rng.uniform(2.8, 4.6)
    shade = mix(p.skin, SKIN_SHADE, 0.42)
    side = -1 if p.light[0] > 0 else 1  # the side in the shade
    figure.line(
        curve((x + side * 1.2, e.left[1] + 2), (x + side * 2.2, y - 3), (x + side * half, y)), mix(p.skin, SKIN_SHADE, 0.2), 1.4
    )
    figure.line(curve((x - half, y), (x, y + 3.4), (x + half, y)), shade, 1.9)


def mouth(figure: Canvas, rng: Random, p: Person) -> None:
    """Closed and anything from sad to smiling, or open in a laugh or an "o"."""
    x, y, half = p.face_x + 0.6 * p.turn, p.ry * rng.uniform(0.54, 0.62), rng.uniform(6.5, 11)
    lip = mix(LIP, p.skin, rng.uniform(0.0, 0.35))
    kind = rng.integers(5)
    if kind < 3:
        bend = rng.uniform(-4, 9)
        figure.line(curve((x - half, y - bend * 0.3), (x, y + bend * 0.7), (x + half, y - bend * 0.3)), lip, 2.4)
    elif kind == 3:
        low = rng.uniform(9, 15)
        upper, lower = (
            curve((x - half, y - 3), (x, y - 1), (x + half, y - 3)),
            curve((x + half, y - 3), (x, y + low), (x - half, y - 3)),
        )
        figure.polygon(np.concatenate([upper, lower]), OPEN_MOUTH)
        teeth = curve((x + half * 0.86, y - 1.6), (x, y + 2.8), (x - half * 0.86, y - 1.6))
        figure.polygon(
            np.concatenate([curve((x - half * 0.86, y - 2.6), (x, y - 1), (x + half * 0.86, y - 2.6)), teeth]), TEETH
        )
        figure.line(np.concatenate([upper, lower]), lip, 1.2)
    else:
        figure.ellipse(x, y, half * 0.46, half * 0.55, lip)
        figure.ellipse(x, y, half * 0.3, half * 0.38, OPEN_MOUTH)


def hair_in_front(figure: Canvas, rng: Random, p: Person) -> None:
    part = rng.uniform(-11, 11)
    grow = rng.uniform(2, 4.5)
    if p.style in (SHORT, LONG, BUN, FRINGE):
        mask = figure.mask()
        mask.polygon(p.outline(grow) - 2 * DOWN, 255)
        low = rng.uniform(-2, 8) if p.style != BUN else -6
        line = rng.uniform(11, 14) if p.style != FRINGE else rng.uniform(15, 18)
        mask.polygon(np.array([(-60, low), (60, low), (60, 60), (-60, 60)]), 0)
        if p.style == FRINGE:
            brow = -p.ry + line + 5
            face = curve((-p.rx * 0.86, brow + 3), (p.face_x, brow - 2), (p.rx * 0.86, brow + 3))
            mask.polygon(np.concatenate([face, [(p.rx * 0.8, 50), (-p.rx * 0.8, 50)]]), 0)
        else:
            mask.ellipse(part * 0.8 + p.face_x * 0.6, line, p.rx * 0.98, p.ry * 0.99, 0)
        ends = np.arange(-1.3, 1.31, 0.075) * p.rx
        lines = [curve((part, -p.ry - 5), (part + 0.9 * (x - part), -p.ry - 2), (x, 8 - abs(x) * 0.1)) for x in ends]
        strands(figure, mask, lines, p.hair, 0.8)
    elif p.style == CURLY:
        top = p.outline(4)
        top = np.concatenate([top[36:], top[:1]]) - 3 * DOWN
        hole = ellipse(part * 0.4 + p.face_x * 0.6, 10, p.rx * 0.96, p.ry * 0.95)
        curls(figure, rng, top, hole, p.hair)
    elif p.style in HATS:
        hat(figure, rng, p)


def hat(figure: Canvas, rng: Random, p: Person) -> None:
    colour = hsv(p.hue + rng.uniform(0.3, 0.7), rng.uniform(0.4, 0.75), rng.uniform(0.45, 0.9))
    y, half = -p.ry * rng.uniform(0.42, 0.52), p.rx + 2.5
    dome = np.concatenate(
        [curve((-half, y), (-half, -p.ry - 9), (0, -p.ry - 9), 20), curve((0, -p.ry - 9), (half, -p.ry - 9), (half, y), 20)]
    )
    mask = figure.mask()
    mask.polygon(np.concatenate([dome, curve((half, y), (p.face_x, y + 3), (-half, y))]), 255)
    if p.style == CAP:
        lines = [curve((0, -p.ry - 9), (1.3 * x, -p.ry - 4), (x, y + 3)) for x in (-0.55 * half, 0.55 * half)]
        figure.paint(mask, colour)
        for points in lines:
            figure.line(points, mix(colour, BLACK, 0.25), 1)
        figure.ellipse(p.face_x, y - 9, 5, 5, mix(colour, WHITE, 0.7))
        front = p.turn + (0.35 if p.turn > 0 else -0.35)  # the peak points where the face looks
        tip = front * 15
        peak = np.concatenate(
            [
                curve((-half + 2, y - 1), (tip, y - 5), (half - 2, y - 1)),
                curve((half - 2, y - 1), (tip * 1.6, y + 11), (-half + 2, y - 1)),
            ]
        )
        figure.polygon(peak, mix(colour, BLACK, 0.35))
        return
    shift = rng.uniform(0, 3)
    ribs = [
        curve((0.3 * x, -p.ry - 10), (1.15 * x, -p.ry - 2), (x, y + 4)) for x in np.arange(-half - 3, half + 3, 2.7) + shift
    ]
    strands(figure, mask, ribs, colour, 0.9)
    band = curve((-half - 1, y - 3), (p.face_x, y), (half + 1, y - 3))
    figure.line(band, mix(colour, WHITE, 0.35), 7)
    if rng.random() < 0.5:
        figure.ellipse(0, -p.ry - 10, 6, 6, mix(colour, WHITE, 0.6))


def brows(figure: Canvas, rng: Random, p: Person, e: Eyes) -> None:
    colour = mix(p.hair, BLACK, 0.3)
    tilt, lift = rng.uniform(-2.2, 2.2), rng.uniform(2.8, 5)
    for side, (x, y) in ((-1, e.left), (1, e.right)):
        inner, outer = (x - side * e.width, y - e.height - lift + tilt), (x + side * e.width, y - e.height - lift - tilt * 0.3)
        figure.line(curve(inner, (x, y - e.height - lift - 2), outer), colour, 2.3)


def glasses(figure: Canvas, rng: Random, p: Person, e: Eyes) -> None:
    if rng.random() >= 0.25:
        return
    colour = FRAME if rng.random() < 0.5 else hsv(rng.random(), 0.6, 0.45)
    rx, ry = e.width + 2.6, e.height + rng.uniform(2, 4)
    for x, y in (e.left, e.right):
        ring = ellipse(x, y + 0.5, rx, ry)
        figure.line(np.concatenate([ring, ring[:2]]), colour, 1.8)
    y = e.left[1]
    figure.line(np.array([(e.left[0] + rx, y), (e.right[0] - rx, y)]), colour, 1.8)
    for side, x in ((-1, e.left[0] - rx), (1, e.right[0] + rx)):
        figure.line(np.array([(x, y), (side * p.rx - 1.5 * p.turn, y - 1)]), colour, 1.8)


def cast_shadow(picture: Image.Image, portrait: Image.Image, p: Person) -> None:
    """Darken the background under the portrait's blurred outline, away from the light."""
    unit = portrait.width / GRID
    shade = portrait.getchannel("A").filter(ImageFilter.GaussianBlur(4 * unit)).point(lambda v: int(v * 0.4))
    picture.paste(SHADOW, tuple(round(-4 * unit * v) for v in p.light), shade)


def lit(portrait: Image.Image, p: Person) -> Image.Image:
    """The portrait's colours, brighter towards the light."""
    place = np.linspace(-1, 1, portrait.width)
    gain = 1 + 0.45 * p.contrast * (place[None, :] * p.light[0] + place[:, None] * p.light[1])
    return Image.fromarray(np.clip(np.asarray(portrait)[..., :3] * gain[..., None], 0, 255).astype(np.uint8))
