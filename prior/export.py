"""The demo prior in the shapes ComfyUI knows: state dicts for its own network classes, and a stock SD 1.5 checkpoint.

ComfyUI takes a checkpoint for SD 1.5 only at 320 channels. The slim networks become that wide *exactly*: same outputs, up to
the rounding of sums (and of float16 in the file).
"""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .networks import STOCK_BLOCKS, STOCK_WIDTHS, Decoder, Encoder, load

State = dict[str, Tensor]

LATENT_SCALE = 0.18215  # scaled latents = this * ComfyUI's LATENT
STOCK_CHANNELS = 320
CONTEXT = 768  # channels of SD1.x's text conditioning
METADATA = {"name": "comfyui-posterior demo prior", "license": "CC0-1.0"}


def comfy_unet_state(unet_state: State) -> State:
    """Keys and tensors of ComfyUI's UNetModel: the UNet's own plus cross-attention that is zero, hence does nothing."""
    state = dict(unet_state)
    for key, query in unet_state.items():
        if key.endswith(".attn1.to_q.weight"):
            block, c = key.removesuffix("attn1.to_q.weight"), len(query)
            state[f"{block}attn2.to_q.weight"] = query.new_zeros(c, c)
            state[f"{block}attn2.to_k.weight"] = query.new_zeros(c, CONTEXT)
            state[f"{block}attn2.to_v.weight"] = query.new_zeros(c, CONTEXT)
            state[f"{block}attn2.to_out.0.weight"] = query.new_zeros(c, c)
            state[f"{block}attn2.to_out.0.bias"] = query.new_zeros(c)
            state[f"{block}norm2.weight"] = query.new_zeros(c)
            state[f"{block}norm2.bias"] = query.new_zeros(c)
    return state


def comfy_vae_state(autoencoder_state: State) -> State:
    """Keys and tensors of ComfyUI's TAESD: the slim autoencoder padded with zeros to the stock widths and blocks.

    Exact, for TAESD has no norms: a padded channel is 0 everywhere, and a block of zeros is the ReLU that stands in its place.
    """
    with torch.device("meta"):
        stock = {"encoder": Encoder(STOCK_WIDTHS, STOCK_BLOCKS), "decoder": Decoder(STOCK_WIDTHS, STOCK_BLOCKS)}
    state = {"vae_scale": torch.tensor(LATENT_SCALE), "vae_shift": torch.tensor(0.0)}
    for name, network in stock.items():
        for key, value in network.state_dict().items():
            padded = torch.zeros(value.shape)
            if (slim := autoencoder_state.get(f"{name}.{key}")) is not None:
                padded[tuple(slice(n) for n in slim.shape)] = slim
            state[f"taesd_{name}.{key}"] = padded
    return state


def widen(unet_state: State, factor: int) -> State:
    """The same UNet with `factor` times the channels: each is repeated in place, and the next layer reads the first of its repeats.

    Repeats change no mean and no variance, so norms stay as they are, and groups and heads keep their members. The weights that
    read the other repeats are 0; none is divided, so float16 weights stay exact, except the queries: the inner products of
    attention grow by `factor` and are divided by sqrt(factor) more.

    The wide sinusoids hold the slim ones at every `factor`-th place, so that `time_embed` follows the same rule.
    """
    state = {}
    for key, weight in unet_state.items():
        if not key.startswith("out.2."):  # the last layer gives eps, whose channels stay
            weight = weight.repeat_interleave(factor, 0)
        if weight.ndim > 1 and not key.startswith("input_blocks.0."):  # the first layer reads latents, whose channels stay
            narrow = weight
            weight = narrow.new_zeros(len(narrow), factor * narrow.shape[1], *narrow.shape[2:])
            weight[:, ::factor] = narrow
        if key.endswith(".attn1.to_q.weight"):
            weight *= factor**-0.5
        state[key] = weight
    return state


def zero_text_encoder() -> State:
    """SD1.x's CLIP text encoder, keys under `text_model.`, all zero: CLIPTextEncode works and gives zeros."""
    width, inner, vocabulary, length = CONTEXT, 3072, 49408, 77
    shapes = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (length, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for i in range(12):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (width, width)
            shapes[f"{layer}.self_attn.{name}.bias"] = (width,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (width,)
        shapes[f"{layer}.mlp.fc1.weight"], shapes[f"{layer}.mlp.fc1.bias"] = (inner, width), (inner,)
        shapes[f"{layer}.mlp.fc2.weight"], shapes[f"{layer}.mlp.fc2.bias"] = (width, inner), (width,)
    return {f"text_model.{key}": torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}


def stock_checkpoint() -> State:
    """The demo prior as a complete SD 1.5 checkpoint, float16 (the VAE's scale and shift float32)."""
    unet, autoencoder = load()
    unet_state = comfy_unet_state(widen(unet.state_dict(), STOCK_CHANNELS // unet.channels))
    vae_state = comfy_vae_state(autoencoder.state_dict())
    return {
        **{f"model.diffusion_model.{key}": value.half() for key, value in unet_state.items()},
        **{f"first_stage_model.{key}": value.half() if value.ndim else value for key, value in vae_state.items()},
        **{f"cond_stage_model.transformer.{key}": value for key, value in zero_text_encoder().items()},
    }


def write_stock_checkpoint(path: str | Path) -> None:
    """Write `stock_checkpoint()` to a .safetensors file, about 450 MB; an interrupted run leaves no broken file under the name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(stock_checkpoint(), part, METADATA)
    part.chmod(0o644)  # safetensors makes it readable by its owner only
    os.replace(part, path)
