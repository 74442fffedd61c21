"""The course of a run as a picture."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE = 480, 270  # pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 34
INK, PALE, LINE, NOISE = (40, 40, 40), (225, 225, 225), (31, 119, 180), (214, 39, 40)
LOWEST = 1e-9  # a residual of 0 has no logarithm


def residual_plot(curves: list[list[float]], noise: float) -> Tensor | None:
    """|A x - y| at each step, on a logarithmic scale, with the noise as a broken line.

    Args:
        curves: for each run, the residual of every step, from the first.
        noise: on the same scale; 0 draws none.

    Returns:
        IMAGE (1, 270, 480, 3), or None when there is no step to draw.
    """
    curves = [[max(value, LOWEST) for value in curve] for curve in curves if curve]
    if not curves:
        return None
    values = [value for curve in curves for value in curve] + [noise] * (noise > 0)
    # A little wider than the values, so that none lies on the frame.
    low, high = math.floor(math.log10(min(values)) - 0.05), math.ceil(math.log10(max(values)) + 0.05)
    steps = max(map(len, curves))
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        across = 0.5 if steps == 1 else (step - 1) / (steps - 1)
        return LEFT + width * across, TOP + height * (high - math.log10(value)) / (high - low)

    picture = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    for power in range(low, high + 1, 1 + (high - low) // 6):
        y = place(1, 10.0**power)[1]
        draw.line([(LEFT, y), (LEFT + width, y)], fill=PALE)
        draw.text((LEFT - 6, y), f"1e{power}", fill=INK, font=font, anchor="rm")
    for step in sorted({1 + round(k * (steps - 1) / 4) for k in range(5)}):
        x = place(step, 10.0**low)[0]
        draw.line([(x, TOP), (x, TOP + height)], fill=PALE)
        draw.text((x, TOP + height + 4), str(step), fill=INK, font=font, anchor="ma")
    draw.text((LEFT + width / 2, SIZE[1] - 3), "step", fill=INK, font=font, anchor="md")
    draw.text((LEFT, 6), "|A x - y|, root mean square, 0 to 1 scale", fill=INK, font=font)
    if noise > 0:
        y = place(1, noise)[1]
        for x in range(LEFT, LEFT + width, 8):
            draw.line([(x, y), (min(x + 4, LEFT + width), y)], fill=NOISE)
        draw.text((SIZE[0] - RIGHT, 6), f"noise {noise:.3g}", fill=NOISE, font=font, anchor="ra")
    for curve in curves:
        points = [place(step, value) for step, value in enumerate(curve, 1)]
        if steps <= 60:
            for x, y in points:
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=LINE)
        if len(points) > 1:
            draw.line(points, fill=LINE, width=2)
    draw.rectangle([LEFT, TOP, LEFT + width, TOP + height], outline=INK)
    return torch.from_numpy(np.array(picture)).float()[None] / 255
