"""What a request that went wrong leaves in its blocks reaches nobody: it is not found again, and wiped first."""

from __future__ import annotations

from tiny_engine import config, request

from fewbit.engine.batch import Drawn
from fewbit.engine.blocks import BlockPool, chain
from fewbit.engine.scheduler import Scheduler


def test_blocks_that_are_discarded_cannot_be_found():
    pool = BlockPool(4, 2)
    tables = [[], []]
    pool.grow(tables[0], 4)
    digests = [chain(b"", [1, 2])]
    pool.publish(tables[0][0], digests[0], [1, 2])
    shared, own = tables[0]
    tables[1] = pool.match(digests, [1, 2, 3])
    pool.hold(tables[1])
    assert pool.discard(tables[0]) == [own]  # the other one is still somebody's
    assert pool.match(digests, [1, 2, 3]) == []
    pool.check(tables)
    assert pool.discard(tables[1]) == [shared]
    pool.check(tables)
    assert pool.free == 4
    assert pool.idle == 0


def test_a_request_without_numbers_leaves_nothing_behind():
    scheduler = Scheduler(config(block_size=2, prefix_cache=True))
    scheduler.submit(request([1, 2, 3, 4, 5], "bad"))
    first = scheduler.schedule()
    used = first.pieces[0].blocks
    assert first.wiped == []
    (event,) = scheduler.commit(first, {"bad": Drawn(fault="no numbers")})
    assert event.ending.reason == "error"
    assert scheduler.schedule().pieces == []  # nothing runs, so nothing needs to be wiped yet
    scheduler.submit(request([1, 2, 3, 4, 5], "good"))
    second = scheduler.schedule()
    assert sorted(second.wiped) == sorted(used)
    assert second.pieces[0].first == 0, "nothing of it was found again"
    scheduler.commit(second, {"good": Drawn(7)})
    assert scheduler.schedule().wiped == []
    scheduler.check()
