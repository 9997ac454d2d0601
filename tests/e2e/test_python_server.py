"""`fewbit.serve` and `fewbit.deploy`: a server beside a script, which never outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

import fewbit
from fewbit.demo import demo_model
from fewbit.errors import CheckpointError, RecipeError
from fewbit.serve.handle import arguments_of

BEGUN = """
import sys, fewbit
server = fewbit.serve(sys.argv[1], port=0, grpc_port=0, device="cpu")
print(server.url, flush=True)
server.wait()
"""


@pytest.fixture(scope="module")
def storyteller():
    try:
        return demo_model()
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so nothing was served: {error}")


def test_options_are_those_of_the_command():
    given = {"port": 0, "max_batch": 4, "prefix_cache": False, "verbose": True, "name": None, "load": ["a", "b"]}
    words = "--port 0 --max-batch 4 --no-prefix-cache --verbose --load a --load b"
    assert arguments_of(given) == words.split()


def test_why_it_does_not_start_is_the_commands_own_line(storyteller):
    with pytest.raises(RecipeError, match="No such option: --max-bach"):
        fewbit.serve(storyteller, port=0, max_bach=3)


def test_a_deployment_is_deployed_first():
    deployment = fewbit.deploy("anything", "name")
    for call in (deployment.run, deployment.serve, deployment.stop):
        with pytest.raises(RecipeError, match=r"call deploy\(\) first"):
            call()


@pytest.mark.slow
def test_a_server_in_a_block(storyteller):
    with fewbit.serve(storyteller, port=0, grpc_port=0, device="cpu", name="teller") as server:
        client = fewbit.Client(server.url)
        assert client.models() == ["teller"]
        (answer,) = client.query(["Once upon a time"], top_k=1, max_tokens=12)
        assert "".join(client.stream("Once upon a time", top_k=1, max_tokens=12)) == answer
    assert not client.health()
    with fewbit.Engine(storyteller, device="cpu") as engine:
        assert engine.generate("Once upon a time", top_k=1, max_tokens=12)[0].text == answer


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_with_its_script(storyteller, how):
    script = subprocess.Popen([sys.executable, "-c", BEGUN, str(storyteller)], stdout=subprocess.PIPE, text=True)
    try:
        client = fewbit.Client(script.stdout.readline().strip())
        assert client.health()
        script.send_signal(how)
        script.wait(120)
        end = time.monotonic() + 120
        while client.health():
            assert time.monotonic() < end, "the server outlived its script"
            time.sleep(0.1)
    finally:
        script.kill()
        script.communicate()
