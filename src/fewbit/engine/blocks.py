"""Who holds which K/V block, and which freed blocks can still be found as a prefix. Integers only.

A block is held (by one or more tables), idle (free, its contents findable) or empty (free, nothing to find):

    held + idle + empty == num_blocks        always; `check` proves it

A full block is findable by its *digest*: a hash of its token ids and of the digest of the block before it, so one
digest stands for everything from the first token on. The ids are kept and compared as well; two prefixes never share
a block because of a collision. Idle blocks are given up least recently used first, the tail of a prefix before its
head (a head without its tail is useful, a tail without its head is not).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a block of `tokens` that follows the block with digest `parent`, or `root` for the first one."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def root(salt: str) -> bytes:
    """What the digests of a sequence begin with: sequences of different salts have no digest in common."""
    return hashlib.blake2b(salt.encode("utf8", "surrogatepass"), digest_size=16).digest() if salt else b""


class BlockPool:
    """A fixed number of blocks of `block_size` tokens. A *table* is the list of blocks of one sequence, in order."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self._holders = [0] * num_blocks
        self._empty = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._found: dict[bytes, int] = {}  # digest to block
        self._content: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # block to digest and token ids

    @property
    def free(self) -> int:
        """Blocks that can be had now."""
        return len(self._empty) + len(self._idle)

    @property
    def idle(self) -> int:
        """Free blocks that can still be found as a prefix."""
        return len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extend `table` until it has room for `tokens` tokens; if that cannot be had, change nothing and say False."""
        need = self.blocks_for(tokens) - len(table)
        if need > self.free:
            return False
        table.extend(self._take() for _ in range(need))
        return True

    def _take(self) -> int:
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            digest, _ = self._content.pop(block)
            del self._found[digest]
        self._holders[block] = 1
        return block

    def release(self, table: list[int]) -> None:
        """Let go of all blocks of `table` and empty it."""
        while table:
            block = table.pop()  # from the tail, see the module's text
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._content:
                    self._idle[block] = None
                else:
                    self._empty.appendleft(block)  # so that neighbours come out as neighbours again

    def discard(self, table: list[int]) -> list[int]:
        """Let go of all blocks of `table` and empty it; none of them can be found any more. Those that nobody holds."""
        blocks = list(table)
        for block in blocks:
            if block in self._content:
                digest, _ = self._content.pop(block)
                del self._found[digest]
        self.release(table)
        return [block for block in blocks if self._holders[block] == 0]

    def match(self, digests: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Blocks that hold the longest known prefix of `tokens`, whose full blocks have these `digests`.

        They are not held yet: `hold` them before anything else is taken. At least one token is always left out, since
        the logits of the last one have to be computed.
        """
        found: list[int] = []
        limit = (len(tokens) - 1) // self.block_size
        for index, digest in enumerate(digests[:limit]):
            block = self._found.get(digest)
            if block is None:
                break
            start = index * self.block_size
            if self._content[block][1] != tuple(tokens[start : start + self.block_size]):
                break
            found.append(block)
        return found

    def idle_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks are free now, so that holding them takes from `free`."""
        return sum(self._holders[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these matched blocks."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1

    def publish(self, block: int, digest: bytes, tokens: Sequence[int]) -> None:
        """Make a full, computed, held block findable. Nothing happens if the same content can be found already."""
        if self.prefix_cache and digest not in self._found and block not in self._content:
            self._found[digest] = block
            self._content[block] = digest, tuple(tokens)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert all laws, given the tables of everyone who holds blocks."""
        holders = [0] * self.num_blocks
        for table in tables:
            for block in table:
                holders[block] += 1
        assert holders == self._holders, "the holders of a block are the tables it stands in"
        held = {block for block, count in enumerate(holders) if count}
        empty, idle = set(self._empty), set(self._idle)
        assert len(empty) == len(self._empty), "no block is empty twice"
        assert len(held) + len(idle) + len(empty) == self.num_blocks, "held + idle + empty == all"
        assert held | idle | empty == set(range(self.num_blocks)), "every block is somewhere"
        assert {digest: block for block, (digest, _) in self._content.items()} == self._found
        assert idle <= self._content.keys() <= idle | held, "what can be found is there"
