"""Load on a server: requests by a schedule, answers stamped as they arrive, figures in the names of both schools.

`datasets/` says what is asked, `arrivals` when, `http` and `answer` how it is heard, `drive` sends, `metrics` and
`report` count, `session` puts it together. Nothing here imports torch, so that the client is light.
"""

from fewbit.measure.load.arrivals import Ramp, schedule
from fewbit.measure.load.datasets import Sample, Wanted, dataset_named, datasets, distinct, fingerprint
from fewbit.measure.load.endpoint import PATHS, Asking, Endpoint, client_of, served_models
from fewbit.measure.load.metrics import read_objectives
from fewbit.measure.load.report import SCHEMA, Result, environment, report
from fewbit.measure.load.session import Load, load_of, measure, middle, ratios, spread, warmups
from fewbit.measure.rows import file_hash

__all__ = [
    "PATHS",
    "SCHEMA",
    "Asking",
    "Endpoint",
    "Load",
    "Ramp",
    "Result",
    "Sample",
    "Wanted",
    "client_of",
    "dataset_named",
    "datasets",
    "distinct",
    "environment",
    "file_hash",
    "fingerprint",
    "load_of",
    "measure",
    "middle",
    "ratios",
    "read_objectives",
    "report",
    "schedule",
    "served_models",
    "spread",
    "warmups",
]
