"""Saved operators come back bit for bit, and files that are not what they should be are refused by name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from operators import (
    OPERATORS,
    AreaDownscale,
    BicubicDownscale,
    Blur,
    Crop,
    Dense,
    Grayscale,
    Identity,
    LanczosDownscale,
    LinearOperator,
    Mask,
    Measurement,
    Product,
    Scale,
    Stack,
)
from operators.io import load_measurement, load_operator, save_measurement, save_operator

SHAPE = (3, 13, 18)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def keep(*shape: int) -> torch.Tensor:
    return (rand(*shape, seed=3) < 0.6).float()


def gaussian(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    taps = torch.exp(-0.5 * torch.arange(-(n // 2), n // 2 + 1, dtype=torch.float64) ** 2)
    return torch.outer(taps, taps).to(dtype)


CASES: dict[str, Callable[[], LinearOperator]] = {
    "identity": lambda: Identity(SHAPE),
    "scale": lambda: Scale(SHAPE, 1 / 3),
    "scale of a long row": lambda: Scale((1, 1, 20_000), 0.5),
    "mask": lambda: Mask(keep(1, 1, 13, 18)),
    "crop": lambda: Crop(SHAPE, (7, 11), (0, 3)),
    "mask of four channels": lambda: Mask(keep(1, 1, 13, 18), channels=4),
    "mask per image and channel": lambda: Mask(keep(2, 3, 13, 18)),
    "gray": lambda: Grayscale(SHAPE),
    "gray, own weights": lambda: Grayscale((2, 13, 18), (0.1, 0.7)),
    "area": lambda: AreaDownscale(SHAPE, 4),
    "bicubic": lambda: BicubicDownscale(SHAPE, 1.7),
    "bicubic to a size": lambda: BicubicDownscale(SHAPE, out_size=(5, 11), boundary="circular"),
    "lanczos": lambda: LanczosDownscale(SHAPE, 2),
    "blur, circular": lambda: Blur(rand(4, 5), SHAPE),
    "blur, separable": lambda: Blur(gaussian(5), SHAPE, "reflect"),
    "blur, separable in float32 only": lambda: Blur(gaussian(5, torch.float32), SHAPE, "zero"),
    "blur, circular and separable in float32 only": lambda: Blur(gaussian(5, torch.float32), SHAPE),
    "blur, iterative": lambda: Blur(rand(3, 5), SHAPE, "replicate"),
    "blur, not normalized": lambda: Blur(3 * rand(3, 3), SHAPE, normalize=False),
    "dense": lambda: Dense(rand(6, 24), (2, 3, 4), (1, 2, 3)),
    "mask @ blur": lambda: Mask(keep(1, 1, 13, 18)) @ Blur(rand(4, 5), SHAPE),
    "gray @ bicubic @ float32 blur": lambda: (
        Grayscale((3, 7, 9)) @ BicubicDownscale(SHAPE, 2) @ Blur(gaussian(5, torch.float32), SHAPE, "reflect")
    ),
    "lanczos @ mask": lambda: LanczosDownscale(SHAPE, 2) @ Mask(keep(1, 3, 13, 18)),
    "stack": lambda: Stack([Grayscale(SHAPE), AreaDownscale(SHAPE, 3), Scale(SHAPE, 0.5) @ Mask(keep(2, 1, 13, 18))]),
    "stack in a stack, masked": lambda: (
        Mask(keep(1, 1, 1, 13 * 18 * 4), channels=1) @ Stack([Stack([Grayscale(SHAPE)]), Identity(SHAPE)])
    ),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "operator.safetensors"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_operator_comes_back_bit_for_bit(name: str, dtype: torch.dtype, path: Path) -> None:
    operator = CASES[name]()
    save_operator(path, operator)
    loaded = load_operator(path)
    x, y = (rand(operator.batch, *shape, dtype=dtype) for shape in (operator.in_shape, operator.out_shape))
    assert type(loaded) is type(operator)
    assert (repr(loaded), loaded.exact, loaded.batch) == (repr(operator), operator.exact, operator.batch)
    assert torch.equal(loaded.A(x), operator.A(x))
    assert torch.equal(loaded.A_adjoint(y), operator.A_adjoint(y))
    if operator.exact:
        assert torch.equal(loaded.A_dagger(y), operator.A_dagger(y))


def test_no_class_is_forgotten() -> None:
    assert set(OPERATORS) <= {type(operator()) for operator in CASES.values()}


def test_saving_again_gives_the_same_file(path: Path) -> None:
    for name, operator in CASES.items():
        again = path.with_name("again.safetensors")
        save_operator(path, operator())
        save_operator(again, load_operator(path))
        assert load_file(again).keys() == load_file(path).keys(), name
        assert metadata(again) == metadata(path), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_measurement_comes_back_bit_for_bit(dtype: torch.dtype, path: Path) -> None:
    operator = Mask(keep(1, 1, 13, 18)) @ Blur(rand(4, 5), SHAPE)
    y = rand(2, 13, 18, 3, dtype=torch.float32).permute(0, 3, 1, 2).to(dtype).requires_grad_()
    save_measurement(path, Measurement(y, operator, 0.1 + 0.2))
    loaded = load_measurement(path)
    assert loaded.sigma == 0.1 + 0.2
    assert loaded.y.dtype == dtype
    assert torch.equal(loaded.y, y)
    assert not loaded.y.requires_grad
    assert torch.equal(loaded.operator.A(loaded.y), operator.A(y))


def test_loaded_tensors_are_not_the_file(path: Path) -> None:
    save_measurement(path, Measurement(rand(1, *SHAPE), Identity(SHAPE)))
    loaded = load_measurement(path)
    before = loaded.y.clone()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.y, before)


def test_a_failed_save_keeps_the_old_file(path: Path) -> None:
    class Mine(Identity):
        pass

    save_operator(path, Identity(SHAPE))
    before = path.read_bytes()
    for operator in (Mine(SHAPE), Stack([Identity(SHAPE), Mine(SHAPE)]), Product(Scale(SHAPE, 2.0), Mine(SHAPE))):
        with pytest.raises(ValueError, match="Mine cannot be saved"):
            save_operator(path, operator)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]


def rewrite(path: Path, tensors: dict | None = None, **changes: str | None) -> None:
    """Change metadata entries (None drops one) and tensors (None drops one) of a file."""
    entries = {k: v for k, v in {**metadata(path), **changes}.items() if v is not None}
    stored = {k: v for k, v in {**load_file(path), **(tensors or {})}.items() if v is not None}
    save_file(stored, path, metadata=entries)


def described(cls: object, **arguments: object) -> str:
    return json.dumps({"class": cls, "arguments": arguments})


NESTED = described("Identity", in_shape=[1, 1, 1])
for _ in range(100):
    NESTED = f'{{"class": "Stack", "arguments": {{"operators": [{NESTED}]}}}}'


MASK = json.loads(described("Mask", keep={"tensor": "operator.keep"}, channels=3))
TWICE = described("Stack", operators=[MASK, MASK])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "format is None"),
        ({"format": "posterior.measurement"}, "use load_measurement"),
        ({"version": "2"}, "version is '2'.*reads '1'"),
        ({"version": None}, "version is None"),
        ({"operator": None}, "no metadata entry 'operator'"),
        ({"operator": "{"}, "not JSON"),
        ({"operator": "[" * 100_000}, "not JSON"),
        ({"operator": "[]"}, "expected .*class"),
        ({"operator": NESTED}, "more than 64 operators"),
        ({"operator": described("os.system", command="true")}, "class is 'os.system', expected one of"),
        ({"operator": described("LinearOperator")}, "class is 'LinearOperator'"),
        ({"operator": described(["Mask"])}, "class is \\['Mask'\\]"),
        ({"operator": described("Mask", channels=3)}, "arguments .'channels'., expected .'channels', 'keep'."),
        ({"operator": described("Identity", in_shape=[3, 4, 5], more=1)}, "'in_shape', 'more'"),
        ({"operator": described("Identity", in_shape=[3, 4])}, "in_shape: got .*expected 3 integers of 1 or more"),
        ({"operator": described("Identity", in_shape=[3, 4, -5])}, "in_shape: got -5"),
        ({"operator": described("Identity", in_shape=[3, 4, True])}, "in_shape: got True"),
        ({"operator": described("Identity", in_shape=[3, 4, 5.0])}, "in_shape: got 5.0"),
        ({"operator": described("AreaDownscale", in_shape=[3, 10**12, 10**12], factor=1)}, "got 1000000000000, expected"),
        ({"operator": described("AreaDownscale", in_shape=[3, 16384, 16384], factor=1)}, "expected at most"),
        ({"operator": described("AreaDownscale", in_shape=[3, 8, 8], factor=9)}, "AreaDownscale.: factor: got 9"),
        ({"operator": described("Scale", in_shape=[3, 8, 8], gain="2")}, "gain: got '2'"),
        ({"operator": described("Scale", in_shape=[3, 8, 8], gain=float("nan"))}, "gain: got nan"),
        ({"operator": described("Scale", in_shape=[3, 8, 8], gain=10**400)}, "gain: got 1000"),
        ({"operator": described("Mask", keep=[1], channels=3)}, "keep: got .1., expected .*tensor"),
        ({"operator": described("Mask", keep={"tensor": "nowhere"}, channels=3)}, "keep: has no tensor 'nowhere'"),
        ({"operator": described("Mask", keep={"tensor": 3}, channels=3)}, "keep: got 3"),
        ({"operator": described("Stack", operators=[])}, "Stack.: operators"),
        ({"operator": described("Stack", operators={})}, "expected a list of operators"),
        (
            {"operator": described("BicubicDownscale", in_shape=[3, 8, 8], out_size=[4, 4], boundary="torus")},
            "boundary: got 'torus'",
        ),
        ({"operator": TWICE}, "its tensor 'operator.keep' is that of another argument"),
        ({"tensors": {"operator.keep": None}}, "keep: has no tensor"),
        ({"tensors": {"operator.keep": torch.ones(1, 1, 13, 18)}}, "keep: its tensor is float32 .*expected uint8"),
        ({"tensors": {"operator.keep": torch.ones(13, 18, dtype=torch.uint8)}}, "shape .13, 18., expected uint8 with 4"),
        ({"tensors": {"operator.keep": torch.full((1, 1, 13, 18), 7, dtype=torch.uint8)}}, "other than 0 and 1"),
        ({"tensors": {"operator.keep": torch.ones(1, 5, 13, 18, dtype=torch.uint8)}}, "5 channels"),
        ({"tensors": {"more": torch.ones(1)}}, "does not use: .'more'"),
    ],
)
def test_bad_operator_files_are_refused(changes: dict, message: str, path: Path) -> None:
    save_operator(path, Mask(keep(1, 1, 13, 18)))
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_operator(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "posterior.operator"}, "use load_operator"),
        ({"sigma": None}, "no metadata entry 'sigma'"),
        ({"sigma": "-1"}, "sigma: got -1"),
        ({"sigma": "Infinity"}, "sigma: got inf"),
        ({"sigma": '"0.1"'}, "sigma: got '0.1'"),
        ({"tensors": {"y": None}}, "y: has no tensor 'y'"),
        ({"tensors": {"y": torch.ones(1, *SHAPE, dtype=torch.int64)}}, "y: its tensor is int64"),
        ({"tensors": {"y": torch.ones(1, 3, 13, 17)}}, "y: got shape .1, 3, 13, 17."),
        ({"tensors": {"y": torch.full((1, *SHAPE), torch.nan)}}, "NaN"),
    ],
)
def test_bad_measurement_files_are_refused(changes: dict, message: str, path: Path) -> None:
    save_measurement(path, Measurement(rand(1, *SHAPE), Identity(SHAPE), 0.1))
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message):
        load_measurement(path)


def test_a_product_that_does_not_fit_is_refused(path: Path) -> None:
    save_operator(path, Product(Scale(SHAPE, 2.0), AreaDownscale(SHAPE, 1)))
    text = metadata(path)["operator"].replace('"in_shape": [3, 13, 18], "gain"', '"in_shape": [3, 13, 17], "gain"')
    rewrite(path, operator=text)
    with pytest.raises(ValueError, match="do not fit"):
        load_operator(path)


def test_truncated_and_corrupt_files_are_refused(path: Path) -> None:
    save_operator(path, Dense(rand(6, 24), (2, 3, 4), (1, 2, 3)))
    whole = path.read_bytes()
    for size in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated, corrupt"):
            load_operator(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="truncated, corrupt"):
        load_operator(path)
    for at in range(0, 200, 7):  # a damaged header either says so or does no harm
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert isinstance(load_operator(path), LinearOperator)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017


def area(n: int) -> dict:
    return {"class": "AreaDownscale", "arguments": {"in_shape": [1, n, n], "factor": n}}


def bicubic(n: int, m: int) -> dict:
    return {"class": "BicubicDownscale", "arguments": {"in_shape": [1, n, 1], "out_size": [m, 1], "boundary": "reflect"}}


SMALL = {"class": "Dense", "arguments": {"matrix": {"tensor": "m"}, "in_shape": [1, 1, 1], "out_shape": [1, 1, 64]}}
KERNEL = {"kernel": {"tensor": "m"}, "boundary": "circular"}


@pytest.mark.parametrize(
    ("operator", "tensor"),
    [
        (described("BicubicDownscale", in_shape=[1, 16384, 16384], out_size=[8192, 8192], boundary="reflect"), None),
        (described("LanczosDownscale", in_shape=[1, 16384, 4], out_size=[16384, 4], boundary="circular"), None),
        (described("AreaDownscale", in_shape=[1, 16384, 16384], factor=1), None),
        (described("Blur", in_shape=[1, 16384, 16384], **KERNEL), torch.ones(1, 1, dtype=torch.float64)),
        (described("Blur", in_shape=[1, 16384, 1], **{**KERNEL, "boundary": "zero"}), torch.ones(1, 1, dtype=torch.float64)),
        (described("Product", outer=SMALL, inner=area(16384)), torch.ones(64, 1, dtype=torch.float64)),
        (
            described("Stack", operators=[bicubic(4096, 2048), bicubic(16000, 8100)]),
            None,
        ),
    ],
)
def test_a_small_file_cannot_ask_for_gigabytes(operator: str, tensor: torch.Tensor | None, path: Path) -> None:
    """The description is refused before anything of that size is made."""
    save_operator(path, Identity(SHAPE))
    rewrite(path, {} if tensor is None else {"m": tensor}, operator=operator)
    with pytest.raises(ValueError, match="numbers to build, more than the"):
        load_operator(path)


def test_large_pictures_are_not_refused(path: Path) -> None:
    for operator in (
        BicubicDownscale((3, 2048, 3072), 4),
        Blur(gaussian(5), (3, 1024, 2048), "reflect"),
        AreaDownscale((3, 8192, 8192), 4),
    ):
        save_operator(path, operator)
        assert repr(load_operator(path)) == repr(operator)


@pytest.mark.parametrize(
    "operator",
    [
        lambda: AreaDownscale((1, 2160, 3840), 4) @ Grayscale((3, 2160, 3840)),
        lambda: Mask(keep(1, 1, 2048, 3072)) @ Blur(gaussian(5), (3, 2048, 3072), "reflect"),
    ],
)
def test_compositions_of_4k_come_back(operator: Callable[[], LinearOperator], path: Path) -> None:
    made = operator()
    save_operator(path, made)
    loaded = load_operator(path)
    assert (repr(loaded), loaded.exact, loaded.batch) == (repr(made), made.exact, made.batch)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda: Identity((3, 20_000, 20_000)), "in_shape: .* expected at most 268435456 values"),
        (lambda: Grayscale((3, 20_000, 4)), "in_shape: got 20000, expected an integer from 1 to 16384"),
        (lambda: Stack([Identity(SHAPE)] * 64), "more than 64 operators; use a file for each part"),
        (lambda: Stack([BicubicDownscale((1, 4096, 4096), 2)] * 9), "smaller picture or fewer operators"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(operator: Callable[[], LinearOperator], message: str, path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_operator(path, operator())
    assert not path.exists()


def test_a_small_photo_of_a_huge_batch_is_refused(path: Path) -> None:
    """Loading it would be cheap, and the first picture made from it a terabyte."""
    operator = Crop((3, 16384, 5461), (1, 1))
    save_measurement(path, Measurement(torch.zeros(1, 3, 1, 1), operator))
    assert load_measurement(path).operator.in_shape == operator.in_shape
    rewrite(path, {"y": torch.zeros(1000, 3, 1, 1)})
    with pytest.raises(ValueError, match="a batch of 1000 photos of 3 values each, with full pictures of 5461 x 16384"):
        load_measurement(path)
    with pytest.raises(ValueError, match="a batch of 2 photos of 3 values each"):
        save_measurement(path, Measurement(torch.zeros(2, 3, 1, 1), operator))


def test_a_large_batch_of_photos_may_have_large_pictures(path: Path) -> None:
    """Two dozen frames of a film, four times as wide and high."""
    operator = AreaDownscale((3, 2048, 2048), 4)
    save_measurement(path, Measurement(torch.zeros(24, 3, 512, 512, dtype=torch.float16), operator))
    assert load_measurement(path).y.shape == (24, 3, 512, 512)


def test_absurd_sizes_in_the_header_are_refused(path: Path) -> None:
    header = json.dumps(
        {
            "__metadata__": {
                "format": "posterior.operator",
                "version": "1",
                "operator": described("Identity", in_shape=[1, 1, 1]),
            },
            "x": {"dtype": "F64", "shape": [2**40, 2**40], "data_offsets": [0, 2**60]},
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="truncated, corrupt"):
        load_operator(path)


def test_pickles_and_missing_files_are_refused(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_operator(path)
    torch.save({"operator": 1}, path)
    with pytest.raises(ValueError, match="no safetensors file"):
        load_operator(path)
