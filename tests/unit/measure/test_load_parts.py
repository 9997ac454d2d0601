"""The load generator's parts: HTTP in any pieces, schedules, figures by hand."""

from __future__ import annotations

import math

import h11
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import RequestError
from fewbit.measure.load import Ramp, read_objectives, schedule
from fewbit.measure.load.answer import EventReader, Record
from fewbit.measure.load.http import MAX_HEAD, ExchangeError, ResponseReader, Url
from fewbit.measure.load.metrics import Figures, figures, is_good, miscounted, peaks, vllm_summary

# --- HTTP -------------------------------------------------------------------------------------------------------------

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nA;note=1\r\n0123456789\r\n1\r\n\n\r\n0\r\nTrailer: x\r\n\r\n"
)
RESPONSES = [
    (CHUNKED, b"hello0123456789\n"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
    (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    (b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno", b"no"),
    (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
]


def by_h11(response: bytes) -> tuple[int, bytes, bool]:
    """Status, body and whether the connection may be used again, by another's reading."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(response)
    connection.receive_data(b"")
    status, body = 0, b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
    return status, body, connection.their_state is not h11.MUST_CLOSE


@pytest.mark.parametrize(("response", "body"), RESPONSES, ids=range(len(RESPONSES)))
def test_a_response_in_any_pieces_is_what_h11_reads(response, body):
    expected = by_h11(response)
    assert expected[1] == body
    for size in range(1, len(response) + 1):
        reader, got = ResponseReader(), b""
        for start in range(0, len(response), size):
            got += reader.feed(response[start : start + size])
        if not reader.done:
            reader.close()
        assert (reader.status, got, reader.keep_alive) == expected
        assert reader.done


@pytest.mark.parametrize(("response", "body"), [r for r in RESPONSES if b"1.0" not in r[0] and r[1]], ids=str)
def test_a_response_that_breaks_off_is_no_response(response, body):
    for length in range(len(response)):
        reader = ResponseReader()
        reader.feed(response[:length])
        assert not reader.done
        with pytest.raises(ExchangeError, match=r"no answer|in the middle of the answer"):
            reader.close()


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabc\r\n",
        b"x" * (MAX_HEAD + 1),
    ],
    ids=lambda r: str(r[-20:]),
)
def test_what_is_no_http_is_refused(response):
    with pytest.raises(ExchangeError):
        ResponseReader().feed(response)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000, False, "")),
        ("http://h:1/v1/", ("h", 1, False, "")),
        ("https://h/openai/v1", ("h", 443, True, "/openai")),
        ("http://[::1]:9", ("::1", 9, False, "")),
    ],
)
def test_urls(text, parts):
    url = Url.parse(text)
    assert (url.host, url.port, url.tls, url.prefix) == parts


@pytest.mark.parametrize("text", ["ftp://h", "http://", "h:port", "h:99999999", "http://h/?q", "http://[::1"])
def test_what_is_no_url(text):
    with pytest.raises(RequestError, match="expected http://host:port"):
        Url.parse(text)


@given(st.lists(st.text(alphabet="ab \u00e9", max_size=5), max_size=6), st.data())
def test_events_in_any_pieces(texts, data):
    line = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    body = b"".join(b": ping" + line + b"data: " + text.encode() + line + line for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=5)))
    reader, found = EventReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        found += reader.feed(body[start:end])
    assert [event.decode() for event in found + reader.finish()] == texts


def test_an_event_of_two_lines_and_one_without_an_end():
    reader = EventReader()
    assert reader.feed(b"event: x\ndata:a\ndata: b\n\ndata: [DO") == [b"a\nb"]
    assert reader.feed(b"NE]") == []
    assert reader.finish() == [b"[DONE]"]


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0, math.inf])
def test_a_schedule_has_its_rate_and_its_burstiness(burstiness):
    due = np.array(schedule(20_000, 50, burstiness=burstiness, seed=7))
    gaps = np.diff(due, prepend=0)
    assert due[-1] == pytest.approx(20_000 / 50)
    assert (gaps >= 0).all()
    # the coefficient of variation of a gamma distribution is shape ** -1/2
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, abs=0.05)


def test_a_schedule_is_its_seed():
    assert schedule(9, 3, seed=1) == schedule(9, 3, seed=1)
    assert schedule(9, 3, seed=1) != schedule(9, 3, seed=2)


def test_all_at_once_and_nothing():
    assert schedule(3, math.inf) == [0, 0, 0]
    assert schedule(0, 5) == []


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_ramp_goes_from_its_first_rate_to_its_last(kind):
    due = np.array(schedule(101, math.inf, burstiness=math.inf, ramp=Ramp(kind, 1, 16)))
    rates = 1 / np.diff(due, prepend=0)
    assert rates[[0, -1]] == pytest.approx([1, 16])
    assert rates[50] == pytest.approx(8.5 if kind == "linear" else 4)


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (1, 0), (math.nan, 1)])
def test_rates_that_are_none(rate, burstiness):
    with pytest.raises(RequestError, match="expected numbers above 0"):
        schedule(3, rate, burstiness=burstiness)
    with pytest.raises(RequestError, match="expected rates above 0"):
        Ramp("linear", 0, 5)


# --- figures ----------------------------------------------------------------------------------------------------------


def record(**fields) -> Record:
    made = Record(sent=10.0, ended=12.0, first_chunk=10.4, arrivals=[10.5, 10.7, 11.3], texts=["a b ", "c ", "d e f"])
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def words(text: str) -> int:
    return len(text.split())


def test_figures_of_both_schools():
    found = figures(record(usage={"prompt_tokens": 4, "completion_tokens": 6}, scheduled=9.75), None, words)
    assert found.ttft == pytest.approx(0.5)
    assert found.e2el == pytest.approx(1.3)
    assert found.tpot == pytest.approx(0.8 / 5)
    assert found.inter_token == pytest.approx(0.8 / 4)  # the first chunk has two tokens
    assert found.itls == pytest.approx([0.2, 0.6])
    assert (found.tokens, found.source, found.retokenized, found.prompt_tokens) == (6, "usage", 6, 4)
    assert found.waited == pytest.approx(0.25)


def test_the_first_of_chunks_of_one_token_is_one_token():
    """However a tokenizer cuts it when it stands alone; one token may be without text, the one that ended it."""
    made = record(usage={"completion_tokens": 4})
    assert figures(made, None, words).inter_token == pytest.approx(0.8 / 3)


def test_one_token_has_no_time_between_tokens():
    alone = record(arrivals=[10.5], texts=["a"], usage={"completion_tokens": 1})
    found = figures(alone, 9, words)
    assert found.tpot is None
    assert found.inter_token is None
    assert found.prompt_tokens == 9
    assert is_good(found, {"tpot": 0.001, "ttft": 0.5})
    assert not is_good(found, {"ttft": 0.499})


@pytest.mark.parametrize(
    ("counted", "finish", "wrong"), [(6, "stop", 0), (7, "stop", 0), (7, "length", 1), (5, "stop", 1)]
)
def test_the_token_that_ends_a_text_is_not_in_it(counted, finish, wrong):
    made = record(usage={"completion_tokens": counted}, finish_reason=finish)
    assert miscounted(made, figures(made, None, words)) == wrong


def test_percentiles_by_hand():
    """Of 10, 20, 30, 40 ms: between the ranks linearly, as vLLM has it; the deviation is the population's."""
    found = vllm_summary("ttft", [0.04, 0.01, 0.03, 0.02], [25, 99.9])
    assert found == pytest.approx(
        {
            "mean_ttft_ms": 25, "median_ttft_ms": 25, "std_ttft_ms": math.sqrt(125), "p25_ttft_ms": 17.5,
            "p99.9_ttft_ms": 39.97,
        }
    )  # fmt: skip
    assert vllm_summary("itl", [], [99]) == dict.fromkeys(
        ["mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms"]
    )  # fmt: skip


def test_peaks():
    records = [
        Record(sent=0.0, ended=2.0, first_chunk=0.5, arrivals=[0.5, 1.5], texts=["a", "b"]),
        Record(sent=1.0, ended=1.8, first_chunk=1.2, arrivals=[1.2, 1.7], texts=["a", "b"]),
        Record(sent=2.0, ended=3.0, error="x"),
    ]
    one = Figures(0, None, 0, [], 0, None, 4, "usage", None, None, None)
    assert peaks([(r, one) for r in records[:2]], records) == (6, 2)


def test_objectives():
    expected = {"ttft": 0.2, "tpot": 0.05, "e2el": 5.0}
    assert read_objectives("ttft_ms=200,tpot_ms=50,e2el_ms=5000") == expected
    assert read_objectives("ttft:200 tpot:50 e2el:5000") == expected
    assert read_objectives("time_to_first_token:200 inter_token_latency:50 request_latency:5000") == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tttf_ms=5", "no figure 'tttf_ms'; did you mean 'ttft'"),
        ("ttft_ms=fast", "expected milliseconds above 0"),
        ("ttft_ms=0", "above 0"),
        ("ttft", "above 0"),
        (" ", "names no objective"),
    ],
)
def test_objectives_that_are_none(text, says):
    with pytest.raises(RequestError, match=says):
        read_objectives(text)
