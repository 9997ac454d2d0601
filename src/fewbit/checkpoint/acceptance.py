"""What engines load, as data: which numerics in which dialect, by the loaders' own sources.

Versions move monthly and nothing here was run but `transformers` and `fewbit`; a row says where its facts are from.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fewbit.checkpoint.formats import format_named
from fewbit.checkpoint.layout import Quantization
from fewbit.checkpoint.nearest import distance
from fewbit.errors import UnsupportedError, nearest_name
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec
from fewbit.version import __version__


@dataclass(frozen=True)
class Row:
    """One dialect that an engine loads.

    Attributes:
        engine: as ``--for`` writes it.
        version: of the engine whose source was read.
        dialect: a file format of ours.
        source: where in that source.
        loads: patterns of `words` for what a linear may be.
        caches: patterns for K and V.
        mixed: whether linears may differ.
        notes: what else holds, by pattern.
    """

    engine: str
    version: str
    dialect: str
    source: str
    loads: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    mixed: bool = True
    notes: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, quantization: Quantization) -> str | None:
        """None: the engine loads it in this dialect; else what it does not."""
        kinds: dict[str, str] = {}
        for name, quant in quantization.quant.items():
            kinds.setdefault(words(quant), name)
        for kind, name in kinds.items():
            if not _any(kind, self.loads):
                return f"{self._who} does not load {kind}, as {name} is"
        if len(kinds) > 1 and not self.mixed:
            return f"{self._who} loads one kind of numerics in a model, not {len(kinds)}"
        for kv in quantization.kv.values():
            if not _any(str(kv), self.caches):
                return f"{self._who} does not load K and V in {kv}"
        return None

    @property
    def _who(self) -> str:
        return f"{self.engine} {self.version} ({self.dialect})"


_VLLM, _SGLANG, _TRT = "0.26.0", "of mid-2026", "of mid-2026"
_AWQ = tuple(
    f"int4_g{g}{inputs}{p}" for g in (32, 64, 128) for inputs in ("", "/fp8 static") for p in ("", " prescaled")
)
ROWS = (
    Row("vllm", _VLLM, "compressed-tensors", "model_executor/layers/quantization/compressed_tensors/", (
        "fp8/fp8 static", "fp8/fp8_row dynamic", "fp8_row/fp8_row dynamic", "fp8_row/fp8 static",
        "fp8_block/fp8_g128 dynamic", "int8_row/int8_row dynamic", "int8_row/int8 static",
        "int[2-8]_row", "int[2-8]_g*", "int4_*/fp8_row dynamic", "nvfp4", "nvfp4/nvfp4 outer", "mxfp4",
        "mxfp4/mxfp4 dynamic",
    ), ("fp8",), notes={"int4_*/fp8_row dynamic": "compute capability 9.0 and up"}),
    Row("vllm", _VLLM, "hf", "model_executor/layers/quantization/modelopt.py", (
        "fp8/fp8 static", "fp8_row/fp8_row dynamic", "fp8_block", "nvfp4", "nvfp4/nvfp4 outer", "mxfp8/mxfp8 dynamic",
    ), ("fp8",)),
    Row("sglang", _SGLANG, "hf", "srt/layers/quantization/modelopt_quant.py", (
        "fp8/fp8 static", "nvfp4/nvfp4 outer",
    ), ("fp8",), notes={"nvfp4/nvfp4 outer": "compute capability 10.0, or 8.0 to 9.0 through Marlin"}),
    Row("tensorrt-llm", _TRT, "hf", "_torch/modules/linear.py, quantization/modelopt_config.py", (
        "fp8/fp8 static", "fp8_row/fp8_row dynamic", "fp8_block", "nvfp4", "nvfp4/nvfp4 outer", "int8_row", *_AWQ,
        "nvfp4_g32/fp8 static",
    ), ("fp8", "nvfp4"), notes={"nvfp4": "the newest alone"}),
    Row("tensorrt-llm", _TRT, "compressed-tensors", "_torch/model_config.py", (
        "fp8_row/fp8_row dynamic", "fp8_block/fp8_g128 dynamic", "nvfp4/nvfp4 outer", "mxfp4",
    ), notes={"nvfp4/nvfp4 outer": "the newest alone", "mxfp4": "the newest alone"}),
    Row("transformers", "5.17.0", "compressed-tensors", "tests/parity/test_formats.py, run", (
        "fp8/fp8 static", "fp8_row/fp8_row dynamic", "int4_g128", "int4_g128_asym", "int8_row",
        "int8_row/int8_row dynamic", "int8_row/int8 static", "int4_g128/fp8_row dynamic", "int4_g128/fp8 static",
        "nvfp4", "nvfp4/nvfp4 outer", "mxfp4", "mxfp4/mxfp4 dynamic",
    ), ("fp8", "int8", "fp8_row", "int8_row"), mixed=False),
    Row("transformers", "5.17.0", "hf", "tests/parity/test_families.py, run"),
    Row("vllm", _VLLM, "hf", "unquantized"),
    Row("fewbit", __version__, "*", "tests, run", ("*",), ("*",)),
)  # fmt: skip
"""In the order of preference. An engine that loads a dialect loads its unquantized models too.

Not in it because no engine's source was seen to load it: INT8 with smoothing as Model Optimizer writes it, NVFP4 with a
prescale, low-rank branches. A TensorRT-LLM checkpoint (`trtllm`) was loaded by its engine builder, which is gone.
"""


def words(quant: QuantSpec) -> str:
    """A QuantSpec as the patterns of the table say it: ``int4_g128``, ``fp8/fp8 static``."""
    found = str(quant.weight)
    if quant.input is not None:
        found += f"/{quant.input} {quant.input_scale}"
    found += " prescaled" if quant.prescale else ""
    return found + (f" beside rank {quant.lowrank}" if quant.lowrank else "")


def engines() -> tuple[str, ...]:
    """The engines of the table."""
    return tuple(dict.fromkeys(row.engine for row in ROWS))


def rows_of(engine: str) -> tuple[Row, ...]:
    """What an engine loads, in the order of preference.

    Raises:
        UnsupportedError: it is not in the table.
    """
    if engine not in engines():
        raise UnsupportedError(f"unknown engine '{engine}'; {nearest_name(engine, engines())}")
    rows = tuple(row for row in ROWS if row.engine == engine)
    if engine == "fewbit":
        return tuple(Row(engine, row.version, name, row.source, row.loads, row.caches)
                     for row in rows for name in ("compressed-tensors", "hf"))  # fmt: skip
    return rows


def dialect_for(engine: str, spec: DecoderSpec, quantization: Quantization) -> str:
    """The file format in which an engine loads a quantized model.

    Raises:
        UnsupportedError: in none; the message says what stands in the way.
    """
    reasons: dict[str, str] = {}
    for row in rows_of(engine):
        reason = row.why_not(quantization) or format_named(row.dialect).why_not(spec, quantization)
        if reason is None:
            return row.dialect
        reasons.setdefault(row.dialect, reason)
    raise UnsupportedError("; ".join(reasons.values()))


def loaders(dialect: str, quantization: Quantization) -> Iterator[tuple[str, str, str | None]]:
    """For every engine its version, and None where it loads such a model, else the reason."""
    for engine in engines():
        rows = [row for row in ROWS if row.engine == engine and row.dialect in (dialect, "*")]
        reasons = [row.why_not(quantization) for row in rows]
        version = next(row.version for row in ROWS if row.engine == engine)
        if not rows:
            yield engine, version, f"{engine} {version} was not seen to load '{dialect}'"
        else:
            yield engine, version, None if None in reasons else reasons[0]


def _any(text: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns)


def nearest(engine: str, spec: DecoderSpec, quantization: Quantization, kinds: Mapping[str, QuantSpec]) -> str | None:
    """Which of some numerics an engine loads and come nearest to those of most linears; None: none of them.

    Args:
        engine: of the table.
        spec: the decoder.
        quantization: what it does not load.
        kinds: QuantSpecs by the name that is wanted.
    """
    counts: dict[QuantSpec, int] = {}
    for quant in quantization.quant.values():
        counts[quant] = counts.get(quant, 0) + 1
    names = list(quantization.quant)

    def loaded(kind: QuantSpec) -> bool:
        try:
            dialect_for(engine, spec, Quantization(dict.fromkeys(names, kind), {}))
        except UnsupportedError:
            return False
        return True

    fitting = [name for name, kind in kinds.items() if counts and loaded(kind)]
    if not fitting:
        return None
    most = max(counts, key=counts.__getitem__)
    return min(fitting, key=lambda name: distance(most, kinds[name]))
