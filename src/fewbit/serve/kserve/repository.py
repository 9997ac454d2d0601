"""The model repository: which models there are, loading and unloading them, their readiness and counters.

Names come from the server's own list and are never parts of paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import TypedDict

from fewbit.engine.types import EngineDownError
from fewbit.errors import RequestError, nearest_name
from fewbit.serve.body import shown
from fewbit.serve.kserve.front import Front, Named
from fewbit.serve.kserve.messages import VERSION
from fewbit.serve.models import ModelState
from fewbit.serve.problems import ForbiddenError


class Entry(TypedDict):
    """A model and its state: READY, UNAVAILABLE, LOADING or UNLOADING."""

    name: str
    version: str
    state: str
    reason: str


def index(front: Front, ready: bool = False) -> list[Entry]:
    """Each name with the state of its model; `ready`: only those that are."""
    states = {state.name: state for state in front.models.states()}
    found: list[Entry] = []
    for named in front.names():
        state = states[_served(front, named)]
        if state.state == "READY" or not ready:
            found.append({"name": named.name, "version": VERSION, "state": state.state, "reason": state.reason})
    return found


def only_ready(fields: Mapping[str, Any]) -> bool:
    """What a request for the index says."""
    for name in fields:
        if name != "ready":
            raise RequestError(f"unknown field '{shown(name)}': {nearest_name(name[:100], ['ready'])}", shown(name))
    if not isinstance(fields.get("ready", False), bool):
        raise RequestError(f"ready must be true or false, got {shown(fields['ready'])}", "ready")
    return bool(fields.get("ready", False))


async def check_ready(front: Front, name: str, version: str = "") -> None:
    """Return if a model would answer a request: now, or once that has loaded it. Clients ask before they send one.

    Raises:
        UnknownModelError: There is no such model.
        OverloadedError: The server is shutting down.
        EngineDownError: It is not loaded and a request would not load it, or its engine does not answer.
    """
    named = front.find(name, version)
    front.models.check_open()
    state = _state(front, named)
    if front.models.comes_on_demand(state.name):
        return
    if state.state != "READY":
        reason = f": {state.reason}" if state.reason else ""
        raise EngineDownError(f"the model '{state.name}' is {state.state}{reason}")
    for service in front.models.ready:
        if service.name == state.name:
            await service.probe()


async def load(front: Front, name: str, parameters: Mapping[str, Any]) -> None:
    """Load a model; one that is loaded stays as it is.

    Raises:
        ForbiddenError: Clients may not.
        UnknownModelError: There is no such model.
        RequestError: A config or a file comes with it.
    """
    _check_allowed(front)
    named = front.find(name)
    for key in parameters:
        if key == "config" or key.startswith("file:"):
            raise RequestError(
                f"'{shown(key)}' is not supported: models are loaded as they lie in the folder", "config"
            )
        raise RequestError(f"unknown parameter '{shown(key)}': loading has none here", shown(key))
    await front.models.load(_served(front, named))


async def unload(front: Front, name: str, parameters: Mapping[str, Any]) -> None:
    """Unload a model once the requests that use it have ended.

    Raises:
        ForbiddenError: Clients may not.
        UnknownModelError: There is no such model.
        RequestError: An unknown parameter.
    """
    _check_allowed(front)
    named = front.find(name)
    for key, value in parameters.items():
        if key != "unload_dependents":
            raise RequestError(f"unknown parameter '{shown(key)}': did you mean 'unload_dependents'?", shown(key))
        if not isinstance(value, bool):  # both do the same: the names of one model are one model
            raise RequestError(f"unload_dependents must be true or false, got {shown(value)}", key)
    await front.models.unload(_served(front, named))


def statistics(front: Front, name: str = "", version: str = "") -> dict[str, Any]:
    """The counters of a name; of every name where none is given."""
    names = [front.find(name, version)] if name else front.names()
    return {"model_stats": [front.statistics(named.name).shown() for named in names]}


def _check_allowed(front: Front) -> None:
    if not front.options.repository_control:
        raise ForbiddenError("clients may not load and unload models here; start the server with --repository-control")


def _served(front: Front, named: Named) -> str:
    """What the server calls the model of a name."""
    return named.model or front.models.names[0]


def _state(front: Front, named: Named) -> ModelState:
    served = _served(front, named)
    return next(state for state in front.models.states() if state.name == served)
