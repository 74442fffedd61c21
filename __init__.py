"""comfyui-posterior: restore photos by sampling the posterior under the checkpoint the user has loaded.

Importing this module needs only the standard library; ComfyUI calls `comfy_entrypoint` when it wants the nodes.
"""

WEB_DIRECTORY = "./web"  # help pages and the colours of links


async def comfy_entrypoint():  # noqa: ANN201 - its type lives in ComfyUI, which need not be there
    from .nodes import PosteriorExtension

    return PosteriorExtension()
