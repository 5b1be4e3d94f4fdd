"""`deterministic`: which switches it sets, what is said of operations without a deterministic form, and rounding."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.toys import Toy, build
from trainer import ConfigError, TrainerConfig, seeding
from trainer.seeding import arithmetic, arithmetic_changes, is_deterministic, naming_indeterminate, set_backend_flags

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(WORKSPACE, "")  # so that what a test sets is removed again
    monkeypatch.delenv(WORKSPACE)
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [
        (None, "cpu", True),
        (None, "cuda", False),
        (None, "mps", False),
        (True, "cuda", True),
        (True, "cpu", True),
        (False, "cpu", False),
    ],
)
def test_the_default_depends_on_the_device(setting, device, expected):
    config = TrainerConfig(deterministic=setting)
    assert is_deterministic(config, torch.device(device)) is expected
    set_backend_flags(config, torch.device(device))
    assert torch.are_deterministic_algorithms_enabled() is expected
    assert torch.backends.cudnn.deterministic is expected


def test_a_second_trainer_gets_its_own_setting():
    for setting in (True, False, None):
        build(deterministic=setting)
        assert torch.are_deterministic_algorithms_enabled() is (setting is not False)


def test_warn_only_of_the_script_becomes_an_error_or_nothing():
    for setting, mode in ((True, 2), (False, 0)):
        torch.use_deterministic_algorithms(True, warn_only=True)
        set_backend_flags(TrainerConfig(deterministic=setting), CPU)
        assert torch.get_deterministic_debug_mode() == mode


def test_timing_kernels_is_not_deterministic():
    with pytest.raises(ConfigError, match=r"cudnn_benchmark=True: .* switch it off, or deterministic"):
        TrainerConfig(deterministic=True, cudnn_benchmark=True).check()
    TrainerConfig(cudnn_benchmark=True).check()  # as in many of Coqui's configs, which run on the CPU too
    set_backend_flags(TrainerConfig(cudnn_benchmark=True), CPU)
    assert torch.backends.cudnn.benchmark is False
    set_backend_flags(TrainerConfig(cudnn_benchmark=True), GPU)
    assert torch.backends.cudnn.benchmark is True


class TestWorkspaceOfCublas:
    def test_is_set_where_there_is_none(self):
        set_backend_flags(TrainerConfig(deterministic=True), GPU)
        assert os.environ[WORKSPACE] == ":4096:8"

    def test_a_right_one_stays(self, monkeypatch):
        monkeypatch.setenv(WORKSPACE, ":16:8")
        set_backend_flags(TrainerConfig(deterministic=True), GPU)
        assert os.environ[WORKSPACE] == ":16:8"

    def test_a_wrong_one_is_an_error(self, monkeypatch):
        monkeypatch.setenv(WORKSPACE, ":4096:2:16:8")
        with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG=':4096:2:16:8' .*set it to :4096:8 or :16:8"):
            set_backend_flags(TrainerConfig(deterministic=True), GPU)

    @pytest.mark.parametrize(("setting", "device"), [(None, GPU), (False, GPU), (True, CPU)])
    def test_is_left_alone_where_nothing_needs_it(self, setting, device):
        set_backend_flags(TrainerConfig(deterministic=setting), device)
        assert WORKSPACE not in os.environ


class Unpooling(Toy):
    """max_unpool1d, in which two values may go to one place, has no deterministic form on any device."""

    def train_step(self, batch, criterion):
        x = self.layer(batch["x"]).view(1, 1, -1)
        pooled, places = F.max_pool1d(x, 2, return_indices=True)
        return {}, {"loss": F.max_unpool1d(pooled, places, 2).square().mean()}


class PutInBackward(torch.autograd.Function):
    """The identity, with a gradient through put_."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient).put_(torch.arange(gradient.numel()), gradient)


class Putting(Toy):
    """A backward pass with an operation that has no deterministic form."""

    def train_step(self, batch, criterion):
        return {}, {"loss": PutInBackward.apply(self.layer(batch["x"])).square().mean()}


class TestOperationsWithoutADeterministicForm:
    @pytest.mark.parametrize(
        ("model_class", "operation"), [(Unpooling, "max_unpooling2d_forward_out"), (Putting, "put_")]
    )
    def test_are_named_with_a_remedy(self, model_class, operation):
        trainer = build(model_class, epochs=1, run_eval=False)
        with pytest.raises(RuntimeError, match=f"^deterministic=true: {operation} has no .* set deterministic=false"):
            trainer.fit()
        assert trainer.total_steps_done == 0

    @pytest.mark.parametrize("model_class", [Unpooling, Putting])
    def test_run_where_the_config_allows_them(self, model_class):
        trainer = build(model_class, epochs=1, run_eval=False, deterministic=False)
        trainer.fit()
        assert trainer.total_steps_done == 3

    def test_are_named_when_a_worker_of_the_loader_met_them(self):
        text = "Caught RuntimeError in worker 0.\nRuntimeError: median CUDA with indices does not have a deterministic"
        with pytest.raises(RuntimeError, match=r"^deterministic=true: median CUDA with indices has no"):
            with naming_indeterminate():
                raise RuntimeError(f"{text} implementation, but you set 'torch.use_deterministic_algorithms(True)'.")

    def test_other_errors_are_as_they_were(self):
        error = RuntimeError("shapes do not fit")
        with pytest.raises(RuntimeError) as caught, naming_indeterminate():
            raise error
        assert caught.value is error


class TestArithmetic:
    def test_nothing_has_changed(self, tmp_path):
        torch.save(arithmetic(CPU), tmp_path / "state.pth")
        assert arithmetic_changes(torch.load(tmp_path / "state.pth", weights_only=True), CPU) == []

    def test_another_number_of_threads_is_told(self):
        before, threads = arithmetic(CPU), torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert arithmetic_changes(before, CPU) == [f"threads: {threads + 1}, before {threads}"]
        finally:
            torch.set_num_threads(threads)

    def test_what_only_one_of_them_has_is_told(self):
        before = {**arithmetic(CPU), "gpu": "H200, cuDNN 9"}
        del before["torch"]
        torch_now = torch.__version__
        assert arithmetic_changes(before, CPU) == [
            f"torch: {torch_now}, before none",
            "gpu: none, before H200, cuDNN 9",
        ]

    def test_a_gpu_counts(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
        assert arithmetic(GPU)["gpu"] == "GPU of cuda, cuDNN 91002"
        assert "gpu" not in arithmetic(CPU)

    def test_kernels_that_were_asked_for_are_others(self, monkeypatch):
        before = arithmetic(CPU)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
        capability = torch.backends.cpu.get_cpu_capability()
        change = f"instructions: {capability} ONEDNN_MAX_CPU_ISA=SSE41, before {before['instructions']}"
        assert arithmetic_changes(before, CPU) == [change]

    def test_the_processor_is_named(self):
        found = arithmetic(CPU)["processor"]
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.is_file() and "vendor_id" in cpuinfo.read_text():
            (vendor,) = {line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if "vendor_id" in line}
            assert found.startswith(vendor)
            assert ("fma" in found.split()) == (" fma " in cpuinfo.read_text())
        else:
            assert found == seeding.platform.machine()


def test_each_training_has_its_own_flag_whatever_was_built_after_it():
    flags = []

    def note(trainer):
        flags.append(torch.are_deterministic_algorithms_enabled())

    first, second = (
        build(deterministic=is_on, epochs=1, max_steps=1, callbacks={"on_train_step_end": note})
        for is_on in (True, False)
    )
    first.fit()
    second.fit()
    assert flags == [True, False]
