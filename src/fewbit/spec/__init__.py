"""What a decoder is, as data: no torch, no weights."""
