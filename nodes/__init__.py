"""The pack's V3 nodes, by topic. A new node is a class in its topic's file and one entry in that file's NODES."""

from comfy_api.latest import ComfyExtension, io

from . import calibration, demo, finish, measurement, memory, operators, restore, samplers


class PosteriorExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            node
            for topic in (operators, calibration, measurement, samplers, restore, memory, finish, demo)
            for node in topic.NODES
        ]
