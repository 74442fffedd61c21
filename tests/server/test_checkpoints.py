"""Models survive our sampler bit by bit, and a checkpoint from a file does what the demo prior does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.server_prompts import (
    SHORT,
    Prompt,
    add,
    cpigdm,
    inputs,
    keep,
    paper_rule,
    psnr,
    relink,
    restore,
    run,
    stock,
    titled,
    with_psld,
)
from support.tiny_checkpoints import write_checkpoint

from dev.server import Server
from prior.export import write_stock_checkpoint

WORKFLOW = "super_resolution_x8"
STOCK = (
    "euler", "dpmpp_2m", "heun", "uni_pc", "dpmpp_2m_sde",
    "dpm_2", "lms", "euler_ancestral", "dpmpp_sde", "lcm", "ddpm",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(base: Path) -> Iterator[str]:
    """File name of a tiny SD 1.5 with a random network and a VAE under which its latents are no black picture."""
    path = write_checkpoint(base / "models" / "checkpoints" / "tiny_sd15.safetensors", "sd15", vae="box")
    yield path.name
    path.unlink()


@pytest.fixture(scope="module")
def exported(base: Path) -> Iterator[str]:
    """File name of the demo prior as `make checkpoint` writes it, 450 MB."""
    path = base / "models" / "checkpoints" / "posterior_avatars.safetensors"
    write_stock_checkpoint(path)
    yield path.name
    path.unlink()


def check_unchanged(server: Server, prompt: Prompt, loader: str) -> None:
    """A stock picture, our sampler, and the same stock picture again, all with one model object in the server's cache."""
    before = run(server, stock(prompt))
    assert before.std() > 5
    run(server, prompt, cached=(loader,))
    assert np.array_equal(run(server, stock(prompt), cached=(loader,)), before)


def test_stock_samplers_are_the_same_around_our_nodes(server: Server, count: Callable[[int, int], int]) -> None:
    """All with one model object in the server's cache: stock pictures, PSLD, C-PiGDM and Restore, and the stock pictures again."""
    loader, names = "Load Demo Prior", STOCK[: count(5, len(STOCK))]
    before = {name: run(server, stock(with_psld(WORKFLOW, 4), name)) for name in names}
    assert len({picture.tobytes() for picture in before.values()}) == len(names)
    psld, other, whole = (with_psld(WORKFLOW, 4) for _ in range(3))
    cpigdm(other, tau=1.0)
    restore(whole, method="PSLD", seed=21)
    for prompt in (psld, other):
        run(server, keep(prompt, "Result"), cached=(loader,))
    whole = keep(whole, "Result")
    assert len(server.run(whole)[titled(whole, "Result")]["images"]) == 1
    for name in names:
        assert np.array_equal(run(server, stock(with_psld(WORKFLOW, 4), name), cached=(loader,)), before[name]), name


def test_demo_prior_is_unchanged_by_a_run(server: Server) -> None:
    check_unchanged(server, with_psld(WORKFLOW, SHORT), "Load Demo Prior")


def test_checkpoint_is_unchanged_by_a_run(server: Server, tiny: str) -> None:
    prompt = with_psld(WORKFLOW, 2)
    checkpoint = add(prompt, "Load Checkpoint", "CheckpointLoaderSimple", ckpt_name=tiny)
    relink(prompt, titled(prompt, "Load Demo Prior"), checkpoint, slots=(0, 2))  # it has no text encoder
    check_unchanged(server, prompt, "Load Checkpoint")


def test_exported_checkpoint_gives_the_same_picture(server: Server, exported: str) -> None:
    """To the rounding of its float16: hardly any in a stock picture, and what PSLD through both networks makes of it."""
    prompt = with_psld(WORKFLOW, SHORT)
    # The line search goes by a decoder that is piecewise linear, and makes more of rounding.
    paper_rule(prompt)
    expected, plain = run(server, prompt), run(server, stock(prompt))
    # Nothing but the loader is swapped, as a user would; its own text encoder then reads the prompts.
    loader = prompt[titled(prompt, "Load Demo Prior")]
    loader.update(class_type="CheckpointLoaderSimple", inputs={"ckpt_name": exported})
    inputs(prompt, "Positive Prompt")["text"] = "a portrait"
    assert psnr(run(server, stock(prompt)), plain) >= 60  # measured: 76
    assert psnr(run(server, prompt), expected) >= 40  # measured: 45
