"""The demo prior: a small latent diffusion model of drawn portraits. Needs torch, numpy and Pillow, not ComfyUI."""
