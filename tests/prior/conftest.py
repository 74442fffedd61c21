from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from prior import networks
from prior.draw import VALIDATION_SEED, draw


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, which on a busy machine costs many times the whole run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prior() -> tuple[networks.UNet, networks.Autoencoder]:
    return networks.load()


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    """64 held-out portraits, (64, 3, 128, 128) in [-1, 1]."""
    drawn = np.stack([draw(VALIDATION_SEED + i) for i in range(64)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1
