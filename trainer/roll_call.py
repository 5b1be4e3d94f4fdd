"""Which rank does not answer: told when the others have waited long enough, and asked before a rank leaves."""

import contextlib
import datetime
import faulthandler
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

_GRACE = 10.0  # [s] ranks that wait for the same one give up at about the same time
_WAIT_AT_THE_END = 30.0  # [s]


class RollCall:
    """Keeps through the process group's store what collectives cannot tell.

    Args:
        rank: this one.
        world_size: number of ranks.
        timeout: how long collectives wait [s].

    Attributes:
        store: of the process group; None before it is open, or where the script has opened it: nothing is told then.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.store: dist.Store | None = None
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._armed = -float("inf")

    def here(self) -> None:
        """This rank is alive. When it says so no more, it shows on stderr where it is, before the others give up.

        Cheap: it does something once in an eighth of the timeout.
        """
        now = time.monotonic()
        if now - self._armed > self._timeout / 8 and sys.__stderr__ is not None:
            self._armed = now
            faulthandler.dump_traceback_later(self._timeout * 1.125, file=sys.__stderr__)

    @contextlib.contextmanager
    def naming_absent(self) -> Iterator[None]:
        """Turn the timeout of a collective inside the block into an error that names the ranks that did not come.

        Raises:
            TimeoutError: other ranks did not come to a collective in time.
        """
        try:
            yield
        except Exception as error:
            text = str(error).lower()
            absent = self._absent(waits="timed out" in text or "timeout" in text)  # gloo says the one or the other
            if not absent:
                raise
            names = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
            raise TimeoutError(
                f"{names} did not answer for {self._timeout:g} s (distributed_timeout), and rank {self._rank} has "
                f"waited: they hang, or are much slower; the end of what {names} wrote shows where"
            ) from error
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._armed = -float("inf")

    def _absent(self, waits: bool) -> list[int]:
        """Say that this rank gives up; after a timeout, the ranks that have not said so after a while."""
        if self.store is None:
            return []
        with contextlib.suppress(dist.DistError):  # the store has gone with another rank
            self.store.set(f"gave up/{self._rank}", "")
            others = [rank for rank in range(self._world_size) if rank != self._rank] if waits else []
            end = time.monotonic() + min(_GRACE, self._timeout)
            while others and time.monotonic() < end:
                others = [rank for rank in others if not self.store.check([f"gave up/{rank}"])]
                time.sleep(0.1)
            return others
        return []

    def leave(self) -> None:
        """Wait until all ranks are about to leave: one that leaves earlier breaks the others' last collective."""
        if self.store is None:
            return
        with contextlib.suppress(dist.DistError):  # others failed, or have left with the store
            if self.store.add("leaving", 1) == self._world_size:
                self.store.set("all leave", "")
            self.store.wait(["all leave"], datetime.timedelta(seconds=_WAIT_AT_THE_END))
