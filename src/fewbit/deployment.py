"""Serving in the shape of NeMo's deployment scripts: `deploy`, in place of ``DeployPyTriton``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.errors import RecipeError
from fewbit.serve.handle import Server, serve


class Deployment:
    """A model under the name and protocol that NeMo's query classes ask for. Made by `deploy`."""

    def __init__(self, model: str | Path, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._server: Server | None = None

    @property
    def url(self) -> str:
        """Where it answers; only after `deploy`."""
        return self._deployed().url

    def deploy(self) -> None:
        """Load the model and begin to answer.

        Raises:
            FewbitError: In the server's own words, why it does not start.
        """
        if self._server is not None:
            raise RecipeError("the model is deployed already; call stop() first")
        self._server = serve(self._model, **self._options)

    def serve(self) -> None:
        """Answer until Ctrl-C, or until the server ends."""
        self._deployed().wait()

    def run(self) -> None:
        """Answer while the script goes on."""
        self._deployed()

    def stop(self) -> None:
        """Let what runs finish, and end."""
        self._deployed().stop()
        self._server = None

    def _deployed(self) -> Server:
        if self._server is None:
            raise RecipeError("the model is not deployed; call deploy() first")
        return self._server


def deploy(
    model: str | Path,
    triton_model_name: str,
    *,
    port: int = 8000,
    address: str = "127.0.0.1",
    max_batch_size: int | None = None,
    **options: Any,
) -> Deployment:
    """A deployment to `deploy`, `serve` or `run`, and `stop`.

    Args:
        model: Directory, or Hub id, of what ``fewbit compress`` wrote or of any model that fewbit opens.
        triton_model_name: What clients call it.
        port: For HTTP; 0: a free one.
        address: To listen on. NeMo's default, every address of the machine, has to be asked for: ``"0.0.0.0"``.
        max_batch_size: Sequences that run at a time.
        **options: Of the command ``fewbit serve``, as for `fewbit.serve`: ``grpc_port=8001``, ...
    """
    own = {"port": port, "name": triton_model_name, "host": address, "max_batch": max_batch_size}
    return Deployment(model, {**own, "triton_flavor": "nemo", **options})
