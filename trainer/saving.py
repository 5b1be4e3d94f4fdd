"""When a Trainer's checkpoints are saved, and what a save that fails means."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import checkpoint as checkpoints
from trainer.checkpoint_writer import CheckpointWriter

if TYPE_CHECKING:
    from trainer.trainer import Trainer


class Saver:
    """Saves the checkpoints of a run.

    With ``save_async`` the training waits until its state is copied, and until the save before is done; a thread
    writes. A save that fails, since the disk is full say, is told of: earlier checkpoints stay, the training goes on,
    and the next save is tried as ever. Only the last one of a training, and those that a script asks for, must succeed.

    Args:
        trainer: whose state is saved. All ranks call all methods, together; the first one writes.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer, self._config = trainer, trainer.config
        self._writer = CheckpointWriter(trainer.config.save_async)
        self._saved_at = time.monotonic()
        self.is_due = False  # as the ranks have agreed
        # the best losses before: of the best model that is being written, and of one that could not be
        self._best_before: dict[str, float] | None = None
        self._best_lost: dict[str, float] | None = None

    def minutes_are_over(self) -> bool:
        """Whether save_minutes have passed since the last checkpoint, by the clock of the first rank."""
        minutes, is_main = self._config.save_minutes, self._trainer.ranks.is_main
        return minutes is not None and is_main and time.monotonic() - self._saved_at >= minutes * 60

    def after_update(self) -> bool:
        """Save what is due; hear of what was saved. Returns whether it took time."""
        config, step = self._config, self._trainer.total_steps_done
        with self._telling_of_failures():
            self._writer.poll()
        if not config.save_checkpoints:
            return False
        is_logged = step % (config.log_model_step or config.save_step) == 0
        if step % config.save_step == 0 or self.is_due:
            self.save(is_logged)
            return True
        if is_logged:
            self.wait()
            for _, path in checkpoints.list_checkpoints(self._trainer.output_path)[-1:]:
                self._log(path, step, self._trainer.epochs_done)
        return is_logged

    def save(self, is_logged: bool = False) -> None:
        """Save ``checkpoint_<step>.pth``.

        Args:
            is_logged: hand the file to the dashboard.

        Raises:
            FloatingPointError: a loss or a weight is not finite; the same when this is found in the thread, later.
        """
        self.wait()
        with self._telling_of_failures():
            self._save(is_logged)

    def save_best(self, is_best: bool, beaten: list[int], before: dict[str, float]) -> None:
        """Save ``best_model.pth``, and a numbered one where the config asks for it; see checkpoint.save_best.

        Args:
            is_best: as of checkpoint.save_best.
            beaten: likewise.
            before: the best losses before this one.
        """
        self.wait()
        self._best_before = before if is_best else None

        def done() -> None:
            self._best_before = None

        with self._telling_of_failures():
            checkpoints.save_best(self._trainer, self._writer, is_best, beaten, done)

    def forget_lost_best(self) -> None:
        """Put the best losses back to those of best_model.pth, if a better one could not be written."""
        if self._best_before is not None:  # that is not known yet
            self.wait()
        lost, self._best_lost = self._trainer.ranks.broadcast(self._best_lost), None
        if lost is not None:
            self._trainer.best_loss = lost

    def save_now(self, best: bool = False) -> None:
        """Save ``checkpoint_<step>.pth``, or ``best_model.pth``, and return when it is there.

        Raises:
            OSError: it could not be written.
            RuntimeError: an evaluation is under way, which holds averaged weights and other random states.
            FloatingPointError: a loss or a weight is not finite.
        """
        if self._trainer.is_evaluating:
            what = "save_best_model()" if best else "save_checkpoint()"
            raise RuntimeError(f"{what} inside an evaluation: call it in on_epoch_end or on_train_step_end")
        self.wait()
        if best:
            checkpoints.save_best(self._trainer, self._writer, is_best=True, beaten=[])
        else:
            self._save(is_logged=False)
        try:
            self._writer.wait()
        finally:
            self._trainer.ranks.barrier()  # what rank 0 has written is there for all

    def wait(self) -> None:
        """Wait until all is written."""
        with self._telling_of_failures():
            self._writer.wait()

    def _save(self, is_logged: bool) -> None:
        trainer = self._trainer
        folder = trainer.output_path  # first: it opens the run, and one that goes on gets its step by that
        step, epochs = trainer.total_steps_done, trainer.epochs_done
        path = folder / f"checkpoint_{step}.pth"
        trainer.drift.check(step)
        self._saved_at, self.is_due = time.monotonic(), False

        def done() -> None:
            trainer.c_logger.print(f"saved {path}")
            if is_logged:
                self._log(path, step, epochs)

        checkpoints.save_step(trainer, self._writer, path, done)

    def _log(self, path: Path, step: int, epochs: int) -> None:
        aliases = [f"epoch-{epochs}", f"step-{step}"]
        try:
            self._trainer.dashboard_logger.add_artifact(path, name="checkpoint", artifact_type="model", aliases=aliases)
        except OSError as error:
            self._trainer.c_logger.warn(f"{path.name} is saved, but the dashboard could not take it: {error}")

    @contextlib.contextmanager
    def _telling_of_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._trainer.c_logger.warn(f"a checkpoint could not be saved: {error}; earlier ones stay as they are")
            self._best_lost, self._best_before = self._best_before or self._best_lost, None
