"""Loading on demand, making room, unloading, failing: over models that are made of nothing."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_engine import FakeEngine
from serve_names import CHAT, SAYS, client_of

from fewbit.engine.config import EngineOptions
from fewbit.engine.types import EngineDownError, OverloadedError
from fewbit.errors import CheckpointError, FewbitError
from fewbit.serve import create_app, loading
from fewbit.serve.metrics import Metrics
from fewbit.serve.modeldir import ModelDirs, ModelFolder
from fewbit.serve.models import LoadError, Models
from fewbit.serve.problems import UnknownModelError
from fewbit.serve.service import Service
from virtual_time import run_virtually

GIB = 2**30


class Shelf:
    """A `Source` of models that take a GiB each. Change its attributes to make it misbehave."""

    def __init__(self, tokenizer, *names: str, budget: int | None = None) -> None:
        self.tokenizer, self.all, self.budget = tokenizer, list(names), budget
        self.broken: dict[str, str] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.lost: dict = {}

    def names(self):
        return list(self.all)

    async def cost(self, name):
        return GIB

    async def open(self, name, metrics, tell, lost) -> Service:
        self.opened.append(name)
        tell("reading weights")
        await self.gate.wait()
        if name in self.broken:
            raise CheckpointError(self.broken[name])
        self.lost[name] = lost
        engine = FakeEngine(self.tokenizer.vocab_size)
        engine.says = self.tokenizer.encode(SAYS, add_special_tokens=False)
        return Service(engine, self.tokenizer, name, metrics.of(name))

    async def close(self, service):
        self.closed.append(service.name)


@pytest.fixture
def shelf(tokenizer):
    return lambda *names, **kwargs: Shelf(tokenizer, *names, **kwargs)


def models_on(source, **kwargs) -> Models:
    return Models((), Metrics(), source, **kwargs)


def states(models) -> dict[str, str]:
    return {s.name: s.state for s in models.states()}


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_model_is_loaded_once_for_all_who_wait(run, shelf):
    async def main():
        source = shelf("a", "b")
        models = models_on(source)
        assert states(models) == {"a": "UNAVAILABLE", "b": "UNAVAILABLE"}
        source.gate.clear()

        async def use() -> str:
            async with models.lease("b") as service:
                return service.name

        users = [asyncio.create_task(use()) for _ in range(5)]
        loads = [asyncio.create_task(models.load("b")) for _ in range(2)]
        await turns()
        assert models.state("b") == ("b", "LOADING", "reading weights")
        users[0].cancel()  # who leaves does not take the load along
        source.gate.set()
        assert await asyncio.gather(*users[1:]) == ["b"] * 4
        await asyncio.gather(*loads)
        assert source.opened == ["b"]
        assert states(models) == {"a": "UNAVAILABLE", "b": "READY"}
        async with models.lease() as service:  # no name: the first
            assert service.name == "a"
        with pytest.raises(UnknownModelError, match="'c' is not served here, 'a' and 'b' are"):
            async with models.lease("c"):
                pass
        source.all.append("c")  # a new folder
        async with models.lease("c") as service:
            assert service.name == "c"
        await models.close()
        assert sorted(source.closed) == ["a", "b", "c"]

    run(main())


def test_all_who_wait_are_told_why_a_load_failed_and_the_next_tries_again(run, shelf):
    async def main():
        source = shelf("a")
        models = models_on(source)
        source.broken["a"] = "config.json is damaged"
        source.gate.clear()

        async def use() -> None:
            async with models.lease("a"):
                pass

        users = [asyncio.create_task(use()) for _ in range(3)]
        await turns()
        source.gate.set()
        for error in await asyncio.gather(*users, return_exceptions=True):
            assert isinstance(error, LoadError)
            assert str(error) == "the model 'a' could not be loaded: config.json is damaged"
        assert models.state("a") == ("a", "UNAVAILABLE", "config.json is damaged")
        await turns()
        assert source.opened == ["a"]  # nobody tries by himself
        source.broken.clear()
        await use()
        assert source.opened == ["a", "a"]
        assert models.state("a") == ("a", "READY", "")

    run(main())


@pytest.mark.parametrize("limit", [{"budget": 2 * GIB}, {"max_loaded": 2}])
def test_the_least_recently_used_that_nobody_uses_makes_room(run, shelf, limit):
    async def main():
        source = shelf("a", "b", "c", "d", budget=limit.get("budget"))
        models = models_on(source, max_loaded=limit.get("max_loaded"))
        await models.load("a")
        await models.load("b")
        async with models.lease("a"):
            pass  # b is now the older one
        await models.load("c")
        assert (source.closed, states(models)["b"]) == (["b"], "UNAVAILABLE")
        assert models.state("b").reason == "unloaded to make room for 'c'"
        async with models.lease("a"), models.lease("c"):
            pass
        async with models.lease("a"):  # the older one, but in use
            await models.load("d")
        assert source.closed == ["b", "c"]
        assert [s.name for s in models.ready] == ["a", "d"]

    run(main())


def test_a_model_in_use_is_waited_for_and_never_unloaded(shelf):
    async def main():
        source = shelf("a", "b", budget=GIB)
        models = models_on(source)
        async with models.lease("a"):
            waiting = asyncio.create_task(models.load("b"))
            await turns(20)
            assert states(models) == {"a": "READY", "b": "LOADING"}
            assert source.opened == ["a"]
        await waiting
        assert states(models) == {"a": "UNAVAILABLE", "b": "READY"}
        async with models.lease("b"):
            with pytest.raises(OverloadedError, match="no room for the model 'a' while 'b' are in use"):
                await models.load("a")
        await models.load("a")

    run_virtually(main())


def test_many_wait_for_room_no_longer_than_one(shelf):
    async def main():
        models = models_on(shelf("a", "b", "c", "d", "e", budget=GIB))
        async with models.lease("a"):
            found = await asyncio.gather(*(models.load(name) for name in "bcde"), return_exceptions=True)
        assert [type(error) for error in found] == [OverloadedError] * 4
        assert asyncio.get_running_loop().time() == pytest.approx(loading.ROOM_S)

    run_virtually(main())


def test_a_model_larger_than_the_budget(run, shelf):
    async def main():
        models = models_on(shelf("a", budget=GIB // 2))
        with pytest.raises(LoadError, match=r"takes 1\.00 GiB, all models together may take 0\.50: raise --memory-bu"):
            await models.load("a")

    run(main())


def test_unloading_waits_for_those_who_use_it(run, shelf):
    async def main():
        source = shelf("a")
        models = models_on(source, drain_s=600)
        holding = models.lease("a")
        await holding.__aenter__()
        leaving = asyncio.create_task(models.unload("a"))
        await turns()
        assert states(models) == {"a": "UNLOADING"}
        assert not source.closed

        async def later() -> None:
            async with models.lease("a"):
                pass

        new = asyncio.create_task(later())
        await turns()
        assert not new.done()
        await holding.__aexit__(None, None, None)
        await leaving
        assert source.closed == ["a"]
        await new  # loaded again
        assert source.opened == ["a", "a"]
        await models.unload("a")
        await models.unload("a")
        assert models.state("a") == ("a", "UNAVAILABLE", "unloaded")

    run(main())


def test_unloading_ends_what_does_not_end(run, shelf):
    async def main():
        source = shelf("a")
        models = models_on(source, drain_s=0.01)
        async with models.lease("a") as service:
            service.client.delay_s = 30
            (running,) = await service.start([service.job([1], _params(), limited=True)])
            await models.unload("a")
            with pytest.raises(OverloadedError):
                async for _ in running.pieces():
                    pass
        assert source.closed == ["a"]
        assert models.state("a").state == "UNAVAILABLE"

    run(main())


def _params():
    from fewbit.engine.types import SamplingParams

    return SamplingParams(max_tokens=5)


def test_only_explicit_loads_where_asked(run, shelf):
    async def main():
        models = models_on(shelf("a"), on_demand=False)
        with pytest.raises(EngineDownError, match="'a' is not loaded, and requests do not load models here"):
            async with models.lease("a"):
                pass
        await models.load("a")
        async with models.lease("a") as service:
            assert service.name == "a"

    run(main())


def test_ready_means_what_was_promised(run, shelf):
    async def main():
        source = shelf("a", "b")
        models = models_on(source)
        await models.check_ready()  # everything is loaded on demand
        source.gate.clear()
        loading = asyncio.create_task(models.preload(["b"]))
        await turns()
        with pytest.raises(EngineDownError, match=r"'b' is not ready \(LOADING\): reading weights"):
            await models.check_ready()
        source.gate.set()
        await loading
        await models.check_ready()
        models.ready[0].client.down = True
        with pytest.raises(EngineDownError):
            await models.check_ready()
        watching = asyncio.create_task(models.until_lost())
        source.lost["b"]("the engine process was ended by SIGKILL")
        with pytest.raises(EngineDownError, match="'b' cannot be brought back: the engine process was ended by SIGK"):
            await watching
        await turns()
        assert models.state("b") == ("b", "UNAVAILABLE", "the engine process was ended by SIGKILL")
        source.broken["a"] = "no"
        with pytest.raises(CheckpointError, match=r"^no$"):
            await models.preload(["a"])
        with pytest.raises(UnknownModelError):
            await models.preload(["x"])

    run(main())


def test_over_http(run, shelf):
    async def main():
        source = shelf("a", "b", budget=GIB)
        source.broken["b"] = "no weights"
        async with client_of(create_app(models_on(source))) as client:
            talk = {"messages": [{"role": "user", "content": "x"}]}
            for name, status in (("a", 200), ("b", 503), ("a", 200), ("../a", 404)):
                answer = await client.post(CHAT, content=json.dumps({**talk, "model": name}))
                assert answer.status_code == status, answer.text
            assert source.closed == ["a"]
            assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["a", "b"]

    run(main())


def test_a_model_that_a_request_would_load_is_ready_since_clients_wait_for_that(run, shelf):
    async def ready(models) -> tuple[int, str]:
        async with client_of(create_app(models)) as client:
            index = await client.post("/v2/repository/index")
            answer = await client.get("/v2/models/b/ready")
            return answer.status_code, next(m["state"] for m in index.json() if m["name"] == "b")

    async def main():
        source = shelf("a", "b")
        models = models_on(source)
        assert await ready(models) == (200, "UNAVAILABLE")
        source.broken["b"] = "no weights"
        with pytest.raises(LoadError):
            await models.load("b")
        assert await ready(models) == (503, "UNAVAILABLE")
        source.broken.clear()
        await models.load("b")
        assert await ready(models) == (200, "READY")
        source.gate.clear()
        promised = models_on(source)
        loading = asyncio.create_task(promised.preload(["b"]))
        await turns()
        assert await ready(promised) == (503, "LOADING")
        source.gate.set()
        await loading
        assert await ready(models_on(source, on_demand=False)) == (503, "UNAVAILABLE")

    run(main())


def test_clients_learn_the_name_of_a_model_that_fails_and_the_log_its_path(run, tmp_path, caplog):
    async def main():
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "config.json").write_text("{}")
        options = EngineOptions(kv_bytes=1 << 20)
        source = ModelDirs(ModelFolder(tmp_path), options, shared=True, budget=GIB, drain_s=0, tell=lambda text: None)
        with pytest.raises(FewbitError) as caught:
            await source.open("mine", Metrics(), lambda text: None, lambda text: None)
        assert "mine" in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
        assert str(tmp_path / "mine") in caplog.text

    run(main())


def test_probes_may_ask_for_the_head_alone(run, shelf):
    async def main():
        async with client_of(create_app(models_on(shelf("a")))) as client:
            for path in ("/health", "/ping", "/v2/health/live", "/v2/health/ready"):
                answer = await client.head(path)
                assert answer.status_code == 200, path

    run(main())
