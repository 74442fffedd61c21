"""Measurement nodes: what was observed, y = A x + noise."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..operators import Blur, Identity, LinearOperator, Measurement, Product, Scale, Stack, estimate_noise_sigma
from ..operators.compose import factors
from ..samplers import measured
from .pictures import beside, shown
from .types import CATEGORY, LinearOperatorType, MeasurementType, OperatorRecipe, to_image, to_signal

OUTPUTS = [
    MeasurementType.Output("measurement", tooltip="The degraded photo, what happened to it, and its noise."),
    io.Image.Output("degraded", tooltip="The degraded photo as a picture; lost pixels are mid-grey."),
    io.Mask.Output("lost", tooltip="1 on the pixels of the full picture that the photo says nothing about."),
]
BLOCK = 8  # pixels; the estimator of noise looks at blocks of this size
NOISELESS = 1e-4  # on the 0 to 1 scale; a tenth of what 8 bits round away
LEAST = 0.001  # sigma of a blurred photo of 8 bits: a little below the standard deviation of their rounding
ROUNDED = 0.002  # sigma that stands for the rounding of 8 bits, on the same scale; the inverse of a blur amplifies it
STREAM = 0x9E3779B9  # of the random numbers of simulated noise
VAGUE = 0.005  # an interval that begins below half its end says nothing, unless it ends below this: a clean photo


def sigma_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("sigma", default=0.0, min=0.0, max=1.0, step=0.005, round=0.0001, tooltip=tooltip)


class MeasureSimulate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorMeasureSimulate",
            display_name="Measure (simulate)",
            category=f"{CATEGORY}/measurement",
            description="Degrade a good picture on purpose, to see how well it can be restored.",
            search_aliases=["degrade", "simulate", "forward model", "add noise", "poisson noise"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("image", tooltip="The good picture, full size."),
                LinearOperatorType.Input("operator", tooltip="What shall happen to it."),
                io.DynamicCombo.Input(
                    "noise",
                    options=[
                        io.DynamicCombo.Option(
                            "Gaussian",
                            [sigma_input("Standard deviation on the 0 to 1 scale; 0 is none, 0.02 is a little, 0.1 a lot.")],
                        ),
                        io.DynamicCombo.Option(
                            "Poisson",
                            [
                                io.Float.Input(
                                    "peak",
                                    default=100.0,
                                    min=1.0,
                                    max=1e6,
                                    step=10.0,
                                    tooltip="Photons that white counts: 10 is very dark, 100 grainy, 1000 clean. A value v then has noise "
                                    "sqrt(v / peak). The measurement carries one sigma for all, the root mean square of these over the "
                                    "batch: right for |A x - y| as a whole, too large for dark values and too small for bright ones.",
                                )
                            ],
                        ),
                    ],
                    tooltip="Gaussian: the same everywhere, as electronics make it. Poisson: counted photons, as little light makes it.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise of the first picture; those of the next ones count up.",
                ),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def execute(cls, image: Tensor, operator: OperatorRecipe, noise: dict, seed: int) -> io.NodeOutput:
        x = to_signal("image", image)
        a = operator.on(tuple(x.shape[1:]), "use a smaller image")
        check_batch(a, "image", x)
        y = a.A(x)
        if noise["noise"] == "Poisson":
            y, sigma = counted(y, measured(a, y), noise["peak"], seed)
            text = f"simulated, noise {sigma:.4f}, root mean square; sqrt(v / {noise['peak']:g}) for a value v"
        else:
            sigma = noise["sigma"]
            text = f"simulated, noise {sigma:.4g}"
            if sigma > 0:
                draws = [torch.randn(y.shape[1:], generator=of_seed(seed, i)) for i in range(len(y))]
                y = y + 2 * sigma * measured(a, y) * torch.stack(draws).double()
        # Users think of noise on the 0 to 1 scale; from here on everything is in [-1, 1].
        return output(cls, Measurement(y, a, 2 * sigma), text)


def check_batch(a: LinearOperator, name: str, pictures: Tensor) -> None:
    """Refuse an operator that is made for another number of pictures."""
    if a.batch not in (1, len(pictures)):
        raise ValueError(
            f"operator: has masks for {a.batch} pictures, but {name} is a batch of {len(pictures)}; give one mask, or one for each picture"
        )


def of_seed(seed: int, i: int) -> torch.Generator:
    """The random numbers of image i: a batch gives what its images give one by one with seeds that count up.

    Others than those of a sampler with the same seed: it would start from the very noise that is in y.
    """
    return torch.Generator().manual_seed((seed + i) ^ STREAM)


def counted(y: Tensor, seen: Tensor, peak: float, seed: int) -> tuple[Tensor, float]:
    """Poisson noise: each value counts photons, `peak` of them for white.

    Args:
        y: (B, c, h, w) in [-1, 1], noise-free. Values below black, which the lobes of bicubic and Lanczos give, count nothing.
        seen: 1 where y is a measurement, broadcastable to y; elsewhere y stays.

    Returns:
        The noisy y, and the root mean square of its noise, sqrt(mean(v) / peak), on the 0 to 1 scale, over the measured values of
        the batch. With it as the sigma of a Gaussian, E ||A x - y||^2 is exact (but for values below black); the noise of single
        values is not, being sqrt(v / peak).
    """
    light = ((y + 1) / 2).clamp(min=0)
    draws = [torch.poisson(peak * v, generator=of_seed(seed, i)) for i, v in enumerate(light)]
    seen = seen.expand_as(y)
    each = ((light * seen).flatten(1).sum(1) / seen.flatten(1).sum(1) / peak).sqrt()
    if float(each.max()) > 1.1 * float(each.min()):
        raise ValueError(
            f"image: the pictures of the batch differ in brightness, and so in Poisson noise ({float(each.min()):.3g} to "
            f"{float(each.max()):.3g}); one measurement has one sigma. Measure them one by one"
        )
    sigma = float(each.square().mean()) ** 0.5
    return torch.where(seen > 0, 2 * torch.stack(draws) / peak - 1, y), sigma


class MeasurementFromPhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorMeasurementFromPhoto",
            display_name="Measurement from Photo",
            category=f"{CATEGORY}/measurement",
            description="Your photo is the measurement. With a downscale operator the restored picture is larger than the photo; "
            "with a mask it has the photo's size and the holes are filled.",
            search_aliases=["restore", "my photo", "measurement", "upscale", "inpaint", "deblur", "colorize", "denoise"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("photo", tooltip="The degraded photo as it is. Do not resize it before."),
                LinearOperatorType.Input("operator", tooltip="What happened to it."),
                io.DynamicCombo.Input(
                    "noise",
                    options=[
                        io.DynamicCombo.Option(
                            "entered",
                            [
                                sigma_input(
                                    "Noise in the photo, as a standard deviation on the 0 to 1 scale. 0 trusts every pixel; 0.01 is a "
                                    "clean phone photo, 0.02 a JPEG to enlarge, 0.05 to 0.1 a grainy photo."
                                )
                            ],
                        ),
                        io.DynamicCombo.Option("estimated", []),
                    ],
                    tooltip="entered: you know the noise, or it is 0. estimated: read from the photo's flattest parts and shown on the "
                    f"node, at least {ROUNDED} for a blurred photo of 8 bits; refused where the photo does not tell.",
                ),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def execute(cls, photo: Tensor, operator: OperatorRecipe, noise: dict) -> io.NodeOutput:
        y = to_signal("photo", photo)
        remedy = f"lower the factor ({operator.label}), or use a smaller photo than {y.shape[3]} x {y.shape[2]}"
        a = operator.on(operator.full_shape(tuple(y.shape[1:])), remedy)
        if a.out_shape[0] == 1:
            y = grey(y)
        if tuple(y.shape[1:]) != a.out_shape:
            raise ValueError(
                f"photo: is {y.shape[3]} x {y.shape[2]}, but {operator.label} gives {a.out_shape[2]} x {a.out_shape[1]} from any "
                "picture near that size; check the operator's numbers"
            )
        check_batch(a, "photo", y)
        seen = measured(a, y)
        if noise["noise"] == "estimated":
            sigma, text = estimated(y, seen)
            if sigma < ROUNDED and blurs(a) and of_8_bits(photo):
                sigma, text = ROUNDED, f"{text}\n{ROUNDED} is taken, for the rounding of 8 bits behind a blur"
        else:
            sigma = noise["sigma"]
            text = f"noise {sigma:.4g}"
            if 0 < sigma < LEAST and blurs(a) and of_8_bits(photo):  # what 0 amplifies Finish and Restore measure
                raise ValueError(
                    f"sigma: got {sigma:.4g}, less than this photo's 8 bits round away, which the inverse of a blur amplifies. Set {ROUNDED} or more"
                )
        # Whatever the photo shows where pixels are lost is no measurement.
        return output(cls, Measurement(seen * y, a, 2 * sigma), text)


def blurs(operator: LinearOperator) -> bool:
    """Whether a blur is among what happened: its inverse amplifies noise."""
    return any(isinstance(part, Blur) for part in factors(operator))


def of_8_bits(photo: Tensor) -> bool:
    """Whether every value of an IMAGE is one of 256."""
    levels = photo * 255
    return float((levels - levels.round()).abs().max()) < 1e-3


def estimated(photo: Tensor, seen: Tensor) -> tuple[float, str]:
    """The one sigma of a batch of photos, on the 0 to 1 scale, and what to say about it.

    Args:
        photo: (B, c, h, w) in [-1, 1].
        seen: 1 where it is a measurement, of the same shape.

    Raises:
        ValueError: the photo does not tell, most of its blocks have lost pixels, or the photos of the batch differ.
    """
    remedy = "set noise to entered and give sigma"
    spoilt = float(torch.nn.functional.max_pool2d(1 - seen, BLOCK, ceil_mode=True).mean())
    if spoilt > 0.5:
        raise ValueError(
            f"noise: cannot be estimated, lost pixels are in {spoilt:.0%} of the photo's blocks of {BLOCK} x {BLOCK}; {remedy}"
        )
    try:
        found = estimate_noise_sigma(photo, seen.expand_as(photo))
    except ValueError as refusal:
        raise ValueError(f"photo:{str(refusal).removeprefix('image:')}; for that {remedy}") from refusal
    sigma, low, high = (values.double() / 2 for values in (found.sigma, found.low, found.high))
    vague = (high > 2 * low) & (high > VAGUE)
    if bool(vague.any()):
        i = int(vague.nonzero()[0])
        raise ValueError(
            f"photo: its noise is between {float(low[i]):.4f} and {float(high[i]):.4f} and cannot be told from its texture; {remedy}"
        )
    if float(low.max()) > float(high.min()):
        raise ValueError(
            f"photo: the photos of the batch differ in noise ({float(sigma.min()):.4f} to {float(sigma.max()):.4f}), and a measurement "
            f"has one sigma; make a measurement of each, or {remedy}"
        )
    if float(sigma.mean()) < NOISELESS:
        # What is left of a flat part is rounding; a sigma like that would be inverted through a blur as if it were noise.
        return 0.0, f"noise 0 (below {NOISELESS}), estimated"
    lines = [f"noise {s:.4f} ({a:.4f} to {b:.4f}), estimated" for s, a, b in zip(sigma, low, high, strict=True)]
    return float(sigma.mean()), "\n".join(lines)


class CombineMeasurements(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorCombineMeasurements",
            display_name="Combine Measurements",
            category=f"{CATEGORY}/measurement",
            description="Two photos of the same picture, degraded in different ways, become one measurement: a burst, or a sharp "
            "black-and-white photo with a small colour one.",
            search_aliases=["stack", "burst", "fuse", "pansharpen", "super resolution", "colorize"],
            inputs=[
                MeasurementType.Input("first", tooltip="A measurement of the picture."),
                MeasurementType.Input("second", tooltip="Another measurement of the same picture, of the same full size."),
            ],
            outputs=[MeasurementType.Output("measurement", tooltip="Both together, each weighed by its noise.")],
        )

    @classmethod
    def execute(cls, first: Measurement, second: Measurement) -> io.NodeOutput:
        if first.operator.in_shape != second.operator.in_shape:
            raise ValueError(
                f"second: measures a picture of {second.operator.in_shape}, but first one of {first.operator.in_shape} (channels, "
                "height, width); both must be of the same picture"
            )
        if len(first.y) != len(second.y):
            raise ValueError(f"second: is a batch of {len(second.y)}, but first one of {len(first.y)}; they must be equal")
        parts = [*single(first), *single(second)]
        sigmas = [part.sigma for part in parts]
        if min(sigmas) == 0 < max(sigmas):
            raise ValueError(
                "first, second: one is noise-free (sigma 0) and the other is not; give both a sigma above 0, or both 0"
            )
        # A common noise level: a photo and its operator scaled alike say the same with another sigma.
        common = min(sigmas)
        gains = [1.0 if common == 0 else common / sigma for sigma in sigmas]
        scaled = [Scale(part.operator.out_shape, gain) @ part.operator for part, gain in zip(parts, gains, strict=True)]
        stack = Stack(scaled)
        y = stack.join([gain * part.y for part, gain in zip(parts, gains, strict=True)])
        measurement = Measurement(y, stack, common)
        return io.NodeOutput(measurement, ui=shown(cls, degraded(measurement)))


def single(measurement: Measurement) -> list[Measurement]:
    """The measurements that a combined one was made of, each with its own photo, operator and sigma; or the one itself."""
    y, operator, sigma = measurement.y, measurement.operator, measurement.sigma
    if isinstance(operator, Stack):
        pairs = zip(operator.split(y), operator.operators, strict=True)
        return [part for photo, own in pairs for part in single(Measurement(photo, own, sigma))]
    if isinstance(operator, Scale):
        return [Measurement(y / operator.gain, Identity(operator.in_shape), sigma / abs(operator.gain))]
    if isinstance(operator, Product) and isinstance(operator.outer, Scale):
        gain = operator.outer.gain
        return single(Measurement(y / gain, operator.inner, sigma / abs(gain)))
    return [measurement]


def grey(y: Tensor) -> Tensor:
    """(B, 3, H, W) with equal channels -> (B, 1, H, W); a photo in colour is not a black-and-white measurement."""
    if float((y.amax(1) - y.amin(1)).max()) > 4 / 255:
        raise ValueError(
            "photo: is in colour, but the operator says black and white. Remove its tint in a photo program first, or leave "
            "out the Black and White node"
        )
    return y.mean(1, keepdim=True)


def check_result(name: str, image: Tensor, measurement: Measurement, several: bool = False) -> Tensor:
    """A result of this measurement as a signal, (B, 3, H, W) in [-1, 1]; an image of another size or batch is refused.

    several: whether each photo of the measurement may have several results.
    """
    x = to_signal(name, image)
    expected = measurement.operator.in_shape
    if tuple(x.shape[1:]) != expected:
        raise ValueError(
            f"{name}: is {x.shape[3]} x {x.shape[2]} but the measurement's picture is {expected[2]} x {expected[1]}; connect the "
            "decoded result of this measurement, not resized"
        )
    count = len(measurement.y)
    if len(x) % count if several else count not in (1, len(x)):
        equal = "there must be as many results of each photo, those of the first one first" if several else "they must be equal"
        raise ValueError(f"{name}: got a batch of {len(x)} for a measurement of {count}; {equal}")
    return x


def each_photo(x: Tensor, measurement: Measurement) -> list[tuple[Tensor, Measurement]]:
    """Results with their measurement: all at once where each photo has one or there is one photo, else photo by photo."""
    if len(measurement.y) in (1, len(x)):
        return [(x, measurement)]
    return [(results, measurement.select(i)) for i, results in enumerate(x.unflatten(0, (len(measurement.y), -1)))]


def which(**numbers: tuple[int, int]) -> str:
    """What a line of a read-out is about, "picture 2: photo 1: " say: of each kind its number from 0, where there are several.

    numbers: (number, how many there are), by kind.
    """
    return "".join(f"{kind} {i + 1}: " for kind, (i, count) in numbers.items() if count > 1)


def degraded(measurement: Measurement) -> Tensor:
    """The photos of a measurement as an IMAGE, side by side where it has several."""
    return beside(*(photo_image(part.y) for part in single(measurement)))


def photo_image(y: Tensor) -> Tensor:
    """A photo, (B, c, h, w) in [-1, 1], as an IMAGE; one that is neither grey nor in colour becomes grey."""
    return to_image(y if y.shape[1] in (1, 3) else y.mean(1, keepdim=True))


def output(node: type[io.ComfyNode], measurement: Measurement, text: str) -> io.NodeOutput:
    """What every node that makes a measurement gives and shows."""
    # Random values tell pixels that nothing reaches from those that a kernel of sum 0 weighs to nothing; in float64, for the
    # rounding of a file's float16 would pass for something.
    draw = torch.randn(measurement.y.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reached = measurement.operator.A_adjoint(draw.expand(measurement.y.shape).contiguous()).abs_().amax(1)
    lost = (reached <= 1e-9 * reached.max()).float()
    shares = lost.flatten(1).mean(1).tolist()
    each = len(set(shares)) > 1
    for i, share in enumerate(shares if each else shares[:1]):
        if share or each:
            much = "nothing" if share == 0 else "less than 0.1%" if share < 1e-3 else f"{share:.1%}"
            text += f"\n{which(picture=(i, len(shares))) if each else ''}{much} of the picture lost"
            text += "; if a mask marks the pixels to keep, invert it" if share > 0.5 else ""
    picture = degraded(measurement)
    return io.NodeOutput(measurement, picture, lost, ui=shown(node, picture, text=text))


NODES = [MeasureSimulate, MeasurementFromPhoto, CombineMeasurements]
