"""A training whose files cannot be written for a while: checkpoints, log file and event files at once."""

import contextlib
import re

import pytest

from tests.trainer.toys import assert_same_weights, build, weights_of
from trainer import TrainerArgs
from trainer.checkpoint import list_checkpoints

resource = pytest.importorskip("resource")
# TensorBoard's thread, whose error is also raised where it can be heard
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


SETTINGS = {"epochs": 4, "save_step": 1, "save_n_checkpoints": 1, "print_step": 1, "plot_step": 1, "run_eval": False}
SETTINGS |= {"dashboard_logger": "tensorboard", "save_best_after": 99, "save_async": False}


@contextlib.contextmanager
def full(frees_at: int):
    """Callbacks with which after the fifth update no file can grow beyond a byte, until another one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(trainer):
        if trainer.total_steps_done in (5, frees_at):
            limit = before[0] if trainer.total_steps_done == frees_at else 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        yield {"on_train_step_start": set_limit}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_training_goes_on_and_each_thing_is_told_once(caplog, capfd):
    whole = build(**SETTINGS)
    whole.fit()
    caplog.clear()
    with full(frees_at=10) as callbacks:
        trainer = build(**SETTINGS, callbacks=callbacks)
        trainer.fit()
    assert_same_weights(weights_of(trainer.model), weights_of(whole.model))
    assert [step for step, _ in list_checkpoints(trainer.output_path)] == [12]
    assert caplog.text.count("a checkpoint could not be saved") == 5
    log = f"{trainer.output_path.name}/trainer_0_log.txt: could not be written (File too large); lines may be lost"
    for what in ("event files could not be written (File too large); the training goes on", log):
        assert caplog.text.count(what) == 1
    assert "Logging error" not in capfd.readouterr().err


def test_when_it_stays_full_the_training_ends_with_the_reason_and_can_go_on():
    whole = build(**SETTINGS)
    whole.fit()
    with full(frees_at=99) as callbacks:
        first = build(**SETTINGS, callbacks=callbacks)
        with pytest.raises(OSError, match=r"File too large"):
            first.fit()
    assert [step for step, _ in list_checkpoints(first.output_path)] == [5]
    second = build(**SETTINGS, seed=9, args=TrainerArgs(continue_path=str(first.output_path)))
    second.fit()
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    text = (first.output_path / "trainer_0_log.txt").read_text()
    assert re.findall(r" step (\d+):", text) == [str(step) for step in range(1, 13)]
