"""Loggers: event files read back, console lines and bar, the log file, and the clock."""

import io
import logging
import math
import sys
import wave

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from trainer import TrainerConfig
from trainer.loggers import console as console_module
from trainer.loggers.base import DashboardLogger
from trainer.loggers.console import (
    ConsoleLogger,
    StepClock,
    arguments_to_repeat,
    format_duration,
    format_values,
    set_up_logging,
)
from trainer.loggers.figures import plot_alignment, plot_matrix, plot_spectrogram, to_image
from trainer.loggers.tensorboard import TensorboardLogger, new_dashboard
from trainer.provenance import as_a_shell_calls


def read_events(folder):
    """Everything in a folder's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "audio": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


class TestTensorboard:
    @pytest.fixture
    def dashboard(self, tmp_path):
        dashboard = TensorboardLogger(tmp_path)
        yield dashboard
        dashboard.finish()

    def test_scalars(self, dashboard, tmp_path):
        dashboard.train_step_stats(10, {"loss": 1.5, "grad_norm": 0.25})
        dashboard.train_step_stats(20, {"loss": 0.5})
        dashboard.train_epoch_stats(20, {"loss": 1.0})
        dashboard.eval_stats(20, {"loss": 2.0})
        dashboard.flush()
        events = read_events(tmp_path)
        found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert found == {
            "TrainIterStats/loss": [(10, 1.5), (20, 0.5)],
            "TrainIterStats/grad_norm": [(10, 0.25)],
            "TrainEpochStats/loss": [(20, 1.0)],
            "EvalStats/loss": [(20, 2.0)],
        }

    def test_figures(self, dashboard, tmp_path):
        from PIL import Image

        figure = Figure(figsize=(3, 2), dpi=100, facecolor=(1, 0, 0))
        for scope in ("train", "eval", "test"):
            getattr(dashboard, f"{scope}_figures")(5, {"plot": figure})
        dashboard.flush()
        events = read_events(tmp_path)
        assert sorted(events.Tags()["images"]) == ["EvalFigures/plot", "TestFigures/plot", "TrainFigures/plot"]
        (event,) = events.Images("EvalFigures/plot")
        image = Image.open(io.BytesIO(event.encoded_image_string))
        assert (event.step, image.size, image.getpixel((150, 100))) == (5, (300, 200), (255, 0, 0))

    def test_audio(self, dashboard, tmp_path, capsys):
        """A tone of half the full level: its length, rate and samples come back, to 16 bits."""
        rate = 8000
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
        for scope, audio in (("train", tone), ("eval", torch.tensor(tone, requires_grad=True)), ("test", 4 * tone)):
            getattr(dashboard, f"{scope}_audios")(3, {"speech": audio}, rate)
        dashboard.flush()
        assert capsys.readouterr().out == ""  # torch prints a warning for what is louder than 1
        events = read_events(tmp_path)
        assert sorted(events.Tags()["audio"]) == ["EvalAudios/speech", "TestAudios/speech", "TrainAudios/speech"]
        for tag, expected in (
            ("TrainAudios/speech", tone),
            ("EvalAudios/speech", tone),
            ("TestAudios/speech", np.clip(4 * tone, -1, 1)),
        ):
            (event,) = events.Audio(tag)
            with wave.open(io.BytesIO(event.encoded_audio_string)) as file:
                assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (rate, rate // 2, 1)
                found = np.frombuffer(file.readframes(rate), dtype="<i2") / 32767
            assert event.step == 3
            np.testing.assert_allclose(found, expected, atol=1 / 32767)

    def test_config_is_written_as_text(self, dashboard, tmp_path):
        dashboard.add_config(TrainerConfig(run_name="my run"))
        dashboard.flush()
        (event,) = read_events(tmp_path).Tensors("config/text_summary")
        assert '"run_name": "my run"' in event.tensor_proto.string_val[0].decode()

    def test_what_the_run_is_for_is_written_with_the_config(self, dashboard, tmp_path):
        dashboard.add_config(TrainerConfig(run_description="a longer warm-up"))
        dashboard.flush()
        event = read_events(tmp_path).Tensors("run_description/text_summary")[0]
        assert event.tensor_proto.string_val[0].decode() == "a longer warm-up"

    def test_parameter_statistics(self, dashboard, tmp_path):
        model = nn.Linear(2, 1)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, 3.0]]))
            model.bias.fill_(5.0)
        dashboard.model_weights(model, 7)
        dashboard.flush()
        events = read_events(tmp_path)
        found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        expected = {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0}
        assert found == {
            **{f"ModelWeights/weight/{k}": [(7, v)] for k, v in expected.items()},
            **{
                f"ModelWeights/bias/{k}": [(7, v)] for k, v in {"mean": 5.0, "std": 0.0, "min": 5.0, "max": 5.0}.items()
            },
        }
        assert events.Tags()["histograms"] == ["ModelWeights/weight"]

    def test_finish_writes_everything_and_closes(self, tmp_path, monkeypatch):
        dashboard, closed = TensorboardLogger(tmp_path), []
        close = dashboard.writer.close
        monkeypatch.setattr(dashboard.writer, "close", lambda: closed.append(close()))
        for step in range(500):
            dashboard.eval_stats(step, {"loss": 1.0})
        dashboard.finish()
        assert len(closed) == 1
        assert [event.step for event in read_events(tmp_path).Scalars("EvalStats/loss")] == list(range(500))


def test_the_dashboard_that_the_config_names(tmp_path):
    silent = new_dashboard(TrainerConfig(dashboard_logger="none"), tmp_path)
    assert type(silent) is DashboardLogger
    dashboard = new_dashboard(TrainerConfig(), tmp_path)
    assert type(dashboard) is TensorboardLogger
    dashboard.finish()


def test_logger_uri_is_where_the_dashboard_writes(tmp_path):
    dashboard = new_dashboard(TrainerConfig(logger_uri=str(tmp_path / "logs")), tmp_path / "run")
    dashboard.finish()
    assert list((tmp_path / "logs").glob("events*"))
    assert not (tmp_path / "run").exists()


def test_the_base_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dashboard = DashboardLogger()
    dashboard.add_config(TrainerConfig())
    for scope in ("train", "eval", "test"):
        getattr(dashboard, f"{scope}_figures")(1, {"a": Figure()})
        getattr(dashboard, f"{scope}_audios")(1, {"a": np.zeros(3)}, 8000)
    dashboard.eval_stats(1, {"loss": 1.0})
    dashboard.flush()
    dashboard.finish()
    assert list(tmp_path.iterdir()) == []


class TestFigures:
    def test_matrix_lies_as_it_says(self):
        """Its first row at the left, its first column at the bottom."""
        values_XY = np.arange(6.0).reshape(2, 3)
        axes = plot_matrix(values_XY, "title", "across", "up").axes[0]
        (image,) = axes.get_images()
        np.testing.assert_array_equal(image.get_array(), values_XY.T)
        assert (image.origin, axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
            "lower",
            "title",
            "across",
            "up",
        )

    def test_spectrogram_and_alignment(self):
        spectrogram_CF = torch.rand(80, 120, requires_grad=True)
        axes = plot_spectrogram(spectrogram_CF).axes[0]
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), spectrogram_CF.detach().numpy())
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("frame", "channel")
        alignment_FT = np.eye(12, 5, dtype=np.float16)
        axes = plot_alignment(alignment_FT).axes[0]
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), alignment_FT.T)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("frame", "token")

    def test_half_precision_and_booleans(self):
        for values in (torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bool)):
            assert to_image(plot_matrix(values, "", "", "")).shape == (500, 600, 3)

    def test_image(self):
        image_HWC = to_image(Figure(figsize=(2, 1), dpi=50, facecolor=(0, 0, 1)))
        assert (image_HWC.shape, image_HWC.dtype) == ((50, 100, 3), np.uint8)
        assert (image_HWC == (0, 0, 255)).all()

    def test_pyplot_keeps_none_alive(self):
        code = (
            "import sys, numpy\nfrom trainer.loggers.figures import plot_matrix, to_image\n"
            "to_image(plot_matrix(numpy.eye(3), '', '', ''))\nprint('matplotlib.pyplot' in sys.modules)"
        )
        from tests.trainer.test_imports import run_python

        assert run_python(code) == "False"


class NoHandlers(list):
    """Stays empty: pytest adds handlers of its own to the root logger when a test begins."""

    def append(self, handler) -> None:
        pass


@pytest.fixture
def bare_logging(monkeypatch):
    """The trainer's logger and the root logger as in a fresh program."""
    logger = logging.getLogger("trainer")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", NoHandlers())
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


def show_on(monkeypatch, **options) -> io.StringIO:
    """Replace the console by one that writes to the returned file."""
    file = io.StringIO()
    monkeypatch.setattr(console_module, "console", Console(file=file, soft_wrap=True, width=120, **options))
    return file


@pytest.mark.usefixtures("bare_logging")
class TestConsole:
    def test_plain_lines_when_there_is_no_terminal(self, monkeypatch):
        file = show_on(monkeypatch)
        console = ConsoleLogger()
        console.start_epoch(0, 3, updates=10, done=4)
        console.advance()
        console.print_train_step(
            25, {"loss": 1.23456789, "lr": 0.0002}, {"loss": 2.0}, {"step_time": 0.5, "loader_time": 0.0625}, 3661.0
        )
        console.print_eval("step 25", {"loss": 0.5}, 1.26)
        console.print_eval("batch 1", {"loss": 0.25})
        console.end_epoch()
        assert file.getvalue() == (
            "epoch 1/3: 10 updates, 4 of them done before\n"
            "step 25: loss 1.235  lr 0.0002  avg_loss 2  step_time 0.500 s  loader_time 0.062 s  left 1:01:01\n"
            "eval at step 25: loss 0.5  (1.3 s)\n"
            "eval at batch 1: loss 0.25\n"
        )

    def test_a_live_bar_on_a_terminal(self, monkeypatch):
        monkeypatch.setenv("TERM", "xterm-256color")
        file = show_on(monkeypatch, force_terminal=True, color_system=None)
        console = ConsoleLogger()
        console.start_epoch(1, 3, updates=10, done=4)
        assert console._progress is not None
        console.advance()
        console.print_train_step(25, {"loss": 1.5}, {}, {"step_time": 0.5}, 61.0)
        console._progress.refresh()
        console.close()
        shown = file.getvalue()
        assert "epoch 2/3" in shown
        assert "5/10" in shown
        assert "loss 1.5  0.500 s  left 0:01:01" in shown
        assert "step 25: loss 1.5" in shown
        assert console._progress is None

    def test_long_lines_and_brackets_stay_as_they_are(self, monkeypatch):
        file = show_on(monkeypatch)
        text = "[red]no markup[/red] :smile: " + "x" * 300
        ConsoleLogger().print(text)
        assert file.getvalue() == text + "\n"

    def test_warnings_say_so(self, monkeypatch, bare_logging):
        file = show_on(monkeypatch)
        set_up_logging()
        bare_logging.warning("loss is %s", math.nan)
        bare_logging.error("stop")
        bare_logging.info("fine")
        bare_logging.debug("not shown")
        assert file.getvalue() == "warning: loss is nan\nerror: stop\nfine\n"

    def test_lines_go_to_what_is_stdout_now(self, capsys):
        console = ConsoleLogger()
        console.print("first")
        assert capsys.readouterr().out == "first\n"
        replaced = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", replaced)
            console.print("second")
        console.print("third")
        assert (replaced.getvalue(), capsys.readouterr().out) == ("second\n", "third\n")

    def test_set_up_once(self, bare_logging):
        for _ in range(2):
            ConsoleLogger()
        assert len(bare_logging.handlers) == 1

    def test_the_programs_own_logging_is_left_alone(self, monkeypatch, bare_logging):
        monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
        bare_logging.setLevel(logging.ERROR)
        set_up_logging()
        assert (bare_logging.handlers, bare_logging.level) == ([], logging.ERROR)

    def test_log_file(self, monkeypatch, tmp_path):
        show_on(monkeypatch)
        path = tmp_path / "trainer_0_log.txt"
        for text in ("first start", "continued: é"):
            console = ConsoleLogger()
            console.open(path)
            console.print(text)
            console.close()
            console.close()
            console.print("not in the file")
        lines = path.read_text(encoding="utf8").splitlines()
        assert [line[20:] for line in lines] == ["first start", "continued: é"]
        assert all(line[4] == line[7] == "-" and line[13] == ":" for line in lines)

    def test_another_rank_writes_to_its_file_only(self, monkeypatch, tmp_path, bare_logging):
        output = io.StringIO()
        monkeypatch.setattr(console_module, "console", Console(file=output, force_terminal=True, width=80))
        c_logger = ConsoleLogger()
        c_logger.open(tmp_path / "log.txt", on_console=False)
        c_logger.start_epoch(0, 1, 5, 0)
        c_logger.advance()
        c_logger.close()
        assert output.getvalue() == ""
        assert "epoch 1/1: 5 updates" in (tmp_path / "log.txt").read_text(encoding="utf8")

    def test_warnings_say_so_in_the_log_file(self, tmp_path):
        c_logger = ConsoleLogger()
        c_logger.open(tmp_path / "log.txt")
        c_logger.warn("going on")
        c_logger.print("fine")
        c_logger.close()
        lines = (tmp_path / "log.txt").read_text(encoding="utf8").splitlines()
        assert [line[20:] for line in lines] == ["warning: going on", "fine"]

    def test_start_and_end(self, monkeypatch, tmp_path):
        file = show_on(monkeypatch)
        monkeypatch.setattr(sys, "argv", ["my recipe.py"])
        console = ConsoleLogger()
        model = nn.Linear(1000, 2)
        folder = tmp_path / "a run"
        console.print_start(folder, model, torch.device("cpu"), TrainerConfig(precision="bf16"))
        console.print_start(folder, model, torch.device("cpu"), TrainerConfig(mixed_precision=True, precision="bf16"))
        console.print_end(folder, can_continue=False)
        console.print_end(folder, can_continue=True)
        start, end = f"run folder: {folder}", f"look at it:  {as_a_shell_calls('tensorboard')} --logdir '{folder}'"
        assert file.getvalue().splitlines() == [
            start,
            "Linear: 2,002 parameters, cpu, fp32",
            start,
            "Linear: 2,002 parameters, cpu, bf16",
            start,
            end,
            start,
            end,
            f"continue it: {as_a_shell_calls('python')} 'my recipe.py' --continue_path '{folder}'",
        ]


def test_the_arguments_that_continuing_a_run_needs():
    """All but those that its config holds, and those of one start."""
    argv = "--data my/clips --coqpit.lr=1e-3 --coqpit.lrs 1 -2 --grad_accum_steps 4 --continue_path run -f a b"
    argv += " --restore_path=x c --coqpit.flag --use_ddp true --rank 1"
    assert arguments_to_repeat(argv.split()) == ["--data", "my/clips", "--grad_accum_steps", "4", "-f", "a", "b", "c"]
    assert arguments_to_repeat([]) == []


def test_formats():
    assert format_values({"loss": 123456.7, "lr": 2e-4, "n": 3}) == "loss 1.235e+05  lr 0.0002  n 3"
    assert format_duration(751.4) == "0:12:31"
    assert format_duration(3 * 86400 + 4 * 3600 + 300) == "3 days, 4:05:00"


class TestStepClock:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock on a time that the test moves by hand."""
        self.now = 100.0
        monkeypatch.setattr(console_module.time, "perf_counter", lambda: self.now)
        return StepClock()

    def run(self, clock: StepClock, steps: int, wait: float, work: float) -> None:
        def loader():
            for i in range(steps):
                self.now += wait
                yield i

        for count, item in enumerate(clock.wait_for(loader())):
            assert item == count
            self.now += work

    def test_waiting_is_told_from_working(self, clock):
        self.run(clock, steps=4, wait=0.25, work=2.0)
        assert clock.read() == {"step_time": 2.0, "loader_time": 0.25}

    def test_an_interval_begins_at_each_reading(self, clock):
        self.run(clock, steps=4, wait=0.25, work=2.0)
        clock.read()
        self.run(clock, steps=2, wait=0.5, work=1.0)
        assert clock.read() == {"step_time": 1.0, "loader_time": 0.5}

    def test_what_is_restarted_is_not_counted(self, clock):
        self.now += 50  # an evaluation
        clock.restart()
        self.run(clock, steps=1, wait=0.5, work=1.0)
        assert clock.read() == {"step_time": 1.0, "loader_time": 0.5}
        assert clock.time_left(10) == 15.0

    def test_time_left_goes_by_all_that_was_read(self, clock):
        assert clock.time_left(10) == 0.0
        self.run(clock, steps=3, wait=0.0, work=1.0)
        clock.read()
        self.run(clock, steps=1, wait=0.0, work=5.0)
        clock.read()
        assert clock.time_left(10) == 20.0  # 8 s for 4 updates

    def test_reading_before_any_step(self, clock):
        self.now += 1
        assert clock.read() == {"step_time": 1.0, "loader_time": 0.0}
