"""Random states: captured and restored they repeat every generator's draws exactly."""

import random

import numpy as np
import pytest
import torch

from tests.trainer.toys import Toy, ToyConfig, make_samples
from trainer import Trainer, TrainerArgs, TrainerConfig, seed_everything, seeding
from trainer.seeding import capture_rng_state, forked_rng, restore_rng_state, set_backend_flags


def draw() -> list:
    """Numbers of every generator; an odd count of gausses, so that python and numpy keep one in store."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.standard_normal(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    ]


@pytest.fixture(autouse=True)
def _keep_generators():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def test_seed_is_the_libraries_own():
    seed_everything(123)
    found = draw()
    generator, numpy_generator, torch_generator = (
        random.Random(123),
        np.random.RandomState(123),
        torch.Generator().manual_seed(123),
    )
    assert found == [
        generator.random(),
        generator.gauss(0, 1),
        numpy_generator.rand(3).tolist(),
        numpy_generator.standard_normal(),
        torch.rand(3, generator=torch_generator).tolist(),
        torch.randn(3, generator=torch_generator).tolist(),
    ]


@pytest.mark.parametrize("through_a_file", [False, True])
def test_restored_generators_repeat(tmp_path, through_a_file):
    seed_everything(1)
    draw()
    state = capture_rng_state()
    expected = [draw(), draw()]
    if through_a_file:
        torch.save(state, tmp_path / "rng.pth")
        state = torch.load(tmp_path / "rng.pth", weights_only=True)
    seed_everything(2)
    draw()
    restore_rng_state(state)
    assert [draw(), draw()] == expected


def test_a_captured_state_does_not_change_by_drawing():
    state = capture_rng_state()
    expected = draw()
    draw()
    restore_rng_state(state)
    assert draw() == expected


def test_forked_generators_are_freshly_seeded_and_put_back():
    seed_everything(5)
    draw()
    state = capture_rng_state()
    expected = draw()
    restore_rng_state(state)
    inside = []
    for _ in range(2):
        with forked_rng(9):
            inside.append(draw())
    assert draw() == expected
    seed_everything(9)
    assert inside == [draw()] * 2


def test_forked_generators_are_put_back_after_an_exception():
    state = capture_rng_state()
    expected = draw()
    restore_rng_state(state)
    with pytest.raises(KeyError), forked_rng(9):
        raise KeyError(str(draw()))
    assert draw() == expected


def test_states_of_devices_that_are_not_here_are_left_out():
    state = capture_rng_state()
    expected = draw()
    state["cuda"] = state["cuda"] + [torch.zeros(16, dtype=torch.uint8)] * 9
    state["mps"] = None if torch.backends.mps.is_available() else torch.zeros(16, dtype=torch.uint8)
    restore_rng_state(state)
    assert draw() == expected


def test_states_go_to_the_devices_that_are_here(monkeypatch):
    """Two GPUs and an MPS device that are made up, and a state of three GPUs."""
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: seen.append((state, device)))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: seen.append((state, "mps")))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "mps state")
    restore_rng_state({**capture_rng_state(), "cuda": ["first", "second", "third"]})
    assert seen == [("first", 0), ("second", 1), ("mps state", "mps")]


@pytest.fixture
def _keep_backend_flags():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    owners = [(cudnn, name) for name in ("enabled", "deterministic", "benchmark", "allow_tf32")] + [
        (matmul, "allow_tf32")
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name in owners]
    yield
    torch.use_deterministic_algorithms(False)
    for owner, name, value in before:
        setattr(owner, name, value)


@pytest.mark.usefixtures("_keep_backend_flags")
def test_backend_flags_are_what_the_config_says():
    """Coqui's cudnn_enable=False does nothing."""
    backends = torch.backends
    for value in (True, False):
        names = ("cudnn_enable", "cudnn_deterministic", "cudnn_benchmark", "allow_tf32")
        for name in names:
            set_backend_flags(TrainerConfig(**{n: (n == name) == value for n in names}), torch.device("cuda"))
            found = (backends.cudnn.enabled, backends.cudnn.deterministic, backends.cudnn.benchmark)
            assert found == tuple((n == name) == value for n in names[:3])
            tf32 = (name == "allow_tf32") == value
            assert (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32) == (tf32, tf32)


class TestScriptsThatDoNotSeed:
    """As those for Coqui's Trainer, which seeds by itself."""

    @staticmethod
    def train(weights: dict, noise: int) -> torch.Tensor:
        """Fit a model with dropout; ``noise`` stands for whatever was drawn before."""
        config = ToyConfig(dropout=0.5, epochs=1)
        torch.manual_seed(noise)
        model = Toy(config)
        model.load_state_dict(weights)
        samples = {"train_samples": make_samples(12), "eval_samples": make_samples(4)}
        Trainer(TrainerArgs(), config, model=model, parse_command_line_args=False, **samples).fit()
        return model.layer.weight.detach()

    @pytest.fixture(autouse=True)
    def _output(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_the_trainer_seeds(self, monkeypatch):
        monkeypatch.setattr(seeding, "_is_seeded", False)
        weights = Toy(ToyConfig()).state_dict()
        assert torch.equal(self.train(weights, noise=1), self.train(weights, noise=2))
        assert seeding._is_seeded is False

    def test_a_script_that_has_called_seed_everything_keeps_its_numbers(self, monkeypatch):
        monkeypatch.setattr(seeding, "_is_seeded", False)
        weights = Toy(ToyConfig()).state_dict()
        seed_everything(3)
        assert not torch.equal(self.train(weights, noise=1), self.train(weights, noise=2))
