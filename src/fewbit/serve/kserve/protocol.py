"""The messages of `inference.GRPCInferenceService` and of gRPC's health service, made from tables of their fields.

The names, numbers and types are the protocol's. Fields of a model's config that this server never sends are left out;
readers of the protocol take them to be absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

# message: its fields as "name number type"; "[]": repeated; "{}": a map from strings; "choice:": all are in this oneof.
# A type that is not a scalar is a message or enum of the table; those inside another have its name before a dot.
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live 1 bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready 1 bool",
    "ModelReadyRequest": "name 1 string, version 2 string",
    "ModelReadyResponse": "ready 1 bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name 1 string, version 2 string, extensions 3 string[]",
    "ModelMetadataRequest": "name 1 string, version 2 string",
    "ModelMetadataResponse": (
        "name 1 string, versions 2 string[], platform 3 string, inputs 4 ModelMetadataResponse.TensorMetadata[], "
        "outputs 5 ModelMetadataResponse.TensorMetadata[]"
    ),
    "ModelMetadataResponse.TensorMetadata": "name 1 string, datatype 2 string, shape 3 int64[]",
    "InferParameter": (
        "parameter_choice: bool_param 1 bool, int64_param 2 int64, string_param 3 string, double_param 4 double, "
        "uint64_param 5 uint64"
    ),
    "InferTensorContents": (
        "bool_contents 1 bool[], int_contents 2 int32[], int64_contents 3 int64[], uint_contents 4 uint32[], "
        "uint64_contents 5 uint64[], fp32_contents 6 float[], fp64_contents 7 double[], bytes_contents 8 bytes[]"
    ),
    "ModelInferRequest": (
        "model_name 1 string, model_version 2 string, id 3 string, parameters 4 InferParameter{}, "
        "inputs 5 ModelInferRequest.InferInputTensor[], outputs 6 ModelInferRequest.InferRequestedOutputTensor[], "
        "raw_input_contents 7 bytes[]"
    ),
    "ModelInferRequest.InferInputTensor": (
        "name 1 string, datatype 2 string, shape 3 int64[], parameters 4 InferParameter{}, "
        "contents 5 InferTensorContents"
    ),
    "ModelInferRequest.InferRequestedOutputTensor": "name 1 string, parameters 2 InferParameter{}",
    "ModelInferResponse": (
        "model_name 1 string, model_version 2 string, id 3 string, parameters 4 InferParameter{}, "
        "outputs 5 ModelInferResponse.InferOutputTensor[], raw_output_contents 6 bytes[]"
    ),
    "ModelInferResponse.InferOutputTensor": (
        "name 1 string, datatype 2 string, shape 3 int64[], parameters 4 InferParameter{}, "
        "contents 5 InferTensorContents"
    ),
    "ModelStreamInferResponse": "error_message 1 string, infer_response 2 ModelInferResponse",
    "ModelConfigRequest": "name 1 string, version 2 string",
    "ModelConfigResponse": "config 1 ModelConfig",
    "ModelStatisticsRequest": "name 1 string, version 2 string",
    "StatisticDuration": "count 1 uint64, ns 2 uint64",
    "InferStatistics": (
        "success 1 StatisticDuration, fail 2 StatisticDuration, queue 3 StatisticDuration, "
        "compute_input 4 StatisticDuration, compute_infer 5 StatisticDuration, compute_output 6 StatisticDuration, "
        "cache_hit 7 StatisticDuration, cache_miss 8 StatisticDuration"
    ),
    "InferResponseStatistics": (
        "compute_infer 1 StatisticDuration, compute_output 2 StatisticDuration, success 3 StatisticDuration, "
        "fail 4 StatisticDuration, empty_response 5 StatisticDuration, cancel 6 StatisticDuration"
    ),
    "InferBatchStatistics": (
        "batch_size 1 uint64, compute_input 2 StatisticDuration, compute_infer 3 StatisticDuration, "
        "compute_output 4 StatisticDuration"
    ),
    "MemoryUsage": "type 1 string, id 2 int64, byte_size 3 uint64",
    "ModelStatistics": (
        "name 1 string, version 2 string, last_inference 3 uint64, inference_count 4 uint64, "
        "execution_count 5 uint64, inference_stats 6 InferStatistics, batch_stats 7 InferBatchStatistics[], "
        "memory_usage 8 MemoryUsage[], response_stats 9 InferResponseStatistics{}"
    ),
    "ModelStatisticsResponse": "model_stats 1 ModelStatistics[]",
    "ModelRepositoryParameter": (
        "parameter_choice: bool_param 1 bool, int64_param 2 int64, string_param 3 string, bytes_param 4 bytes"
    ),
    "RepositoryIndexRequest": "repository_name 1 string, ready 2 bool",
    "RepositoryIndexResponse": "models 1 RepositoryIndexResponse.ModelIndex[]",
    "RepositoryIndexResponse.ModelIndex": "name 1 string, version 2 string, state 3 string, reason 4 string",
    "RepositoryModelLoadRequest": (
        "repository_name 1 string, model_name 2 string, parameters 3 ModelRepositoryParameter{}"
    ),
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": (
        "repository_name 1 string, model_name 2 string, parameters 3 ModelRepositoryParameter{}"
    ),
    "RepositoryModelUnloadResponse": "",
    "SystemSharedMemoryStatusRequest": "name 1 string",
    "SystemSharedMemoryStatusResponse": "",
    "SystemSharedMemoryRegisterRequest": "name 1 string, key 2 string, offset 3 uint64, byte_size 4 uint64",
    "SystemSharedMemoryRegisterResponse": "",
    "SystemSharedMemoryUnregisterRequest": "name 1 string",
    "SystemSharedMemoryUnregisterResponse": "",
    "CudaSharedMemoryStatusRequest": "name 1 string",
    "CudaSharedMemoryStatusResponse": "",
    "CudaSharedMemoryRegisterRequest": "name 1 string, raw_handle 2 bytes, device_id 3 int64, byte_size 4 uint64",
    "CudaSharedMemoryRegisterResponse": "",
    "CudaSharedMemoryUnregisterRequest": "name 1 string",
    "CudaSharedMemoryUnregisterResponse": "",
    "TraceSettingRequest": "settings 1 TraceSettingRequest.SettingValue{}, model_name 2 string",
    "TraceSettingRequest.SettingValue": "value 1 string[]",
    "TraceSettingResponse": "settings 1 TraceSettingResponse.SettingValue{}",
    "TraceSettingResponse.SettingValue": "value 1 string[]",
    "LogSettingsRequest": "settings 1 LogSettingsRequest.SettingValue{}",
    "LogSettingsRequest.SettingValue": (
        "parameter_choice: bool_param 1 bool, uint32_param 2 uint32, string_param 3 string"
    ),
    "LogSettingsResponse": "settings 1 LogSettingsResponse.SettingValue{}",
    "LogSettingsResponse.SettingValue": (
        "parameter_choice: bool_param 1 bool, uint32_param 2 uint32, string_param 3 string"
    ),
    "ModelConfig": (
        "name 1 string, platform 2 string, version_policy 3 ModelVersionPolicy, max_batch_size 4 int32, "
        "input 5 ModelInput[], output 6 ModelOutput[], instance_group 7 ModelInstanceGroup[], "
        "parameters 14 ModelParameter{}, backend 17 string, model_transaction_policy 19 ModelTransactionPolicy"
    ),
    "ModelInput": "name 1 string, data_type 2 DataType, dims 4 int64[], optional 8 bool",
    "ModelOutput": "name 1 string, data_type 2 DataType, dims 3 int64[]",
    "ModelInstanceGroup": "name 1 string, count 2 int32, kind 4 ModelInstanceGroup.Kind",
    "ModelParameter": "string_value 1 string",
    "ModelTransactionPolicy": "decoupled 1 bool",
    "ModelVersionPolicy": "policy_choice: latest 1 ModelVersionPolicy.Latest",
    "ModelVersionPolicy.Latest": "num_versions 1 uint32",
}
_ENUMS = {
    "DataType": (
        "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32 "
        "TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16"
    ),
    "ModelInstanceGroup.Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
}
_HEALTH_MESSAGES = {
    "HealthCheckRequest": "service 1 string",
    "HealthCheckResponse": "status 1 HealthCheckResponse.ServingStatus",
}
_HEALTH_ENUMS = {"HealthCheckResponse.ServingStatus": "UNKNOWN SERVING NOT_SERVING SERVICE_UNKNOWN"}
_TABLES = {INFERENCE: (_MESSAGES, _ENUMS), HEALTH: (_HEALTH_MESSAGES, _HEALTH_ENUMS)}
METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
)
"""The calls with one request `METHODRequest` and one answer `METHODResponse`. `ModelStreamInfer` has many of both."""


class Field(NamedTuple):
    """A field of a message: `kind` is a scalar's name, a message or an enum; `form` is "", "[]" or "{}"."""

    name: str
    number: int
    kind: str
    form: str


def fields(line: str) -> tuple[str, list[Field]]:
    """Of a message in a table: the name of the oneof that its fields are in ("": they are in none), and the fields."""
    oneof, _, rest = line.rpartition(": ")
    found = []
    for one in filter(None, rest.split(", ")):
        name, number, kind = one.split(" ")
        plain = kind.rstrip("[]{}")
        found.append(Field(name, int(number), plain, kind.removeprefix(plain)))
    return oneof, found


@cache
def messages(service: str = INFERENCE) -> dict[str, Any]:
    """The message classes of a service by name, in a pool of their own: others may have loaded the same protocol."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    package = service.rpartition(".")[0]
    file = descriptor_pb2.FileDescriptorProto(name=f"fewbit/{package}.proto", package=package, syntax="proto3")
    table, enums = _TABLES[service]
    made: dict[str, Any] = {}
    for name in sorted(table, key=lambda n: n.count(".")):
        outer, _, short = name.rpartition(".")
        made[name] = made[outer].nested_type.add(name=short) if outer else file.message_type.add(name=short)
    for name, values in enums.items():
        outer, _, short = name.rpartition(".")
        enum = made[outer].enum_type.add(name=short) if outer else file.enum_type.add(name=short)
        for number, value in enumerate(values.split(" ")):
            enum.value.add(name=value, number=number)
    for name, message in made.items():
        oneof, found = fields(table[name])
        if oneof:
            message.oneof_decl.add(name=oneof)
        for field in found:
            added = message.field.add(name=field.name, number=field.number)
            if oneof:
                added.oneof_index = 0
            kind = _entry(message, f"{package}.{name}", field, package, enums) if field.form == "{}" else field.kind
            _set_type(added, kind, package, enums)
            added.label = added.LABEL_REPEATED if field.form else added.LABEL_OPTIONAL
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{n}")) for n in table}


def _entry(message: Any, full: str, field: Field, package: str, enums: Mapping[str, str]) -> str:
    """A map is a repeated message of a key and a value."""
    entry = message.nested_type.add(name=field.name.title().replace("_", "") + "Entry")
    entry.options.map_entry = True
    for number, (name, kind) in enumerate((("key", "string"), ("value", field.kind)), 1):
        added = entry.field.add(name=name, number=number)
        added.label = added.LABEL_OPTIONAL
        _set_type(added, kind, package, enums)
    return f"{full.removeprefix(package + '.')}.{entry.name}"


def _set_type(field: Any, kind: str, package: str, enums: Mapping[str, str]) -> None:
    if kind[0].islower():  # scalars are, names of messages are not
        field.type = getattr(field, f"TYPE_{kind.upper()}")
        return
    field.type = field.TYPE_ENUM if kind in enums else field.TYPE_MESSAGE
    field.type_name = f".{package}.{kind}"
