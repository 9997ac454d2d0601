"""fewbit's own client against a live server, and against servers that are broken."""

from __future__ import annotations

import socket
import threading

import pytest
from serve_names import SAYS
from test_serve_live import until

import fewbit
from fewbit.client import OverloadedServerError
from fewbit.errors import RequestError

TALK = [{"role": "user", "content": "Count!"}]


def test_query_chat_stream_models_health(live, engine):
    client = fewbit.Client(live + "/v1/", model="storyteller")
    assert client.query(["a", "b"], top_k=1, max_tokens=50) == [SAYS, SAYS]
    assert [r.params.top_k for r in engine.seen] == [1, 1]
    assert client.query("a", max_tokens=50, n=2) == [SAYS, SAYS]
    assert client.chat("Count!") == client.chat(TALK) == SAYS
    assert "".join(client.stream("a", max_tokens=50, stop=["trois"])) == "un, deux, "
    assert "".join(client.stream(TALK)) == SAYS
    assert client.models() == ["storyteller"]
    assert client.health()
    engine.down = True
    assert not client.health()


def test_leaving_a_stream_frees_its_blocks(live, engine):
    engine.hold_after = 5
    for _ in fewbit.Client(live).stream("a", max_tokens=90):
        break
    until(lambda: len(engine.aborted) == 1)


def test_errors_are_the_servers_own_words(live, engine):
    client = fewbit.Client(live)
    with pytest.raises(RequestError, match="did you mean 'max_tokens'") as error:
        client.query(["a"], maxtokens=5)
    assert error.value.param == "maxtokens"
    with pytest.raises(RequestError, match="'gpt' is not served here, 'storyteller' is"):
        fewbit.Client(live, model="gpt").chat("a")
    with pytest.raises(RequestError, match="n must be 1, got 3"):
        client.chat("a", n=3)
    with pytest.raises(RequestError, match="cannot be sent as JSON"):
        client.query(["a"], temperature=float("nan"))
    with pytest.raises(RequestError, match=r"Client\.stream"):
        client.query(["a"], stream=True)
    engine.fail_after = 2
    with pytest.raises(fewbit.FewbitError, match="out of memory"):
        list(client.stream("a", max_tokens=50))


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://h:99999", "http://h:x"])
def test_a_url_that_is_none(url):
    with pytest.raises(RequestError, match="url must be like"):
        fewbit.Client(url)


@pytest.fixture
def saying():
    """`saying(bytes)` gives the URL of a server that answers every connection with them and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answers(what: bytes) -> str:
        def forever() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    answers.heard.append(connection.recv(65536))
                    connection.sendall(what)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # hanging up on what was not read would be a reset
                        pass

        threading.Thread(target=forever, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    answers.heard = []
    yield answers
    listener.shutdown(socket.SHUT_RDWR)  # which ends the threads that wait for it
    listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        (b"", fewbit.FewbitError, "no answer from http://127"),
        (b"nonsense\r\n\r\n", fewbit.FewbitError, "no answer from"),
        (HEAD + b"not json", fewbit.FewbitError, "is no JSON"),
        (b"HTTP/1.1 503 No\r\nRetry-After: 7\r\n\r\n{}", OverloadedServerError, "{}"),
        (b"HTTP/1.1 401 No\r\n\r\n" + b'{"error":"Unauthorized"}', fewbit.FewbitError, "another API key: Unauthorized"),
        (b"HTTP/1.1 500 No\r\n\r\n", fewbit.FewbitError, r"failed \(500\): Internal Server Error"),
        (b"HTTP/1.1 400 No\r\n\r\n" + b'{"error":"text_input is missing"}', RequestError, "text_input is missing"),
    ],
)
def test_servers_that_answer_badly(saying, what, error, says):
    with pytest.raises(error, match=says) as raised:
        fewbit.Client(saying(what)).query(["a"])
    if error is OverloadedServerError:
        assert raised.value.retry_after_s == 7


def test_streams_that_break_off(saying):
    piece = b'data: {"choices":[{"text":"un"}]}\n\n'
    for end in (b"", b": still here\n\n", b'data: {"cho'):
        pieces = fewbit.Client(saying(HEAD + piece + end)).stream("a")
        assert next(pieces) == "un"
        with pytest.raises(fewbit.FewbitError, match="broke off"):
            next(pieces)


def test_nobody_there():
    with socket.socket() as held:  # nobody else can listen there meanwhile
        held.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{held.getsockname()[1]}"
        assert not fewbit.Client(url).health()
        with pytest.raises(fewbit.FewbitError, match="is a server there"):
            fewbit.Client(url).models()


def test_a_key_is_sent(saying):
    with pytest.raises(fewbit.FewbitError):
        fewbit.Client(saying(b""), "secret").query(["a"])
    assert b"Authorization: Bearer secret\r\n" in saying.heard[0]
