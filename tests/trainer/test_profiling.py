"""Training under torch.profiler: the schedule is kept, the traces are there, and nothing else of a training happens."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from tests.trainer.toys import Toy, ToyConfig, assert_same_weights, build, make_samples, weights_of
from trainer import Trainer, TrainerArgs
from trainer.loggers.base import DashboardLogger
from trainer.profiling import profile_fit


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class CountingProfiler:
    """Stands for a profiler where only its calls matter."""

    def __init__(self) -> None:
        self.calls: list = []

    def __enter__(self) -> None:
        self.calls.append("start")

    def __exit__(self, *error) -> None:
        self.calls.append("stop")

    def step(self) -> None:
        self.calls.append("step")


class Recorder(DashboardLogger):
    """A dashboard that remembers what reaches it."""

    def __init__(self) -> None:
        self.seen: list = []

    def add_scalar(self, title, value, step):
        self.seen.append(title)

    def add_text(self, title, text, step):
        self.seen.append(title)

    def finish(self):
        self.seen.append("finish")


class Watched(Toy):
    """Remembers what a profiled training must not call."""

    def train_log(self, *args):
        self.seen.append("train_log")

    def eval_step(self, batch, criterion):
        self.seen.append("eval_step")
        return super().eval_step(batch, criterion)

    def test_run(self, trainer):
        self.seen.append("test_run")


def build_with(dashboard: DashboardLogger, model_class=Toy, **values) -> Trainer:
    """As build, with a dashboard that is handed over."""
    config = ToyConfig(**values)
    samples = {"train_samples": make_samples(12), "eval_samples": make_samples(6)}
    model = model_class(config)
    return Trainer(
        TrainerArgs(), config, model=model, dashboard_logger=dashboard, parse_command_line_args=False, **samples
    )


def steps_in(path: Path) -> tuple[list[int], set[str]]:
    """The profiled steps, and the names of all events, of a Chrome trace."""
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    return sorted({int(match[1]) for name in names if (match := re.fullmatch(r"ProfilerStep#(\d+)", name))}), set(names)


class TestTheProfiler:
    def test_keeps_its_schedule_and_writes_traces(self, tmp_path):
        """Coqui's Trainer never steps it: the schedule stays in its first step, and nothing is recorded."""
        handler, ready = tensorboard_trace_handler(str(tmp_path / "traces")), []

        def on_trace_ready(profiler):
            ready.append(profiler.step_num)
            handler(profiler)

        plan = schedule(skip_first=1, wait=1, warmup=1, active=2, repeat=2)
        profiler = profile(
            activities=[ProfilerActivity.CPU],
            schedule=plan,
            on_trace_ready=on_trace_ready,
            acc_events=True,  # or it warns that it clears the events of the first cycle
        )
        trainer = build(train=12, batch_size=1)
        assert profile_fit(trainer, profiler, epochs=1) is profiler
        assert trainer.total_steps_done == profiler.step_num == 12
        assert ready == [5, 9]
        traces = sorted((tmp_path / "traces").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert [steps_in(path)[0] for path in traces] == [[3, 4], [7, 8]]
        for path in traces:
            assert steps_in(path)[1] >= {"aten::linear", "aten::mse_loss", "Optimizer.step#SGD.step"}

    def test_exports_what_it_recorded(self, tmp_path):
        profiler = profile(activities=[ProfilerActivity.CPU], schedule=schedule(wait=1, warmup=1, active=3, repeat=1))
        profile_fit(build(train=8, batch_size=1), profiler, epochs=1)
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        steps, names = steps_in(tmp_path / "trace.json")
        assert steps == [2, 3, 4]
        assert "aten::linear" in names
        assert "aten::linear" in {event.key for event in profiler.key_averages()}

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_steps_once_an_update(self, accumulate):
        profiler = CountingProfiler()
        profile_fit(build(train=12, args=TrainerArgs(grad_accum_steps=accumulate)), profiler, epochs=2)
        assert profiler.calls == ["start", *["step"] * (6 // accumulate + (accumulate == 2)), "stop"]

    def test_is_stopped_after_an_error(self):
        class Broken(Toy):
            def train_step(self, batch, criterion):
                if len(self.seen) == 2:
                    raise KeyError("in the model")
                return super().train_step(batch, criterion)

        trainer, profiler = build(Broken), CountingProfiler()
        with pytest.raises(KeyError, match="in the model"):
            profile_fit(trainer, profiler)
        assert profiler.calls == ["start", "step", "step", "stop"]
        assert (trainer.config.run_eval, trainer.config.save_checkpoints) == (True, True)
        trainer.callbacks("on_train_step_end", trainer)
        assert profiler.calls[-1] == "stop"  # nothing steps it any more


class TestTheTraining:
    def test_is_that_of_fit(self):
        profiled, plain = build(epochs=2, run_eval=False), build(epochs=2, run_eval=False)
        profile_fit(profiled, CountingProfiler())
        plain.fit()
        assert_same_weights(weights_of(profiled.model), weights_of(plain.model))

    @pytest.mark.parametrize("opened", [False, True])
    def test_shows_evaluates_and_saves_nothing(self, opened):
        dashboard = Recorder()
        trainer = build_with(dashboard, model_class=Watched, plot_step=1, save_step=1, run_eval_steps=1)
        if opened:
            trainer.open_run()
        dashboard.seen.clear()
        profile_fit(trainer, CountingProfiler(), epochs=1)
        assert [entry for entry in trainer.model.seen if isinstance(entry, str)] == []
        assert len(trainer.model.seen) == 3
        assert dashboard.seen == ["finish"] * opened
        assert list(trainer.output_path.glob("*.pth")) == []

    def test_takes_the_first_samples(self):
        trainer = build(train=12, batch_size=2)
        profile_fit(trainer, CountingProfiler(), epochs=1, small_run=5)
        first = [float(x[0]) for x, _ in make_samples(12)[:5]]
        seen = [value for batch in trainer.model.seen for value in batch]
        assert sorted(seen) == pytest.approx(sorted(first))
        assert len(trainer.train_samples) == len(make_samples(12))
        assert trainer.train_loader is None

    def test_leaves_all_as_it_was(self):
        dashboard = Recorder()
        trainer = build_with(dashboard, epochs=3)
        before = trainer.config.to_json()
        profile_fit(trainer, CountingProfiler(), epochs=1, small_run=4)
        assert trainer.config.to_json() == before
        assert json.loads((trainer.output_path / "config.json").read_text()) == json.loads(before)
        assert (trainer.epochs_done, trainer.total_steps_done) == (1, 1)
        assert trainer._dashboard is dashboard
        trainer.fit()
        assert (trainer.epochs_done, trainer.total_steps_done) == (3, 7)
        assert trainer.dashboard_logger is dashboard
        assert "EvalStats/loss" in dashboard.seen
        assert (trainer.output_path / "checkpoint_7.pth").exists()

    def test_does_not_count_for_early_stopping(self):
        trainer = build(epochs=9, lr=0.0, early_stopping_patience=3)
        profile_fit(trainer, CountingProfiler(), epochs=5)
        assert (trainer.epochs_done, trainer.early_stopping.waited) == (5, 0)

    def test_counts_epochs_from_where_it_is(self):
        trainer = build(epochs=2)
        trainer.fit()
        profile_fit(trainer, CountingProfiler(), epochs=3)
        assert trainer.epochs_done == 5

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs=0: at least 1 is needed"),
            ({"small_run": 0}, "small_run=0: at least 1 is needed"),
            ({"small_run": 3}, "small_run=3 cuts the samples, and there are none: hand train_samples over"),
        ],
    )
    def test_wrong_numbers(self, options, message, tmp_path):
        loader = torch.utils.data.DataLoader([1, 2])
        trainer = build(train_samples=None, train_loader=loader)
        with pytest.raises(ValueError, match=message):
            profile_fit(trainer, CountingProfiler(), **options)
        assert list(tmp_path.iterdir()) == []
