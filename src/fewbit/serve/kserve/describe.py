"""What the server says of itself and its models: metadata, configs, settings. Dicts in the protocol's JSON.

gRPC sends the same dicts: its messages have the same field names.
"""

from __future__ import annotations

from typing import Any

from fewbit.serve.kserve.front import Front, Named
from fewbit.serve.kserve.messages import VERSION
from fewbit.serve.kserve.signatures import BATCHES, Input, Output
from fewbit.version import __version__

EXTENSIONS = (
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "generate",
)
# What can be asked of these and never changes: nothing is traced, and the log is not the clients' to set.
TRACE_SETTINGS = {
    "trace_level": ["OFF"],
    "trace_rate": "0",
    "trace_count": "0",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
LOG_SETTINGS = {
    "log_file": "",
    "log_info": False,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
FIXED = "what is traced and logged is fixed when the server starts, it cannot be set by a request"
NO_SHARED_MEMORY = "shared memory is not supported by this server: send tensors in the request"
_DATA_TYPES = {"BYTES": "TYPE_STRING"}


def server() -> dict[str, Any]:
    """GET /v2."""
    return {"name": "fewbit", "version": __version__, "extensions": list(EXTENSIONS)}


def metadata(named: Named) -> dict[str, Any]:
    """GET /v2/models/M. Every tensor has a first dimension for the rows of a request."""

    def shown(one: Input | Output) -> dict[str, Any]:
        return {"name": one.name, "datatype": one.datatype, "shape": [-1, *one.dims]}

    return {
        "name": named.name,
        "versions": [VERSION],
        "platform": "fewbit",
        "inputs": [shown(i) for i in named.signature.inputs],
        "outputs": [shown(o) for o in named.signature.outputs],
    }


def config(front: Front, named: Named) -> dict[str, Any]:
    """GET /v2/models/M/config."""
    model = named.model or next(iter(front.models.names), "")
    loaded = next((service for service in front.models.ready if service.name == model), None)
    parameters = {"model": model}
    kind = "KIND_AUTO"
    if loaded is not None:
        kind = "KIND_GPU" if loaded.client.info.device.startswith("cuda") else "KIND_CPU"
        parameters["max_model_len"] = str(loaded.max_model_len)
    inputs = [
        {"name": i.name, "data_type": _data_type(i), "dims": list(i.dims), "optional": not i.required}
        for i in named.signature.inputs
    ]
    outputs = [{"name": o.name, "data_type": _data_type(o), "dims": list(o.dims)} for o in named.signature.outputs]
    return {
        "name": named.name,
        "platform": "",
        "backend": "fewbit",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": BATCHES,
        "input": inputs,
        "output": outputs,
        "instance_group": [{"name": f"{named.name}_0", "kind": kind, "count": 1}],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        "model_transaction_policy": {"decoupled": named.signature.streams},
    }


def _data_type(one: Input | Output) -> str:
    return _DATA_TYPES.get(one.datatype, f"TYPE_{one.datatype}")
