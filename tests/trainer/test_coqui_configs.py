"""Configs and scripts written for Coqui's Trainer: their habits are legal, and what is wrong in them is still told."""

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest
from coqpit import MISSING, Coqpit, check_argument

from trainer import ConfigError, TrainerArgs, TrainerConfig, field, parse_command_line
from trainer.checked_config import CheckedConfig, field_types, find_problems, type_name
from trainer.command_line import load_run_config


@dataclass
class BaseAudio(Coqpit):
    """A plain Coqpit with a check of its own; None and floats stand where ints are annotated."""

    sample_rate: int = 22050
    frame_shift_ms: int = None
    mel_fmax: float = None
    trim_db: int = 45
    log_func: Literal["np.log", "np.log10"] = "np.log10"

    def check_values(self):
        c = asdict(self)
        check_argument("sample_rate", c, restricted=True, min_val=512, max_val=100000)
        assert self.trim_db > 0


@dataclass
class DatasetConfig(Coqpit):
    formatter: str = ""
    meta_file_train: str = ""


@dataclass
class ModelArgs(Coqpit):
    num_chars: int = 100
    use_speaker_embedding: bool = False
    kernel_sizes: list[int] = dataclasses.field(default_factory=lambda: [3, 7])


@dataclass
class BaseTTSConfig(TrainerConfig):
    """Bare overrides of the Trainer's fields, and defaults that are not of the annotated type."""

    model: str = None
    audio: BaseAudio = dataclasses.field(default_factory=BaseAudio)
    model_args: ModelArgs = dataclasses.field(default_factory=ModelArgs)
    _supports_cloning: bool = False
    loss_masking: bool = None
    max_audio_len: int = float("inf")
    phonemizer: str = dataclasses.field(default="", metadata={"help": "Name of the phonemizer."})
    languages: list[str] = dataclasses.field(default_factory=list)
    datasets: list[DatasetConfig] = dataclasses.field(default_factory=lambda: [DatasetConfig()])
    test_sentences: list[str] | list[list[str]] = dataclasses.field(default_factory=list)
    epochs: int = 10
    optimizer: str = "radam"
    optimizer_params: dict = None
    lr_scheduler: str = None
    grad_clip: list[float] = dataclasses.field(default_factory=lambda: [1000, 1000])
    print_step: int = dataclasses.field(default=5, metadata={"help": "How often to print."})

    @property
    def supports_cloning(self) -> bool:
        return self._supports_cloning


@dataclass
class VitsLikeConfig(BaseTTSConfig):
    """Its ``__post_init__`` calls no super, and copies the model's arguments."""

    use_speaker_embedding: bool = False
    model_args: ModelArgs = dataclasses.field(default_factory=ModelArgs)

    def __post_init__(self):
        for key, value in self.model_args.items():
            if hasattr(self, key):
                self[key] = value


@dataclass
class EncoderConfig(TrainerConfig):
    """Fields that must be given, and a check that reads them all."""

    num_classes: int = MISSING
    num_loader_workers: int = MISSING
    audio: BaseAudio = dataclasses.field(default_factory=BaseAudio)

    def check_values(self):
        super().check_values()
        if asdict(self)["num_classes"] < 2:
            raise AssertionError("num_classes must be above 1")


CLASSES = [BaseTTSConfig, VitsLikeConfig, EncoderConfig]


def filled(cls: type) -> TrainerConfig:
    """A config of the class, what must be given set to 3."""
    config = cls()
    unset: list[str] = []
    find_problems(config, unset)
    for name in unset:
        setattr(config, name, 3)
    return config


def problems_of(call) -> list[str]:
    """The problems of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value.problems


def refused(capsys, call) -> list[str]:
    """The problems that a call prints before it exits with 2."""
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().split("\n  - ")[1:]


class TestDefaultsThatAreNotOfTheAnnotatedType:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("model", "str | none"),
            ("loss_masking", "bool | none"),
            ("max_audio_len", "int | float"),
            ("optimizer_params", "dict | none"),
            ("phonemizer", "str"),
            ("grad_clip", "list[float]"),
        ],
    )
    def test_the_default_widens_the_annotation(self, name, kind):
        assert type_name(field_types(BaseTTSConfig)[name]) == kind

    @pytest.mark.parametrize("cls", CLASSES)
    def test_build_check_save_load(self, cls, tmp_path):
        config = filled(cls)
        config.check()
        config.save_json(tmp_path / "config.json")
        loaded = cls()
        loaded.load_json(tmp_path / "config.json")
        assert loaded == config
        assert cls.new_from_dict(config.to_dict()) == config
        assert type(loaded.audio) is BaseAudio

    def test_infinity_comes_back_from_json(self):
        assert BaseTTSConfig.new_from_dict(json.loads(BaseTTSConfig().to_json())).max_audio_len == math.inf

    @pytest.mark.parametrize(
        ("argument", "name", "expected"),
        [
            ("model=none", "model", None),
            ("model=vits", "model", "vits"),
            ("loss_masking", "loss_masking", True),
            ("loss_masking=none", "loss_masking", None),
            ("max_audio_len=5", "max_audio_len", 5),
            ("max_audio_len=inf", "max_audio_len", math.inf),
            ("phonemizer=none", "phonemizer", "none"),
            ("optimizer_params.eps=1", "optimizer_params", None),
            ('optimizer_params={"eps": 1}', "optimizer_params", {"eps": 1}),
            ("grad_clip.1=3", "grad_clip", [1000, 3.0]),
            ("_supports_cloning", "_supports_cloning", True),
        ],
    )
    def test_on_the_command_line(self, argument, name, expected, capsys):
        config = BaseTTSConfig()
        if argument.startswith("optimizer_params."):
            found = refused(capsys, lambda: parse_command_line(config, argv=[f"--coqpit.{argument}"]))
            assert found == ["--coqpit.optimizer_params.eps='1': None has no items that could be set: give all of it"]
        else:
            parse_command_line(config, argv=[f"--coqpit.{argument}"])
        assert getattr(config, name) == expected
        assert type(getattr(config, name)) is type(expected)

    def test_of_nested_plain_coqpits(self):
        config = BaseTTSConfig()
        parse_command_line(config, argv=["--coqpit.audio.mel_fmax", "8000", "--coqpit.audio.frame_shift_ms=none"])
        assert (config.audio.mel_fmax, config.audio.frame_shift_ms) == (8000.0, None)

    def test_a_bare_override_keeps_range_and_help(self, capsys):
        assert problems_of(lambda: BaseTTSConfig(epochs=0)) == ["epochs=0: must be at least 1"]
        # a help text of its own leaves the range
        assert problems_of(lambda: BaseTTSConfig(print_step=0)) == ["print_step=0: must be at least 1 updates"]


class TestAnnotationsAreHints:
    """Scripts put None and 60.0 where the annotation says something else; fields made with field() are exact."""

    def test_values_of_recipes(self):
        config = VitsLikeConfig(
            audio=BaseAudio(trim_db=60.0),
            datasets=[DatasetConfig(meta_file_train=None)],
            test_sentences=[["Be a voice.", "p277", None, "en"]],
            test_delay_epochs=-1,
            run_description="\n  several lines\n",
        )
        config.check()
        assert VitsLikeConfig.new_from_dict(json.loads(config.to_json())) == config
        config.from_dict(config.to_dict())
        config.check()

    def test_what_is_wrong_is_still_told(self):
        config = VitsLikeConfig(
            audio=BaseAudio(trim_db=60.5),
            datasets=[DatasetConfig(formatter=3)],
            test_sentences=[[1]],
            max_audio_len="long",
        )
        assert problems_of(config.check) == [
            "audio.trim_db=60.5 (float): must be int",
            "max_audio_len='long' (str): must be int | float",
            "datasets.0.formatter=3 (int): must be str",
            "test_sentences=[[1]] (list): must be list[str] | list[list[str]]",
        ]

    def test_fields_of_the_trainer_are_exact(self):
        assert problems_of(lambda: BaseTTSConfig(epochs=None, batch_size=8.0)) == [
            "epochs=None (NoneType): must be int",
            "batch_size=8.0 (float): must be int",
        ]

    def test_fields_made_with_field_are_exact(self):
        @dataclass
        class Mine(TrainerConfig):
            width: int = field(3, "Width.")
            names: list[str] = field([], "Names.")

        assert problems_of(lambda: Mine(width=3.0, names=[None])) == [
            "width=3.0 (float): must be int",
            "names=[None] (list): must be list[str]",
        ]

    def test_the_command_line_is_exact(self, capsys):
        found = refused(capsys, lambda: parse_command_line(BaseTTSConfig(), argv=["--coqpit.audio.trim_db=60.0"]))
        assert found == ["--coqpit.audio.trim_db='60.0': must be int"]

    def test_models_keep_values_of_their_own_on_a_config(self):
        config = VitsLikeConfig()
        config.num_chars = 5  # a field of the model's arguments only
        config.output_log_path = "x"  # near output_path, but not misspelt
        assert (config.num_chars, config.output_log_path, "num_chars" in config) == (5, "x", False)
        with pytest.raises(AttributeError, match="no field 'bach_size'; did you mean 'batch_size'"):
            config.bach_size = 5

    def test_loading_shares_nothing_with_the_data(self):
        preset, config = {"optimizer_params": {"eps": 1.0}}, VitsLikeConfig()
        config.from_dict(preset)
        config.optimizer_params["eps"] = 2.0
        assert preset == {"optimizer_params": {"eps": 1.0}}

    def test_post_init_is_not_called_again_by_loading(self):
        config = VitsLikeConfig()
        config.from_dict({"use_speaker_embedding": True})
        assert config.use_speaker_embedding is True

    def test_without_the_decorator_the_values_count(self):
        class Undecorated(TrainerConfig):
            lr: float = 0.5
            hidden: int = 3

        config = Undecorated(batch_size=2)
        assert (config.lr, config.hidden, config.batch_size, config.to_dict()["hidden"]) == (0.5, 3, 2, 3)
        assert problems_of(lambda: Undecorated(lr=-1.0)) == ["lr=-1.0: must be at least 0"]


class TestFieldsThatMustBeGiven:
    def test_may_be_unset_until_check(self):
        config = EncoderConfig()
        config.batch_size = 4
        config.num_classes = 7
        assert problems_of(config.check) == ["num_loader_workers: is not set; give it a value"]
        config.num_loader_workers = 0
        config.check()

    def test_use_is_an_error_that_names_the_field(self):
        with pytest.raises(AttributeError, match="num_classes must be defined"):
            _ = EncoderConfig().num_classes
        with pytest.raises(AttributeError, match="num_classes must be defined"):
            EncoderConfig(num_loader_workers=0).to_json()

    def test_check_values_waits_until_all_are_set(self):
        EncoderConfig(num_classes=1)
        with pytest.raises(AssertionError, match="must be above 1"):
            EncoderConfig(num_classes=1, num_loader_workers=0)

    def test_other_values_are_checked_already(self):
        assert problems_of(lambda: EncoderConfig(batch_size=0)) == ["batch_size=0: must be at least 1 samples"]

    def test_loading_may_leave_them_unset(self):
        config = EncoderConfig()
        config.from_dict({"num_classes": 5})
        assert problems_of(config.validate) == ["num_loader_workers: is not set; give it a value"]

    def test_on_the_command_line(self, capsys):
        config = EncoderConfig()
        found = refused(capsys, lambda: parse_command_line(config, argv=["--coqpit.num_classes=1"]))
        assert found == ["--coqpit.num_loader_workers: is not set; give it a value"]
        found = refused(capsys, lambda: parse_command_line(config, argv=["--coqpit.num_loader_workers=0"]))
        assert found == ["num_classes must be above 1"]
        parse_command_line(config, argv=["--coqpit.num_classes=2"])
        assert (config.num_classes, config.num_loader_workers) == (2, 0)

    def test_help_says_so(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            parse_command_line(EncoderConfig(), argv=["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert "--coqpit.num_classes INT (must be given)" in shown
        assert (
            "--coqpit.num_loader_workers INT Processes that load data; 0 loads in the training process. (must" in shown
        )

    def test_a_check_without_a_message(self, capsys):
        found = refused(capsys, lambda: parse_command_line(Silent(), argv=["--coqpit.epochs=1"]))
        assert found == ["Silent.check_values raised AssertionError"]
        nested = {"audio": {"sample_rate": 1}}
        assert problems_of(lambda: BaseTTSConfig.new_from_dict(nested)) == [
            "audio: BaseAudio.check_values raised ValueError"
        ]


@dataclass
class Silent(TrainerConfig):
    def check_values(self):
        if self.epochs == 1:
            raise AssertionError


class TestConfigJsonOfCoquisTrainer:
    def write(self, folder, **values: Any):
        data = {
            **BaseTTSConfig().to_dict(),
            "distributed_backend": "nccl",
            "distributed_url": "tcp://localhost:54321",
            "run_description": "🐸Coqui trainer run.",
            "precision": "bf16",
            "github_branch": "* main",
            "restore_path": "/runs/checkpoint_5.pth",
            **values,
        }
        (folder / "config.json").write_text(json.dumps(data), encoding="utf8")
        return data

    def test_loads_but_for_what_is_no_field(self, tmp_path):
        data = self.write(tmp_path, epochs=7)
        expected = {k: v for k, v in data.items() if k not in ("github_branch", "restore_path")}
        config = BaseTTSConfig()
        load_run_config(config, tmp_path)
        assert config.to_dict() == expected
        other = BaseTTSConfig()
        other.from_dict(data)  # what Coqui TTS's load_config calls
        assert other == config == BaseTTSConfig.new_from_dict(data)

    def test_other_unknown_names_are_errors(self, tmp_path):
        self.write(tmp_path, github_branches="x", audio={"restore_path": "x"})
        assert sorted(problems_of(lambda: load_run_config(BaseTTSConfig(), tmp_path))) == [
            "audio.restore_path: unknown field",
            "github_branches: unknown field",
        ]

    def test_a_dashboard_that_is_not_there(self, tmp_path):
        self.write(tmp_path, dashboard_logger="tensorbord")
        (problem,) = problems_of(lambda: load_run_config(BaseTTSConfig(), tmp_path))
        assert problem.startswith("dashboard_logger='tensorbord': must be one of 'tensorboard', ")

    def test_no_run(self, tmp_path):
        hint = "give the folder of a run, such as output/run-..."
        config = BaseTTSConfig(epochs=3)
        with pytest.raises(ConfigError, match="continue_path: 1 problem") as caught:
            load_run_config(config, tmp_path)
        assert caught.value.problems == [f"{str(tmp_path)!r} has no config.json; {hint}"]
        missing = str(tmp_path / "missing")
        assert problems_of(lambda: load_run_config(config, missing)) == [f"{missing!r} is no folder; {hint}"]
        assert config == BaseTTSConfig(epochs=3)

    def test_trainer_arguments_may_be_none(self):
        TrainerArgs(restore_path=None, continue_path=None, best_path=None).check()


@dataclass
class ScriptArgs(TrainerArgs):
    config_path: str | None = dataclasses.field(default=None, metadata={"help": "Path to the config file."})


class TestScriptsThatParseThemselves:
    """Coqpit's own methods, called as Coqui TTS's train_tts.py calls them."""

    def run(self, argv: list[str]) -> tuple[ScriptArgs, argparse.Namespace, VitsLikeConfig, list[str]]:
        train_args = ScriptArgs()
        parser = train_args.init_argparse(arg_prefix="")
        args, overrides = parser.parse_known_args(argv)
        train_args.parse_args(args)
        config = VitsLikeConfig()
        rest = config.parse_known_args(overrides, relaxed_parser=True) if overrides else []
        return train_args, args, config, rest

    def test_as_train_tts(self):
        argv = ["--config_path", "c.json", "--coqpit.batch_size", "7", "--small_run", "4", "--coqpit.audio.mel_fmax=9"]
        argv += ["--coqpit.datasets.0.formatter", "vctk", "--coqpit.lr", "1e-3,2e-3", "--start_with_eval", "true"]
        train_args, args, config, rest = self.run(argv)
        assert train_args == ScriptArgs(config_path="c.json", small_run=4, start_with_eval=True)
        assert (args.config_path, args.continue_path, args.rank, args.small_run) == ("c.json", "", 0, 4)
        assert (config.batch_size, config.audio.mel_fmax, config.lr) == (7, 9.0, [1e-3, 2e-3])
        assert (config.datasets, rest) == ([DatasetConfig("vctk")], [])

    def test_unknown_words(self, capsys):
        _, _, config, rest = self.run(["--other", "3", "--coqpit.batch_size=7", "word"])
        assert (config.batch_size, rest) == (7, ["--other", "3", "word"])
        found = refused(capsys, lambda: self.run(["--coqpit.epochz", "7", "--coqpit.batch_siz=1", "--coqpit.lr=x"]))
        assert found == [
            "--coqpit.epochz: unknown argument; did you mean '--coqpit.epochs'?",
            "--coqpit.batch_siz: unknown argument; did you mean '--coqpit.batch_size'?",
            "--coqpit.lr='x': must be float | list[float]",
        ]

    def test_no_prefix_stands_for_a_longer_name(self, capsys):
        train_args = ScriptArgs()
        _, rest = train_args.init_argparse(arg_prefix="").parse_known_args(["--small", "3"])
        assert rest == ["--small", "3"]
        assert refused(capsys, lambda: VitsLikeConfig().parse_known_args(["--coqpit.epoch=3"])) == [
            "--coqpit.epoch: unknown argument; did you mean '--coqpit.epochs'?"
        ]

    def test_a_wrong_value_of_the_parser(self, capsys):
        with pytest.raises(SystemExit) as caught:
            ScriptArgs().init_argparse(arg_prefix="").parse_args(["--small_run", "x"])
        assert caught.value.code == 2
        assert "argument --small_run: 'x': must be int | none" in capsys.readouterr().err

    def test_a_value_out_of_range(self):
        args = ScriptArgs().init_argparse(arg_prefix="").parse_args(["--small_run", "0"])
        assert problems_of(lambda: ScriptArgs().parse_args(args)) == ["small_run=0: must be at least 1 samples"]

    def test_a_namespace_with_unknown_names(self):
        config = VitsLikeConfig()
        wrong = argparse.Namespace(**{"coqpit.epochs": "3", "coqpit.epochz": 3})
        assert problems_of(lambda: config.parse_args(wrong)) == [
            "coqpit.epochz: VitsLikeConfig has no field 'epochz'; did you mean 'epochs'?"
        ]
        wrong = argparse.Namespace(epochs="3")
        assert problems_of(lambda: config.parse_args(wrong, arg_prefix="")) == ["epochs='3' (str): must be int"]

    def test_parse_args_takes_no_unknown_word(self, capsys):
        config = VitsLikeConfig()
        config.parse_args(["--coqpit.epochs", "3", "--coqpit.model_args.num_chars=5"])
        assert (config.epochs, config.model_args.num_chars) == (3, 5)
        assert refused(capsys, lambda: VitsLikeConfig().parse_args(["--coqpit.epochs=0"])) == [
            "--coqpit.epochs=0: must be at least 1"
        ]
        assert refused(capsys, lambda: config.parse_args(["--epochs=3"])) == [
            "--epochs: unknown argument; did you mean '--coqpit.epochs'?"
        ]
        config.parse_args(["--my.epochs=4"], arg_prefix="my")
        assert config.epochs == 4

    def test_sys_argv_is_the_default_and_no_words_are_none(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["train.py", "--coqpit.epochs=3", "--small_run=2"])
        config, train_args = VitsLikeConfig(), ScriptArgs()
        assert train_args.parse_known_args(arg_prefix="") == ["--coqpit.epochs=3"]
        assert config.parse_known_args() == ["--small_run=2"]
        assert (config.epochs, train_args.small_run) == (3, 2)
        assert VitsLikeConfig().init_argparse().parse_known_args()[1] == ["--small_run=2"]
        other = VitsLikeConfig()
        assert other.parse_known_args([]) == []
        assert other == VitsLikeConfig()

    def test_the_parser_keeps_what_the_instance_has(self):
        config = VitsLikeConfig(epochs=5, languages=["en"])
        config.parse_args(VitsLikeConfig.init_argparse(instance=config).parse_args(["--coqpit.batch_size=2"]))
        assert config == VitsLikeConfig(epochs=5, languages=["en"], batch_size=2)
        # without an instance the defaults of the class are the parser's, and set
        config.parse_args(config.init_argparse().parse_args([]))
        assert config == VitsLikeConfig()

    def test_parsing_changes_nothing_yet(self):
        config = VitsLikeConfig()
        VitsLikeConfig.init_argparse(instance=config).parse_args(["--coqpit.languages.0=en", "--coqpit.epochs=3"])
        assert config == VitsLikeConfig()

    def test_items_of_lists_and_dicts(self, capsys):
        argv = ["--coqpit.grad_clip.0", "1", "--coqpit.lr_scheduler_params.gamma=.5", "--coqpit.languages.0=en"]
        argv += ["--coqpit.languages.1=de", "--coqpit.datasets.0.formatter=vctk", "--coqpit.grad_clip", "5", "6"]
        parser = VitsLikeConfig.init_argparse()
        config = VitsLikeConfig()
        for _ in range(2):  # the parser keeps nothing
            config.parse_args(parser.parse_args(argv))
        assert (config.grad_clip, config.lr_scheduler_params) == ([1.0, 6.0], {"gamma": 0.5})
        assert (config.languages, config.datasets) == (["en", "de"], [DatasetConfig("vctk")])
        assert VitsLikeConfig() == VitsLikeConfig.init_from_argparse([])  # the class was not changed
        assert refused(capsys, lambda: parser.parse_args(["--coqpit.grad_clip.0=x"])) == [
            "--coqpit.grad_clip.0='x': must be float"
        ]

    def test_a_list_may_be_given_word_by_word(self, capsys):
        config = VitsLikeConfig()
        config.parse_args(["--coqpit.languages", "en", "de, at", "--coqpit.lr", "1", "2"])
        assert (config.languages, config.lr) == (["en", "de, at"], [1.0, 2.0])
        assert refused(capsys, lambda: config.parse_args(["--coqpit.lr", "1", "x"])) == [
            "--coqpit.lr='1 x': must be float | list[float]"
        ]

    def test_the_flags_of_a_given_parser(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("--data")
        assert VitsLikeConfig.init_argparse(parser=parser, help_prefix="x", relaxed_parser=True) is parser
        namespace = parser.parse_args(["--data=d", "--coqpit.epochs=3"])
        assert (namespace.data, getattr(namespace, "coqpit.epochs")) == ("d", 3)
        assert parser.parse_known_args(["--coqpit.epoch=3"])[1] == ["--coqpit.epoch=3"]

    def test_a_nested_config_may_be_taken_away(self):
        @dataclass
        class Optional(TrainerConfig):
            audio: BaseAudio | None = dataclasses.field(default_factory=BaseAudio)

        config = Optional()
        assert config.parse_known_args(Optional.init_argparse().parse_args(["--coqpit.audio=none"])) == []
        assert config.audio is None
        config.parse_args(Optional.init_argparse().parse_args(["--coqpit.audio.trim_db=3"]))
        assert config.audio == BaseAudio(trim_db=3)

    def test_init_from_argparse(self):
        config = VitsLikeConfig.init_from_argparse(["--coqpit.model_args.use_speaker_embedding", "--coqpit.epochs=3"])
        # __post_init__ has seen the values
        assert (config.use_speaker_embedding, config.epochs) == (True, 3)
        namespace = VitsLikeConfig.init_argparse().parse_args(["--coqpit.epochs=4"])
        assert VitsLikeConfig.init_from_argparse(namespace).epochs == 4

    def test_init_from_argparse_of_a_class_with_required_fields(self):
        @dataclass
        class Required(CheckedConfig):
            name: str
            size: int = 3

        assert Required.init_from_argparse(["--coqpit.name=x"]) == Required("x")
        assert problems_of(Required.init_from_argparse([]).check) == ["name: is not set; give it a value"]

    def test_of_coquis_trainer(self):
        """Trainer.__init__ hands what the arguments do not know to the config."""
        train_args, config = TrainerArgs(), VitsLikeConfig()
        words = ["--restore_path", "x.pth", "--coqpit.run_eval", "false", "--coqpit.mixed_precision"]
        rest = train_args.parse_known_args(words, arg_prefix="")
        assert (train_args.restore_path, rest) == ("x.pth", words[2:])
        assert config.parse_known_args(rest, relaxed_parser=True) == []
        assert (config.run_eval, config.mixed_precision) == (False, True)
