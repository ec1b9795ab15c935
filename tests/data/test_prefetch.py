"""The prefetcher: order, position of the consumer, failures, closing."""

import threading

import pytest

from switchx.data.prefetch import Prefetcher


class Counter:
    """Counts up; fails at `fail_at`; tells when it has made `watch` numbers."""

    def __init__(self, fail_at=None, watch=None):
        self.count = 0
        self.fail_at = fail_at
        self.watch = watch
        self.reached = threading.Event()

    def __next__(self):
        if self.count == self.fail_at:
            raise OSError("disk gone")
        self.count += 1
        if self.count == self.watch:
            self.reached.set()
        return self.count

    def position(self):
        return {"count": self.count}

    def seek(self, position):
        self.count = position["count"]


def test_order_place_and_position_of_the_consumer():
    source = Counter(watch=4)
    batches = Prefetcher(source, place=lambda n: n * 10, size=2)
    assert batches.position() == {"count": 0}
    assert next(batches) == 10
    assert next(batches) == 20
    # Two more are made ahead of the consumer, whose position does not move.
    assert source.reached.wait(10)
    assert batches.position() == {"count": 2}
    assert [next(batches) for _ in range(5)] == [30, 40, 50, 60, 70]
    assert batches.position() == {"count": 7}
    batches.close()


def test_never_further_ahead_than_size():
    source = Counter(watch=3)
    batches = Prefetcher(source, place=lambda n: n, size=3)
    batches.start()
    assert source.reached.wait(10)
    batches.close()
    assert source.count == 3


def test_a_failure_reaches_the_consumer_in_its_turn():
    batches = Prefetcher(Counter(fail_at=2), place=lambda n: n)
    assert [next(batches), next(batches)] == [1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            next(batches)
    assert batches.position() == {"count": 2}
    batches.close()


def test_a_failure_to_place_reaches_the_consumer():
    def place(number):
        raise MemoryError(f"no room for {number}")

    batches = Prefetcher(Counter(), place)
    with pytest.raises(MemoryError, match="no room for 1"):
        next(batches)


def test_close_ends_the_thread_while_it_waits():
    before = threading.active_count()
    batches = Prefetcher(Counter(), place=lambda n: n)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_close_before_the_start():
    batches = Prefetcher(Counter(), place=lambda n: n)
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        batches.start()


def test_seek_only_before_the_start():
    batches = Prefetcher(Counter(), place=lambda n: n)
    batches.seek({"count": 41})
    assert batches.position() == {"count": 41}
    assert next(batches) == 42
    with pytest.raises(RuntimeError, match="before the first batch"):
        batches.seek({"count": 0})
    batches.close()
    with pytest.raises(ValueError, match="size = 0"):
        Prefetcher(Counter(), place=lambda n: n, size=0)
