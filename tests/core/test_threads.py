"""A lock that many share, or one has alone."""

import threading

import pytest

from fedweight.core.threads import SharedLock


def start(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_several_share_it():
    lock, together = SharedLock(), threading.Barrier(3, timeout=10)

    def share():
        with lock.shared():
            together.wait()

    threads = [start(share) for _ in range(3)]
    for thread in threads:
        thread.join(10)
    assert not together.broken


def test_who_wants_it_alone_waits_for_others_and_holds_back_new_ones():
    lock, order = SharedLock(), []
    inside, go = threading.Event(), threading.Event()

    def share(name):
        with lock.shared():
            if name == "first":
                inside.set()
                assert go.wait(10)
            order.append(name)

    def alone():
        with lock.alone():
            order.append("alone")

    first = start(lambda: share("first"))
    assert inside.wait(10)
    writer = start(alone)
    while lock._alone is None:
        pass
    second = start(lambda: share("second"))
    second.join(0.05)
    assert order == []
    go.set()
    for thread in (first, writer, second):
        thread.join(10)
    assert order == ["first", "alone", "second"]


def test_who_has_it_alone_may_ask_again():
    lock = SharedLock()
    with lock.alone(), lock.alone(), lock.shared():
        pass
    with lock.shared():
        pass
    done = start(lambda: lock.alone().__enter__())
    done.join(10)
    assert not done.is_alive()


def test_who_is_interrupted_while_waiting_holds_nobody_back(monkeypatch):
    lock = SharedLock()

    def interrupt():
        raise KeyboardInterrupt

    with lock.shared(), monkeypatch.context() as patch:
        patch.setattr(lock._changed, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt), lock.alone():
            pass
    done = start(lambda: lock.alone().__enter__())
    done.join(10)
    assert not done.is_alive()
