"""Checkpoints, LoRAs and ControlNets with random weights, the smallest that ComfyUI's own loaders recognise.

ComfyUI tells architectures apart by the names and shapes of a few weights (comfy/model_detection.py), so most of a network
can be left out: one level with one residual block, no middle block and no attention on the way up still is an SD 1.5.

Two files are known exactly, and so is everything computed from them:

    zero_out=True   the last layer is zero. With sd21v (v-prediction) the denoiser is D(x, sigma) = x / (1 + sigma^2), the
                    exact one of the latent prior N(0, I); with sd15 and sdxl (eps) it is D(x, sigma) = x.
    vae="box"       encode is the 8x8 box mean, raw latent channel c = 5 (2 mean[c % 3] - 1) with images in [0, 1]; decode is
                    its inverse on channels 0 to 2 followed by nearest upsampling. Both are affine far beyond [0, 1]: to 2e-6
                    of the image between 0 and 1, 1e-4 between -2 and 3. (Save it as float32.)
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

UNET, VAE, CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."
CHANNELS = 320  # of every UNet level; the detection expects this width of the first convolution
EMBEDDING = 4 * CHANNELS
MMDIT_DEPTH = 2  # blocks of SD3's transformer
WIDTH = 64  # of TAESD, fixed by ComfyUI

Arch = Literal["sd15", "sd21v", "sdxl_vega", "sdxl", "sd3"]
Codec = Literal["taesd", "box", "kl"]


@dataclass(frozen=True)
class Spec:
    """What the loader recognises an architecture by.

    Attributes:
        context, pooled: widths of the two text conditionings.
        depths: transformer blocks beside each residual block of the UNet, level by level; empty where there is no UNet.
        linear: the transformers' projections are linear layers, not 1x1 convolutions.
        vector: width of the UNet's second conditioning (label_emb), 0 for none.
        lora: how LoRA trainers call the first transformer block.
    """

    context: int
    pooled: int
    latent_channels: int = 4
    depths: tuple[tuple[int, ...], ...] = ()
    linear: bool = False
    vector: int = 0
    lora: str = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"


_SDXL = {"linear": True, "vector": 2816, "lora": "lora_unet_input_blocks_4_1_transformer_blocks_0"}
SPECS: dict[str, Spec] = {
    "sd15": Spec(768, 768, depths=((1,),)),
    "sd21v": Spec(1024, 1024, depths=((1,),), linear=True),
    "sdxl_vega": Spec(2048, 1280, depths=((0, 0), (1, 1), (2, 2)), **_SDXL),  # the cheapest of the SDXL class
    "sdxl": Spec(2048, 1280, depths=((0, 0), (2, 2), (10, 10)), **_SDXL),
    "sd3": Spec(4096, 2048, latent_channels=16, lora="lora_unet_joint_blocks_0_x_block"),
}


def write_checkpoint(
    path: Path,
    arch: Arch,
    vae: Codec | None = "taesd",
    clip: bool = False,
    zero_out: bool = False,
    seed: int = 0,
    levels: int = 1,
    dtype: torch.dtype = torch.float32,
    kl_width: int = 32,
) -> Path:
    """Write a checkpoint that CheckpointLoaderSimple loads.

    Args:
        vae: random TAESD weights (2.4 M), the exact box codec, a random KL autoencoder (37 M: ComfyUI fixes the width of its
            encoder), or none.
        clip: with SD 1.5's text encoder (123 M, of fixed size); sd15 only. Without one, use `conditioning`.
        zero_out: zero the last layer.
        levels: resolutions of the UNet; sd15 and sd21v only.
        kl_width: channels of the KL decoder at full resolution; stock is 128.
    """
    spec = SPECS[arch]
    if clip and arch != "sd15":
        raise ValueError(f"clip: got {arch}, only sd15 has a text encoder here")
    if levels > 1 and arch not in ("sd15", "sd21v"):
        raise ValueError(f"levels: got {levels} for {arch}, whose levels are fixed by its detection")
    weights = Weights(seed)
    depths = spec.depths + ((0,),) * (levels - 1)
    last = _unet(weights, spec, depths) if depths else _mmdit(weights, spec)
    if arch == "sd21v":
        # ComfyUI tells v-prediction by the spread of this one vector of the full SD 2.1, used for nothing else here.
        weights[f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"] = weights.normal(CHANNELS)
    if zero_out:
        weights[f"{last}.weight"].zero_()
        weights[f"{last}.bias"].zero_()
    if vae == "kl":
        _kl(weights, spec.latent_channels, kl_width)
    elif vae is not None:
        _taesd(weights, spec.latent_channels)
        if vae == "box":
            _make_box(weights, spec.latent_channels)
    if clip:
        _clip_l(weights)
    return weights.save(path, dtype)


def write_lora(path: Path, arch: Arch = "sd15", rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a LoRA in kohya's format for layers of the first transformer."""
    spec, weights = SPECS[arch], Weights(seed)
    c, width = CHANNELS, 64 * MMDIT_DEPTH
    unet = (("attn1_to_q", c, c), ("attn2_to_v", c, spec.context), ("ff_net_2", c, 4 * c))
    mmdit = (("attn_qkv", 3 * width, width), ("mlp_fc2", width, 4 * width))
    for layer, out, into in unet if spec.depths else mmdit:
        key = f"{spec.lora}_{layer}"
        weights.linear(f"{key}.lora_down", rank, into, bias=False)
        weights.linear(f"{key}.lora_up", out, rank, bias=False)
        weights[f"{key}.alpha"] = torch.tensor(float(rank))
    return weights.save(path, dtype)


def write_controlnet(
    path: Path, arch: Arch = "sd15", seed: int = 0, levels: int = 1, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a ControlNet for a UNet of the same `levels`. Its output convolutions are not zero: it has an effect."""
    spec, weights = SPECS[arch], Weights(seed)
    _time_embedding(weights, CONTROL, spec)
    blocks = _input_blocks(weights, CONTROL, spec, spec.depths + ((0,),) * (levels - 1))
    _res_block(weights, f"{CONTROL}middle_block.0.", CHANNELS)
    for key in [*(f"zero_convs.{n}.0" for n in range(blocks)), "middle_block_out.0"]:
        weights.conv(f"{CONTROL}{key}", CHANNELS, CHANNELS, size=1)
    hint = (3, 16, 16, 32, 32, 96, 96, 256, CHANNELS)
    for i, (into, out) in enumerate(itertools.pairwise(hint)):
        weights.conv(f"{CONTROL}input_hint_block.{2 * i}", out, into)
    return weights.save(path, dtype)


def write_sd3_controlnet(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a ControlNet for the SD3, of one block, under the names of diffusers, as they are published."""
    import comfy.utils

    own, weights, width = Weights(seed), Weights(seed + 1), 64 * MMDIT_DEPTH
    _mmdit(own, SPECS["sd3"])
    for theirs, ours in comfy.utils.mmdit_to_diffusers({"depth": MMDIT_DEPTH, "num_blocks": 1}).items():
        key, part = (ours, None) if isinstance(ours, str) else ours[:2]
        if (found := own.get(f"{UNET}{key}")) is not None and not theirs.startswith(
            ("norm_out", "proj_out", "transformer_blocks.1.")
        ):
            weights[theirs] = (found if part is None else found.narrow(*part)).clone()
    weights.conv("pos_embed_input.proj", width, SPECS["sd3"].latent_channels, size=2)
    weights.linear("controlnet_blocks.0", width, width)
    return weights.save(path, dtype)


def conditioning(arch: Arch, seed: int = 0, tokens: int = 77) -> list[list]:
    """A random CONDITIONING, in place of an encoded prompt."""
    spec = SPECS[arch]
    g = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, tokens, spec.context, generator=g)
    return [[cond, {"pooled_output": torch.randn(1, spec.pooled, generator=g)}]]


class Weights(dict[str, Tensor]):
    """A state dict in the making: random layers that keep the size of their input, times `gain`, and zero biases."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def linear(self, key: str, out: int, into: int, bias: bool = True, gain: float = 1.0) -> None:
        self._layer(key, (out, into), bias, gain)

    def conv(self, key: str, out: int, into: int, size: int = 3, bias: bool = True, gain: float = 1.0) -> None:
        self._layer(key, (out, into, size, size), bias, gain)

    def norm(self, key: str, channels: int) -> None:
        self[f"{key}.weight"], self[f"{key}.bias"] = torch.ones(channels), torch.zeros(channels)

    def save(self, path: Path, dtype: torch.dtype) -> Path:
        save_file({key: value.to(dtype) for key, value in self.items()}, path)
        return path

    def _layer(self, key: str, shape: tuple[int, ...], bias: bool, gain: float) -> None:
        self[f"{key}.weight"] = self.normal(*shape) * (gain / math.sqrt(math.prod(shape[1:])))
        if bias:
            self[f"{key}.bias"] = torch.zeros(shape[0])


# Networks -------------------------------------------------------------------------------------------------------------


def _unet(weights: Weights, spec: Spec, depths: tuple[tuple[int, ...], ...]) -> str:
    """The UNet without middle block, and without attention in the output blocks. Returns the key of the last layer."""
    _time_embedding(weights, UNET, spec)
    _input_blocks(weights, UNET, spec, depths)
    n = 0
    for level in reversed(range(len(depths))):
        for i in range(len(depths[level]) + 1):
            _res_block(weights, f"{UNET}output_blocks.{n}.0.", 2 * CHANNELS)  # with the skip connection
            if level and i == len(depths[level]):
                weights.conv(f"{UNET}output_blocks.{n}.1.conv", CHANNELS, CHANNELS)
            n += 1
    weights.norm(f"{UNET}out.0", CHANNELS)
    weights.conv(f"{UNET}out.2", spec.latent_channels, CHANNELS)
    return f"{UNET}out.2"


def _time_embedding(weights: Weights, prefix: str, spec: Spec) -> None:
    weights.linear(f"{prefix}time_embed.0", EMBEDDING, CHANNELS)
    weights.linear(f"{prefix}time_embed.2", EMBEDDING, EMBEDDING)
    if spec.vector:
        weights.linear(f"{prefix}label_emb.0.0", EMBEDDING, spec.vector)
        weights.linear(f"{prefix}label_emb.0.2", EMBEDDING, EMBEDDING)


def _input_blocks(weights: Weights, prefix: str, spec: Spec, depths: tuple[tuple[int, ...], ...]) -> int:
    """The way down; returns the number of its blocks."""
    weights.conv(f"{prefix}input_blocks.0.0", CHANNELS, spec.latent_channels)
    n = 1
    for level, blocks in enumerate(depths):
        if level:
            weights.conv(f"{prefix}input_blocks.{n}.0.op", CHANNELS, CHANNELS)
            n += 1
        for depth in blocks:
            _res_block(weights, f"{prefix}input_blocks.{n}.0.", CHANNELS)
            if depth:
                _transformer(weights, f"{prefix}input_blocks.{n}.1.", spec, depth)
            n += 1
    return n


def _res_block(weights: Weights, prefix: str, into: int) -> None:
    weights.norm(f"{prefix}in_layers.0", into)
    weights.conv(f"{prefix}in_layers.2", CHANNELS, into)
    weights.linear(f"{prefix}emb_layers.1", CHANNELS, EMBEDDING)
    weights.norm(f"{prefix}out_layers.0", CHANNELS)
    weights.conv(f"{prefix}out_layers.3", CHANNELS, CHANNELS, gain=0.5)
    if into != CHANNELS:
        weights.conv(f"{prefix}skip_connection", CHANNELS, into, size=1)


def _transformer(weights: Weights, prefix: str, spec: Spec, depth: int) -> None:
    c = CHANNELS
    weights.norm(f"{prefix}norm", c)
    for key in ("proj_in", "proj_out"):
        if spec.linear:
            weights.linear(prefix + key, c, c, gain=0.7)
        else:
            weights.conv(prefix + key, c, c, size=1, gain=0.7)
    for i in range(depth):
        block = f"{prefix}transformer_blocks.{i}."
        for attention, context in (("attn1", c), ("attn2", spec.context)):
            for key, into in (("to_q", c), ("to_k", context), ("to_v", context)):
                weights.linear(f"{block}{attention}.{key}", c, into, bias=False)
            weights.linear(f"{block}{attention}.to_out.0", c, c)
        weights.linear(f"{block}ff.net.0.proj", 8 * c, c)
        weights.linear(f"{block}ff.net.2", c, 4 * c)
        for key in ("norm1", "norm2", "norm3"):
            weights.norm(block + key, c)


def _mmdit(weights: Weights, spec: Spec) -> str:
    """SD3's transformer, whose width follows from its depth. Returns the key of the last layer."""
    depth, width = MMDIT_DEPTH, 64 * MMDIT_DEPTH
    weights.conv(f"{UNET}x_embedder.proj", width, spec.latent_channels, size=2)
    for key, into in (("t_embedder", 256), ("y_embedder", spec.pooled)):
        weights.linear(f"{UNET}{key}.mlp.0", width, into)
        weights.linear(f"{UNET}{key}.mlp.2", width, width)
    weights.linear(f"{UNET}context_embedder", width, spec.context)
    weights[f"{UNET}pos_embed"] = weights.normal(1, 64 * 64, width) * 0.02  # patches of 2x2: up to 1024 x 1024 pixels
    for i in range(depth):
        for kind in ("context_block", "x_block"):
            block = f"{UNET}joint_blocks.{i}.{kind}."
            cut = kind == "context_block" and i == depth - 1  # after the last attention the text is not needed any more
            weights.linear(f"{block}attn.qkv", 3 * width, width)
            weights.linear(f"{block}adaLN_modulation.1", (2 if cut else 6) * width, width)
            if not cut:
                weights.linear(f"{block}attn.proj", width, width)
                weights.linear(f"{block}mlp.fc1", 4 * width, width)
                weights.linear(f"{block}mlp.fc2", width, 4 * width)
    weights.linear(f"{UNET}final_layer.adaLN_modulation.1", 2 * width, width)
    weights.linear(f"{UNET}final_layer.linear", 4 * spec.latent_channels, width)
    return f"{UNET}final_layer.linear"


def _taesd(weights: Weights, latent_channels: int) -> None:
    encoder, decoder = f"{VAE}taesd_encoder.", f"{VAE}taesd_decoder."
    weights.conv(f"{encoder}0", WIDTH, 3)
    weights.conv(f"{encoder}14", latent_channels, WIDTH)
    weights.conv(f"{decoder}1", WIDTH, latent_channels)
    weights.conv(f"{decoder}19", 3, WIDTH)
    for prefix, resamplings, blocks in (
        (encoder, (2, 6, 10), (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)),
        (decoder, (7, 12, 17), (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)),
    ):
        for i in resamplings:
            weights.conv(f"{prefix}{i}", WIDTH, WIDTH, bias=False)
        for i in blocks:
            for j in (0, 2, 4):
                weights.conv(f"{prefix}{i}.conv.{j}", WIDTH, WIDTH, gain=0.7)
    weights[f"{VAE}vae_scale"], weights[f"{VAE}vae_shift"] = torch.tensor(1.0), torch.tensor(0.0)


def _make_box(weights: Weights, latent_channels: int) -> None:
    """Set the TAESD weights to the box mean and nearest upsampling, on the first three of its channels."""
    offset = 8.0  # added to the image inside both networks: the ReLUs never cut
    scale = 0.002  # of raw latents inside the network: the decoder's 3 tanh(x / 3) is linear to 4e-6 at raw 5
    encoder, decoder = f"{VAE}taesd_encoder.", f"{VAE}taesd_decoder."
    for key, value in weights.items():
        if key.startswith((encoder, decoder)):
            value.zero_()  # what is left of the residual blocks is their skip connection
    rgb = range(3)
    weights[f"{encoder}0.weight"][rgb, rgb, 1, 1] = 1.0
    weights[f"{encoder}0.bias"][:3] = offset
    for i in (2, 6, 10):
        weights[f"{encoder}{i}.weight"][rgb, rgb, 1:, 1:] = 0.25  # stride 2, padding 1: these taps are a 2x2 cell
    for c in range(latent_channels):
        weights[f"{encoder}14.weight"][c, c % 3, 1, 1] = 10 * scale
    weights[f"{encoder}14.bias"][:] = -10 * scale * (offset + 0.5)
    weights[f"{VAE}vae_scale"].fill_(scale)
    weights[f"{decoder}1.weight"][rgb, rgb, 1, 1] = 0.1 / scale
    weights[f"{decoder}1.bias"][:3] = offset + 0.5
    for i in (7, 12, 17):
        weights[f"{decoder}{i}.weight"][rgb, rgb, 1, 1] = 1.0
    weights[f"{decoder}19.weight"][rgb, rgb, 1, 1] = 1.0
    weights[f"{decoder}19.bias"][:] = -offset


def _kl(weights: Weights, latent_channels: int, width: int) -> None:
    """Stable Diffusion's own kind of autoencoder. ComfyUI fixes the encoder at 128 channels and finds the decoder's `width`."""
    multiples = (1, 2, 4, 4)

    def res_block(prefix: str, out: int, into: int) -> None:
        weights.norm(f"{prefix}.norm1", into)
        weights.conv(f"{prefix}.conv1", out, into)
        weights.norm(f"{prefix}.norm2", out)
        weights.conv(f"{prefix}.conv2", out, out, gain=0.5)
        if out != into:
            weights.conv(f"{prefix}.nin_shortcut", out, into, size=1)

    def half(prefix: str, channels: int, ends: tuple[int, int], way: str, resampling: str, blocks: int) -> None:
        widths = [m * channels for m in multiples]
        levels = list(enumerate(widths))
        if way == "up":
            levels.reverse()
        width = widths[-1] if way == "up" else widths[0]
        weights.conv(f"{prefix}conv_in", width, ends[0])
        for level, out in levels:
            for i in range(blocks):
                res_block(f"{prefix}{way}.{level}.block.{i}", out, width)
                width = out
            if level != levels[-1][0]:
                weights.conv(f"{prefix}{way}.{level}.{resampling}.conv", out, out)
        middle = widths[-1]
        for key in ("block_1", "block_2"):
            res_block(f"{prefix}mid.{key}", middle, middle)
        weights.norm(f"{prefix}mid.attn_1.norm", middle)
        for key in ("q", "k", "v", "proj_out"):
            weights.conv(f"{prefix}mid.attn_1.{key}", middle, middle, size=1)
        weights.norm(f"{prefix}norm_out", width)
        weights.conv(f"{prefix}conv_out", ends[1], width)

    half(f"{VAE}encoder.", 128, (3, 2 * latent_channels), "down", "downsample", blocks=2)
    half(f"{VAE}decoder.", width, (latent_channels, 3), "up", "upsample", blocks=3)
    weights.conv(f"{VAE}quant_conv", 2 * latent_channels, 2 * latent_channels, size=1)
    weights.conv(f"{VAE}post_quant_conv", latent_channels, latent_channels, size=1)


def _clip_l(weights: Weights) -> None:
    """CLIP-L, of the size that SD 1.5's loader builds."""
    prefix, width = "cond_stage_model.transformer.text_model.", 768
    weights[f"{prefix}embeddings.token_embedding.weight"] = weights.normal(49408, width) * 0.02
    weights[f"{prefix}embeddings.position_embedding.weight"] = weights.normal(77, width) * 0.01
    for i in range(12):
        layer = f"{prefix}encoder.layers.{i}."
        for key in ("layer_norm1", "layer_norm2"):
            weights.norm(layer + key, width)
        for key in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.linear(f"{layer}self_attn.{key}", width, width)
        weights.linear(f"{layer}mlp.fc1", 4 * width, width)
        weights.linear(f"{layer}mlp.fc2", width, 4 * width)
    weights.norm(f"{prefix}final_layer_norm", width)
