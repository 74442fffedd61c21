"""Everything that touches ComfyUI's internals, and nothing else does.

ComfyUI runs a whole prompt under `torch.inference_mode()`, may page weights in and out while a network runs, and has attention
kernels without a gradient. In here is what it takes to differentiate through its models all the same; what cannot be
differentiated correctly is refused by name before the first step, because a wrong gradient is a wrong picture that nobody
notices. ComfyUI is imported inside functions: a renamed internal then fails one node, with a message, not the pack.

    gradients    autograd inside inference mode, and model calls that have a gradient
    refusals     what has none, by name
    internals    what this ComfyUI does not have
    loading      models side by side in memory, and twins of those that the host pages
    memory       what a run needs, and what there is
    recompute    computing activations twice instead of keeping them
    codec        the VAE as a differentiable map
    faults       a cancelled run, and NaN on the way
    guard        autograd against finite differences
    readout      what the node says while it runs
    plugin       the SAMPLER that puts these together
    sampling     a whole run inside one node
    demo_models  MODEL, CLIP and VAE around the demo prior
"""

from .codec import Codec, check_sizes, check_vae, latent_size, side_multiple, works_on_pixels
from .demo_models import null_clip, picture_vae, pixel_vae, slim_sd15
from .faults import naming_lack_of_memory, saved, stoppable
from .gradients import differentiable_options, gradients, normal_tensors, normal_weights
from .internals import naming_what_is_missing, without
from .loading import resident, static_patcher
from .memory import GIB, Estimate, Plan, estimate, room
from .plugin import run_on_host, stock_sampler
from .readout import node_id, show_text
from .recompute import MODES
from .refusals import refuse_unsupported, state_of
from .sampling import MIDPOINTS, sample_latents, schedulers, sigmas_of

__all__ = [
    "GIB",
    "MIDPOINTS",
    "MODES",
    "Codec",
    "Estimate",
    "Plan",
    "check_sizes",
    "check_vae",
    "differentiable_options",
    "estimate",
    "gradients",
    "latent_size",
    "naming_lack_of_memory",
    "naming_what_is_missing",
    "node_id",
    "normal_tensors",
    "normal_weights",
    "null_clip",
    "picture_vae",
    "pixel_vae",
    "refuse_unsupported",
    "resident",
    "room",
    "run_on_host",
    "sample_latents",
    "saved",
    "schedulers",
    "show_text",
    "side_multiple",
    "sigmas_of",
    "slim_sd15",
    "state_of",
    "static_patcher",
    "stock_sampler",
    "stoppable",
    "without",
    "works_on_pixels",
]
