"""Configs: what they refuse, what they say, and that JSON brings back what was written."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Union  # noqa: UP035

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.digits import DigitsConfig
from models.vits import VitsConfig
from trainer import ConfigError, TrainerArgs, TrainerConfig, field
from trainer.checked_config import CheckedConfig, convert, matches, metadata_of, type_name


@dataclass
class AudioConfig(CheckedConfig):
    """Nested in ModelConfig."""

    sample_rate: int = field(22050, "Samples a second.", unit="Hz", min=8000)
    window: str = field("hann", "Window.", choices=("hann", "hamming"))


@dataclass
class RequiredConfig(CheckedConfig):
    """A nested config that cannot be built from nothing."""

    name: str
    size: int = field(3, min=1)


@dataclass
class Point:
    """A plain dataclass, not coqpit's."""

    x: int = 1


@dataclass
class ModelConfig(TrainerConfig):
    """Every kind of field that a model's config may have."""

    hidden: int = field(64, "Width.", min=1, max=512)
    audio: AudioConfig = field(AudioConfig(sample_rate=16000))
    maybe: Optional[AudioConfig] = None  # noqa: UP045
    several: list[AudioConfig] = field([AudioConfig(), AudioConfig(window="hamming")])
    by_name: dict[str, AudioConfig] = field({"a": AudioConfig()})
    optional_several: list[RequiredConfig] | None = None
    betas: list[float] = field([0.8, 0.99], "Betas.", min=0, max=1)
    kernel: tuple[int, float] = (3, 1.0)
    kernels: tuple[int, ...] | None = None
    folder: Path = Path("data")
    kind: Literal["small", "large"] = "small"
    either: Union[int, str] = field(3, min=1)  # noqa: UP007
    pair: tuple[AudioConfig, RequiredConfig] | None = None
    words: set[str] = field({"a"})
    plain: Point = field(Point())
    at_step: dict[int, float] = field({})
    bare_list: List = field([1])  # noqa: UP006
    bare_dict: Dict = field({})  # noqa: UP006
    anything: Any = None


def problems_of(call) -> list[str]:
    """The problems of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value.problems


class TestBuilding:
    def test_wrong_types_and_ranges_are_told_all_at_once(self):
        found = problems_of(
            lambda: ModelConfig(hidden=0, epochs=3.7, batch_size="8", betas=[0.5, 1.5], run_eval=1, kind="medium")
        )
        assert sorted(found) == [
            "batch_size='8' (str): must be int",
            "betas=1.5: must be at most 1",
            "epochs=3.7 (float): must be int",
            "hidden=0: must be at least 1",
            "kind='medium' (str): must be 'small' | 'large'",
            "run_eval=1 (int): must be bool",
        ]

    def test_message_names_the_class_and_lists_the_problems(self):
        with pytest.raises(ConfigError) as caught:
            ModelConfig(hidden=0, epochs=0)
        assert str(caught.value) == (
            "ModelConfig: 2 problems\n  - epochs=0: must be at least 1\n  - hidden=0: must be at least 1"
        )
        with pytest.raises(ConfigError, match=r"^ModelConfig: 1 problem\n"):
            ModelConfig(hidden=0)

    def test_is_a_value_error(self):
        assert issubclass(ConfigError, ValueError)

    def test_range_names_the_unit(self):
        assert problems_of(lambda: AudioConfig(sample_rate=10)) == ["sample_rate=10: must be at least 8000 Hz"]

    def test_choice_names_the_choices_and_the_nearest(self):
        assert problems_of(lambda: AudioConfig(window="haming")) == [
            "window='haming': must be one of 'hann', 'hamming'; did you mean 'hamming'?"
        ]

    def test_optimizer_modules_without_an_optimizer(self):
        modules = [["generator"], ["discriminator"]]
        assert TrainerConfig(optimizer=["Adam", "SGD"], optimizer_modules=modules).optimizer_modules == modules
        (problem,) = problems_of(lambda: TrainerConfig(optimizer_modules=modules))
        assert problem.startswith("optimizer_modules=[['generator'], ['discriminator']]: goes with optimizer, which is")

    def test_nan_is_in_no_range(self):
        assert problems_of(lambda: TrainerConfig(lr=math.nan)) == ["lr=nan: must be at least 0"]

    def test_a_bool_is_no_number(self):
        assert problems_of(lambda: TrainerConfig(epochs=True, lr=False)) == [
            "epochs=True (bool): must be int",
            "lr=False (bool): must be float | list[float]",
        ]

    def test_range_is_for_the_numbers_of_a_field_that_also_takes_words(self):
        assert ModelConfig(either="auto").either == "auto"
        assert problems_of(lambda: ModelConfig(either=0)) == ["either=0: must be at least 1"]

    def test_nested_problems_have_dotted_paths(self):
        config = ModelConfig()
        config.audio.sample_rate = 1
        config.several[1].window = "box"
        config.by_name["a"].sample_rate = "fast"
        assert problems_of(config.check) == [
            "audio.sample_rate=1: must be at least 8000 Hz",
            "several.1.window='box': must be one of 'hann', 'hamming'",
            "by_name.a.sample_rate='fast' (str): must be int",
        ]

    def test_a_config_of_another_class_is_a_wrong_type(self):
        (problem,) = problems_of(lambda: ModelConfig(audio=RequiredConfig("x")))
        assert problem.startswith("audio=RequiredConfig(")
        assert problem.endswith("must be AudioConfig")

    def test_mutable_defaults_are_copied(self):
        first, second = ModelConfig(), ModelConfig()
        first.betas.append(0.5)
        first.audio.sample_rate = 8000
        first.optimizer_params["eps"] = 1.0
        assert (second.betas, second.audio.sample_rate, second.optimizer_params) == ([0.8, 0.99], 16000, {})

    def test_plain_dataclass_default_is_copied(self):
        first, second = ModelConfig(), ModelConfig()
        first.plain.x = 5
        assert second.plain.x == 1

    def test_own_check_values_is_called(self):
        @dataclass
        class Checked(TrainerConfig):
            def check_values(self) -> None:
                if self.batch_size % 2:
                    raise ValueError("batch_size must be even")

        with pytest.raises(ValueError, match="must be even"):
            Checked(batch_size=3)

    def test_the_example_of_the_documentation(self):
        import doctest

        import trainer.config

        example = doctest.DocTestFinder().find(
            trainer.config.TrainerConfig, "TrainerConfig", globs=vars(trainer.config)
        )
        results = [doctest.DocTestRunner().run(test) for test in example if test.examples]
        assert [(r.failed, r.attempted) for r in results] == [(0, 2)]


class TestAssigning:
    def test_unknown_name_is_an_error_with_the_nearest(self):
        with pytest.raises(AttributeError, match=r"ModelConfig has no field 'bach_size'; did you mean 'batch_size'\?"):
            ModelConfig().bach_size = 3
        with pytest.raises(AttributeError, match="'bach_size'"):
            ModelConfig().update({"bach_size": 3})

    def test_fields_and_private_names_can_be_set(self):
        config = ModelConfig()
        config.batch_size, config._cache = 3, 4
        config["epochs"] = 7
        assert (config.batch_size, config._cache, config.epochs) == (3, 4, 7)

    def test_check_finds_what_was_assigned(self):
        config = ModelConfig()
        config.batch_size, config.grad_clip = 64, None
        config.check()
        config.epochs = 3.7
        assert problems_of(config.check) == ["epochs=3.7 (float): must be int"]


class TestJson:
    def test_round_trip_of_every_kind_of_field(self, tmp_path):
        config = ModelConfig(
            maybe=AudioConfig(sample_rate=44100),
            optional_several=[RequiredConfig("a"), RequiredConfig("b", size=5)],
            kernels=(1, 2, 3),
            pair=(AudioConfig(window="hamming"), RequiredConfig("c")),
            words={"b", "c"},
            plain=Point(3),
            at_step={10: 0.5},
            lr=[0.1, 0.2],
            folder=Path("elsewhere/x"),
            anything={"a": [1, None]},
        )
        config.save_json(tmp_path / "config.json")
        loaded = ModelConfig()
        loaded.load_json(tmp_path / "config.json")
        assert loaded == config
        assert type(loaded.optional_several[1]) is RequiredConfig
        assert type(loaded.by_name["a"]) is AudioConfig
        assert ModelConfig.new_from_dict(json.loads(config.to_json())) == config

    def test_values_that_are_not_named_stay(self):
        config = ModelConfig(hidden=7)
        config.from_dict({"epochs": 2})
        assert (config.hidden, config.epochs) == (7, 2)

    def test_an_empty_dict_stays_a_dict(self):
        config = ModelConfig(optimizer_params={"eps": 1e-9})
        config.from_dict({"optimizer_params": {}})
        assert config.optimizer_params == {}

    def test_everything_wrong_is_told_at_once_and_nothing_changed(self, tmp_path):
        path = tmp_path / "config.json"
        wrong = {
            "epochs": 3.7,
            "batch_size": 8,
            "bach_size": 3,
            "hidden": 1000,
            "audio": {"sample_rat": 1, "window": "hamming"},
            "maybe": {"sample_rate": 1},
            "several": [{}, {"sample_rate": "x"}],
            "optional_several": [{"size": 1}],
            "kernel": [1],
            "run_eval": None,
        }
        path.write_text(json.dumps(wrong))
        config = ModelConfig()
        with pytest.raises(ConfigError) as caught:
            config.load_json(path)
        assert caught.value.problems == [
            "epochs=3.7 (float): must be int",
            "bach_size: unknown field; did you mean 'batch_size'?",
            "hidden=1000: must be at most 512",
            "audio.sample_rat: unknown field; did you mean 'sample_rate'?",
            "maybe.sample_rate=1: must be at least 8000 Hz",
            "several.1.sample_rate='x' (str): must be int",
            "optional_several.0.name: is missing",
            "kernel=[1] (list): must be tuple[int, float]",
            "run_eval=None (NoneType): must be bool",
        ]
        assert str(path) in str(caught.value)
        assert config == ModelConfig()

    def test_nothing_is_changed_when_the_own_check_fails(self):
        @dataclass
        class Even(TrainerConfig):
            def check_values(self) -> None:
                if self.batch_size % 2:
                    raise ValueError("batch_size must be even")

        @dataclass
        class Outer(CheckedConfig):
            even: Even | None = None

        config = Even()
        with pytest.raises(ValueError, match="must be even"):
            config.from_dict({"epochs": 5, "batch_size": 3})
        assert config == Even()
        assert problems_of(lambda: Outer().from_dict({"even": {"batch_size": 3}})) == [
            "even.batch_size must be even".replace(".", ": ", 1)
        ]

    def test_a_nested_default_can_be_wrong_too(self):
        @dataclass
        class Bad(CheckedConfig):
            x: int = field(0, min=1)
            y: int = 3

        @dataclass
        class Outer(CheckedConfig):
            bad: Bad | None = None

        assert problems_of(lambda: Outer().from_dict({"bad": {"y": 4}})) == ["bad.x=0: must be at least 1"]

    def test_new_from_dict_lists_problems(self):
        assert problems_of(lambda: ModelConfig.new_from_dict({"epochz": 1})) == [
            "epochz: unknown field; did you mean 'epochs'?"
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "config.json: 1 problem\n  - not valid JSON"), ("[1]", "holds a list, not a JSON object")],
    )
    def test_no_json_object(self, tmp_path, text, message):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            ModelConfig().load_json(tmp_path / "config.json")

    def test_int_becomes_float_and_stays_int(self):
        config = ModelConfig.new_from_dict({"betas": [0, 1], "either": 5, "lr": 1, "grad_clip": [1, 2]})
        assert [type(v) for v in (*config.betas, config.either, config.lr, *config.grad_clip)] == [
            float,
            float,
            int,
            float,
            float,
            float,
        ]

    @settings(max_examples=40, deadline=None, database=None)
    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "epochs": st.integers(1, 10**9),
                "lr": st.floats(0, 1e3) | st.lists(st.floats(0, 1e3)),
                "run_name": st.text(),
                "max_steps": st.none() | st.integers(1),
                "optimizer_params": st.dictionaries(
                    st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
                ),
                "lr_scheduler": st.none() | st.text() | st.lists(st.text()),
                "kernel": st.tuples(st.integers(), st.floats(allow_nan=False)),
                "kernels": st.none() | st.lists(st.integers()).map(tuple),
                "at_step": st.dictionaries(st.integers(), st.floats(allow_nan=False)),
                "several": st.lists(st.builds(AudioConfig, sample_rate=st.integers(8000, 96000))),
            },
        )
    )
    def test_round_trip_of_any_values(self, values):
        config = ModelConfig(**values)
        assert ModelConfig.new_from_dict(json.loads(config.to_json())) == config


class TestTypes:
    @pytest.mark.parametrize(
        ("annotation", "name"),
        [
            (float | list[float], "float | list[float]"),
            (Optional[int], "int | none"),  # noqa: UP045
            (dict[str, Any], "dict[str, any]"),
            (tuple[int, ...], "tuple[int, ...]"),
            (Literal["a", 1], "'a' | 1"),
            (List, "list"),  # noqa: UP006
            (AudioConfig, "AudioConfig"),
        ],
    )
    def test_names(self, annotation, name):
        assert type_name(annotation) == name

    @pytest.mark.parametrize(
        ("value", "annotation", "expected"),
        [
            (1, float, True),
            (1.0, int, False),
            (None, None, True),
            ((1, "a"), tuple[int, str], True),
            ((1, 2, 3), tuple[int, ...], True),
            ((1,), tuple[int, str], False),
            (None, tuple[int, ...], False),
            ({1, 2}, set[int], True),
            ({"a"}, set[int], False),
            ({"a": 1}, dict[str, int], True),
            ({1: 1}, dict[str, int], False),
            ([[1], [2]], list[list[int]], True),
            ([[1], ["2"]], list[list[int]], False),
            (lambda: 0, "anything that is no type", True),
        ],
    )
    def test_matches(self, value, annotation, expected):
        assert matches(value, annotation) is expected

    def test_convert_sets(self):
        assert convert([1, 2, 2], set[int], "x", []) == {1, 2}

    def test_what_fits_a_union_as_it_is_is_not_converted(self):
        assert convert([1], tuple[int, ...] | list[int], "x", []) == [1]
        assert convert("a", Path | str, "x", []) == "a"

    def test_a_union_of_configs_takes_the_one_that_fits(self):
        either = AudioConfig | RequiredConfig
        assert convert({"name": "n"}, either, "x", []) == RequiredConfig("n")
        found: list[str] = []
        convert({"window": "box"}, either, "x", found)
        assert found == ["x.window='box': must be one of 'hann', 'hamming'"]


def test_every_field_of_the_library_has_help():
    for cls in (TrainerConfig, TrainerArgs):
        assert [f.name for f in dataclasses.fields(cls) if not f.metadata.get("help", "").endswith((".", ")."))] == []


class TestAnotherDefault:
    """A subclass that only gives a field another default keeps its help, unit and range."""

    def test_range(self):
        @dataclass
        class Mine(TrainerConfig):
            batch_size: int = 64

        @dataclass
        class Yours(Mine):
            batch_size: int = 8

        with pytest.raises(ConfigError, match="batch_size=0: must be at least 1 samples"):
            Yours(batch_size=0)
        with pytest.raises(ConfigError, match="batch_size=0: must be at least 1 samples"):
            Yours().deserialize({"batch_size": 0})

    def test_a_range_of_its_own_counts(self):
        @dataclass
        class Mine(TrainerConfig):
            batch_size: int = field(64, "Pairs in a batch.", min=2)

        with pytest.raises(ConfigError, match=r"batch_size=1: must be at least 2$"):
            Mine(batch_size=1)

    def test_every_field_of_the_models_has_help(self):
        for cls in (DigitsConfig, VitsConfig):
            assert [f.name for f in dataclasses.fields(cls) if not metadata_of(cls, f.name).get("help")] == []
