"""Stable Diffusion's networks at full size, with random weights or with none at all, built without a file."""

from typing import Any, Literal

import torch

Family = Literal["SD15", "SDXL"]
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2] * 4,
    "channel_mult": [1, 2, 4, 4], "num_heads": 8, "num_head_channels": -1, "use_spatial_transformer": True,
    "transformer_depth": [1] * 6 + [0, 0], "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1,
    "context_dim": 768, "use_linear_in_transformer": False, "legacy": False,
}  # fmt: skip
SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2] * 3,
    "channel_mult": [1, 2, 4], "num_head_channels": 64, "use_spatial_transformer": True, "num_classes": "sequential",
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10, "context_dim": 2048, "use_linear_in_transformer": True, "adm_in_channels": 2816,
    "legacy": False,
}  # fmt: skip
KL = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def base_model(family: Family, dtype: torch.dtype, device: str | torch.device) -> Any:
    """A ComfyUI BaseModel of the family; on "meta" it has no memory, elsewhere random weights that keep activations in size."""
    import comfy.supported_models

    settings = getattr(comfy.supported_models, family)({**(SD15 if family == "SD15" else SDXL), "dtype": dtype})
    settings.set_inference_dtype(dtype, None)
    model = settings.get_model({}, "", device=device)
    fill(model.diffusion_model)
    return model


def kl_network(dtype: torch.dtype, device: str | torch.device) -> torch.nn.Module:
    """Stable Diffusion's own autoencoder, of 84 million weights, as ComfyUI builds it."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device(device):
        network = AutoencoderKL(ddconfig=KL, embed_dim=4).to(dtype)
    fill(network)
    return network


def fill(network: torch.nn.Module) -> None:
    """Random weights of variance 1 / inputs, norms that do nothing else, no biases. ComfyUI leaves them uninitialised."""
    for name, weight in network.named_parameters():
        if weight.is_meta:
            continue
        with torch.no_grad():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.7 * weight[0].numel() ** -0.5)
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
