"""``python -m trainer.checkpoint``: inspect and strip."""

import re
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch

from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, make_samples, weights_of
from trainer import TrainerArgs
from trainer.checkpoint import load_checkpoint, load_weights
from trainer.checkpoint_command import inspect, main, strip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run with one optimizer, and its Trainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        trainer = build(epochs=1, optimizer="AdamW", features=64, train_samples=make_samples(12, 64),
                        eval_samples=make_samples(6, 64))  # fmt: skip
        trainer.fit()
        return trainer, trainer.output_path.resolve()


class TestInspect:
    def test_a_checkpoint(self, run):
        trainer, folder = run
        path = folder / "checkpoint_3.pth"
        lines = inspect(str(path))
        assert lines[0] == f"{path}: {path.stat().st_size / 1e3:.3g} kB, format 3"
        assert re.fullmatch(r"step 3, 1 epochs done, saved \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", lines[1])
        assert lines[2] == f"best loss: eval_loss {trainer.best_loss['eval_loss']:.5g}"
        assert lines[3] == "model: 2 tensors (2 float32), 65 values"
        # 65 values of 4 bytes; AdamW keeps two for each, and a step for each tensor
        assert "  model: 0.26 kB" in lines
        assert f"  optimizer: {(2 * 65 + 2) * 4 / 1e3:.3g} kB" in lines
        (config,) = [line for line in lines if line.startswith("config: ")]
        assert "epochs=1, batch_size=4, optimizer=AdamW, lr=0.1" in config
        assert lines[-1] == "optimizer 0: groups: 1, parameters: 2, lr: 0.1, state: exp_avg, exp_avg_sq, step"

    def test_sections_add_up_to_the_file(self, tmp_path):
        shared = torch.zeros(1000)
        torch.save({"model": {"a": shared, "b": shared[:10]}, "x": [shared, (torch.zeros(500),)]}, "f.pth")
        lines = inspect("f.pth")
        assert lines[2:4] == ["  model: 4 kB", "  x: 2 kB"]  # what is shared is in the file once
        other = float(re.fullmatch(r"  other: (.*) kB", lines[4])[1])
        assert other * 1e3 == pytest.approx((tmp_path / "f.pth").stat().st_size - 6000, rel=0.01)

    def test_tensors(self, run):
        path = str(run[1] / "best_model.pth")
        assert inspect(path, tensors=True)[-2:] == [
            "  layer.weight  [1, 64]  float32",
            "  layer.bias    [1]      float32",
        ]
        assert not any("layer.weight" in line for line in inspect(path))

    def test_a_position_in_an_epoch_and_several_optimizers(self):
        trainer = build(ToyGan, epochs=1, max_steps=2)
        trainer.fit()
        lines = inspect(str(trainer.output_path / "checkpoint_2.pth"))
        assert lines[1].startswith("step 2, 0 epochs done, 2 batches of the next one, saved ")
        assert [line[:11] for line in lines[-2:]] == ["optimizer 0", "optimizer 1"]
        assert lines[-1].endswith("lr: 0.1, state: none")

    def test_one_of_coquis(self, run):
        trainer, _ = run
        state = {
            "config": {"model": "vits", "epochs": 9},
            "model": trainer.model.state_dict(),
            "optimizer": [trainer.optimizer[0].state_dict()],
            "scheduler": None,
            "scaler": None,
            "step": 7,
            "epoch": 2,
            "date": "November 21, 2026",
            "model_loss": {"train_loss": 2.0, "eval_loss": None},
        }
        torch.save(state, "c.pth")
        lines = inspect("c.pth")
        assert lines[0].endswith("a checkpoint of Coqui's Trainer")
        assert lines[1:3] == ["step 7, 2 epochs done, saved November 21, 2026", "loss: train_loss 2"]
        assert "config: 2 fields: model=vits, epochs=9" in lines
        assert lines[-1].startswith("optimizer 0: groups: 1, parameters: 2")
        torch.save({**state, "optimizer": state["optimizer"][0]}, "c.pth")
        assert inspect("c.pth")[-1] == lines[-1]

    def test_weights_alone(self):
        torch.save(Toy(ToyConfig()).half().state_dict(), "w.pth")
        lines = inspect("w.pth")
        assert lines[0].endswith("weights without a format")
        assert lines[1] == "model: 2 tensors (2 float16), 4 values"
        assert all(line.startswith("  ") for line in lines[2:])

    def test_from_a_url(self, run):
        url = "memory://inspect/best_model.pth"
        with fsspec.open(url, "wb") as file:
            file.write((run[1] / "best_model.pth").read_bytes())
        here = inspect(str(run[1] / "best_model.pth"))
        assert inspect(url)[1:] == here[1:]
        assert inspect(url)[0].split(": ")[1] == here[0].split(": ")[1]


class TestStrip:
    def test_the_same_outputs(self, run):
        trainer, folder = run
        line = strip(str(folder / "best_model.pth"), "small.pth")
        small = load_checkpoint("small.pth")
        assert set(small) == {"format", "model", "config"}
        assert small["config"] == trainer.config.to_dict()
        model, x = Toy(ToyConfig.new_from_dict(small["config"])), torch.randn(5, 64)
        model.load_state_dict(small["model"])
        assert torch.equal(model.layer(x), trainer.model.layer(x))
        assert_same_weights(load_weights("small.pth"), weights_of(trainer.model))
        before, after = (folder / "best_model.pth").stat().st_size, Path("small.pth").stat().st_size
        assert after < 0.3 * before
        sizes = f"{before / 1e3:.3g} kB -> {after / 1e3:.3g} kB ({after / before:.0%})"
        assert line == f"small.pth: weights and config, {sizes}"
        assert inspect("small.pth")[0].endswith("format 3, stripped: no training state")

    def test_a_new_run_starts_from_it(self, run):
        strip(str(run[1] / "best_model.pth"), "small.pth")
        config = ToyConfig(features=64)
        trainer = build(config=config, seed=7, args=TrainerArgs(restore_path="small.pth"))
        trainer.open_run()
        assert_same_weights(weights_of(trainer.model), weights_of(run[0].model))

    def test_the_average_unless_raw(self):
        weights = {"a": torch.tensor([1.0, 2.0]).half(), "n": torch.tensor(3)}
        averaged = {"a": torch.tensor([1.5, 2.5])}
        torch.save({"model": weights, "ema": {"weights": averaged, "updates": 4}, "step": 1, "optimizer": {}}, "c.pth")
        assert "c_stripped.pth: averaged weights (EMA) and config, " in strip("c.pth")
        small = load_weights("c_stripped.pth")
        assert small["a"].dtype == torch.float16
        assert (small["a"].tolist(), small["n"].item()) == ([1.5, 2.5], 3)
        assert strip("c.pth", "raw.pth", raw=True).startswith("raw.pth: weights and config")
        assert_same_weights(load_weights("raw.pth"), weights)

    def test_the_default_name_and_what_is_there_already(self):
        torch.save({"model": {"w": torch.ones(2)}}, "best.v2.pth")
        strip("best.v2.pth")
        Path("best.v2_stripped.pth").write_bytes(b"other")
        with pytest.raises(FileExistsError, match=r"best\.v2_stripped\.pth: is there already; --force overwrites it"):
            strip("best.v2.pth")
        assert Path("best.v2_stripped.pth").read_bytes() == b"other"
        strip("best.v2.pth", force=True)
        assert load_weights("best.v2_stripped.pth")["w"].tolist() == [1, 1]

    def test_the_input_is_never_overwritten(self, tmp_path):
        torch.save({"model": {"w": torch.ones(2)}}, "a.pth")
        before = Path("a.pth").read_bytes()
        for output in ("a.pth", "./a.pth", str(tmp_path / "a.pth")):
            with pytest.raises(ValueError, match="is the checkpoint itself; choose another name"):
                strip("a.pth", output, force=True)
        assert Path("a.pth").read_bytes() == before

    def test_from_and_to_a_url(self, run):
        url = "memory://strip/best_model.pth"
        with fsspec.open(url, "wb") as file:
            file.write((run[1] / "best_model.pth").read_bytes())
        strip(url)
        with pytest.raises(FileExistsError):
            strip(url)
        assert_same_weights(load_weights("memory://strip/best_model_stripped.pth"), weights_of(run[0].model))
        strip(url, "local.pth")
        assert_same_weights(load_weights("local.pth"), weights_of(run[0].model))


class TestCommandLine:
    def test_the_command(self, run):
        """As a user calls it, in a process of its own."""
        command = [sys.executable, "-W", "error", "-m", "trainer.checkpoint"]
        path = str(run[1] / "checkpoint_3.pth")
        found = subprocess.run([*command, "inspect", path, "--tensors"], cwd=ROOT, capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.splitlines() == inspect(path, tensors=True)

    def test_strip(self, run, capsys):
        path = str(run[1] / "best_model.pth")
        assert main(["strip", path, "--output", "s.pth"]) == 0
        assert capsys.readouterr().out.startswith("s.pth: weights and config, ")
        assert main(["strip", path, "--output", "s.pth", "--raw"]) == 1
        assert main(["strip", path, "--output", "s.pth", "--raw", "--force"]) == 0

    @pytest.mark.parametrize("command", ["inspect", "strip"])
    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("none.pth", "none.pth"),
            ("memory://none.pth", "none.pth"),
            ("damaged.pth", "damaged.pth: damaged: its end is missing (it has 16 bytes)"),
            ("list.pth", "list.pth: holds no model"),
            (".", "Is a directory"),
            ("nothing://x.pth", "Unsupported filesystem: 'nothing'"),
        ],
    )
    def test_files_that_cannot_be_read(self, command, file, message, capsys):
        Path("damaged.pth").write_bytes(b"PK\x03\x04 and no more")
        torch.save([1], "list.pth")
        assert main([command, file]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert message in err
        assert {path.name for path in Path().iterdir()} == {"damaged.pth", "list.pth"}

    @pytest.mark.parametrize(
        "arguments", [[], ["strip"], ["inspect", "a", "b"], ["stripp", "a"], ["strip", "a", "--forc"]]
    )
    def test_wrong_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: python -m trainer.checkpoint" in capsys.readouterr().err
