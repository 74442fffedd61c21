"""The pack's V3 nodes, by topic. A new node is a class in its topic's file and one entry in that file's NODES."""

from comfy_api.latest import ComfyExtension, io

from . import calibration, demo, finish, measurement, memory, operators, readouts, restore, samplers, storage
from .door import guarded, usable

NODES = [
    guarded(node)
    for topic in (operators, calibration, measurement, storage, samplers, restore, finish, readouts, memory, demo)
    for node in topic.NODES
]


class PosteriorExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return usable(NODES)
