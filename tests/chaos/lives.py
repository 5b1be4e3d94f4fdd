"""The lives of one training: started, killed, damaged, continued, until it ends by itself."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch

from tests.chaos.cases import Case, train
from tests.chaos.compare import compare_checkpoints, compare_logs, compare_scalars
from tests.chaos.harm import PHASES, Harm, unsafe

DAMAGES = ("truncated", "flipped", "empty", "zeros", "stale", "all", "read-only", "full")
TIMEOUT = 120  # [s], after which a life counts as hanging


class Life:
    """One process of a training, from its start to its end.

    Args:
        case: what is trained.
        home: where the run's folder is made.
        run: the run to continue, relative to home.
        harm: what happens to it.
        delay: after which it is killed [s].
        number: of the life, for the names of its files.

    Attributes:
        code: its exit code; that of SIGKILL is -9.
        seconds: how long it lived.
        text: what it printed.
        start: the update from which it went on; None if it did not come so far.
        changes: ``(saved or deleted, name)`` of the checkpoints that it has put into their places, or removed.
    """

    def __init__(
        self,
        case: Case,
        home: Path,
        run: Path | None = None,
        harm: Harm | None = None,
        delay: float | None = None,
        number: int = 0,
    ) -> None:
        output = home / f"life{number}" / "output.txt"
        output.parent.mkdir(parents=True)
        work = (case, home, run, harm or Harm(), output)
        process = multiprocessing.get_context("fork").Process(target=train, args=work)
        begin = time.monotonic()
        process.start()
        process.join(TIMEOUT if delay is None else delay)
        hangs = delay is None and process.is_alive()
        process.kill()
        process.join()
        self.seconds = time.monotonic() - begin
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the loader's workers
        self.code = "hangs" if hangs else process.exitcode
        self.text = output.read_text(errors="replace") if output.exists() else ""
        ledger = output.with_name("ledger.txt")
        lines = [line.split(" ", 1) for line in (ledger.read_text() if ledger.exists() else "").splitlines()]
        self.start = next((int(value) for word, value in lines if word == "start"), None)
        self.changes = [(word, value) for word, value in lines if word in ("saved", "deleted")]

    def end(self) -> str:
        """The exit code and the last line."""
        return f"exit {self.code}: {(self.text.strip().splitlines() or ['(no output)'])[-1]}"


class Undisturbed:
    """A training that nobody kills, with which others are compared.

    Attributes:
        run: its folder.
        steps: its updates.
        seconds: its duration.
        events: how often each low-level event of saving happens.
        problems: what is wrong with it by itself.
    """

    def __init__(self, case: Case, home: Path) -> None:
        home.mkdir(parents=True)
        life = Life(case, home)
        self.case, self.seconds = case, life.seconds
        if life.code != 0:
            raise RuntimeError(f"an undisturbed training failed, {life.end()}\n{life.text}\n{case}")
        (self.run,) = (home / "output").iterdir()
        self.steps = max(steps_of(self.run).values())
        trace = json.loads((home / "life0" / "trace.json").read_text())
        self.events = Counter(event for event, _ in trace)
        self.problems = unsafe(trace) + [f"{path.name} is left" for path in leftovers(self.run)]


def steps_of(run: Path, but: Collection[str] = ()) -> dict[str, int]:
    """The updates after which the checkpoints of a run were saved, by their names; without some, and torn ones."""
    paths = [path for path in run.glob("*.pth") if re.fullmatch(r"checkpoint_\d+|best_model", path.stem)]
    paths = [path for path in paths if path.name not in but and zipfile.is_zipfile(path)]
    return {path.name: torch.load(path, weights_only=True)["step"] for path in paths}


def leftovers(run: Path) -> set[Path]:
    """Temporary files of checkpoints."""
    return {path for path in run.iterdir() if ".pth" in path.name and path.suffix not in (".pth", ".damaged")}


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every checkpoint."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.glob("*.pth")}


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Damage a file."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if kind == "truncated":
        del content[place:]
    elif kind == "flipped":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "empty":
        content.clear()
    else:
        content[place:] = bytes(len(content) - place)
    path.write_bytes(content)


class Run:
    """A training that is killed and damaged.

    Args:
        whole: the same one, undisturbed.
        folder: of its files.
        rng: chooses what happens.
        share: how often something is damaged after a kill.

    Attributes:
        sums: kills, those of them that were aimed at an event of saving, resumed and nothing saved.
        problems: lines of what is ``lost`` or ``differing``.
    """

    def __init__(self, whole: Undisturbed, folder: Path, rng: random.Random, share: float) -> None:
        self.whole, self.folder, self.rng, self.share = whole, folder, rng, share
        self.sums: Counter[str] = Counter()
        self.problems: dict[str, list[str]] = {"lost": [], "differing": []}
        self._lives = self._homes = 0
        self._begin_anew()

    def live(self) -> None:
        """Go through some kills, to the end."""
        for _ in range(self.rng.randint(1, 4)):
            harm, delay = self._draw_kill()
            if self._go_on(harm, delay) != -signal.SIGKILL:
                break
            self.sums["kills"] += 1
            self.sums["aimed"] += harm.kind == "kill"
            if self._sound() and self.rng.random() < self.share:
                self._damage(self.rng.choice(DAMAGES))
        else:
            self._go_on()
        run = self._run()
        if run is None or not self._is_done:
            return
        self._look_at_the_damaged()
        lines = compare_checkpoints(self.whole.run, run, set(self._damaged))
        lines += compare_scalars(self.whole.run, run) + compare_logs(self.whole.run, run)
        self.problems["differing"] += lines + [f"{path.name} is left" for path in leftovers(run)]

    def _begin_anew(self) -> None:
        self.home = self.folder / f"home{self._homes}"
        self.home.mkdir(parents=True)
        self._homes += 1
        self._saved: set[str] = set()
        self._has_saved = False
        self._damaged: dict[str, str] = {}  # digests of the files that were damaged
        self._unnamed: set[str] = set()  # of those, the ones that the next start has to name
        self._said = ""  # since then
        self._is_done = False

    def _run(self) -> Path | None:
        """The run's folder, if it was made."""
        folders = list((self.home / "output").iterdir()) if (self.home / "output").exists() else []
        return folders[0] if folders else None

    # ---- what is there ----

    def _look_at_the_damaged(self) -> None:
        """Forget those that were written anew."""
        now = digests(self._run())
        self._damaged = {name: digest for name, digest in self._damaged.items() if now.get(name) == digest}
        self._saved -= {path.stem for path in self._run().glob("*.pth.damaged")} - set(now)  # put aside

    def _sound(self) -> dict[str, int]:
        """The updates of the checkpoints that are there and were not damaged."""
        if (run := self._run()) is None:
            return {}
        self._look_at_the_damaged()
        return steps_of(run, but=self._damaged)

    def _check_saved(self, sound: dict[str, int]) -> None:
        """What was saved and not deleted is there."""
        names = {name for name in self._saved if name == "best_model.pth" or name.startswith("checkpoint_")}
        if missing := names - set(sound) - set(self._damaged):
            self._lose(f"{sorted(missing)} were saved, and are gone: there are {sorted(sound)}")
        if (run := self._run()) is not None:
            torn = {path.name for path in run.glob("*.pth") if not zipfile.is_zipfile(path)} - set(self._damaged)
            if torn:
                self._lose(f"{sorted(torn)} are torn")

    def _lose(self, line: str) -> None:
        self.problems["lost"].append(line)

    # ---- lives ----

    def _draw_kill(self) -> tuple[Harm, float | None]:
        done = max(self._sound().values(), default=0) / self.whole.steps
        if self.rng.random() < 0.5:
            return Harm(), self.rng.uniform(0, self.whole.seconds * (1 - 0.8 * done))
        return self._aimed("kill", done), None

    def _aimed(self, kind: str, done: float) -> Harm:
        event = "write" if kind == "full" else self.rng.choice([name for name, n in self.whole.events.items() if n])
        number = self.rng.randint(1, math.ceil(self.whole.events[event] * (1 - 0.8 * done)))
        phases = [phase for phase in PHASES if phase != "halfway" or event == "write"]
        return Harm(kind, event, number, self.rng.choice(phases))

    def _go_on(self, harm: Harm | None = None, delay: float | None = None) -> int | str:
        """The next life, which must go on from the newest sound checkpoint; returns its exit code."""
        run, sound = self._run(), self._sound()
        self._check_saved(sound)
        if run is not None and not sound:
            if self._has_saved:
                self._lose("there was a checkpoint, and none is left")
            self._expect_nothing(run)
            run = None
        before = leftovers(run) if run else set()
        life = self._live(run, harm, delay)
        if run is not None and life.start is not None:
            self.sums["resumed"] += 1
            if life.start != max(sound.values()):
                self._lose(f"goes on from update {life.start}, though there is {sound}")
            if stale := before & leftovers(run):
                self.problems["differing"].append(f"left by an earlier process: {sorted(map(str, stale))}")
            self._expect_names()
        may_fail = harm is not None and harm.kind in ("full", "read-only")
        self._is_done = life.code == 0
        if life.code not in (0, -signal.SIGKILL) and not may_fail:
            self._lose(f"life {self._lives}: {life.end()}")
        return life.code

    def _live(self, run: Path | None, harm: Harm | None = None, delay: float | None = None) -> Life:
        self._lives += 1
        relative = run.relative_to(self.home) if run else None
        life = Life(self.whole.case, self.home, relative, harm, delay, self._lives)
        self._said += life.text
        for change, name in life.changes:
            # of the numbered best models none is gone on from
            self._has_saved |= name == "best_model.pth" or name.startswith("checkpoint_")
            (self._saved.add if change == "saved" else self._saved.discard)(name)
        return life

    def _expect_nothing(self, run: Path) -> None:
        """Nothing was saved: a start that goes on has to say so. Then the training begins anew."""
        life = self._live(run)
        self.sums["nothing saved"] += 1
        if life.code in (0, -signal.SIGKILL) or life.start is not None or "FileNotFoundError" not in life.text:
            self._lose(f"nothing was saved, but {life.end()}")
        self._begin_anew()

    def _expect_names(self) -> None:
        """Damaged checkpoints that are newer than the one used are named."""
        warnings = [line for line in self._said.splitlines() if line.startswith("warning: ")]
        missing = [name for name in self._unnamed if not any(name in line for line in warnings)]
        if missing:
            self._lose(f"{missing} were damaged, and no warning names them")
        self._unnamed.clear()
        self._said = ""

    # ---- damage ----

    def _damage(self, kind: str) -> None:
        self.sums[f"damage: {kind}"] += 1
        run, sound = self._run(), self._sound()
        if kind == "stale":
            number = self.rng.randrange(100)
            (run / f".checkpoint_{number}.pth.{2**22 + number}.tmp").write_bytes(b"PK" * number)
        elif kind == "read-only":
            before = digests(run)
            life = self._live(run, Harm("read-only"))
            if life.code in (0, -signal.SIGKILL) or digests(run) != before:
                self._lose(f"read-only folder: {life.end()}, {sorted(before)} became {sorted(digests(run))}")
        elif kind == "full":
            code = self._go_on(self._aimed("full", max(sound.values()) / self.whole.steps))
            if code == 0 and max(self._sound().values()) != self.whole.steps:
                self._lose("the disk was full, the last checkpoint is not there, and the exit code is 0")
        elif kind == "all" or len(sound) == 1:
            self._damage_all(run)
        else:
            name = max(sound, key=lambda name: (sound[name], name))  # checkpoint_N before best_model.pth
            damage(run / name, kind, self.rng)
            self._damaged[name] = digests(run)[name]
            if list(sound.values()).count(sound[name]) == 1:  # or another one is as new
                self._unnamed.add(name)
            self._said = ""

    def _damage_all(self, run: Path) -> None:
        """No checkpoint is sound: a start must fail and leave all as it is. Then they are put back."""
        kept = self.folder / "kept"
        shutil.copytree(run, kept)
        for path in run.glob("*.pth"):
            damage(path, self.rng.choice(DAMAGES[:4]), self.rng)
        before = digests(run)
        life = self._live(run)
        if life.code in (0, -signal.SIGKILL) or life.start is not None or digests(run) != before:
            self._lose(f"no checkpoint was sound, but {life.end()}; {sorted(before)}, {sorted(digests(run))}")
        for path in kept.glob("*.pth"):
            shutil.copyfile(path, run / path.name)
        shutil.rmtree(kept)
