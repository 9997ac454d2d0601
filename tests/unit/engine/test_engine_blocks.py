"""The block pool: who holds what, and what can be found again."""

import pytest

from fewbit.engine.blocks import BlockPool, chain


def fill(pool, tokens):
    """A table for `tokens`, its full blocks published."""
    table, digest = [], b""
    assert pool.grow(table, len(tokens))
    for i in range(len(tokens) // pool.block_size):
        block = tokens[i * pool.block_size : (i + 1) * pool.block_size]
        digest = chain(digest, block)
        pool.publish(table[i], digest, block)
    return table


def digests(tokens, size):
    out = [b""]
    for i in range(len(tokens) // size):
        out.append(chain(out[-1], tokens[i * size : (i + 1) * size]))
    return out[1:]


def test_growing_takes_all_or_nothing():
    pool = BlockPool(4, 2)
    table = []
    assert pool.grow(table, 5)
    assert len(table) == 3
    other = []
    assert not pool.grow(other, 3)
    assert other == []
    assert pool.free == 1
    assert pool.grow(table, 6)
    assert len(table) == 3, "there was room left in the last block"
    pool.check([table])
    pool.release(table)
    assert table == []
    assert pool.free == 4
    pool.check([])


def test_a_repeated_prompt_finds_all_but_its_last_block():
    pool = BlockPool(8, 4)
    tokens = list(range(12))
    table = fill(pool, tokens)
    assert pool.match(digests(tokens, 4), tokens) == table[:2], "at least one token is left to compute"
    assert pool.match(digests(tokens, 4), [*tokens, 99]) == table
    assert pool.match(digests([9, *tokens], 4), [9, *tokens]) == []


def test_held_prefixes_are_shared_and_outlive_their_first_holder():
    pool = BlockPool(4, 2)
    tokens = [1, 2, 3, 4, 5]
    first = fill(pool, tokens)
    second = pool.match(digests(tokens, 2), tokens)
    pool.hold(second)
    pool.check([first, second])
    pool.release(first)
    assert pool.free == 2
    pool.check([second])
    pool.release(second)
    assert pool.free == 4
    assert pool.idle == 2


def test_idle_blocks_are_given_up_oldest_first_and_tails_before_heads():
    pool = BlockPool(4, 1)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(old), pool.release(new)
    taken = []
    assert pool.grow(taken, 1)
    assert len(pool.match(digests([1, 2, 0], 1), [1, 2, 0])) == 1, "the tail of the older prefix went"
    assert len(pool.match(digests([3, 4, 0], 1), [3, 4, 0])) == 2
    assert pool.grow(taken, 4)
    assert pool.idle == 0
    assert pool.match(digests([1, 2, 0], 1), [1, 2, 0]) == []
    pool.check([taken])


def test_a_hash_collision_shares_nothing():
    pool = BlockPool(4, 2)
    table = []
    pool.grow(table, 2)
    pool.publish(table[0], b"same", [1, 2])
    assert pool.match([b"same"], [1, 2, 3]) == table
    assert pool.match([b"same"], [8, 9, 3]) == []


def test_what_is_published_twice_is_found_once():
    pool = BlockPool(4, 2)
    first, second = fill(pool, [1, 2]), fill(pool, [1, 2])
    assert pool.match(digests([1, 2, 3], 2), [1, 2, 3]) == first
    pool.release(first), pool.release(second)
    pool.check([])
    assert pool.idle == 1


def test_without_prefix_cache_nothing_is_found():
    pool = BlockPool(4, 2, prefix_cache=False)
    table = fill(pool, [1, 2, 3])
    assert pool.match(digests([1, 2, 3], 2), [1, 2, 3]) == []
    pool.release(table)
    assert pool.idle == 0
    pool.check([])


def test_neighbours_come_out_as_neighbours_again():
    pool = BlockPool(8, 1, prefix_cache=False)
    table = []
    pool.grow(table, 5)
    pool.release(table)
    pool.grow(table, 5)
    assert table == [0, 1, 2, 3, 4]


def test_check_notices_a_leak():
    pool = BlockPool(4, 1)
    table = []
    pool.grow(table, 2)
    with pytest.raises(AssertionError):
        pool.check([])
    pool.release(table)
    pool._empty.pop()
    with pytest.raises(AssertionError):
        pool.check([])
