"""Where Coqui's Trainer 0.4.0 is wrong: eighteen cases, and the test that keeps each of them right here.

1. Gradients are never averaged over the ranks; they drift apart.
   tests/trainer/test_several_ranks.py::test_two_ranks_are_one_rank_with_the_joint_batch
   tests/trainer/test_distributed.py::test_two_ranks_are_bitwise_equal
2. With one optimizer, schedulers that count epochs never step.
   tests/trainer/test_schedulers.py::test_steps_and_epochs
   tests/coqui/test_scripts.py::test_learns_with_the_overrides
3. Running averages drop their first value.
   tests/trainer/test_averages.py::test_the_first_value_counts
   tests/trainer/test_evaluation.py::test_evaluation_counts_every_sample_once
   tests/trainer/test_evaluation.py::test_the_best_model_is_the_one_with_the_lowest_eval_loss
4. The best evaluation loss is lost by a resume, and the training loss judges.
   tests/trainer/test_restore.py::test_both_losses_survive_a_resume
   tests/trainer/test_coqui_cases.py::test_after_a_resume_the_best_eval_loss_of_before_judges
5. A resume begins the epoch again, with other random numbers, and repeats a finished epoch.
   tests/trainer/test_resume.py::test_a_continued_run_ends_bitwise_where_an_undisturbed_one_does
   tests/trainer/test_coqui_cases.py::test_a_resume_in_an_epoch_of_a_plain_loader_is_exact
6. All ranks draw the same numbers, epochs are not shuffled anew, and only rank 0 is evaluated.
   tests/trainer/test_distributed.py::test_ranks_draw_differently_and_rank_0_as_a_single_process
   tests/trainer/test_several_ranks.py::test_two_ranks_are_one_rank_with_the_joint_batch
   tests/data/test_loader.py::test_a_distributed_sampler_is_told_the_epoch
7. A NotImplementedError from inside a model's hook is taken for a hook that is not there.
   tests/trainer/test_coqui_cases.py::test_not_implemented_inside_a_hook_comes_out
8. A NaN is neither reported nor skipped.
   tests/trainer/test_nan_guard.py::test_stops_before_the_update_with_step_loss_and_parameter
   tests/trainer/test_nan_guard.py::test_the_update_is_left_out_and_the_run_goes_on
9. Accumulated losses are logged divided, a short last window is too small, several optimizers are refused.
   tests/trainer/test_coqui_cases.py::test_accumulated_losses_are_logged_as_the_mean_of_their_window
   tests/trainer/test_loop.py::test_accumulation_weighs_a_short_batch_by_its_samples
   tests/trainer/test_loop.py::test_two_optimizers_equal_a_plain_loop_bitwise
   tests/trainer/test_coqui_cases.py::test_a_manual_gan_accumulates_each_optimizers_own_gradients
10. The gradient norm is logged as 0 without clipping, and scaled under fp16.
   tests/trainer/test_loop.py::test_gradient_norms_are_the_true_ones
   tests/trainer/test_manual.py::test_norms_are_the_true_ones_under_loss_scaling
11. reset_lr flattens the rates of parameter groups and the warm-up; another model is continued in part, silently.
   tests/trainer/test_optimizers.py::test_reset_gives_each_group_its_own_rate
   tests/trainer/test_optimizers.py::test_a_schedule_of_base_rates_goes_on_after_a_reset
   tests/trainer/test_resume.py::test_a_checkpoint_of_another_model_is_an_error_that_lists_the_differences
12. The launcher drops arguments, returns 0 after failures, leaves ranks running, and has a fixed port.
   tests/trainer/test_distribute.py::test_all_arguments_are_passed_on_by_this_interpreter
   tests/trainer/test_distribute.py::test_a_failing_rank_gives_an_exit_code_and_the_first_traceback
   tests/trainer/test_agent.py::test_a_killed_rank_ends_the_job_and_nothing_is_left
   tests/trainer/test_distribute.py::test_two_launches_at_the_same_time_do_not_collide
13. Any exception deletes the run's folder and hides the traceback behind sys.exit(1).
   tests/trainer/test_coqui_cases.py::test_an_exception_comes_out_as_it_is_and_the_folder_stays
   tests/coqui/test_scripts.py::test_an_exception_of_the_model_comes_out_and_the_run_goes_on_from_its_checkpoint
14. A save that is cut off leaves a broken file, and a broken newest file stops a resume.
   tests/trainer/test_storage.py::test_a_writer_that_fails_leaves_what_was_there
   tests/trainer/test_resume.py::test_a_damaged_newest_checkpoint_is_told_of_and_the_one_before_it_used
15. The batch size finder does not change the batch size; the profiler is not stepped; overfit_batch is not read.
   tests/trainer/test_batch_size.py::test_the_fit_is_that_of_a_training_with_this_size
   tests/trainer/test_profiling.py::test_steps_once_an_update
   tests/trainer/test_loop.py::test_overfit_batch_uses_one_batch_only
16. --coqpit.grad_clip 1.0 and --coqpit.lr_scheduler crash; unknown flags are ignored.
   tests/coqui/test_scripts.py::test_learns_with_the_overrides
   tests/coqui/test_scripts.py::test_misspelt_flags_end_it_before_anything_is_made
17. cudnn_enable=False does nothing, the limit of open files is lowered, two runs of one minute share a folder,
   memory:// becomes a local folder, three criteria pass for two optimizers.
   tests/trainer/test_coqui_cases.py::test_cudnn_can_be_switched_off
   tests/trainer/test_coqui_cases.py::test_the_limit_of_open_files_is_left_alone
   tests/trainer/test_provenance.py::test_runs_that_start_together_get_folders_of_their_own
   tests/trainer/test_coqui_cases.py::test_an_output_path_that_is_a_url_is_refused
   tests/trainer/test_coqui_cases.py::test_a_dashboard_at_a_url_is_written_there
   tests/trainer/test_coqui_cases.py::test_lists_of_other_lengths_than_the_optimizers_are_refused
18. Every step waits for the device and flushes the event file; batches in batches stay on the CPU.
   tests/trainer/test_coqui_cases.py::test_steps_that_log_nothing_do_not_wait_for_the_device
   tests/trainer/test_coqui_cases.py::test_the_event_file_is_flushed_at_log_points_only
   tests/trainer/test_device.py::test_every_tensor_is_moved_however_deep
"""

import ast
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from tests.trainer.test_manual import ManualGan
from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, collate, make_samples, weights_of
from trainer import Trainer, TrainerArgs
from trainer.loggers.base import DashboardLogger

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_case_has_tests_that_exist():
    cases = re.split(r"^(?=\d+\. )", __doc__, flags=re.MULTILINE)[1:]
    assert [int(case.split(".")[0]) for case in cases] == list(range(1, 19))
    for case in cases:
        named = re.findall(r"^   (tests/\S+\.py)::(\w+)$", case, flags=re.MULTILINE)
        assert named, case
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, name)


# ---- 4, 5: resume ----


class Scripted(Toy):
    """Evaluates to given losses, one for each epoch."""

    losses = iter(())

    def eval_step(self, batch, criterion):
        if batch["x"].size(0) == 4:  # the first of two batches
            self.value = next(self.losses)
        return {}, {"loss": torch.tensor(self.value)}


def test_after_a_resume_the_best_eval_loss_of_before_judges():
    """Case 4. The training losses, which fall all the time, would save the later epochs."""
    Scripted.losses = iter([1.0, 0.5, 0.75, 0.625])
    first = build(Scripted, epochs=2)
    first.fit()
    args = TrainerArgs(continue_path=str(first.output_path))
    second = build(Scripted, epochs=4, args=args)
    second.fit()
    assert second.total_steps_done == 12
    assert second.best_loss["eval_loss"] == 0.5
    assert torch.load(first.output_path / "best_model.pth", weights_only=True)["step"] == 6


@pytest.mark.parametrize("stop", [3, 4, 5], ids=lambda n: f"stopped after {n} updates")
@pytest.mark.parametrize("seed", [None, 3], ids=["torch's generator", "its own generator"])
@pytest.mark.parametrize("model", [Toy, ToyGan])
def test_a_resume_in_an_epoch_of_a_plain_loader_is_exact(model, seed, stop):
    """Case 5. Coqui's models bring DataLoaders that shuffle by themselves."""

    def trained(args=None, **changes):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        loader = DataLoader(make_samples(12), batch_size=4, shuffle=True, collate_fn=collate, generator=generator)
        trainer = build(model, lr=0.01, epochs=3, dropout=0.3, train_loader=loader, args=args, **changes)
        trainer.fit()
        return trainer

    whole = trained()
    first = trained(max_steps=stop)
    second = trained(TrainerArgs(continue_path=str(first.output_path)))
    assert second.total_steps_done == whole.total_steps_done == 9
    if model is Toy:
        order = [x for seen in (first.model.seen, second.model.seen) for batch in seen for x in batch]
        assert order == [x for batch in whole.model.seen for x in batch]
    assert_same_weights(weights_of(second.model), weights_of(whole.model))


# ---- 7: hooks ----


def failing(name: str) -> type:
    """A Toy one of whose hooks raises."""

    def hook(self, *args, **kwargs):
        raise NotImplementedError(f"inside {name}")

    also = {"test_log": {"test_run": lambda self, trainer: {}}}.get(name, {})
    return type("Failing", (Toy,), {name: hook, **also})


STEPS = ("train_step", "eval_step", "optimize", "format_batch", "format_batch_on_device")
SHOWN = ("test_run", "test_log", "on_epoch_start", "before_gradient_clipping")
BUILT = ("get_optimizer", "get_lr", "get_scheduler", "get_criterion", "get_data_loader")


@pytest.mark.parametrize("name", [*STEPS, *SHOWN, *BUILT])
def test_not_implemented_inside_a_hook_comes_out(name):
    """Case 7."""
    with pytest.raises(NotImplementedError, match=f"^inside {name}$"):
        build(failing(name), epochs=1, plot_step=1).fit()


# ---- 9: accumulation ----


class Recording(DashboardLogger):
    """Keeps the numbers of every update."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.flushes = 0

    def train_step_stats(self, step, stats):
        self.steps.append(dict(stats))

    def flush(self):
        self.flushes += 1


def shown_by(dashboard, model, loader, args=None, **fields) -> Trainer:
    """A Trainer of one epoch, without evaluation, that writes to this dashboard."""
    config = ToyConfig(epochs=1, run_eval=False, **fields)
    loaders = {"train_loader": loader, "dashboard_logger": dashboard}
    return Trainer(args or TrainerArgs(), config, model=model(config), parse_command_line_args=False, **loaders)


@pytest.mark.parametrize("by", ["automatic", "manual"])
def test_accumulated_losses_are_logged_as_the_mean_of_their_window(by):
    """Case 9. 14 samples in batches of 4, 4, 4 and 2: windows of 12 and of 2 samples, at a rate of 0."""

    class Manual(Toy):
        def optimize(self, batch, trainer):
            outputs, losses = self.train_step(batch, trainer.criterion)
            self.scaled_backward(losses["loss"], trainer)
            trainer.optimizer[0].step()
            trainer.optimizer[0].zero_grad()
            return outputs, losses

    samples, dashboard = make_samples(14), Recording()
    loader = DataLoader(samples, batch_size=4, collate_fn=collate)
    model = Manual if by == "manual" else Toy
    trainer = shown_by(dashboard, model, loader, TrainerArgs(grad_accum_steps=3), lr=0.0, plot_step=1)
    trainer.fit()
    whole = collate(samples)
    errors = (trainer.model.layer(whole["x"]).squeeze(1) - whole["y"]).detach() ** 2
    # relative 1e-6: the mean of batch means, each rounded to float32
    expected = [errors[:12].mean().item(), errors[12:].mean().item()]
    assert [stats["loss"] for stats in dashboard.steps] == pytest.approx(expected, rel=1e-6)
    assert trainer.keep_avg_train.means["loss"] == pytest.approx(errors.mean().item(), rel=1e-6)


def test_accumulated_losses_of_several_optimizers_are_logged_so_too():
    """Case 9."""
    means = {}
    for name, k, size in (("accumulated", 3, 4), ("one batch", 1, 12)):
        loader = DataLoader(make_samples(12), batch_size=size, collate_fn=collate)
        trainer = build(ToyGan, args=TrainerArgs(grad_accum_steps=k), train_loader=loader, lr=0.01, epochs=1)
        trainer.fit()
        means[name] = trainer.keep_avg_train.means
    assert set(means["one batch"]) == {"loss_0", "loss_1", "real", "score", "grad_norm_0", "grad_norm_1"}
    assert means["accumulated"] == pytest.approx(means["one batch"], rel=1e-5)


def gan_losses(model, batch) -> tuple:
    """Of ManualGan's generator and discriminator."""
    fake = model.generator(batch["x"])
    real = ((1 - model.disc(batch["y"].unsqueeze(1))) ** 2).mean()
    return ((1 - model.disc(fake)) ** 2).mean(), real + (model.disc(fake.detach()) ** 2).mean()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_manual_gan_accumulates_each_optimizers_own_gradients(accumulate):
    """Case 9. The generator's loss also fills the discriminator's gradients, which zero_grad clears in a plain loop."""
    loader = DataLoader(make_samples(24), batch_size=4, collate_fn=collate)
    args = TrainerArgs(grad_accum_steps=accumulate)
    trainer = build(ManualGan, args=args, optimizer="AdamW", lr=0.01, train_loader=loader, epochs=2, run_eval=False)
    trainer.fit()

    torch.manual_seed(0)
    model = ToyGan(trainer.config)
    optimizers, parts = model.get_optimizer(), [list(m.parameters()) for m in (model.disc, model.generator)]
    for _ in range(2):
        batches = list(loader)
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            sums = [[torch.zeros_like(p) for p in part] for part in parts]
            for i, batch in enumerate(window):
                for idx in (0, 1):
                    loss = gan_losses(model, batch)[1 - idx] / len(window)
                    for total, gradient in zip(sums[idx], torch.autograd.grad(loss, parts[idx])):
                        total += gradient
                    if i == len(window) - 1:
                        for parameter, gradient in zip(parts[idx], sums[idx]):
                            parameter.grad = gradient
                        optimizers[idx].step()
    for a, b in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_held_step_is_made_though_the_last_batch_asks_for_none():
    """Case 9. An optimizer that a model steps for some of a window's batches only."""

    class Sometimes(Toy):
        def optimize(self, batch, trainer):
            outputs, losses = self.train_step(batch, trainer.criterion)
            self.batches = getattr(self, "batches", 0) + 1
            if self.batches % 2 == 1:
                self.scaled_backward(losses["loss"], trainer)
                trainer.optimizer[0].step()
                trainer.optimizer[0].zero_grad()
            return outputs, losses

    loader = DataLoader(make_samples(8), batch_size=4, collate_fn=collate)
    trainer = build(Sometimes, args=TrainerArgs(grad_accum_steps=2), train_loader=loader, epochs=1, run_eval=False)
    before = weights_of(trainer.model)
    trainer.fit()
    layer, batch = torch.nn.Linear(3, 1), next(iter(loader))
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in before.items()})
    # half of the window's samples
    (((layer(batch["x"]).squeeze(1) - batch["y"]) ** 2).mean() / 2).backward()
    expected = layer.weight - trainer.config.lr * layer.weight.grad
    torch.testing.assert_close(trainer.model.layer.weight, expected)


# ---- 13: exceptions ----


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(7), GeneratorExit()], ids=repr
)
def test_an_exception_comes_out_as_it_is_and_the_folder_stays(error):
    """Case 13."""

    def fail(trainer):
        raise error

    trainer = build(callbacks={"on_train_step_end": fail}, dashboard_logger="tensorboard")
    with pytest.raises(type(error)) as caught:
        trainer.fit()
    assert caught.value is error
    assert caught.traceback[-1].name == "fail"
    names = {path.name.split(".")[0] for path in trainer.output_path.iterdir()}
    assert names == {"config", "trainer_0_log", "events"}
    assert "epoch 1/6" in (trainer.output_path / "trainer_0_log.txt").read_text()
    assert not list(trainer.output_path.glob("*.pth"))


# ---- 17 ----


def test_cudnn_can_be_switched_off(monkeypatch):
    """Case 17."""
    cudnn = torch.backends.cudnn
    for name in ("enabled", "deterministic", "benchmark", "allow_tf32"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))  # puts them back
    for wanted in (False, True):
        build(cudnn_enable=wanted)
        assert cudnn.enabled is wanted


def test_the_limit_of_open_files_is_left_alone():
    """Case 17. In a process of its own, whose limit is neither Coqui's 4096 nor the default."""
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (777, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        from tests.trainer.toys import build
        build(epochs=1).fit()
        print("limit", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "limit 777"


@pytest.mark.parametrize("url", ["memory://runs", Path("memory://runs"), "s3:/runs"], ids=repr)
def test_an_output_path_that_is_a_url_is_refused(url):
    """Case 17. A Path makes ``memory:/runs`` of the URL."""
    loader = DataLoader(make_samples(4), batch_size=4, collate_fn=collate)
    config = ToyConfig(run_eval=False)
    trainer = Trainer(TrainerArgs(), config, url, model=Toy(config), train_loader=loader, parse_command_line_args=False)
    with pytest.raises(ValueError, match=f"output_path='{url}': only local folders can be written to"):
        trainer.fit()
    assert list(Path().iterdir()) == []


def test_a_run_at_a_url_cannot_be_continued():
    """Case 17."""
    with pytest.raises((ValueError, FileNotFoundError), match="memory:"):
        build(epochs=1, args=TrainerArgs(continue_path="memory://runs/run")).fit()
    assert list(Path().iterdir()) == []


def test_a_dashboard_at_a_url_is_written_there():
    """Case 17. TensorBoard writes to every URL that fsspec knows."""
    url = "memory://dashboards/a"
    build(epochs=1, logger_uri=url, dashboard_logger="tensorboard").fit()
    assert len(fsspec.filesystem("memory").glob(f"{url}/events.out.tfevents.*")) == 1
    assert [path.name for path in Path().iterdir()] == ["output"]


@pytest.mark.parametrize("n", [3, 0])
@pytest.mark.parametrize("hook", ["get_criterion", "get_scheduler"])
def test_lists_of_other_lengths_than_the_optimizers_are_refused(hook, n):
    """Case 17. Two optimizers, and three (or no) criteria or schedulers."""
    entry = torch.nn.L1Loss() if hook == "get_criterion" else None
    model = type("Wrong", (ToyGan,), {hook: lambda self, *args: [entry] * n})
    with pytest.raises(ValueError, match=rf"{hook}\(\): {n} (entries|schedulers) .*for 2 optimizers"):
        build(model)


# ---- 18 ----


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: a value that is read, or an index that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if re.search(r"_local_scalar_dense|nonzero|masked_select|unique", str(function)):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [Toy, ToyGan, ManualGan])
def test_steps_that_log_nothing_do_not_wait_for_the_device(model, precision):
    """Case 18. Two epochs of ten updates between log points, with accumulation, clipping and a schedule."""
    changes = {"grad_clip": 0.5, "lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.9}}
    mixed = {"mixed_precision": True, "precision": "bf16"} if precision == "bf16" else {}
    waits, reads = Waits(), []

    def begin(trainer):
        if trainer.total_steps_done == 1:  # the first update is printed
            waits.__enter__()

    def end(trainer):
        if trainer.total_steps_done == 10:
            waits.__exit__(None, None, None)
            reads.extend(waits.found)
            trainer.config.max_steps = 10

    trainer = build(
        model,
        args=TrainerArgs(grad_accum_steps=2),
        lr=0.001,
        train=80,
        run_eval=False,
        scheduler_after_epoch=False,
        target_loss="loss_gen" if model is ManualGan else None,
        **{"print_step": 100, "plot_step": 100, "epochs": 3, **changes, **mixed},
        callbacks={"on_train_step_start": begin, "on_train_step_end": end},
    )
    trainer.fit()
    assert trainer.total_steps_done == 10
    assert reads == []


def test_the_event_file_is_flushed_at_log_points_only():
    """Case 18. 30 updates, shown after every tenth."""
    dashboard = Recording()
    shown_by(dashboard, Toy, DataLoader(make_samples(120), batch_size=4, collate_fn=collate), plot_step=10).fit()
    assert len(dashboard.steps) == 3
    assert dashboard.flushes == 3
    assert math.isfinite(dashboard.steps[-1]["loss"])


def test_a_deep_batch_reaches_the_model_on_the_device():
    """Case 18. The meta device stands for a GPU."""
    trainer = build(config=ToyConfig())
    trainer.device = torch.device("meta")
    batch, samples = trainer.prepare({"x": torch.ones(2, 3), "deep": [{"a": (torch.ones(2), {"b": torch.ones(1)})}]})
    a, inner = batch["deep"][0]["a"]
    assert samples == 2
    assert {batch["x"].device.type, a.device.type, inner["b"].device.type} == {"meta"}
