"""The threads of the disk: order, and a loop that is held up."""

from __future__ import annotations

import threading
import time

import pytest

from fewbit.compress.disk import Disk


@pytest.mark.parametrize("overlaps", [False, True])
def test_things_happen_in_the_order_in_which_they_were_asked_for(overlaps):
    done, seconds = [], {}
    with Disk(seconds, overlaps) as disk:
        reads = [disk.read(lambda i=i: done.append(("read", i)) or i) for i in range(3)]
        for i in range(3):
            disk.write(lambda i=i: done.append(("write", i)))
        assert [read() for read in reads] == [0, 1, 2]
        assert list(disk.each(lambda i: i * i, range(5))) == [0, 1, 4, 9, 16]
        disk.wait()
    assert [i for what, i in done if what == "write"] == [0, 1, 2]
    assert [i for what, i in done if what == "read"] == [0, 1, 2]
    assert seconds.keys() == {"load", "write"}


def test_a_slow_disk_holds_the_loop_up():
    go = threading.Event()
    with Disk({}, True) as disk:
        disk.write(go.wait)
        disk.catch_up()  # nothing was asked for before it
        threading.Timer(0.2, go.set).start()
        start = time.perf_counter()
        disk.catch_up()
        assert go.is_set()
        assert time.perf_counter() - start > 0.1


def test_what_went_wrong_is_raised_and_nothing_is_written_after_it():
    done = []

    def fail() -> None:
        raise OSError("full")

    def write_both() -> None:
        disk.write(fail)
        disk.write(done.append, 1)  # raises already, if the first has failed by now
        disk.wait()

    with Disk({}, True) as disk, pytest.raises(OSError, match="full"):
        write_both()
    assert not done
