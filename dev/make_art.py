"""docs/icon.png and docs/banner.jpg for the registry, from the thumbnails of the templates. `python dev/make_art.py`"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("super_resolution_x4", "deblur_motion", "inpaint_free_form", "old_photo", "denoise", "deblur_gaussian", "colourise")
CELL = 180  # pixels; the banner is 21:9


def thumbnail(name: str) -> Image.Image:
    return Image.open(ROOT / "workflows" / f"{name}.jpg").convert("RGB")


def icon() -> Image.Image:
    picture, mask = thumbnail(SHOWN[0]), Image.new("L", (320, 320))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 319, 319), 56, fill=255)
    picture.putalpha(mask)
    return picture


def banner() -> Image.Image:
    width = len(SHOWN) * CELL
    height = width * 9 // 21
    sheet = Image.new("RGB", (width, height), (24, 26, 32))
    draw = ImageDraw.Draw(sheet)
    draw.text((40, 60), "Posterior", font=ImageFont.load_default(96), fill="white")
    line = "Restore photos with the Stable Diffusion you have. The result agrees with the photo."
    draw.text((44, 190), line, font=ImageFont.load_default(30), fill=(190, 196, 205))
    for i, name in enumerate(SHOWN):
        sheet.paste(thumbnail(name).resize((CELL, CELL), Image.Resampling.LANCZOS), (i * CELL, height - CELL - 40))
    return sheet


def main() -> None:
    icon().quantize(128).save(ROOT / "docs" / "icon.png", optimize=True)
    banner().save(ROOT / "docs" / "banner.jpg", quality=88)


if __name__ == "__main__":
    main()
