"""What of a checkpoint goes into a Trainer: partial restore, continuing, Coqui's files, and what is never saved."""

import copy
import math
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, collate, make_samples, weights_of
from trainer import TrainerArgs, TrainerModel
from trainer.checkpoint import check_finite, continue_newest, load_checkpoint, save_checkpoint, state_of
from trainer.restore import best_loss_of, fit_weights, plain_name, under_own_names
from trainer.saving import Saver


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Speller(TrainerModel):
    """An embedding, a normalization with buffers, and an output layer."""

    def __init__(self, config: ToyConfig, symbols: int = 5, width: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(symbols, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, symbols, bias=bias)

    def get_criterion(self):
        return None


def saved(weights: dict, name: str = "old.pth", **more) -> str:
    """A checkpoint's path."""
    torch.save({"model": weights, **more}, name)
    return name


def restored(path: str, model: TrainerModel, **settings):
    """A Trainer of a new run that starts from a checkpoint."""
    trainer = build(model=model, args=TrainerArgs(restore_path=str(path)), **settings)
    trainer.open_run()
    return trainer


def speller(seed: int, **sizes) -> Speller:
    torch.manual_seed(seed)
    return Speller(ToyConfig(), **sizes)


class TestRestorePath:
    def test_a_changed_vocabulary_keeps_the_rows_that_it_shares(self, caplog):
        """Grown and shrunk; the rest of the tensors stays as the model was initialized."""
        for symbols in (8, 3):
            old, new = speller(0), speller(1, symbols=symbols)
            fresh, common = weights_of(new), min(5, symbols)
            caplog.clear()
            restored(saved(old.state_dict(), step=7), new)
            for name in ("embedding.weight", "out.weight", "out.bias"):
                value = new.state_dict()[name]
                assert torch.equal(value[:common], old.state_dict()[name][:common])
                assert torch.equal(value[common:], fresh[name][common:])
            assert torch.equal(new.norm.weight, old.norm.weight)
            lines = [line.split() for line in caplog.messages]
            assert ["embedding.weight", "[5,", "4]", f"[{symbols},", "4]", "resized"] in lines
            assert ["out.bias", "[5]", f"[{symbols}]", "resized"] in lines
            # 4 + 4 + 4 + 4 + 1 values of norm; 4 + 4 + 1 for each symbol
            expected = f"old.pth (step 7); tensors: 5 loaded (17 values), 3 resized ({9 * common} values taken)"
            assert any(message.endswith(expected) for message in caplog.messages)

    def test_several_dimensions_at_once(self):
        found, own = torch.arange(12.0).view(3, 4), -torch.arange(10.0).view(5, 2)
        weights, (entry,) = fit_weights({"w": found}, {"w": own}, [])
        assert weights["w"].tolist() == [[0, 1], [4, 5], [8, 9], [-6, -7], [-8, -9]]
        assert (entry.outcome, entry.values) == ("resized", 6)
        assert own.tolist()[0] == [0, -1]  # a copy

    def test_a_resized_tensor_keeps_the_models_type(self):
        weights, _ = fit_weights({"w": torch.ones(3, dtype=torch.float64)}, {"w": torch.zeros(2)}, [])
        assert torch.equal(weights["w"], torch.ones(2))

    def test_everything_that_does_not_fit_is_in_the_table(self, caplog):
        old, new = speller(0).state_dict(), speller(1)
        fresh = weights_of(new)
        old["out.weight"] = old["out.weight"].unsqueeze(-1)
        old["gone.weight"] = torch.ones(2, 3)
        del old["norm.bias"]
        trainer = restored(saved(old), new)
        table = [
            ["norm.bias", "-", "[4]", "missing"],
            ["out.weight", "[5,", "4,", "1]", "[5,", "4]", "skipped"],
            ["gone.weight", "[2,", "3]", "-", "skipped"],
        ]
        lines = [message.split() for message in caplog.messages]
        position = lines.index(["name", "checkpoint", "model"])
        assert lines[position + 1 :] == table
        assert caplog.messages[position - 1].endswith(
            "old.pth; tensors: 6 loaded (38 values), 2 skipped (26 values not used), 1 missing (4 values kept fresh)"
        )
        for name in ("norm.bias", "out.weight"):
            assert torch.equal(new.state_dict()[name], fresh[name])
        assert torch.equal(new.embedding.weight, old["embedding.weight"])
        trainer.close_run()
        (log,) = trainer.output_path.glob("trainer_*log.txt")
        assert "gone.weight" in log.read_text()

    def test_columns_are_aligned(self, caplog):
        restored(saved(speller(0).state_dict()), speller(1, symbols=12))
        rows = [message for message in caplog.messages if message.startswith("  ")]
        assert [row.index("[12") for row in rows[1:]] == [rows[0].index("model")] * 3
        assert [row.index("resized") for row in rows[1:]] == [rows[0].index("model") + len("[12, 4]  ")] * 3

    def test_all_fits_in_one_line(self, caplog):
        new = speller(1)
        restored(saved(speller(0).state_dict()), new)
        assert_same_weights(weights_of(new), speller(0).state_dict())
        (line,) = [message for message in caplog.messages if "old.pth" in message]
        assert line == "weights restored from old.pth; tensors: 8 loaded (62 values)"
        assert not any("checkpoint " in message for message in caplog.messages)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_prefixes_of_wrappers_are_taken_off(self, prefix):
        new = speller(1)
        restored(saved({prefix + name: value for name, value in speller(0).state_dict().items()}), new)
        assert_same_weights(weights_of(new), speller(0).state_dict())

    def test_a_compiled_part_of_a_model(self):
        own = {"_orig_mod.a.w": 1, "b._orig_mod.w": 2, "module.c": 3}
        assert under_own_names({"a.w": 4, "b.w": 5, "module.c": 6, "d": 7}, own) == {
            "_orig_mod.a.w": 4,
            "b._orig_mod.w": 5,
            "module.c": 6,
            "d": 7,
        }
        own = {"module.a": 1, "a": 2}  # a model whose own names look like that
        assert under_own_names({"module.a": 3, "a": 4}, own) == {"module.a": 3, "a": 4}
        assert plain_name("amodule.module.w") == "amodule.module.w"

    def test_old_and_new_names_of_weight_norm(self):
        new = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 1))
        values = list(new.state_dict().values())
        names = ["bias", "weight_g", "weight_v"]
        old = dict(zip(names, values))
        assert set(under_own_names(old, new.state_dict())) == set(new.state_dict())
        back = under_own_names(new.state_dict(), old)
        assert {name: value.shape for name, value in back.items()} == {n: v.shape for n, v in old.items()}

    def test_reinit_layers_keep_their_fresh_values(self, caplog):
        new = speller(1)
        fresh = weights_of(new)
        restored(saved(speller(0).state_dict()), new, reinit_layers=["out.", "norm.running"])
        for name, value in new.state_dict().items():
            kept = name in ("out.weight", "out.bias", "norm.running_mean", "norm.running_var")
            assert torch.equal(value, fresh[name] if kept else speller(0).state_dict()[name]), name
        lines = [message.split() for message in caplog.messages]
        assert ["out.bias", "[5]", "[5]", "reinitialized"] in lines
        assert any("4 loaded (29 values), 4 reinitialized (33 values kept fresh)" in m for m in caplog.messages)

    def test_a_word_of_reinit_layers_that_is_in_no_name(self):
        with pytest.raises(ValueError, match=r"reinit_layers='out.wieght': .*did you mean 'out.weight'\?"):
            restored(saved(speller(0).state_dict()), speller(1), reinit_layers=["out", "out.wieght"])

    def test_nothing_fits(self):
        new = speller(1)
        fresh = weights_of(new)
        with pytest.raises(
            ValueError, match=r"old\.pth: nothing in it fits Speller.*layer.weight(.|\n)*embedding.weight"
        ):
            restored(saved(Toy(ToyConfig()).state_dict()), new)
        assert_same_weights(weights_of(new), fresh)

    def test_a_bare_state_dict(self):
        new = speller(1)
        torch.save(speller(0).state_dict(), "bare.pth")
        restored("bare.pth", new)
        assert_same_weights(weights_of(new), speller(0).state_dict())

    def test_safetensors(self):
        save_file = pytest.importorskip("safetensors.torch").save_file
        new = speller(1)
        save_file(speller(0).state_dict(), "w.safetensors")
        restored("w.safetensors", new)
        assert_same_weights(weights_of(new), speller(0).state_dict())
        with open("w.safetensors", "r+b") as file:
            file.truncate(100)
        with pytest.raises(ValueError, match=r"w\.safetensors: damaged"):
            restored("w.safetensors", speller(1))

    def test_rates_of_groups_steps_and_optimizers_are_those_of_the_new_run(self):
        class Grouped(Toy):
            def get_optimizer(self):
                groups = [{"params": [self.layer.weight], "lr": 0.3}, {"params": [self.layer.bias], "lr": 0.01}]
                return torch.optim.AdamW(groups)

        first = build(Grouped, epochs=2, lr_scheduler="ExponentialLR", lr_scheduler_params={"gamma": 0.1})
        first.fit()
        path = first.output_path / "checkpoint_6.pth"
        second = restored(path, Grouped(ToyConfig()))
        assert_same_weights(weights_of(second.model), weights_of(first.model))
        assert [group["lr"] for group in second.optimizer[0].param_groups] == [0.3, 0.01]
        assert second.optimizer[0].state_dict()["state"] == {}
        assert (second.total_steps_done, second.epochs_done, second.batches_done) == (0, 0, 0)
        assert not math.isfinite(second.best_loss["eval_loss"])

    def test_the_random_numbers_of_the_checkpoint_are_not_taken_over(self):
        first = build(epochs=1)
        first.fit()
        trainer = build(seed=5, args=TrainerArgs(restore_path=str(first.output_path / "best_model.pth")))
        before = torch.get_rng_state()
        trainer.open_run()
        assert torch.equal(torch.get_rng_state(), before)

    def test_an_average_begins_at_the_restored_weights(self, caplog):
        new, path = speller(1), saved(speller(0).state_dict(), ema={"weights": {}, "updates": 5})
        trainer = build(model=new, args=TrainerArgs(restore_path=path), ema_decay=0.9)
        trainer.ema.update()
        trainer.open_run()
        assert trainer.ema.updates == 0
        assert_same_weights(trainer.ema.state_dict()["weights"], speller(0).state_dict())
        assert "its averaged weights (EMA) are not used" in caplog.text


def continuing(folder, **settings):
    """A Trainer that goes on in a run's folder, opened."""
    trainer = build(args=TrainerArgs(continue_path=str(folder)), **{"seed": 99, **settings})
    trainer.open_run()
    return trainer


class TestContinue:
    """What does not fit is an error with its own message, and nothing is half-loaded."""

    def fails(self, first, match: str, **settings) -> None:
        trainer = build(args=TrainerArgs(continue_path=str(first.output_path)), **{"seed": 99, **settings})
        before = [weights_of(trainer.model), *[copy.deepcopy(o.state_dict()) for o in trainer.optimizer]]
        with pytest.raises(ValueError, match=match):
            trainer.open_run()
        assert_same_weights(weights_of(trainer.model), before[0])
        assert [str(o.state_dict()) for o in trainer.optimizer] == [str(state) for state in before[1:]]
        assert (trainer.total_steps_done, trainer.epochs_done) == (0, 0)
        trainer.close_run()

    def test_another_number_of_optimizers(self):
        class OneOptimizer(ToyGan):
            def get_optimizer(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        first = build(ToyGan, epochs=1)
        first.fit()
        self.fails(first, r"optimizers: it holds the states of 2, this run has 1", model_class=OneOptimizer)

    def test_groups_of_other_sizes(self):
        class Grouped(Toy):
            def get_optimizer(self):
                groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias]}]
                return torch.optim.SGD(groups, lr=0.1)

        first = build(epochs=1)
        first.fit()
        match = r"optimizer 0: its groups have \[2\] parameters, this run's \[1, 1\]"
        self.fails(first, match, model_class=Grouped)

    def test_another_kind_of_optimizer(self):
        first = build(epochs=1, optimizer="AdamW")
        first.fit()
        self.fails(first, r"optimizer 0: is of another class, with .*betas.*than this run's SGD", optimizer="SGD")
        continuing(first.output_path, optimizer="Adam").close_run()  # which has the same state

    def test_settings_that_only_another_version_of_torch_has(self):
        first = build(epochs=1, optimizer="AdamW", lr_scheduler="ExponentialLR", lr_scheduler_params={"gamma": 0.5})
        first.fit()
        path = first.output_path / "checkpoint_3.pth"
        state = load_checkpoint(path)
        state["optimizer"]["0"]["param_groups"][0]["novelty"] = False
        state["scheduler"]["0"].update(novelty=False, _private=1)
        torch.save(state, path)
        settings = {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}}
        trainer = continuing(first.output_path, optimizer="AdamW", **settings)
        assert trainer.optimizer[0].state_dict()["state"][0]["step"] == 3
        assert trainer.last_eval_step == 3
        # an older one's: a setting less, and attributes that are gone
        del state["optimizer"]["0"]["param_groups"][0]["novelty"], state["scheduler"]["0"]["novelty"]
        del state["optimizer"]["0"]["param_groups"][0]["foreach"], state["scheduler"]["0"]["_last_lr"]
        torch.save(state, path)
        assert continuing(first.output_path, optimizer="AdamW", **settings).total_steps_done == 3

    def test_schedulers(self):
        settings = {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}}
        plain, scheduled = build(epochs=1), build(epochs=1, **settings)
        plain.fit()
        scheduled.fit()
        self.fails(plain, r"schedulers: it holds the states of 0, this run has 1", **settings)
        self.fails(scheduled, r"schedulers: it holds the states of 1, this run has 0")
        continuing(scheduled.output_path, **settings).close_run()
        other = {"lr_scheduler": "LinearLR", "lr_scheduler_params": {}}
        self.fails(scheduled, r"scheduler 0: is of another class, with gamma, than this run's LinearLR", **other)

    def test_schedulers_of_other_optimizers(self):
        class Scheduled(ToyGan):
            which = 0

            def get_scheduler(self, optimizer):
                schedulers = [None, None]
                schedulers[self.which] = torch.optim.lr_scheduler.ExponentialLR(optimizer[self.which], 0.5)
                return schedulers

        first = build(Scheduled, epochs=1)
        first.fit()
        Scheduled.which = 1
        match = r"schedulers: it holds those of the optimizers \['0'\], this run has \['1'\]"
        self.fails(first, match, model_class=Scheduled)

    def test_a_missing_scaler(self):
        first = build(epochs=1)
        first.fit()
        settings = {"mixed_precision": True, "precision": "fp16"}
        self.fails(first, r"gradient scaler: it holds no state of one", **settings)

    def test_a_scaler_that_is_not_needed_is_dropped_with_a_word(self, caplog):
        first = build(epochs=1, mixed_precision=True, precision="fp16")
        first.fit()
        continuing(first.output_path)
        assert "holds a state of a gradient scaler: dropped" in caplog.text

    def test_all_problems_at_once(self):
        first = build(epochs=1, lr_scheduler="ExponentialLR", lr_scheduler_params={"gamma": 0.5})
        first.fit()
        match = r"is of a run that was set up differently\n  - optimizer 0: .*\n  - schedulers: .*\n  - gradient scaler"
        self.fails(first, match, optimizer="AdamW", mixed_precision=True, precision="fp16")

    def test_weights_alone_cannot_be_continued(self):
        first = build(epochs=1)
        first.open_run()
        saved(first.model.state_dict(), first.output_path / "checkpoint_3.pth", format=2, config={})
        self.fails(first, r"checkpoint_3\.pth: holds weights only, no training to continue: .*--restore_path")

    def test_random_states_of_another_rank_are_left_alone(self, caplog):
        first = build(epochs=1)
        first.fit()
        trainer = build()
        trainer.open_run()
        trainer.ranks.rank, trainer.ranks.world_size, before = 1, 2, torch.get_rng_state()
        trainer.ranks.broadcast = lambda value: value
        continue_newest(trainer, first.output_path)
        assert torch.equal(torch.get_rng_state(), before)
        assert "the checkpoint holds no random states of rank 1" in caplog.text
        assert trainer.total_steps_done == 3

    def test_each_rank_takes_its_own_random_states(self):
        first = build(epochs=1)
        first.fit()
        path = first.output_path / "checkpoint_3.pth"
        state = load_checkpoint(path)
        torch.manual_seed(1234)
        own = torch.get_rng_state()
        state["rng"]["1"] = {**state["rng"]["0"], "torch": own}
        save_checkpoint(state, path)
        for rank, expected in (("0", state["rng"]["0"]["torch"]), ("1", own)):
            trainer = build(args=TrainerArgs(continue_path=str(first.output_path)))
            trainer.ranks.rank = int(rank)
            trainer.open_run()
            assert torch.equal(torch.get_rng_state(), expected)


class TestOptionalParts:
    """EMA and early stopping, which the config switches on, and the counts of the guard against NaN."""

    on = {"ema_decay": 0.9, "early_stopping_patience": 50}

    def first(self, **settings):
        trainer = build(epochs=2, lr=1.0, **settings)  # too fast: the losses grow
        trainer.fit()
        return trainer

    def second(self, first, **settings):
        return build(seed=9, args=TrainerArgs(continue_path=str(first.output_path)), **settings)

    def test_round_trip(self):
        first = self.first(**self.on)
        first.guard.skipped = 3
        first.saver.save_now()
        trainer = self.second(first, **self.on)
        trainer.open_run()
        assert trainer.early_stopping.state_dict() == first.early_stopping.state_dict()
        assert trainer.early_stopping.waited == 1
        assert (trainer.guard.skipped, trainer.ema.updates) == (3, 6)
        averages = trainer.ema.state_dict()["weights"]
        assert_same_weights(averages, first.ema.state_dict()["weights"])
        assert not torch.equal(averages["layer.weight"], trainer.model.layer.weight)

    def test_switched_off_they_are_dropped_with_a_word_each(self, caplog):
        self.second(self.first(**self.on)).open_run()
        for what in ("averaged weights (EMA)", "a state of early stopping"):
            assert f"the checkpoint holds {what}: dropped, since this run has it switched off" in caplog.text

    def test_switched_on_for_the_first_time(self, caplog):
        first = self.first()
        trainer = self.second(first, **self.on)
        trainer.open_run()
        assert "holds no averaged weights (EMA): the average starts from its weights" in caplog.text
        assert trainer.ema.updates == 0
        assert_same_weights(trainer.ema.state_dict()["weights"], weights_of(first.model))
        assert trainer.early_stopping.waited == 0

    def test_an_average_of_other_weights(self):
        first = self.first(**self.on)
        path = first.output_path / "checkpoint_6.pth"
        state = load_checkpoint(path)
        del state["ema"]["weights"]["layer.bias"]
        save_checkpoint(state, path)
        trainer = self.second(first, **self.on)
        before = weights_of(trainer.model)
        with pytest.raises(ValueError, match=r"averaged weights \(EMA\): missing: layer.bias"):
            trainer.open_run()
        assert_same_weights(weights_of(trainer.model), before)


class TestBestLoss:
    @pytest.mark.parametrize(
        ("state", "expected"),
        [
            ({}, None),
            ({"model_loss": None}, None),
            ({"model_loss": {"train_loss": None, "eval_loss": None}}, None),
            ({"model_loss": {"train_loss": 2.0, "eval_loss": 1.0}}, (2.0, 1.0)),
            ({"model_loss": {"train_loss": 2.0, "eval_loss": None}}, (2.0, None)),
            ({"model_loss": {"train_loss": math.nan, "eval_loss": 1.0}}, (math.inf, 1.0)),
            ({"model_loss": 3.0, "config": {"run_eval": True}}, (math.inf, 3.0)),
            ({"model_loss": 3.0, "config": {"run_eval": False}}, (3.0, None)),
            ({"best_loss": 3.0, "format": 1, "config": {"run_eval": True}}, (math.inf, 3.0)),
            ({"best_loss": 3.0, "format": 1, "config": {"run_eval": False}}, (3.0, None)),
            ({"model_loss": 3.0, "config": None}, (math.inf, 3.0)),
        ],
    )
    def test_read(self, state, expected):
        found = best_loss_of(state)
        assert (found and (found["train_loss"], found["eval_loss"])) == expected

    def test_both_losses_survive_a_resume(self):
        first = build(epochs=1)
        first.fit()
        first.best_loss = {"train_loss": 0.125, "eval_loss": 0.25}
        first.saver.save_now()
        assert continuing(first.output_path).best_loss == {"train_loss": 0.125, "eval_loss": 0.25}

    def test_a_run_that_was_not_evaluated_before(self):
        first = build(epochs=1, run_eval=False)
        first.fit()
        assert continuing(first.output_path).best_loss == {**first.best_loss, "eval_loss": math.inf}
        assert math.isfinite(first.best_loss["train_loss"])

    def test_best_path(self):
        first = build(epochs=1)
        first.fit()
        saved({}, "best.pth", model_loss={"train_loss": 5.0, "eval_loss": 0.5})
        args = TrainerArgs(continue_path=str(first.output_path), best_path="best.pth")
        trainer = build(args=args)
        trainer.open_run()
        assert trainer.best_loss == {"train_loss": 5.0, "eval_loss": 0.5}

    def test_a_best_path_without_a_loss(self):
        first = build(epochs=1)
        first.fit()
        args = TrainerArgs(continue_path=str(first.output_path), best_path=saved({}, "none.pth"))
        with pytest.raises(ValueError, match=r"best_path='none\.pth': holds no best loss; give best_model\.pth"):
            build(args=args).open_run()

    def test_format_1(self):
        """The last version's files: a number as the best loss, infinite before there was one."""
        first = build(epochs=1)
        first.fit()
        path = first.output_path / "checkpoint_3.pth"
        for best in (0.5, math.inf):
            state = load_checkpoint(path)
            del state["model_loss"]
            torch.save({**state, "format": 1, "best_loss": best}, path)
            trainer = continuing(first.output_path)
            assert trainer.best_loss == {"train_loss": math.inf, "eval_loss": best}
            assert trainer.total_steps_done == 3
            assert_same_weights(weights_of(trainer.model), weights_of(first.model))
            save_checkpoint({**state, "model_loss": {}}, path)


class TestNothingButNumbersIsSaved:
    def trainer(self):
        trainer = build(epochs=1)
        trainer.fit()
        return trainer

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_weight(self, value):
        trainer = self.trainer()
        before = {path.name: path.read_bytes() for path in trainer.output_path.glob("*.pth")}
        with torch.no_grad():
            trainer.model.layer.weight[0, 1:] = value
        trainer.total_steps_done = 9
        match = r"weight layer.weight: 2 of 3 values are NaN or infinite after update 9; nothing is saved"
        for save in (trainer.save_checkpoint, trainer.save_best_model):
            with pytest.raises(FloatingPointError, match=match):
                save()
        trainer.config.save_async = False
        with pytest.raises(FloatingPointError, match=match):
            Saver(trainer).save()
        assert {path.name: path.read_bytes() for path in trainer.output_path.glob("*.pth")} == before

    def test_an_averaged_weight(self):
        trainer = build(epochs=1, ema_decay=0.9)
        trainer.fit()
        averages = trainer.ema.state_dict()
        averages["weights"] = {**averages["weights"], "layer.bias": torch.tensor([math.nan])}
        trainer.ema.load_state_dict(averages)
        with pytest.raises(FloatingPointError, match=r"averaged weight layer.bias: 1 of 1"):
            check_finite(state_of(trainer), {"layer.bias"})

    def test_a_buffer_may_be_infinite_but_not_nan(self):
        """As a mask of attention scores is, or a running mean is not."""
        trainer = self.trainer()
        trainer.model.register_buffer("mask", torch.full((2, 2), -math.inf))
        trainer.model.register_buffer("count", torch.tensor(3))
        trainer.saver.save_now()
        assert (
            load_checkpoint(trainer.output_path / "checkpoint_3.pth")["model"]["mask"].tolist() == [[-math.inf] * 2] * 2
        )
        trainer.model.mask[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match=r"weight mask: 1 of 4"):
            trainer.saver.save_now()

    def test_weights_whose_sum_is_too_large(self):
        """As one looks for: a sum overflows where no value is infinite."""
        check_finite({"model": {"w": torch.full((4,), 3e38)}, "step": 1}, {"w"})
        with pytest.raises(FloatingPointError, match=r"weight w: 1 of 4"):
            check_finite({"model": {"w": torch.tensor([3e38, 3e38, math.inf, -1])}, "step": 1}, {"w"})

    def test_weights_of_other_types(self):
        """Complex ones have two parts; those of 8 bits no sum."""
        good = {"z": torch.ones(2, dtype=torch.complex64), "f": torch.ones(2).to(torch.float8_e4m3fn)}
        check_finite({"model": good, "step": 1}, {"z", "f"})
        bad = {"z": torch.tensor([1, complex(0, math.inf)]), "f": torch.tensor([1, math.nan]).to(torch.float8_e4m3fn)}
        for name, value in bad.items():
            with pytest.raises(FloatingPointError, match=rf"weight {name}: 1 of 2"):
                check_finite({"model": {**good, name: value}, "step": 1}, {"z", "f"})


def test_other_ranks_write_nothing():
    trainer = build(epochs=1)
    trainer.fit()
    (trainer.output_path / "best_model.pth").unlink()
    before = sorted(trainer.output_path.iterdir())
    trainer.ranks.is_main, trainer.total_steps_done = False, 9
    trainer.save_best_model()
    trainer.saver.save_now()
    assert sorted(trainer.output_path.iterdir()) == before
    trainer.ranks.is_main = True
    trainer.saver.save_now()
    assert (trainer.output_path / "checkpoint_9.pth").is_file()


# ---- files of Coqui's Trainer ----


def coqui_state(model, optimizers, schedulers=None, **entries) -> dict:
    """A checkpoint in the layout in which Coqui's Trainer 0.4 writes it."""
    return {
        "config": {"epochs": 4, "run_eval": True, "lr_scheduler": "none", "grad_clip": 0.0},
        "model": model.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in optimizers],
        "scheduler": [s.state_dict() for s in schedulers if s is not None] if schedulers else None,
        "scaler": None,
        "step": 3,
        "epoch": 1,
        "date": "November 21, 2026",
        **entries,
    }


def coqui_folder(tmp_path, state: dict, name: str = "checkpoint_3.pth"):
    folder = tmp_path / "coqui"
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / name)
    return folder


def plain_updates(model, optimizer, loader, epochs: int, after_epoch=lambda: None) -> None:
    """The training as a loop of plain PyTorch."""
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model.layer(batch["x"]).squeeze(1), batch["y"]).backward()
            optimizer.step()
        after_epoch()


class TestCoqui:
    def loader(self):
        return DataLoader(make_samples(12), batch_size=4, collate_fn=collate)

    @pytest.mark.parametrize("layout", ["list", "dict", "alone"])
    def test_a_run_goes_on_as_if_it_had_never_stopped(self, tmp_path, layout, caplog):
        """One epoch in plain PyTorch, saved in Coqui's layout (and older ones), three more by the Trainer."""
        torch.manual_seed(0)
        model = Toy(ToyConfig())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        plain_updates(model, optimizer, self.loader(), 1, scheduler.step)
        state = coqui_state(model, [optimizer], [scheduler], model_loss={"train_loss": 2.0, "eval_loss": 1e-9})
        older = {"list": lambda s: s, "dict": lambda s: {"adam": s[0]}, "alone": lambda s: s[0]}[layout]
        state = copy.deepcopy({**state, "optimizer": older(state["optimizer"]), "scheduler": older(state["scheduler"])})
        folder = coqui_folder(tmp_path, state)
        settings = {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}}
        trainer = continuing(folder, optimizer="AdamW", epochs=4, train_loader=self.loader(), **settings)
        assert (trainer.total_steps_done, trainer.epochs_done, trainer.batches_done) == (3, 1, 0)
        trainer.fit()
        plain_updates(model, optimizer, self.loader(), 3, scheduler.step)
        assert_same_weights(weights_of(trainer.model), weights_of(model))
        assert trainer.scheduler[0].get_last_lr() == scheduler.get_last_lr() == [0.1 / 16]
        assert trainer.best_loss["eval_loss"] == 1e-9
        (line,) = [message for message in caplog.messages if "written by Coqui's Trainer" in message]
        assert "no random states" in line
        assert "epoch 2 begins again" in line

    def test_several_optimizers_of_which_one_has_a_scheduler(self, tmp_path):
        class Scheduled(ToyGan):
            def get_scheduler(self, optimizer):
                return [None, torch.optim.lr_scheduler.ExponentialLR(optimizer[1], 0.5)]

        first = build(Scheduled, epochs=2, optimizer="AdamW")
        first.fit()
        folder = coqui_folder(tmp_path, coqui_state(first.model, first.optimizer, first.scheduler))
        trainer = continuing(folder, model_class=Scheduled, optimizer="AdamW")
        assert [str(o.state_dict()) for o in trainer.optimizer] == [str(o.state_dict()) for o in first.optimizer]
        assert trainer.scheduler[1].state_dict() == first.scheduler[1].state_dict()
        assert not math.isfinite(trainer.best_loss["eval_loss"])  # the file holds none

    def test_another_number_of_optimizers_or_schedulers(self, tmp_path):
        first = build(ToyGan)
        folder = coqui_folder(tmp_path, coqui_state(first.model, first.optimizer[:1]))
        with pytest.raises(ValueError, match=r"optimizers: it holds the states of 1, this run has 2"):
            continuing(folder, model_class=ToyGan)
        first = build()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(first.optimizer[0], 0.5)
        folder = coqui_folder(tmp_path, coqui_state(first.model, first.optimizer, [scheduler]))
        with pytest.raises(ValueError, match=r"schedulers: it holds the states of 1, this run has 0"):
            continuing(folder)

    def test_scaler(self, tmp_path):
        first = build(mixed_precision=True, precision="fp16")
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        folder = coqui_folder(tmp_path, coqui_state(first.model, first.optimizer, scaler=scaler.state_dict()))
        assert continuing(folder, mixed_precision=True, precision="fp16").precision.scaler.get_scale() == 256.0

    def test_the_best_loss_is_that_of_best_model(self, tmp_path):
        """Coqui's checkpoint_<step>.pth hold the loss at their own step."""
        first = build()
        state = coqui_state(first.model, first.optimizer, model_loss={"train_loss": 3.0, "eval_loss": 4.0})
        folder = coqui_folder(tmp_path, state)
        assert continuing(folder).best_loss == {"train_loss": 3.0, "eval_loss": 4.0}
        best = {**state, "step": 2, "model_loss": {"train_loss": 2.0, "eval_loss": 1.0}}
        for name in ("best_model_2.pth", "best_model.pth"):
            coqui_folder(tmp_path, best, name)
        trainer = continuing(folder)
        assert (trainer.best_loss, trainer.total_steps_done) == ({"train_loss": 2.0, "eval_loss": 1.0}, 3)
        coqui_folder(tmp_path, {**best, "step": 9, "epoch": 2, "model_loss": 0.75}, "best_model.pth")
        trainer = continuing(folder)
        assert (trainer.best_loss["eval_loss"], trainer.total_steps_done, trainer.epochs_done) == (0.75, 9, 2)

    def test_restore_path(self, tmp_path):
        torch.manual_seed(3)
        model = Toy(ToyConfig())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = coqui_state(model, [optimizer])
        state["model"] = {f"module.{name}": value for name, value in state["model"].items()}
        folder = coqui_folder(tmp_path, state, "best_model.pth")
        trainer = restored(folder / "best_model.pth", Toy(ToyConfig()))
        assert_same_weights(weights_of(trainer.model), weights_of(model))
        assert (trainer.total_steps_done, trainer.epochs_done) == (0, 0)

    def test_a_file_with_a_pickled_class_names_it_and_says_how_to_convert(self, monkeypatch):
        module = types.ModuleType("tts_configs")
        module.VitsConfig = type("VitsConfig", (), {"__module__": "tts_configs"})
        monkeypatch.setitem(sys.modules, "tts_configs", module)
        torch.save({"model": {}, "config": module.VitsConfig()}, "old.pth")
        with pytest.raises(ValueError, match=r"old\.pth: .*tts_configs\.VitsConfig.*convert it once"):
            restored("old.pth", Toy(ToyConfig()))
