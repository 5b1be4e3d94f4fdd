"""The logs of runs that were stopped and continued: every step is there once, with an undisturbed run's values."""

import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from tests.trainer.toys import Toy, build
from tests.trainer.two_ranks import on_two_ranks
from trainer import TrainerArgs, restarts
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.loggers.console import ConsoleLogger
from trainer.loggers.tensorboard import TensorboardLogger

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Showing(Toy):
    """Logs every kind of event."""

    def train_log(self, batch, outputs, logger, steps):
        logger.train_audios(steps, {"x": batch["x"][:, 0]}, 8000)
        logger.add_text("predictions", str(outputs["prediction"].tolist()), steps)

    def eval_log(self, batch, outputs, logger, steps):
        figure = Figure(figsize=(0.5, 0.5), facecolor=(abs(float(outputs["prediction"].mean())) % 1, 0, 0))
        logger.eval_figures(steps, {"colour": figure})

    def test_run(self, trainer):
        return {"weight": float(self.layer.weight.sum())}

    def test_log(self, outputs, logger, steps):
        logger.add_scalar("TestStats/weight", outputs["weight"], steps)


SETTINGS = {
    "epochs": 3,
    "dropout": 0.3,
    "print_step": 1,
    "plot_step": 1,
    "save_step": 2,
    "run_eval_steps": 2,
    "model_param_stats": True,
    "dashboard_logger": "tensorboard",
}


class CrashError(Exception):
    """What ends the runs here."""


def run(crash_at=None, continue_path="", model_class=Showing, **changes):
    """A Trainer after ``fit``, which fails in update ``crash_at``, before that is logged."""

    def crash(trainer):
        if trainer.total_steps_done + 1 == crash_at:
            raise CrashError

    args = TrainerArgs(continue_path=str(continue_path))
    seed = 99 if continue_path else 0
    settings = {**SETTINGS, "callbacks": {"on_train_step_start": crash}, **changes}
    trainer = build(model_class, args=args, seed=seed, **settings)
    if crash_at is None:
        trainer.fit()
    else:
        with pytest.raises(CrashError):
            trainer.fit()
    return trainer


def records(path: Path) -> list[Event]:
    """The events of a file, all of whose bytes belong to whole records with right sums.

    A record is: length (uint64), CRC of these 8 bytes, the event, its CRC.
    """
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        body, data = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[:4]) == (masked_crc32c(body),)
        events.append(Event.FromString(body))
        data = data[4:]
    return events


def summaries(folder: Path) -> list[tuple[int, Summary.Value]]:
    """All that was logged in a folder's event files, with its step."""
    paths = sorted(folder.glob("events.out.tfevents.*"))
    return [(event.step, value) for path in paths for event in records(path) for value in event.summary.value]


def logged(folder: Path) -> dict[tuple[str, int], bytes]:
    """Everything in a folder's event files but times, by tag and step; each must be there once.

    TensorBoard has to see the same.
    """
    found = {(value.tag, step): value for step, value in summaries(folder)}
    assert len(found) == len(summaries(folder))
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown = [(tag, event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    assert sorted(shown) == sorted(key for key, value in found.items() if value.HasField("simple_value"))
    return {key: value.SerializeToString() for key, value in found.items() if not key[0].endswith("_time")}


def lines(folder: Path, rank: int = 0) -> list[str]:
    """The log file's lines of updates, evaluations and best models, without times."""
    text = (folder / f"trainer_{rank}_log.txt").read_text(encoding="utf8")
    found = [line[20:] for line in text.splitlines() if re.search(r"step \d+:|best model", line)]
    return [re.split(r"  step_time|  \(", line)[0] for line in found]


def assert_same_logs(folder: Path, whole: Path) -> None:
    """Of a continued run and an undisturbed one."""
    assert logged(folder) == logged(whole)
    assert lines(folder) == lines(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the undisturbed run."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return (root / run().output_path).resolve()


def test_the_undisturbed_run_logs_what_the_other_tests_compare(whole):
    tags = {}
    for tag, step in logged(whole):
        tags.setdefault(tag, []).append(step)
    assert {tag: sorted(steps) for tag, steps in tags.items() if not tag.startswith("ModelWeights/")} == {
        "config/text_summary": [0],
        **{f"TrainIterStats/{name}": list(range(1, 10)) for name in ("loss", "grad_norm", "current_lr")},
        "TrainAudios/x": list(range(1, 10)),
        "predictions/text_summary": list(range(1, 10)),
        "EvalStats/loss": [2, 3, 4, 6, 8, 9],
        "EvalFigures/colour": [2, 3, 4, 6, 8, 9],
        "TestStats/weight": [3, 6, 9],
        **{f"TrainEpochStats/{name}": [3, 6, 9] for name in ("loss", "grad_norm")},
    }
    assert sorted(tags["ModelWeights/layer.weight"]) == [3, 6, 9]
    assert [line.split(": ")[0] for line in lines(whole) if not line.startswith("best")] == [
        *("step 1", "step 2", "eval at step 2", "step 3", "eval at step 3", "step 4", "eval at step 4", "step 5"),
        *("step 6", "eval at step 6", "step 7", "step 8", "eval at step 8", "step 9", "eval at step 9"),
    ]
    assert "best model so far: loss 0.1625" in lines(whole)
    assert re.fullmatch(r"step 2: loss \S+  grad_norm \S+  current_lr 0.1  avg_loss \S+", lines(whole)[1])


@pytest.mark.parametrize("crash_at", [3, 4, 5, 6, 7, 9])
def test_a_run_that_crashed_logs_the_same_when_it_goes_on(whole, crash_at):
    """At 3, 5, 7 and 9 only the evaluation of the checkpoint's step, or that of the epoch, came after it."""
    first = run(crash_at)
    second = run(continue_path=first.output_path)
    assert_same_logs(second.output_path, whole)


def test_a_run_that_crashed_again_and_again_logs_the_same(whole):
    folder = run(crash_at=4).output_path
    for crash_at in (4, 6, 9):
        run(crash_at, continue_path=folder)
    run(continue_path=folder)
    assert_same_logs(folder, whole)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 4  # the second start has saved nothing


@pytest.mark.parametrize("damaged", [("checkpoint_6.pth",), ("checkpoint_6.pth", "best_model.pth", "checkpoint_4.pth")])
def test_the_logs_go_back_to_the_checkpoint_that_is_used(whole, damaged):
    first = run(crash_at=8)
    for name in damaged:
        os.truncate(first.output_path / name, 1000)
    run(continue_path=first.output_path)
    assert_same_logs(first.output_path, whole)


def test_going_on_from_what_a_callback_has_saved():
    def save(trainer):
        if trainer.total_steps_done == 3:
            trainer.save_checkpoint()

    def crash(trainer):
        if trainer.total_steps_done == 4:
            raise CrashError

    options = {"save_step": 100, "save_best_after": 99, "run_eval_steps": None}
    whole = run(**options)
    first = build(
        Showing, **{**SETTINGS, **options}, callbacks={"on_train_step_end": save, "on_train_step_start": crash}
    )
    with pytest.raises(CrashError):
        first.fit()
    second = run(continue_path=first.output_path, **options)
    assert logged(second.output_path) == logged(whole.output_path)


def test_going_on_from_the_best_model(whole):
    """It is saved when the evaluation is logged, but the epoch is not over."""
    first = run(crash_at=4)
    (first.output_path / "checkpoint_2.pth").unlink()
    assert load_checkpoint(first.output_path / "best_model.pth")["step"] == 3
    run(continue_path=first.output_path)
    assert_same_logs(first.output_path, whole)


@pytest.mark.parametrize("hook", ["train_step", "eval_step", "test_run"])
def test_a_run_that_was_told_to_stop_logs_the_same_when_it_goes_on(whole, hook):
    calls = []

    class Stopping(Showing):
        pass

    def stop(self, *args):
        calls.append(self)
        if len(calls) == (5 if hook == "train_step" else 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return getattr(Showing, hook)(self, *args)

    setattr(Stopping, hook, stop)
    trainer = build(Stopping, **SETTINGS)
    with pytest.raises(SystemExit):
        trainer.fit()
    run(continue_path=trainer.output_path)
    assert_same_logs(trainer.output_path, whole)


def test_going_on_from_what_a_callback_has_saved_at_the_end_of_an_epoch(whole):
    """When all of the epoch but its means is logged."""

    class Saving(Showing):
        def on_epoch_end(self, trainer):
            if not trainer.args.continue_path:
                trainer.save_checkpoint()

    first = run(crash_at=4, model_class=Saving)
    assert load_checkpoint(first.output_path / "checkpoint_3.pth")["batches_done"] == 3
    run(continue_path=first.output_path, model_class=Saving)
    assert_same_logs(first.output_path, whole)


SCRIPT = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from tests.trainer.test_resumed_logs import *
def kill(trainer):
    if trainer.total_steps_done == 6:
        trainer.dashboard_logger.flush()
        os.kill(os.getpid(), signal.SIGKILL)
build(Showing, callbacks={{"on_train_step_end": kill}}, **SETTINGS).fit()
"""


def test_a_run_that_was_killed_logs_the_same_when_it_goes_on(whole, tmp_path):
    """And what the kill has left of a record is cut off."""
    script = SCRIPT.format(root=str(ROOT))
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (folder,) = (tmp_path / "output").iterdir()
    (events,) = folder.glob("events.out.tfevents.*")
    assert ("TrainIterStats/loss", 5) in {(value.tag, step) for step, value in summaries(folder)}
    os.truncate(events, events.stat().st_size - 3)
    run(continue_path=folder)
    assert_same_logs(folder, whole)


def on_a_rank(rank: int, folder: Path) -> list[str]:
    os.chdir(folder)
    settings = {"batch_size": 2, "eval_batch_size": 2, "dashboard_logger": "none", "model_class": Toy}
    first = run(crash_at=6, **settings)
    run(continue_path=first.output_path, **settings)
    undisturbed = run(**settings)
    assert lines(first.output_path, rank) == lines(undisturbed.output_path, rank)
    return lines(first.output_path, rank)


def test_two_ranks(tmp_path):
    """Each has a log file of its own."""
    for found in on_two_ranks(tmp_path, on_a_rank, in_a_group=True):
        assert [line.split(": ")[0] for line in found if line[0] == "s"] == [f"step {i}" for i in range(1, 10)]


def test_log_files_of_ranks_that_are_not_there_any_more_keep_their_place():
    first = run(crash_at=6)
    (first.output_path / "best_model.pth").unlink()  # which is of the same update, after its evaluation
    path = first.output_path / "checkpoint_4.pth"
    state = load_checkpoint(path)
    state["logs"]["console"]["1"] = 1234
    save_checkpoint(state, path)
    second = run(crash_at=7, continue_path=first.output_path)
    found = load_checkpoint(second.output_path / "checkpoint_6.pth")["logs"]["console"]
    assert found["1"] == 1234
    assert found["0"] > state["logs"]["console"]["0"]


def test_what_is_logged_again_is_kept_in_a_file_of_its_own():
    first = run(crash_at=6)
    (first.output_path / "best_model.pth").unlink()  # which is of the same update, after its evaluation
    log = first.output_path / "trainer_0_log.txt"
    before = log.read_text()
    position = load_checkpoint(first.output_path / "checkpoint_4.pth")["logs"]["console"]["0"]
    run(crash_at=9, continue_path=first.output_path)
    redone = (first.output_path / "trainer_0_log_redone.txt").read_text()
    title, moved = redone.split("\n", 1)
    assert re.fullmatch(r"logged after step 4, which the run went on from [-\d]+ [:\d]+:", title)
    assert (log.read_text()[:position], moved) == (before[:position], before[position:])
    assert "CrashError" in moved
    # what this start has said before it found the checkpoint is still there, in its order
    said = [line[20:] for line in log.read_text()[position:].splitlines()]
    assert said[0] == f"run folder: {first.output_path}"
    assert said[1].startswith("Showing: 4 parameters")
    assert said[2].startswith("continuing from ")
    assert said[3] == "what was logged after step 4 is in trainer_0_log_redone.txt now"
    run(continue_path=first.output_path)
    redone = (first.output_path / "trainer_0_log_redone.txt").read_text()
    assert redone.startswith(f"{title}\n{moved}logged after step 8, ")
    assert redone.count("CrashError") == 2 * moved.count("CrashError")


def test_a_checkpoint_of_an_older_format_cuts_nothing():
    first = run(crash_at=6, run_eval=False)
    path = first.output_path / "checkpoint_4.pth"
    state = load_checkpoint(path)
    del state["logs"]
    save_checkpoint(state, path)
    logs = [first.output_path / "trainer_0_log.txt", *first.output_path.glob("events.out.tfevents.*")]
    before = {log: log.read_bytes() for log in logs}
    run(continue_path=first.output_path, run_eval=False)
    for log, content in before.items():
        assert log.read_bytes()[: len(content)] == content
    assert not (first.output_path / "trainer_0_log_redone.txt").exists()


def test_a_run_that_cannot_go_on_leaves_the_logs_as_they_are():
    first = run(crash_at=6)
    logs = [first.output_path / "trainer_0_log.txt", *first.output_path.glob("events.out.tfevents.*")]
    before = {log: log.read_bytes() for log in logs}
    with pytest.raises(ValueError, match="another model"):
        build(features=5, args=TrainerArgs(continue_path=str(first.output_path)), **SETTINGS).fit()
    for log, content in before.items():
        assert log.read_bytes()[: len(content)] == content
    run(crash_at=7, continue_path=first.output_path)  # and what that start has logged is cut off
    assert "another model" not in logs[0].read_text()


def test_a_run_that_was_moved_goes_on_with_its_logs(whole, tmp_path):
    first = run(crash_at=6)
    shutil.move(first.output_path, tmp_path / "elsewhere")
    run(continue_path=tmp_path / "elsewhere")
    assert_same_logs(tmp_path / "elsewhere", whole)


def test_other_event_files_stay_as_they_are(tmp_path):
    """Of another program in the run's folder, and of other runs in the folder that logger_uri names."""
    uri = {"logger_uri": str(tmp_path / "board")}
    other, first = run(crash_at=8, **uri), run(crash_at=6, **uri)
    marked = {path.name.rpartition(".trainer-")[2] for path in (tmp_path / "board").iterdir()}
    assert marked == {other.output_path.name, first.output_path.name}
    foreign = TensorboardLogger(tmp_path / "board")
    foreign.add_scalar("foreign", 1.0, 100)
    foreign.finish()
    own = [path for path in (tmp_path / "board").iterdir() if path.name.endswith(first.output_path.name)]
    before = {path: path.read_bytes() for path in (tmp_path / "board").iterdir() if path not in own}
    assert len(before) == 2
    run(continue_path=first.output_path, **uri)
    assert {path: path.read_bytes() for path in before} == before
    found = [
        (event.step, value.tag)
        for path in (tmp_path / "board").iterdir()
        if path.name.endswith(first.output_path.name)
        for event in records(path)
        for value in event.summary.value
    ]
    assert len(set(found)) == len(found)
    assert sorted(step for step, tag in found if tag == "TrainIterStats/loss") == list(range(1, 10))


def test_where_event_files_cannot_be_cut_readers_are_told_what_to_hide(caplog):
    uri = {"logger_uri": "memory://boards/a"}
    first = run(crash_at=6, **uri)
    run(continue_path=first.output_path, **uri)
    warnings = [r.getMessage() for r in caplog.records if "memory://boards/a: its event files are not cut" in r.message]
    assert len(warnings) == 1
    assert "logged after step 4 is there twice" in warnings[0]
    files = fsspec.filesystem("memory")
    for name in files.ls("memory://boards/a", detail=False):
        Path("events").mkdir(exist_ok=True)
        (Path("events") / Path(name).name).write_bytes(files.cat(name))
    starts = [e.step for p in Path("events").iterdir() for e in records(p) if e.session_log.status == SessionLog.START]
    assert starts == [5]
    events = EventAccumulator("events", size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("TrainIterStats/loss")] == list(range(1, 10))


def test_a_config_that_has_changed_is_logged_at_the_step_where_the_run_goes_on():
    first = run(crash_at=6)
    run(crash_at=7, continue_path=first.output_path, lr=0.2)
    run(crash_at=9, continue_path=first.output_path, lr=0.2)
    run(continue_path=first.output_path, lr=0.3)
    found = [(step, value) for step, value in summaries(first.output_path) if value.tag == "config/text_summary"]
    rates = [(step, re.search(r'"lr": ([\d.]+)', value.tensor.string_val[0].decode())[1]) for step, value in found]
    assert sorted(rates) == [(0, "0.1"), (4, "0.2"), (8, "0.3")]


def test_a_run_that_is_restarted_before_its_first_checkpoint_begins_its_logs_anew(whole, monkeypatch):
    first = run(crash_at=2)
    assert not list(first.output_path.glob("*.pth"))
    monkeypatch.setattr(restarts, "earlier_folder", lambda: first.output_path)
    second = run()
    assert second.output_path == first.output_path
    assert_same_logs(first.output_path, whole)
    assert "step 1:" in (first.output_path / "trainer_0_log_redone.txt").read_text()


def test_without_a_dashboard_only_the_log_file_goes_back(whole):
    first = run(crash_at=6, dashboard_logger="none")
    run(continue_path=first.output_path, dashboard_logger="none")
    assert lines(first.output_path) == lines(whole)
    assert not list(first.output_path.glob("events*"))


class Killed(io.FileIO):
    """A stream whose process is killed when it cuts the file."""

    def truncate(self, size=None):
        raise KeyboardInterrupt


class TestPositions:
    """Of the loggers alone."""

    def test_event_files_end_with_whole_records_wherever_they_are_asked(self, tmp_path):
        dashboard = TensorboardLogger(tmp_path, mark="trainer")
        for step in range(8):
            dashboard.add_scalar("a", 1.0, step)
            dashboard.add_text("b", "x" * 20_000, step)
            ((name, size),) = dashboard.position().items()
            content = (tmp_path / name).read_bytes()
            assert len(content) == size
            Path("copy").write_bytes(content)
            assert [event.step for event in records(Path("copy"))][1:] == [i for i in range(step + 1) for _ in "ab"]
        dashboard.finish()

    def test_the_log_file_ends_with_a_whole_line(self, tmp_path):
        c_logger = ConsoleLogger()
        assert c_logger.position() is None
        assert c_logger.rewind(0, 1) is False
        c_logger.open(tmp_path / "log.txt")
        c_logger.print("é" * 9000)
        assert c_logger.position() == 20 + 2 * 9000 + 1 == (tmp_path / "log.txt").stat().st_size
        c_logger.close()

    def test_a_kill_before_the_log_file_is_cut_loses_no_line(self, tmp_path, monkeypatch):
        path = tmp_path / "log.txt"
        path.write_bytes(b"before\nafter\n")
        c_logger = ConsoleLogger()
        c_logger.open(path)
        with Killed(path) as stream, monkeypatch.context() as patch:
            patch.setattr(c_logger._file, "stream", stream)
            with pytest.raises(KeyboardInterrupt):
                c_logger.rewind(7, 1)
        assert path.read_bytes() == b"before\nafter\n"
        c_logger.close()
        c_logger = ConsoleLogger()
        c_logger.open(path)
        assert c_logger.rewind(7, 1) is True
        c_logger.close()
        kept, said = path.read_text().splitlines()
        assert (kept, said[20:]) == ("before", "what was logged after step 1 is in log_redone.txt now")
        moved = (tmp_path / "log_redone.txt").read_text().splitlines()
        assert moved[1::2] == ["after", "after"]  # of both attempts

    @pytest.mark.parametrize(("position", "gone"), [(100, "65 bytes"), (35, None), (None, None)])
    def test_a_log_file_that_is_not_longer_stays_as_it_is(self, tmp_path, caplog, position, gone):
        path = tmp_path / "log.txt"
        path.write_text("2026-11-21 20:00:00 before the end\n")
        c_logger = ConsoleLogger()
        c_logger.open(path)
        c_logger.print("this start")
        assert c_logger.rewind(position, 4) is False
        c_logger.close()
        text = [line[20:] for line in path.read_text().splitlines()]
        assert text[:2] == ["before the end", "this start"]
        assert [message for message in caplog.messages if "are gone" in message] == (
            [f"{path}: {gone} of what was logged before are gone"] if gone else []
        )
        assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]

    def test_event_files_that_are_gone_or_shorter_are_told_of(self, tmp_path, caplog):
        (tmp_path / "events.out.tfevents.1.trainer").write_bytes(b"12345")
        dashboard = TensorboardLogger(tmp_path, mark="trainer")
        dashboard.rewind({"events.out.tfevents.1.trainer": 6, "events.out.tfevents.0.trainer": 1}, 4)
        dashboard.finish()
        assert "is gone, or a part of it: events.out.tfevents.1.trainer, events.out.tfevents.0.trainer" in caplog.text
        assert (tmp_path / "events.out.tfevents.1.trainer").read_bytes() == b"12345"

    def test_what_this_start_has_logged_before_the_checkpoint_was_found_stays(self, tmp_path):
        (tmp_path / "events.out.tfevents.1.trainer").write_bytes(b"12345")
        dashboard = TensorboardLogger(tmp_path, mark="trainer")
        dashboard.add_scalar("a", 1.0, 0)
        dashboard.flush()
        dashboard.rewind({}, 4)
        dashboard.finish()
        assert [(step, value.tag) for step, value in summaries(tmp_path)] == [(0, "a")]
        assert len(list(tmp_path.iterdir())) == 1

    def test_of_a_logger_without_a_mark_no_file_is_cut(self, tmp_path, caplog):
        for _ in range(2):
            dashboard = TensorboardLogger(tmp_path)
            assert dashboard.position() is None
            dashboard.add_scalar("a", 1.0, 7)
            dashboard.finish()
        dashboard = TensorboardLogger(tmp_path)
        dashboard.rewind({}, 4)
        dashboard.finish()
        assert len(summaries(tmp_path)) == 2
        assert "its event files are not cut" in caplog.text
