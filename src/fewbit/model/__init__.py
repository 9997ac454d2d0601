"""The one forward, built for one device: what was calibrated is what is served."""

from fewbit.model.attend import Attend, DenseAttend, KVCodec
from fewbit.model.decoder import Decoder, DecoderLayer
from fewbit.model.load import Linear, Loader, choices, load

__all__ = ["Attend", "Decoder", "DecoderLayer", "DenseAttend", "KVCodec", "Linear", "Loader", "choices", "load"]
