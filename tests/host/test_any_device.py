"""A measurement may be on any device; where there is no other one, PyTorch's fake tensors have a device and no memory."""

from types import ModuleType

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def test_the_read_out_computes_on_the_cpu(host: ModuleType, pack: ModuleType) -> None:
    """A sampler's callback gives residuals of the compute device, and they are multiplied by this on the CPU."""
    operator = pack.operators.AreaDownscale((3, 16, 16), 8)
    photo = pack.operators.Measurement(torch.zeros(2, 3, 2, 2), operator)
    scale = host.plugin.residual_scale(photo)
    torch.testing.assert_close(scale, torch.full((2,), 0.5 * 12**-0.5))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        object.__setattr__(photo, "y", fake.from_tensor(photo.y).to("cuda"))
        assert photo.y.device.type == "cuda"
        assert host.plugin.residual_scale(photo).device.type == "cpu"
