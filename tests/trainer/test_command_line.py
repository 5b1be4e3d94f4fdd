"""The command line: every field can be set, everything wrong is told, and coqpit's own traps are gone."""

import argparse
import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from trainer import TrainerArgs, TrainerConfig, field, parse_command_line
from trainer.checked_config import CheckedConfig
from trainer.command_line import parse_value


@dataclass
class InnerConfig(CheckedConfig):
    """Nested in ScriptConfig."""

    size: int = field(1, "Size in percent: 100 % is all.", unit="%", min=0)
    name: str = "x"


@dataclass
class ScriptConfig(TrainerConfig):
    """The fields that make coqpit's own parser fail, among others."""

    inner: InnerConfig = field(InnerConfig())
    maybe: Optional[InnerConfig] = field(InnerConfig(size=2))  # noqa: UP045
    absent: InnerConfig | None = None
    many: list[InnerConfig] = field([InnerConfig(), InnerConfig(size=7)])
    names: list[str] = field(["a"], "Names.")
    rates: list[float] = field([0.1, 0.2], min=0)
    kernel: tuple[int, float] = (3, 1.0)
    either: Union[int, str] = 3  # noqa: UP007
    folder: Path = Path("data")
    kind: Literal["small", "Large"] = "small"
    params: dict[str, float] = field({"eps": 1e-8})
    empty: dict[str, Any] = field({})
    nothing: list[int] | None = None
    anything: Any = None
    numbers: set[int] = field({1})


def parse(*argv: str, config=None, parser=None):
    """The config after a command line (and the args and flags, when asked through the full result)."""
    config = config or ScriptConfig()
    args, flags = parse_command_line(config, parser, argv)
    return config, args, flags


def errors(capsys, *argv: str, config=None, parser=None) -> list[str]:
    """The problems that a command line's error lists."""
    with pytest.raises(SystemExit) as caught:
        parse(*argv, config=config, parser=parser)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    first, *problems = output.err.strip().split("\n  - ")
    assert first.endswith("error on the command line")
    return problems


CASES = [
    ("lr=1e-4", "lr", 1e-4),
    ("lr=0.1,0.2", "lr", [0.1, 0.2]),
    ("lr=[0.1, 1]", "lr", [0.1, 1.0]),
    # Coqui's Trainer crashes on this one, and on lr_scheduler's
    ("grad_clip=1.0", "grad_clip", 1.0),
    ("grad_clip=-1", "grad_clip", -1.0),
    ("grad_clip=none", "grad_clip", None),
    ("optimizer=Adam,SGD", "optimizer", ["Adam", "SGD"]),
    ("reinit_layers=decoder", "reinit_layers", ["decoder"]),
    ("test_delay_epochs=-1", "test_delay_epochs", -1),
    ("lr_scheduler=StepLR", "lr_scheduler", "StepLR"),
    ("lr_scheduler=StepLR,ExponentialLR", "lr_scheduler", ["StepLR", "ExponentialLR"]),
    ("lr_scheduler=StepLR,none", "lr_scheduler", ["StepLR", None]),
    ("grad_clip=1.5,none", "grad_clip", [1.5, None]),
    ("lr_scheduler=none", "lr_scheduler", None),
    ('lr_scheduler_params={"gamma": 0.5}', "lr_scheduler_params", {"gamma": 0.5}),
    ('lr_scheduler_params=[{"gamma": 0.5}, {}]', "lr_scheduler_params", [{"gamma": 0.5}, {}]),
    ("run_eval=false", "run_eval", False),
    ("run_eval=No", "run_eval", False),
    ("mixed_precision", "mixed_precision", True),
    ("max_steps=5", "max_steps", 5),
    ("max_steps=None", "max_steps", None),
    ("run_name=3", "run_name", "3"),
    ("run_name=a,b", "run_name", "a,b"),
    ("names=x", "names", ["x"]),
    ("names=x,3", "names", ["x", "3"]),
    ("names=", "names", []),
    ("names.0=5", "names", ["5"]),
    ("names.1=b", "names", ["a", "b"]),
    ("rates.1=1", "rates", [0.1, 1.0]),
    ("kernel=5,2", "kernel", (5, 2.0)),
    ("kernel=[5, 2.5]", "kernel", (5, 2.5)),
    ("either=4", "either", 4),
    ("either=auto", "either", "auto"),
    ("folder=a/b", "folder", Path("a/b")),
    ("kind=Large", "kind", "Large"),
    ("params.eps=1", "params", {"eps": 1.0}),
    ("params.new=.5", "params", {"eps": 1e-8, "new": 0.5}),
    ("empty.eps=1e-9", "empty", {"eps": 1e-9}),
    ("empty.flag=True", "empty", {"flag": True}),
    ("empty.half=.5", "empty", {"half": 0.5}),
    ("empty.word=None", "empty", {"word": None}),
    ("empty.word=adam", "empty", {"word": "adam"}),
    ("optimizer_params.betas=[0.8, 0.9]", "optimizer_params", {"betas": [0.8, 0.9]}),
    ("nothing=1,2", "nothing", [1, 2]),
    ("anything=[1, {}]", "anything", [1, {}]),
    ("numbers=2,3", "numbers", {2, 3}),
    ("inner.size=9", "inner", InnerConfig(size=9)),
    ("maybe.size=9", "maybe", InnerConfig(size=9)),
    ("maybe=none", "maybe", None),
    ('absent={"size": 4}', "absent", InnerConfig(size=4)),
    ("many.1.name=5", "many", [InnerConfig(), InnerConfig(size=7, name="5")]),
    ('many.2={"size": 3}', "many", [InnerConfig(), InnerConfig(size=7), InnerConfig(size=3)]),
]


class TestSetting:
    @pytest.mark.parametrize(("argument", "name", "expected"), CASES, ids=[case[0] for case in CASES])
    def test_value(self, argument, name, expected):
        config, _, _ = parse(f"--coqpit.{argument}")
        assert getattr(config, name) == expected
        assert type(getattr(config, name)) is type(expected)
        # nothing else changed
        setattr(config, name, getattr(ScriptConfig(), name))
        assert config == ScriptConfig()

    def test_value_may_be_the_next_word(self):
        config, _, _ = parse(
            "--coqpit.lr", "0.5", "--coqpit.empty.a", "1", "--coqpit.mixed_precision", "--small_run", "3"
        )
        assert (config.lr, config.empty, config.mixed_precision) == (0.5, {"a": 1}, True)

    def test_a_list_takes_several_words(self):
        config, _, _ = parse("--coqpit.lr", "1", "2", "--coqpit.names", "a,b", "c", "--coqpit.grad_clip", "1.0")
        assert (config.lr, config.names, config.grad_clip) == ([1.0, 2.0], ["a,b", "c"], 1.0)
        config, _, _ = parse("--coqpit.lr_scheduler", "StepLR", "--coqpit.optimizer", "Adam", "SGD")
        assert (config.lr_scheduler, config.optimizer) == ("StepLR", ["Adam", "SGD"])

    def test_after_an_equals_sign_a_list_takes_one_word(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("data")
        config, _, flags = parse("--coqpit.names=a,b", "here", parser=parser)
        assert (config.names, flags.data) == (["a", "b"], "here")

    def test_the_whole_comes_before_its_parts(self):
        config, _, _ = parse("--coqpit.params.b=2", '--coqpit.params={"a": 1}')
        assert config.params == {"a": 1.0, "b": 2.0}

    def test_trainer_arguments(self, tmp_path):
        given, file = TrainerArgs(grad_accum_steps=4), tmp_path / "x.pth"
        file.touch()
        argv = ["--restore_path", str(file), "--small_run=8", "--overfit_batch", "--start_with_eval", "false"]
        args, _ = parse_command_line(ScriptConfig(), argv=argv, args=given)
        assert args is given
        assert args == TrainerArgs(restore_path=str(file), small_run=8, overfit_batch=True, grad_accum_steps=4)

    def test_argv_is_the_default(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["train.py", "--coqpit.epochs=3"])
        config = ScriptConfig()
        parse_command_line(config)
        assert config.epochs == 3

    def test_no_arguments_change_nothing(self):
        config, args, flags = parse()
        assert (config, args, vars(flags)) == (ScriptConfig(), TrainerArgs(), {})


class TestScriptFlags:
    def make(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="train.py")
        parser.add_argument("data")
        parser.add_argument("--data_path", type=Path, default=Path("default"))
        return parser

    def test_flags_of_the_script(self):
        config, _, flags = parse("here", "--data_path=x", "--coqpit.epochs=3", parser=self.make())
        assert (config.epochs, vars(flags)) == (3, {"data": "here", "data_path": Path("x")})

    def test_a_dotted_value_is_no_positional_argument(self):
        config, _, flags = parse("--coqpit.empty.a", "1", "here", parser=self.make())
        assert (config.empty, flags.data) == ({"a": 1}, "here")

    def test_the_parser_is_not_changed(self):
        parser = self.make()
        parse("here", "--coqpit.epochs=3", parser=parser)
        with pytest.raises(SystemExit):
            parser.parse_args(["here", "--coqpit.epochs=3"])
        assert parser.allow_abbrev is True
        parse("here", "--coqpit.epochs=4", parser=parser)


class TestErrors:
    def test_everything_at_once(self, capsys):
        problems = errors(
            capsys,
            *["--coqpit.epochz", "7", "--coqpit.batch_size=x", "--coqpit.inner.size=-3", "--smal_run=3"],
            *["--coqpit.many.0.zz=1", "--grad_accum_steps=0", "extra", "--coqpit.lr=fast"],
        )
        assert sorted(problems) == [
            "--coqpit.batch_size='x': must be int",
            "--coqpit.epochz: unknown argument; did you mean '--coqpit.epochs'?",
            "--coqpit.inner.size=-3: must be at least 0 %",
            "--coqpit.lr='fast': must be float | list[float]",
            "--coqpit.many.0.zz='1': InnerConfig has no field 'zz'",
            "--grad_accum_steps=0: must be at least 1 batches",
            "--smal_run: unknown argument; did you mean '--small_run'?",
            "extra: unknown argument",
        ]

    @pytest.mark.parametrize(
        ("argument", "problem"),
        [
            # no prefix stands for a longer name
            ("coqpit.epoch=3", "--coqpit.epoch: unknown argument; did you mean '--coqpit.epochs'?"),
            ("coqpit.epochs=3.7", "--coqpit.epochs='3.7': must be int"),
            ("coqpit.run_eval=maybe", "--coqpit.run_eval='maybe': must be bool"),
            ("coqpit.precision=fp8", "--coqpit.precision='fp8': must be one of 'fp16', 'bf16'"),
            ("coqpit.kind=LARGE", "--coqpit.kind='LARGE': must be 'small' | 'Large'"),
            ("coqpit.kernel=1", "--coqpit.kernel='1': must be tuple[int, float]"),
            ("coqpit.kernel=1,2,3", "--coqpit.kernel='1,2,3': must be tuple[int, float]"),
            ("coqpit.rates=1,x", "--coqpit.rates='1,x': must be list[float]"),
            ("coqpit.rates=-1", "--coqpit.rates=-1.0: must be at least 0"),
            ("coqpit.params={", "--coqpit.params='{': must be dict[str, float]"),
            ("coqpit.params.eps=x", "--coqpit.params.eps='x': must be float"),
            ("coqpit.params.a.b=1", "--coqpit.params.a.b='1': there is no 'a'; there are 'eps'"),
            ("coqpit.empty.a.b=1", "--coqpit.empty.a.b='1': there is no 'a'; there are no items"),
            (
                "coqpit.names.5=x",
                "--coqpit.names.5='x': the list has 1 items; give an index from 0 to 1 (which appends)",
            ),
            ("coqpit.many.2.size=1", "--coqpit.many.2.size='1': there is no '2'; there are '0', '1'"),
            ("coqpit.epochs.x=1", "--coqpit.epochs.x='1': 1000 has no items that could be set: give all of it"),
            ("coqpit.absent.size=1", "--coqpit.absent.size='1': None has no items that could be set: give all of it"),
            ("coqpit.empty.a", "--coqpit.empty.a: needs a value"),
            ("coqpit.inner.siz=1", "--coqpit.inner.siz: unknown argument; did you mean '--coqpit.inner.size'?"),
            (
                'coqpit.optimizer_modules=[["a"], ["b"]]',
                "--coqpit.optimizer_modules=[['a'], ['b']]: goes with optimizer, which is None; name one there, or "
                "leave the modules to the model's get_optimizer()",
            ),
            ("coqpit.maybe.siz=1", "--coqpit.maybe.siz='1': InnerConfig has no field 'siz'; did you mean 'size'?"),
        ],
    )
    def test_problem(self, capsys, argument, problem):
        assert errors(capsys, f"--{argument}") == [problem]

    def test_problems_inside_json(self, capsys):
        text = '{"siz": 1}'
        found = "must be InnerConfig | none; siz: unknown field; did you mean 'size'?"
        assert errors(capsys, f"--coqpit.absent={text}") == [f"--coqpit.absent={text!r}: {found}"]

    def test_own_check_of_the_config(self, capsys):
        @dataclass
        class Even(TrainerConfig):
            def check_values(self) -> None:
                if self.batch_size % 2:
                    raise ValueError("batch_size must be even")

        assert errors(capsys, "--coqpit.batch_size=3", config=Even()) == ["batch_size must be even"]

    def test_a_flag_without_its_value(self, capsys):
        with pytest.raises(SystemExit) as caught:
            parse("--coqpit.epochs")
        assert caught.value.code == 2
        assert "--coqpit.epochs: expected one argument" in capsys.readouterr().err


class TestContinuePath:
    def test_the_config_of_the_run_then_the_overrides(self, tmp_path):
        ScriptConfig(epochs=7, lr=0.5, empty={"a": 1}, absent=InnerConfig()).save_json(tmp_path / "config.json")
        config, args, _ = parse(
            *["--continue_path", str(tmp_path), "--coqpit.lr=0.25", "--coqpit.empty.b=2", "--coqpit.absent.size=3"]
        )
        expected = ScriptConfig(epochs=7, lr=0.25, empty={"a": 1, "b": 2}, absent=InnerConfig(size=3))
        assert (config, args.continue_path) == (expected, str(tmp_path))

    def test_no_run(self, capsys, tmp_path):
        hint = "give the folder of a run, such as output/run-..."
        assert errors(capsys, f"--continue_path={tmp_path}") == [
            f"continue_path: {str(tmp_path)!r} has no config.json; {hint}"
        ]
        missing = str(tmp_path / "missing")
        assert errors(capsys, f"--continue_path={missing}") == [f"continue_path: {missing!r} is no folder; {hint}"]

    def test_config_of_another_model(self, capsys, tmp_path):
        path = tmp_path / "config.json"
        path.write_text('{"epochs": "x", "hiden": 3}')
        assert errors(capsys, f"--continue_path={tmp_path}") == [
            f"{path}: epochs='x' (str): must be int",
            f"{path}: hiden: unknown field",
        ]


class TestHelp:
    def text(self, capsys, config) -> str:
        with pytest.raises(SystemExit) as caught:
            parse("--help", config=config, parser=argparse.ArgumentParser(usage="train"))
        assert caught.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    def test_lists_every_field_with_its_help_and_default(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        config = ScriptConfig(run_name="", epochs=17)
        shown = self.text(capsys, config)
        for prefix, owner in (("--", TrainerArgs()), ("--coqpit.", config), ("--coqpit.inner.", config.inner)):
            for entry in dataclasses.fields(owner):
                value = getattr(owner, entry.name)
                if isinstance(value, CheckedConfig):
                    continue
                text = entry.metadata.get("help", "")
                default = " ".join(f"(default: {value})".split()) if value != "" else "(default: '')"
                assert re.search(
                    rf"{re.escape(prefix + entry.name)} .*?{re.escape(text)}.*?{re.escape(default)}", shown
                ), prefix + entry.name
        assert "--coqpit.epochs INT Epochs to train. (default: 17)" in shown
        assert "--coqpit.inner.size INT Size in percent: 100 % is all. [%] (default: 1)" in shown
        assert (
            "--coqpit.precision STR Type that autocast computes in; fp16 scales the losses. One of fp16, bf16." in shown
        )
        assert "--coqpit.kind 'small' | 'Large' (default: small)" in shown

    def test_usage_of_any_width_can_be_printed(self, capsys, monkeypatch):
        """argparse asserts that it can wrap the usage, which metavars with brackets have broken before."""
        for columns in ("30", "80", "200"):
            monkeypatch.setenv("COLUMNS", columns)
            with pytest.raises(SystemExit) as caught:
                parse("--help")
            assert caught.value.code == 0
            assert "usage:" in capsys.readouterr().out

    def test_of_a_recipe_in_its_own_process(self):
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "recipes/digits/train_digits.py", "--coqpit.epochz", "7"]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert "--coqpit.epochz: unknown argument; did you mean '--coqpit.epochs'?" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("3", int | str, 3),
        ("3", str | int, 3),
        ("x", list[str] | str, "x"),
        ("+15", Any, 15.0),
        ("1e-9", Any, 1e-9),
        ("null", int | None, None),
        ("1,2", list, [1, 2]),
    ],
)
def test_parse_value(text, annotation, expected):
    value = parse_value(text, annotation)
    assert value == expected
    assert type(value) is type(expected)
