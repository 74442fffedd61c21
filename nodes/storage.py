"""A measurement as a file, to keep and to give to others."""

from comfy_api.latest import io

from ..operators import Measurement, load_measurement, save_measurement
from .host import files
from .measurement import OUTPUTS, output
from .pictures import shown
from .types import CATEGORY, MeasurementType

SUFFIX = ".safetensors"
FARTHEST = 2.0**28  # the sum of all values of the largest picture that a file may ask for


class SaveMeasurement(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorSaveMeasurement",
            display_name="Save Measurement",
            category=f"{CATEGORY}/measurement",
            description="Write a measurement, the photo with what happened to it and its noise, into one file in ComfyUI's output "
            "folder. Load Measurement reads it, here or at somebody else's.",
            search_aliases=["export measurement", "store", "share", "safetensors"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                MeasurementType.Input("measurement", tooltip="What was observed; from a Measurement node."),
                io.String.Input(
                    "filename_prefix",
                    default="measurements/posterior",
                    tooltip="Subfolder of the output folder and begin of the file's name; a number is added.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, measurement: Measurement, filename_prefix: str) -> io.NodeOutput:
        path, saved = files.new("filename_prefix", filename_prefix, SUFFIX)
        try:
            save_measurement(path, measurement)
        except ValueError as error:
            raise ValueError(f"measurement: {error}") from error
        except OSError as error:
            raise ValueError(
                f"filename_prefix: {path} cannot be written ({error.strerror or error}); choose another name or make room"
            ) from error
        name = "/".join(filter(None, (saved["subfolder"], saved["filename"])))
        text = f"saved as {name} [output]\nin {path.parent}"
        return io.NodeOutput(ui={**shown(cls, text=text), "measurements": [saved]})


class LoadMeasurement(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorLoadMeasurement",
            display_name="Load Measurement",
            category=f"{CATEGORY}/measurement",
            description="Read a measurement that Save Measurement wrote, from ComfyUI's input or output folder.",
            search_aliases=["import measurement", "open", "safetensors"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.stored(SUFFIX),
                    tooltip="A .safetensors file of the input folder, or of the output folder, with [output] behind. Press R to see new ones.",
                ),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = files.find("file", file, SUFFIX)
        try:
            measurement = load_measurement(path)
        except ValueError as error:
            raise ValueError(f"file: {error}. Choose another file, or save or copy this one again") from error
        if measurement.operator.in_shape[0] != 3:
            raise ValueError(
                f"file: {path} measures pictures of {measurement.operator.in_shape[0]} channels; the nodes restore those in colour, of 3"
            )
        largest = float(measurement.y.abs().max())
        if largest > FARTHEST:
            raise ValueError(
                f"file: {path} holds values of up to {largest:.3g}, which no photo has, within [-1, 1], nor sums of its pixels; save it anew"
            )
        return output(cls, measurement, f"noise {measurement.sigma / 2:.4g}")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        found = files.find("file", file, SUFFIX).stat()  # not the bytes: a checkpoint may be chosen by mistake
        return f"{found.st_mtime_ns} {found.st_size}"


NODES = [SaveMeasurement, LoadMeasurement]
