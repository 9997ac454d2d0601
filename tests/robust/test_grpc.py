"""gRPC among strangers: what is too large, half sent or no gRPC at all gets an error, and nobody else notices."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from real_server import Server, until

from fewbit.serve.kserve import protocol
from fewbit.serve.kserve.rpc import MAX_CALLS

INFER, STREAM = (f"/{protocol.INFERENCE}/{name}" for name in ("ModelInfer", "ModelStreamInfer"))
LIVE = f"/{protocol.INFERENCE}/ServerLive"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LIMIT_S = 240.0
"""For what takes milliseconds on a machine that nobody else uses."""
KEY = "a-key-of-these-tests"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", size: int | None = None) -> bytes:
    """A frame of HTTP/2; `size` is what it says of its length."""
    length = len(payload) if size is None else size
    return struct.pack(">I", length)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def hpack(*fields: tuple[str, str]) -> bytes:
    """Header fields, each spelled out."""
    return b"".join(bytes([0, len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in fields)


SETTINGS, HEADERS, DATA, END_STREAM, END_HEADERS = 4, 1, 0, 1, 4
CALL = hpack(
    (":method", "POST"), (":scheme", "http"), (":path", INFER), (":authority", "127.0.0.1"),
    ("content-type", "application/grpc"), ("te", "trailers"),
)  # fmt: skip
OPENED = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, CALL)


def started(*arguments: str, **more: Any) -> Server:
    """A server that speaks both; the port of gRPC is free when it is looked for, so one may be lost to others."""
    for attempt in range(3):
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        try:
            running = Server("--drain", "2", "--grpc-port", str(port), *arguments, **more)
            break
        except AssertionError:
            if attempt == 2:
                raise
    running.rpc = port
    return running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started("--request-timeout", "300")
    yield running
    running.close()


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.rpc}", options) as made:
        yield made


def asked(text: str = "The old fox", tokens: int = 8, request_id: str = "", pad: int = 0) -> Any:
    """A request as protocol says it, for `ensemble`."""
    message = protocol.messages()["ModelInferRequest"](model_name="ensemble", id=request_id)
    for name, kind, value in (
        ("text_input", "BYTES", struct.pack("<I", len(text) + pad) + text.encode() + b" " * pad),
        ("max_tokens", "INT32", struct.pack("<i", tokens)),
        ("min_tokens", "INT32", struct.pack("<i", tokens)),
        ("stream", "BOOL", b"\1"),
    ):
        if name != "stream" or request_id:
            message.inputs.add(name=name, datatype=kind, shape=[1, 1])
            message.raw_input_contents.append(value)
    return message


def infer(channel: grpc.Channel, raw: bytes) -> bytes:
    """The answer to one call, as it comes."""
    return channel.unary_unary(INFER)(raw, timeout=LIMIT_S)


@pytest.fixture
def unharmed(server: Server, channel: grpc.Channel) -> Iterator[None]:
    """Before and after the test the same request has the same answer, byte for byte, over gRPC and over HTTP."""
    before = infer(channel, asked().SerializeToString())
    yield
    assert infer(channel, asked().SerializeToString()) == before
    server.unharmed()
    server.quiet()


# ---- messages ----


@pytest.mark.slow
@pytest.mark.parametrize("size", [33 << 20, 200 << 20])
def test_a_message_that_is_too_large(server: Server, channel: grpc.Channel, unharmed, size: int):
    """In a call and in a stream; 32 MiB are the limit."""
    memory = server.rss()[0]
    raw = asked(pad=size).SerializeToString()
    with pytest.raises(grpc.RpcError) as found:
        infer(channel, raw)
    assert found.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, found.value
    with pytest.raises(grpc.RpcError) as found:
        list(channel.stream_stream(STREAM)(iter([raw]), timeout=LIMIT_S))
    assert found.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, found.value
    assert server.rss()[0] - memory < 64 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\xff" * 40, id="ones"),
        pytest.param(random.Random(1).randbytes(1000), id="random"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x0f", id="a length beyond the end"),
        pytest.param(asked().SerializeToString()[:-3], id="cut"),
        pytest.param(b"\x08", id="half a field"),
    ],
)
def test_a_message_that_is_none(channel: grpc.Channel, unharmed, raw: bytes):
    """An error of the client's; in a stream the others are answered all the same."""
    with pytest.raises(grpc.RpcError) as found:
        infer(channel, raw)
    assert found.value.code() is grpc.StatusCode.INVALID_ARGUMENT, found.value
    assert "the message is no ModelInferRequest" in found.value.details()
    good = asked(request_id="good").SerializeToString()
    answers = list(map(answer, channel.stream_stream(STREAM)(iter([raw, good]), timeout=LIMIT_S)))
    (error,) = (a.error_message for a in answers if a.error_message)
    assert "the message is no ModelInferRequest" in error
    assert {a.infer_response.id for a in answers if not a.error_message} == {"good"}


def answer(raw: bytes) -> Any:
    return protocol.messages()["ModelStreamInferResponse"].FromString(raw)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "//", "/inference.GRPCInferenceService/../ModelInfer", f"{INFER}x", "/x" * 2000])
def test_a_method_that_is_none(channel: grpc.Channel, unharmed, path: str):
    with pytest.raises(grpc.RpcError) as found:
        channel.unary_unary(path)(b"", timeout=LIMIT_S)
    assert found.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED), found.value


# ---- streams ----


@pytest.mark.slow
def test_a_stream_whose_client_has_said_all(channel: grpc.Channel, unharmed):
    """It is closed on one side before the first answer; all answers come. So do those of an id that is used twice."""
    call = channel.stream_stream(STREAM)
    assert list(call(iter(()), timeout=LIMIT_S)) == []
    requests = [asked(tokens=40, request_id="twice").SerializeToString()] * 2
    answers = [answer(raw) for raw in call(iter(requests), timeout=LIMIT_S)]
    assert not [a.error_message for a in answers if a.error_message]
    assert {a.infer_response.id for a in answers} == {"twice"}
    assert len(answers) % 2 == 0
    assert len(answers) >= 2 * 20  # a token may hold back its text


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancelled", "the connection is gone", "half of a connection"])
def test_a_stream_that_breaks_off(server: Server, channel: grpc.Channel, unharmed, how: str):
    """What runs is ended, and its blocks are free."""
    cancelled = server.metric("requests_cancelled_total")
    raw = asked(tokens=1900, request_id="long").SerializeToString()
    if how == "cancelled":
        call = channel.stream_stream(STREAM)(iter([raw]))
        next(call)
        call.cancel()
    else:
        with socket.create_connection(("127.0.0.1", server.rpc), LIMIT_S) as s:
            stream = CALL.replace(INFER.encode(), STREAM.encode())
            stream = stream.replace(bytes([len(INFER)]) + STREAM.encode(), bytes([len(STREAM)]) + STREAM.encode())
            message = b"\0" + struct.pack(">I", len(raw)) + raw
            opening = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, stream)
            s.sendall(opening + frame(DATA, 0, 1, message))
            server.reaches("num_requests_running", 1, LIMIT_S)
            if how == "half of a connection":
                s.shutdown(socket.SHUT_WR)
                server.reaches("num_requests_running", 0, LIMIT_S)
    server.quiet()
    server.reaches("requests_cancelled_total", cancelled + 1)


# ---- what is no gRPC ----

GARBAGE = {
    "random bytes": random.Random(2).randbytes(4096),
    "HTTP/1.1": b"POST /v2/models/ensemble/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n{}",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.Random(3).randbytes(600),
    "random bytes after the preface": PREFACE + random.Random(4).randbytes(4096),
    "a frame that says 16 MiB": PREFACE + frame(SETTINGS, 0, 0, size=0xFFFFFF) + bytes(100_000),
    "settings of five bytes": PREFACE + frame(SETTINGS, 0, 0, bytes(5)),
    "headers that are none": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, b"\xff" * 50),
    "headers without an end": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 0, 1, CALL) + frame(DATA, 0, 1, b"x"),
    "data of no stream": PREFACE + frame(SETTINGS, 0, 0) + frame(DATA, 0, 0, b"x"),
    "data of a stream that was not opened": PREFACE + frame(SETTINGS, 0, 0) + frame(DATA, 0, 7, b"x"),
    "a stream of an even number": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 2, CALL),
    "a window of nothing": OPENED + frame(8, 0, 1, bytes(4)),
    "a message that ends too early": OPENED + frame(DATA, END_STREAM, 1, b"\0" + struct.pack(">I", 100) + b"x"),
    "a message of four GiB": OPENED + frame(DATA, 0, 1, b"\0\xff\xff\xff\xff" + bytes(1000)),
    "a message that claims to be packed": OPENED + frame(DATA, END_STREAM, 1, b"\1" + struct.pack(">I", 3) + b"abc"),
    "a message whose flag is 7": OPENED + frame(DATA, END_STREAM, 1, b"\7" + struct.pack(">I", 3) + b"abc"),
    "ten thousand resets": OPENED + frame(3, 0, 1, bytes(4)) * 10_000,
    "ten thousand pings": PREFACE + frame(SETTINGS, 0, 0) + frame(6, 0, 0, bytes(8)) * 10_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", GARBAGE)
def test_garbage(server: Server, unharmed, what: str):
    """The connection ends, or the call does; no request was begun."""
    begun = server.metric("requests_cancelled_total") + server.metric("request_success_total")
    with socket.create_connection(("127.0.0.1", server.rpc), LIMIT_S) as s:
        try:
            s.sendall(GARBAGE[what])
            s.shutdown(socket.SHUT_WR)
            while s.recv(65536):
                pass
        except TimeoutError:
            raise
        except OSError:
            pass  # it was refused: a reset, or no longer connected
    assert server.metric("requests_cancelled_total") + server.metric("request_success_total") == begun


@pytest.mark.slow
def test_connections_that_say_nothing(server: Server, unharmed):
    """Five hundred of them, half of which have begun to speak; others are answered meanwhile."""
    many = [socket.create_connection(("127.0.0.1", server.rpc), LIMIT_S) for _ in range(500)]
    for s in many[::2]:
        s.sendall(OPENED)
    server.unharmed()
    for s in many:
        s.close()


# ---- calls that need no key ----


def live(channel: grpc.Channel) -> bool:
    """Whether the probe is answered."""
    try:
        raw = channel.unary_unary(LIVE)(b"", timeout=LIMIT_S)
    except grpc.RpcError:
        return False
    return protocol.messages()["ServerLiveResponse"].FromString(raw).live


@pytest.mark.slow
def test_calls_without_a_key_take_no_room_from_others(tmp_path):
    """Many are opened and say nothing: the probes and those with a key are answered, and the many are ended."""
    (tmp_path / "keys").write_text(KEY)
    server = started("--api-key-file", str(tmp_path / "keys"), key=KEY)
    port = server.rpc
    probe = CALL.replace(bytes([len(INFER)]) + INFER.encode(), bytes([len(LIVE)]) + LIVE.encode())
    batches = [b"".join(frame(HEADERS, END_HEADERS, i, probe) for i in range(b, b + 600, 2)) for b in (1, 601, 1201)]
    many = [socket.create_connection(("127.0.0.1", port), LIMIT_S) for _ in range(6)]
    assert len(many) * 900 > MAX_CALLS
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for s in many:
                s.sendall(PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, 1, 0))  # and theirs are taken
                for batch in batches:
                    s.sendall(batch)
                    # gRPC itself turns some calls away while hundreds arrive at once; none of theirs is over by itself
                    until(lambda: live(channel), LIMIT_S, "an answer to a probe")
            key = (("authorization", f"Bearer {KEY}"),)
            assert channel.unary_unary(INFER)(asked().SerializeToString(), timeout=LIMIT_S, metadata=key)
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                infer(channel, asked().SerializeToString())
        server.unharmed()
    finally:
        for s in many:
            s.close()
        server.close()
