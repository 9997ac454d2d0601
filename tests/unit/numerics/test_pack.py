"""Bits in their places: the worked examples of pack.py, and the words that the compressed-tensors library makes."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from fewbit.numerics.pack import pack_nibbles, pack_words, unpack_nibbles, unpack_words


def codes_of(bits, *shape):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def test_the_worked_examples():
    assert pack_nibbles(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).tolist() == [0x21, 0x43]
    assert pack_words(torch.arange(1, 9, dtype=torch.uint8), 4).tolist() == [0x87654321 - 2**32]
    assert pack_words(torch.tensor([0xFF], dtype=torch.uint8), 8).tolist() == [0xFF]


@pytest.mark.parametrize("dim", [-1, -2, 0, 1])
def test_nibbles_come_back(dim):
    codes = codes_of(4, 6, 10)
    packed = pack_nibbles(codes, dim)
    assert packed.shape == ((6, 5) if dim % 2 else (3, 10))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, dim), codes)


def test_nibbles_of_rows_put_the_even_row_low():
    codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert pack_nibbles(codes, -2).tolist() == [[0x31, 0x42]]
    assert pack_nibbles(codes, -1).tolist() == [[0x21], [0x43]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("size", [1, 7, 8, 16, 33])
def test_words_come_back_also_where_the_last_is_not_full(bits, dim, size):
    codes = codes_of(bits, 5, size) if dim == -1 else codes_of(bits, size, 5)
    packed = pack_words(codes, bits, dim)
    assert packed.dtype == torch.int32
    assert packed.shape[dim] == -(-size * bits // 32)
    assert torch.equal(unpack_words(packed, bits, size, dim), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dim", [0, 1])
def test_words_are_those_of_compressed_tensors(bits, dim):
    codes = codes_of(bits, 24, 40)
    half = 1 << (bits - 1)
    signed = (codes.int() - half).to(torch.int8)  # the library stores value + half
    theirs = pack_to_int32(signed, bits, packed_dim=dim)
    assert torch.equal(pack_words(codes, bits, dim), theirs)
    assert torch.equal(unpack_from_int32(theirs, bits, codes.shape, packed_dim=dim), signed)
    assert torch.equal(unpack_words(theirs, bits, codes.shape[dim], dim), codes)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [32, 64, 40])
def test_three_bits_run_on_over_the_ends_of_words(dim, size):
    codes = codes_of(3, 5, size) if dim else codes_of(3, size, 5)
    packed = pack_words(codes, 3, dim)
    assert packed.shape[dim] == -(-size * 3 // 32)
    assert torch.equal(unpack_words(packed, 3, size, dim), codes)
    line = codes.select(1 - dim, 2).tolist()
    number = sum(code << (3 * place) for place, code in enumerate(line))
    words = [w % 2**32 for w in packed.select(1 - dim, 2).tolist()]
    assert sum(word << (32 * place) for place, word in enumerate(words)) == number


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_axis_of_one_may_be_strided_as_it_likes(bits):
    codes = codes_of(bits, 64, 1).t()  # contiguous, though its first stride is 1
    assert torch.equal(unpack_words(pack_words(codes, bits), bits, 64), codes)
    assert torch.equal(unpack_words(pack_words(codes.t(), bits, 0).t(), bits, 64), codes)
