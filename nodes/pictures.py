"""Pictures that nodes show of what they did."""

from collections.abc import Sequence

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from . import host

GAP = 4  # pixels between pictures
VISIBLE = 128  # pixels of a picture whose single pixels shall be seen
LETTERS = 10, 1 / 40  # size of names above pictures: pixels at least, and of the width


def shown(node: type[io.ComfyNode], *images: Tensor, text: str = "", names: Sequence[str] = ()) -> dict:
    """The `ui` of a node's output: previews of these IMAGEs, small ones enlarged, and a text, which is on the node at once.

    names: of the pictures that stand `beside` each other in each IMAGE.
    """
    result = {}
    if images:
        with host.without("pictures on nodes"):
            from comfy_api.latest import ui

            previews = [ui.PreviewImage(named(enlarged(image), names), cls=node).as_dict() for image in images]
            result = {"images": [saved for preview in previews for saved in preview["images"]], "animated": (False,)}
    if text:
        host.show_text(node, text)
        result["text"] = (text,)
    return result


def enlarged(image: Tensor) -> Tensor:
    """An IMAGE that is too small to be seen, with each pixel a whole number of times."""
    times = max(1, VISIBLE // max(image.shape[1:3]))
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def named(image: Tensor, names: Sequence[str]) -> Tensor:
    """An IMAGE (B, h, w, 3) of pictures of one width side by side, with a line of their names above, if that has room for them."""
    if not names:
        return image
    width = image.shape[2]
    size = max(LETTERS[0], round(LETTERS[1] * width))
    strip, font = Image.new("RGB", (width, round(1.6 * size)), "white"), ImageFont.load_default(size)
    draw = ImageDraw.Draw(strip)
    if max(draw.textlength(name, font=font) for name in names) > width / len(names) - 2 * GAP:
        return image
    for k, name in enumerate(names):
        draw.text((width * (k + 0.5) / len(names), strip.height / 2), name, fill=(40, 40, 40), font=font, anchor="mm")
    line = torch.from_numpy(np.array(strip)).to(image) / 255
    return torch.cat([line.expand(len(image), -1, -1, -1), image], 1)


def beside(*images: Tensor, height: int = 0) -> Tensor:
    """IMAGEs (B, h, w, 3) side by side on white, as high as the highest or `height`.

    Those that are smaller are enlarged, each pixel a whole number of times.
    """
    height = max(height, *(image.shape[1] for image in images))
    columns = []
    for image in images:
        times = height // image.shape[1]
        large = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
        columns.append(torch.nn.functional.pad(large, (0, 0, 0, GAP, 0, height - large.shape[1]), value=1.0))
    return torch.cat(columns, 2)[:, :, :-GAP]


def below(*images: Tensor) -> Tensor:
    """IMAGEs (B, h, w, 3) one below the other on white."""
    width = max(image.shape[2] for image in images)
    rows = [torch.nn.functional.pad(image, (0, 0, 0, width - image.shape[2], 0, GAP), value=1.0) for image in images]
    return torch.cat(rows, 1)[:, :-GAP]


def heat(share: Tensor) -> Tensor:
    """(B, H, W) from 0 to 1 -> IMAGE from black over red and yellow to white."""
    return torch.stack([(3 * share - k).clamp(0, 1) for k in range(3)], -1)
