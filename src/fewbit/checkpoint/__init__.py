"""Files in, files out: canonical names and QTensors on one side, each format's names and packings on the other."""

from fewbit.checkpoint.checkpoint import Checkpoint, Tensors, open_checkpoint
from fewbit.checkpoint.conversion import Conversion, Exported, convert, export, plan_export, plan_for
from fewbit.checkpoint.formats import format_named, formats
from fewbit.checkpoint.locate import locate
from fewbit.checkpoint.sources import text_folder
from fewbit.checkpoint.trtllm.modules import Parallel
from fewbit.checkpoint.trtllm.writer import Target
from fewbit.checkpoint.writer import CheckpointWriter, check_target

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Conversion",
    "Exported",
    "Parallel",
    "Target",
    "Tensors",
    "check_target",
    "convert",
    "export",
    "format_named",
    "formats",
    "locate",
    "open_checkpoint",
    "plan_export",
    "plan_for",
    "text_folder",
]
