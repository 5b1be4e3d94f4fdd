"""What Coqui's models and scripts import and call, under its names."""

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, make_samples, weights_of
from trainer import Trainer, TrainerArgs
from trainer.coqui_modules import MODULES
from trainer.loggers.base import DashboardLogger
from trainer.loggers.console import ConsoleLogger

ROOT = Path(__file__).resolve().parents[2]
# every name that coqui-tts 0.28.0 imports from a module of the trainer
TTS_NAMES = {
    "trainer": ["Trainer", "TrainerArgs", "TrainerConfig", "TrainerModel"],
    "trainer.config": ["TrainerConfig"],
    "trainer.generic_utils": [
        "count_parameters",
        "get_experiment_folder_path",
        "get_git_branch",
        "is_pytorch_at_least_2_4",
        "set_partial_state_dict",
    ],
    "trainer.io": [
        "copy_model_files",
        "get_last_checkpoint",
        "get_user_data_dir",
        "load_fsspec",
        "save_best_model",
        "save_checkpoint",
    ],
    "trainer.logging": ["BaseDashboardLogger", "ConsoleLogger", "logger_factory"],
    "trainer.logging.base_dash_logger": ["BaseDashboardLogger"],
    "trainer.logging.tensorboard_logger": ["TensorboardLogger"],
    "trainer.torch": ["DistributedSampler", "DistributedSamplerWrapper", "NoamLR"],
    "trainer.trainer_utils": ["get_optimizer", "get_scheduler"],
    "trainer.utils.distributed": ["is_dist_avail_and_initialized"],
}


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TestModules:
    @pytest.mark.parametrize("module", MODULES)
    def test_every_name_can_be_imported(self, module):
        found = importlib.import_module(module)
        for name, (home, there) in MODULES[module].items():
            assert getattr(found, name) is getattr(importlib.import_module(home), there)
        assert found.__name__ == module

    def test_in_a_fresh_process(self):
        code = """
            from trainer.io import load_fsspec, save_fsspec
            import trainer.utils.distributed as distributed
            from trainer.logging.tensorboard_logger import TensorboardLogger
            print(load_fsspec.__module__, distributed.get_rank(), TensorboardLogger.__module__)
        """
        command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout == "trainer.coqui_names 0 trainer.loggers.tensorboard\n"

    def test_other_names_are_import_errors(self):
        with pytest.raises(ImportError, match=r"cannot import name 'load_fsspecs' from 'trainer\.io'"):
            from trainer.io import load_fsspecs  # noqa: F401
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'trainer\.ios'"):
            importlib.import_module("trainer.ios")

    def test_what_coqui_tts_imports_is_here_or_in_the_list_of_what_is_not(self):
        page = (ROOT / "docs/migrating.md").read_text(encoding="utf8")
        section = page[page.index("## What is not carried over") :]
        left_out = set(re.findall(r"`(\w+)`", section))
        missing = {
            name
            for module, names in TTS_NAMES.items()
            for name in names
            if not hasattr(importlib.import_module(module), name)
        }
        assert missing <= left_out
        # every model of several speakers imports it
        assert "set_partial_state_dict" not in missing


class TestBuilders:
    def test_get_optimizer(self):
        from trainer.trainer_utils import get_optimizer

        model = nn.Linear(2, 1)
        optimizer = get_optimizer("AdamW", {"betas": (0.5, 0.9)}, 0.25, model)
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.param_groups[0]["params"] == list(model.parameters())
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]) == (0.25, (0.5, 0.9))
        some = get_optimizer("RAdam", {}, 0.5, parameters=[model.bias])
        assert type(some) is torch.optim.RAdam
        assert some.param_groups[0]["params"] == [model.bias]

    def test_get_scheduler(self):
        from trainer.torch import NoamLR
        from trainer.trainer_utils import get_scheduler

        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        scheduler = get_scheduler("ExponentialLR", {"gamma": 0.5}, optimizer)
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert type(get_scheduler("NoamLR", {"warmup_steps": 4}, optimizer)) is NoamLR
        assert get_scheduler(None, {}, optimizer) is None

    def test_count_parameters(self):
        from trainer.generic_utils import count_parameters

        model = nn.Linear(3, 2)
        assert count_parameters(model) == 8
        model.bias.requires_grad_(False)
        assert count_parameters(model) == 6

    def test_set_partial_state_dict_takes_what_fits(self):
        from trainer.generic_utils import set_partial_state_dict

        torch.manual_seed(0)
        old = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 1))
        new = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(5, 1))
        fresh = weights_of(new)
        state = set_partial_state_dict(new.state_dict(), weights_of(old), ToyConfig(reinit_layers=["2.bias"]))
        new.load_state_dict(state)
        assert torch.equal(new[0].weight, old[0].weight)
        # of other sizes: the part that both have
        assert torch.equal(new[1].weight[:4], old[1].weight)
        assert torch.equal(new[1].weight[4:], fresh["1.weight"][4:])
        assert torch.equal(new[2].weight[:, :4], old[2].weight)
        assert torch.equal(new[2].bias, fresh["2.bias"])


class TestFiles:
    def state(self) -> dict:
        return {"model": {"w": torch.arange(4.0)}, "step": 3}

    @pytest.mark.parametrize("path", ["state.pth", "memory://names/state.pth", Path("path.pth")], ids=str)
    def test_round_trip(self, path, monkeypatch):
        from trainer.io import load_fsspec, save_fsspec

        monkeypatch.setenv("TTS_HOME", str(Path.cwd() / "home"))
        save_fsspec(self.state(), path)
        state = load_fsspec(path, map_location="cpu")
        assert state["step"] == 3
        assert torch.equal(state["model"]["w"], torch.arange(4.0))
        assert load_fsspec(path, map_location="meta")["model"]["w"].device.type == "meta"

    @pytest.mark.parametrize("cache", [True, False])
    def test_a_remote_file_is_kept_unless_told_otherwise(self, cache, monkeypatch):
        from trainer.io import load_fsspec, save_fsspec

        monkeypatch.setenv("TTS_HOME", str(Path.cwd() / "home"))
        save_fsspec(self.state(), f"memory://kept/{cache}.pth")
        assert load_fsspec(f"memory://kept/{cache}.pth", cache=cache)["step"] == 3
        assert Path("home/tts_cache").is_dir() is cache
        fsspec.filesystem("memory").rm(f"/kept/{cache}.pth")
        if cache:
            assert load_fsspec(f"memory://kept/{cache}.pth")["step"] == 3
        else:
            with pytest.raises(FileNotFoundError):
                load_fsspec(f"memory://kept/{cache}.pth", cache=False)

    def test_code_is_never_executed(self):
        from trainer.io import load_fsspec

        class Trap:
            def __reduce__(self):
                return (Path("executed").touch, ())

        torch.save({"model": Trap()}, "trap.pth")
        with pytest.raises(Exception, match="Weights only load failed"):
            load_fsspec("trap.pth")
        assert not Path("executed").exists()

    def test_a_save_that_fails_leaves_the_old_file(self):
        from trainer.io import load_fsspec, save_fsspec

        save_fsspec(self.state(), "state.pth")
        with pytest.raises(Exception, match=r"[Pp]ickle"):
            save_fsspec({"model": torch.ones(1000), "hook": lambda: None}, "state.pth")
        assert load_fsspec("state.pth")["step"] == 3

    def test_get_user_data_dir(self, monkeypatch):
        from trainer.io import get_user_data_dir

        monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
        monkeypatch.setenv("TTS_HOME", "~/tts")
        assert get_user_data_dir("app") == Path.home() / "tts/app"
        monkeypatch.delenv("TTS_HOME")
        assert get_user_data_dir("app") == Path("/xdg/app")
        monkeypatch.delenv("XDG_DATA_HOME")
        monkeypatch.setattr(sys, "platform", "linux")
        assert get_user_data_dir("app") == Path.home() / ".local/share/app"


class TestRanks:
    @pytest.mark.parametrize(("rank", "expected"), [(None, 0), ("0", 0), ("3", 3)])
    def test_ranks(self, rank, expected, monkeypatch):
        from trainer.utils.distributed import get_rank, is_dist_avail_and_initialized, is_main_process, rank_zero_only

        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert get_rank() == expected
        assert is_main_process() is (expected == 0)
        assert rank_zero_only(lambda a, b: a + b)(1, b=2) == (3 if expected == 0 else None)
        assert is_dist_avail_and_initialized() is False


class TestAttributes:
    """What scripts and callbacks of Coqui's read from a Trainer, and call on it."""

    def test_numbers_and_switches(self):
        trainer = build()
        assert (trainer.use_cuda, trainer.num_gpus, trainer.use_amp_scaler, trainer.scaler) == (False, 0, False, None)
        assert trainer.wrapped_model is None
        assert trainer._get_model() is trainer.model
        assert (trainer.total_steps_done, trainer.epochs_done, trainer.grad_accum_steps) == (0, 0, 1)
        assert build(args=TrainerArgs(grad_accum_steps=4)).grad_accum_steps == 4
        assert (trainer.args.continue_path, trainer.config.epochs) == ("", 6)
        scaling = build(mixed_precision=True, precision="fp16")
        assert scaling.use_amp_scaler is True
        assert isinstance(scaling.scaler, torch.amp.GradScaler)
        assert build(mixed_precision=True, precision="bf16").scaler is None

    def test_a_model_that_optimizes_by_itself_counts_no_batches(self):
        class Manual(Toy):
            def optimize(self, batch, trainer):
                return {}, {}

        assert build(Manual, args=TrainerArgs(grad_accum_steps=4)).grad_accum_steps == 1

    def test_parts_are_lists(self):
        trainer = build(ToyGan, lr_scheduler="ConstantLR")
        assert [type(part).__name__ for part in trainer.optimizer] == ["SGD", "SGD"]
        assert [type(part).__name__ for part in trainer.scheduler] == ["ConstantLR", "ConstantLR"]
        assert list(trainer.criterion) == [None, None]
        parameters = list(trainer.master_params(trainer.optimizer[0]))
        assert [id(p) for p in parameters] == [id(p) for p in trainer.model.disc.parameters()]

    def test_rates(self):
        trainer = build(lr=0.5)
        assert trainer.get_lr() == [0.5]
        trainer.optimizer[0].param_groups[0]["lr"] = 0.1
        trainer.reset_lr()
        assert trainer.optimizer[0].param_groups[0]["lr"] == 0.5

    def test_the_folder_and_the_dashboard_are_there_before_fit(self):
        trainer = build(dashboard_logger="tensorboard")
        assert trainer.output_path.is_dir()
        assert (trainer.output_path / "config.json").is_file()
        trainer.dashboard_logger.add_scalar("before", 1.0, 0)
        folder = trainer.output_path
        trainer.fit()
        assert trainer.output_path == folder
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_loaders(self):
        trainer = build()
        batch = next(iter(trainer.get_train_dataloader(make_samples(8), verbose=False)))
        assert batch["x"].shape == (4, 3)
        batches = list(trainer.get_eval_dataloader(trainer.eval_samples))
        assert [len(batch["x"]) for batch in batches] == [4, 2]
        x = make_samples(6, seed=1)[0][0]
        assert torch.equal(batches[0]["x"][0], x)  # not shuffled

    def test_evaluation_and_test_alone(self):
        class Tested(Toy):
            def test_run(self, trainer):
                assert not self.training
                return {"step": trainer.total_steps_done}

            def test_log(self, outputs, logger, steps):
                self.logged = (outputs, type(logger), steps)

        trainer = build(Tested)
        assert trainer.eval_epoch() is None
        assert trainer.keep_avg_eval["avg_loss"] == trainer.evaluate()["loss"] > 0
        trainer.test_run()
        assert trainer.model.logged == ({"step": 0}, DashboardLogger, 0)
        assert trainer.model.training

    def test_averages_after_fit(self):
        trainer = build(epochs=2)
        trainer.fit()
        assert trainer.keep_avg_train["avg_loss"] == trainer.keep_avg_train.means["loss"]
        assert trainer.keep_avg_eval.avg_values.keys() == {"avg_loss"}
        with pytest.raises(KeyError, match="avg_other"):
            trainer.keep_avg_train["avg_other"]

    def test_fit_again_with_more_epochs(self):
        trainer = build(epochs=2)
        trainer.fit()
        assert (trainer.total_steps_done, trainer.epochs_done) == (6, 2)
        trainer.config.epochs = 5
        trainer.fit()
        assert (trainer.total_steps_done, trainer.epochs_done) == (15, 5)
        whole = build(epochs=5)
        whole.fit()
        assert_same_weights(weights_of(trainer.model), weights_of(whole.model))
        text = (trainer.output_path / "trainer_0_log.txt").read_text()
        assert re.findall(r"epoch (\d/\d):", text) == ["1/2", "2/2", "3/5", "4/5", "5/5"]

    def test_saving_by_hand(self):
        trainer = build(epochs=1, save_checkpoints=False)
        trainer.fit()
        trainer.save_checkpoint()
        trainer.save_best_model()
        assert {p.name for p in trainer.output_path.glob("*.pth")} == {"checkpoint_3.pth", "best_model.pth"}


class TestConstructor:
    def make(self, **options) -> Trainer:
        config = ToyConfig(epochs=1)
        samples = {"train_samples": make_samples(8), "eval_samples": make_samples(4)}
        return Trainer(TrainerArgs(), config, model=Toy(config), parse_command_line_args=False, **samples, **options)

    def test_loggers(self):
        class Console(ConsoleLogger):
            lines: list = []

            def print(self, text):
                self.lines.append(text)

        class Dashboard(DashboardLogger):
            found: list = []

            def add_scalar(self, title, value, step):
                self.found.append((title, step))
                assert math.isfinite(value)

        console, dashboard = Console(), Dashboard()
        trainer = self.make(c_logger=console, dashboard_logger=dashboard)
        assert trainer.c_logger is console
        assert trainer.dashboard_logger is dashboard
        trainer.fit()
        assert ("EvalStats/loss", 2) in dashboard.found
        assert any(line.startswith("epoch 1/1: 2 updates") for line in console.lines)
        assert not list(trainer.output_path.glob("events*"))

    def test_output_path(self):
        assert self.make(output_path=Path("elsewhere")).output_path.parent == Path("elsewhere")
        config = ToyConfig()
        assert Trainer(TrainerArgs(), config, "third", model=Toy(config), parse_command_line_args=False).output_path

    def test_gpu(self):
        config = ToyConfig(device="auto")
        with pytest.raises(ValueError, match="gpu=7 with device='auto'"):
            Trainer(TrainerArgs(), config, model=Toy(config), parse_command_line_args=False, gpu=7)
        with pytest.raises(ValueError, match="gpu=6 with device='auto'"):
            Trainer(TrainerArgs(gpu=6), config, model=Toy(config), parse_command_line_args=False, gpu=7)


def test_batches_may_be_lists():
    """As TensorDataset gives them."""

    class Pairs(Toy):
        def train_step(self, batch, criterion):
            x, y = batch
            return {}, {"loss": criterion(self.layer(x).squeeze(1), y)}

        eval_step = train_step

    loader = torch.utils.data.DataLoader(make_samples(12), batch_size=4)
    trainer = build(Pairs, train_loader=loader, eval_loader=loader, epochs=1)
    before = trainer.evaluate()["loss"]
    trainer.fit()
    assert trainer.best_loss["eval_loss"] < before
