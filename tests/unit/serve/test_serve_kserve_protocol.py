"""Our messages are those of Triton's own client, field by field."""

from __future__ import annotations

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from fewbit.serve.kserve import protocol

_THEIRS = {
    **{f"{d.name}": d for d in service_pb2.DESCRIPTOR.message_types_by_name.values()},
    **{f"{d.name}": d for d in model_config_pb2.DESCRIPTOR.message_types_by_name.values()},
}
_OURS = protocol.messages()
# Messages whose fields we only have in part: a config has many that this server never sends.
_PART = {"ModelConfig", "ModelInput", "ModelOutput", "ModelInstanceGroup", "ModelVersionPolicy"}


def theirs(name):
    outer, _, inner = name.partition(".")
    return _THEIRS[outer].nested_types_by_name[inner] if inner else _THEIRS[outer]


def told(descriptor) -> dict:
    """Everything that the bytes of a message depend on."""
    found = {}
    for field in descriptor.fields:
        kind = field.message_type or field.enum_type
        found[field.name] = (
            field.number,
            field.type,
            field.is_repeated,
            kind.full_name if kind else None,
            field.containing_oneof.name if field.containing_oneof else None,
            told(kind) if field.message_type and kind.GetOptions().map_entry else None,
        )
    return found


@pytest.mark.parametrize("name", sorted(_OURS))
def test_the_fields_of_a_message(name):
    ours, real = told(_OURS[name].DESCRIPTOR), told(theirs(name))
    if name in _PART:
        assert ours.items() <= real.items()
    elif name.endswith("SharedMemoryStatusResponse"):  # never sent: the call is refused
        assert not ours
    else:
        assert ours == real


def test_nothing_is_missing():
    wanted = set(service_pb2.DESCRIPTOR.message_types_by_name)
    assert wanted <= set(_OURS)
    (service,) = service_pb2.DESCRIPTOR.services_by_name.values()
    assert service.full_name == protocol.INFERENCE
    methods = {m.name: m for m in service.methods}
    assert set(methods) == {*protocol.METHODS, "ModelStreamInfer"}
    for name in protocol.METHODS:
        assert methods[name].input_type.name == f"{name}Request"
        assert methods[name].output_type.name == f"{name}Response"


def test_the_values_of_enums():
    ours = _OURS["ModelInput"].DESCRIPTOR.fields_by_name["data_type"].enum_type
    real = model_config_pb2.DataType.DESCRIPTOR
    assert {v.name: v.number for v in ours.values} == {v.name: v.number for v in real.values}
    ours = _OURS["ModelInstanceGroup"].DESCRIPTOR.enum_types_by_name["Kind"]
    real = model_config_pb2.ModelInstanceGroup.Kind.DESCRIPTOR
    assert {v.name: v.number for v in ours.values} == {v.name: v.number for v in real.values}


def test_a_message_of_ours_is_read_by_theirs():
    made = _OURS["ModelInferRequest"](model_name="m", id="7", raw_input_contents=[b"abc"])
    made.inputs.add(name="x", datatype="BYTES", shape=[1, 1]).parameters["a"].int64_param = -3
    read = service_pb2.ModelInferRequest.FromString(made.SerializeToString())
    assert (read.model_name, read.id, read.raw_input_contents[0]) == ("m", "7", b"abc")
    assert (list(read.inputs[0].shape), read.inputs[0].parameters["a"].int64_param) == ([1, 1], -3)
