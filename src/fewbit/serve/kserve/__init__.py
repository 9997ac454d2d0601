"""The v2 protocol (KServe, Triton): one `Front` of the models' names, and HTTP and gRPC before it.

A request becomes an `InferRequest` of `Tensor`s (`messages`, `generate`, `protobuf`), the tables of `signatures` say
what its inputs mean (`asks`), a `Call` runs it on the engine, and `answers` makes the outputs.
"""

from fewbit.serve.kserve.front import FLAVORS, Flavor, Front, Options
from fewbit.serve.kserve.http import routes

__all__ = ["FLAVORS", "Flavor", "Front", "Options", "routes"]
