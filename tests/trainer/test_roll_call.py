"""Which rank does not answer, and leaving together."""

import threading
import time

import pytest
import torch.distributed as dist

from trainer import roll_call
from trainer.roll_call import RollCall

TIMED_OUT = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete"


@pytest.fixture
def store():
    return dist.HashStore()


def call(store, rank, world_size, timeout=0.3) -> RollCall:
    found = RollCall(rank, world_size, timeout)
    found.store = store
    return found


class TestNamingAbsent:
    """What becomes of an error of a collective."""

    def test_those_who_did_not_give_up_are_named(self, store):
        with pytest.raises(RuntimeError, match="Timed out"):  # this one waits for nobody
            self.fail(call(dist.HashStore(), 2, 3), others=[0, 1])
        with pytest.raises(TimeoutError, match=r"^rank 1 did not answer for 0.3 s .*and rank 0 has waited") as found:
            self.fail(call(store, 0, 3), others=[2])
        assert TIMED_OUT in str(found.value.__cause__)
        with pytest.raises(TimeoutError, match=r"^ranks 1, 3 did not answer"):
            self.fail(call(store, 0, 4))

    def fail(self, roll, others=()):
        for rank in others:
            roll.store.set(f"gave up/{rank}", "")
        with roll.naming_absent():
            raise RuntimeError(TIMED_OUT)

    def test_what_gloo_says_when_another_collective_timed_out_before(self, store):
        with pytest.raises(TimeoutError, match=r"^rank 1 did not answer"), call(store, 0, 2).naming_absent():
            raise RuntimeError("Application timeout caused pair closure")

    def test_others_that_give_up_a_little_later_are_not_named(self, store):
        late = threading.Timer(0.2, store.set, ("gave up/1", ""))
        late.start()
        with pytest.raises(RuntimeError, match="Timed out"):
            self.fail(call(store, 0, 2, timeout=5))
        late.join()

    def test_any_other_error_is_left_alone_and_told_at_once(self, store):
        begin, error = time.monotonic(), ValueError("mine")
        with pytest.raises(ValueError, match="mine") as found, call(store, 1, 2, timeout=100).naming_absent():
            raise error
        assert found.value is error
        assert time.monotonic() - begin < 1
        with pytest.raises(RuntimeError, match="Timed out"):
            self.fail(call(store, 0, 2))  # rank 1 has said that it is gone

    def test_without_a_store_nothing_is_named(self):
        with pytest.raises(RuntimeError, match="Timed out"):
            self.fail(RollCall(0, 2, 100))


def test_a_rank_that_is_not_heard_of_shows_where_it_is(store, capfd):
    roll = call(store, 0, 2, timeout=0.1)
    with roll.naming_absent():
        roll.here()
        time.sleep(0.3)
    assert "in test_a_rank_that_is_not_heard_of_shows_where_it_is" in capfd.readouterr().err
    with roll.naming_absent():
        for _ in range(30):
            roll.here()
            time.sleep(0.01)
    time.sleep(0.2)  # it is not alarmed after the block either
    assert capfd.readouterr().err == ""


class TestLeave:
    """Leaving together."""

    def test_the_first_waits_for_the_last(self, store):
        left, first = [], call(store, 0, 2)
        thread = threading.Thread(target=lambda: (first.leave(), left.append(0)))
        thread.start()
        time.sleep(0.2)
        assert left == []
        call(store, 1, 2).leave()
        thread.join(5)
        assert left == [0]

    def test_one_that_never_comes_is_not_waited_for_without_end(self, store, monkeypatch):
        monkeypatch.setattr(roll_call, "_WAIT_AT_THE_END", 0.2)
        begin = time.monotonic()
        call(store, 0, 2).leave()
        assert 0.1 < time.monotonic() - begin < 5

    def test_a_store_that_is_gone(self):
        server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        client = dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
        del server
        call(client, 1, 2).leave()
        with pytest.raises(RuntimeError, match="Timed out"), call(client, 1, 2).naming_absent():
            raise RuntimeError(TIMED_OUT)

    def test_a_group_of_the_script_is_not_waited_for(self):
        begin = time.monotonic()
        RollCall(0, 2, 100).leave()
        assert time.monotonic() - begin < 1
