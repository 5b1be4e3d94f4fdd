"""What a training can set: TrainerArgs for one start of it, TrainerConfig for the run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trainer.checked_config import CheckedConfig, ConfigError, field


@dataclass
class TrainerArgs(CheckedConfig):
    """How this one start of a training goes; given as ``--continue_path``, ``--small_run`` and so on."""

    continue_path: str | None = field(
        "", "Folder of a run to continue: its config, newest checkpoint and folder are used."
    )
    restore_path: str | None = field(
        "", "Checkpoint whose weights a new run starts from, as far as they fit its model."
    )
    best_path: str | None = field(
        "", "With continue_path: checkpoint to take the best loss so far from, not the run's own."
    )
    use_ddp: bool = field(False, "Set by the launcher (python -m trainer.distribute); do not set it yourself.")
    use_accelerate: bool = field(False, "Accepted for old scripts: the Trainer's own loop does what Accelerate did.")
    grad_accum_steps: int = field(1, "Batches accumulated for one update of the weights.", unit="batches", min=1)
    overfit_batch: bool = field(False, "Train and evaluate on the first training batch only, to debug a model.")
    skip_train_epoch: bool = field(False, "Run one evaluation and test, without training.")
    start_with_eval: bool = field(False, "Evaluate once before the first training epoch.")
    small_run: int | None = field(
        None,
        "Use only the first N training and evaluation samples, to debug a recipe.",
        unit="samples",
        min=1,
    )
    gpu: int | None = field(None, "Index of the GPU to train on, where CUDA_VISIBLE_DEVICES is not set.", min=0)
    rank: int = field(0, "Rank of this process; set by the launcher, do not set it yourself.", min=0)
    group_id: str = field("", "Name of this group of ranks; set by the launcher, do not set it yourself.")

    def check(self, complete: bool = True) -> None:
        """As for every config; also that best_path has a run to be the best of."""
        super().check(complete)
        for name in ("restore_path", "best_path") if complete else ():
            path = getattr(self, name)
            if path and "://" not in path and not Path(path).is_file():
                problem = f"{name}={path!r}: no such file; give a checkpoint, such as output/run-.../best_model.pth"
                raise ConfigError([problem], type(self).__name__)
        if self.best_path and not self.continue_path:
            problem = f"best_path={self.best_path!r}: goes with continue_path, which is not given; give a run's folder"
            raise ConfigError([problem], type(self).__name__)


@dataclass
class TrainerConfig(CheckedConfig):
    """What every training run can set. A model's config inherits from it and adds its own fields.

    Every field can be overridden on the command line: ``--coqpit.lr=1e-4 --coqpit.optimizer_params.eps=1e-9``.

    Example:
        >>> @dataclass
        ... class DigitsConfig(TrainerConfig):
        ...     hidden: int = field(64, "Width of the hidden layers.", min=1)
        >>> DigitsConfig(hidden=0)
        Traceback (most recent call last):
        trainer.checked_config.ConfigError: DigitsConfig: 1 problem
          - hidden=0: must be at least 1
    """

    _ignored_keys: ClassVar[tuple[str, ...]] = ("github_branch", "restore_path")  # which Coqui's Trainer writes

    # the run
    output_path: str = field("output", "Folder in which every run makes a folder of its own.")
    run_name: str = field("run", "First part of the name of the run's folder.")
    project_name: str | None = field(None, "Project under which a tracker files the run; TensorBoard has no projects.")
    run_description: str = field("", "What this run is for; shown with the config by the dashboard.")
    training_seed: int = field(54321, "Seed of python's, numpy's and torch's random numbers.", min=0, max=2**32 - 1)
    epochs: int = field(1000, "Epochs to train.", min=1)
    max_steps: int | None = field(None, "Stop after this many updates, if the epochs do not end before.", min=1)
    device: str = field("auto", "Device to train on: auto, cpu, cuda, cuda:N or mps.")

    # logging
    print_step: int = field(25, "Print the losses every N updates.", unit="updates", min=1)
    plot_step: int = field(100, "Write scalars, and the model's train_log, every N updates.", unit="updates", min=1)
    print_eval: bool = field(False, "Print every evaluation batch.")
    dashboard_logger: str = field("tensorboard", "Dashboard to write to.", choices=("tensorboard", "none"))
    logger_uri: str | None = field(None, "Where the dashboard writes; none means the run's folder.")
    log_model_step: int | None = field(
        None, "Hand the checkpoint to the dashboard every N updates; none means save_step.", unit="updates", min=1
    )
    model_param_stats: bool = field(False, "Write statistics and histograms of all parameters after every epoch.")
    wandb_entity: str | None = field(None, "Entity for Weights & Biases, a tracker that is not there yet.")

    # checkpoints
    save_step: int = field(10000, "Save a checkpoint every N updates.", unit="updates", min=1)
    save_minutes: float | None = field(
        None, "Save a checkpoint when the last one is M minutes old as well.", unit="min", min=0
    )
    save_n_checkpoints: int = field(5, "Keep the newest N checkpoints.", min=1)
    save_max_age: float | None = field(
        None, "Delete checkpoints that are older than this, but for the newest.", unit="hours", min=0
    )
    save_async: bool = field(True, "Write checkpoints in a thread; the training waits for a copy in memory only.")
    save_checkpoints: bool = field(True, "Save checkpoints; without them a run cannot be continued.")
    save_on_interrupt: bool = field(True, "Save a checkpoint on Ctrl-C, SIGTERM and SIGUSR1.")
    save_all_best: bool = field(False, "Keep every best model as best_model_STEP.pth too.")
    save_n_best: int | None = field(
        None, "Keep the N models with the lowest loss, as best_model_STEP.pth.", unit="models", min=1
    )
    save_best_after: int = field(0, "Save no best model before this update.", unit="updates", min=0)
    reinit_layers: list[str] | None = field(
        None, "With restore_path: parameters whose name contains one of these words keep their fresh values."
    )
    target_loss: str | None = field(
        None, "Loss that decides which model is best; none means loss, of several optimizers their mean."
    )

    # evaluation and test
    run_eval: bool = field(True, "Evaluate after the epochs (see run_eval_epochs), and after the last update.")
    run_eval_epochs: int = field(1, "Evaluate and test after every N epochs.", unit="epochs", min=1)
    run_eval_steps: int | None = field(None, "Evaluate every N updates as well.", unit="updates", min=1)
    test_delay_epochs: int = field(0, "First epoch after which the model's test_run is called; -1 is as 0.")
    early_stopping_patience: int | None = field(
        None, "Stop after this many evaluations without a better target loss.", unit="evaluations", min=1
    )
    early_stopping_min_delta: float = field(0.0, "By how much the target loss must fall to count as better.", min=0)

    # several GPUs
    strategy: str = field(
        "ddp",
        "On several ranks: ddp keeps the whole model on each, fsdp a part of it, for models larger than one GPU.",
        choices=("ddp", "fsdp"),
    )
    distributed_backend: str = field(
        "auto", "Backend of torch.distributed: auto is nccl on GPUs and gloo on CPUs.", choices=("auto", "nccl", "gloo")
    )
    distributed_url: str = field("env://", "How the ranks find each other; the launcher's way by default.")
    distributed_timeout: float = field(
        1800.0, "How long a rank waits for the others; then the training ends, naming those that hang.", unit="s", min=1
    )
    overlap_gradients: bool = field(
        True,
        "Sum gradients over the ranks during the backward pass; False after it, for reentrant checkpointing of layers.",
    )
    sync_batchnorm: bool = field(False, "Compute BatchNorm's statistics over the batches of all ranks.")
    drift_check_steps: int | None = field(
        1000,
        "Compare the weights of all ranks every N updates, and before saving; none means before saving only.",
        unit="updates",
        min=1,
    )

    # precision and speed
    mixed_precision: bool = field(False, "Run the forward pass under autocast.")
    precision: str = field("fp16", "Type that autocast computes in; fp16 scales the losses.", choices=("fp16", "bf16"))
    use_grad_scaler: bool = field(False, "Scale the losses without fp16 too; with fp16 they are always scaled.")
    nan_policy: str = field(
        "raise",
        "On a loss or gradient that is not finite: stop, and save the batch, or skip the update.",
        choices=("raise", "skip"),
    )
    nan_skip_limit: int = field(10, "With nan_policy=skip: stop when so many updates in a row were skipped.", min=1)
    deterministic: bool | None = field(
        None, "Use deterministic algorithms only, so that runs repeat bit for bit; none means on the CPU, not on GPUs."
    )
    allow_tf32: bool = field(False, "Let GPUs multiply fp32 matrices in TF32: faster, 10 bits of mantissa.")
    cudnn_enable: bool = field(True, "Use cuDNN.")
    cudnn_deterministic: bool = field(False, "Let cuDNN choose deterministic kernels only; slower.")
    cudnn_benchmark: bool = field(False, "Let cuDNN time its kernels; for inputs of constant shape.")

    # data
    batch_size: int = field(32, "Samples in a training batch.", unit="samples", min=1)
    eval_batch_size: int = field(16, "Samples in an evaluation batch.", unit="samples", min=1)
    num_loader_workers: int = field(0, "Processes that load data; 0 loads in the training process.", min=0)

    # optimization
    optimizer: str | list[str] | None = field(
        None, "Name(s) of torch.optim classes, when the model brings no optimizer."
    )
    optimizer_params: dict[str, Any] | list[dict[str, Any]] | None = field({}, "Arguments of the optimizer(s).")
    optimizer_modules: list[list[str]] | None = field(
        None, "For each of several optimizers, the modules that it trains; none means the whole model."
    )
    lr: float | list[float] = field(0.001, "Learning rate of the optimizer(s).", min=0)
    lr_scheduler: str | list[str | None] | None = field(
        None, "Name(s) of torch.optim.lr_scheduler classes, NoamLR or StepwiseGradualLR."
    )
    lr_scheduler_params: dict[str, Any] | list[dict[str, Any] | None] | None = field(
        {}, "Arguments of the scheduler(s)."
    )
    scheduler_after_epoch: bool = field(True, "Step the schedulers once an epoch, otherwise after every update.")
    lr_scheduler_unit: str | list[str | None] | None = field(
        None,
        "What each scheduler counts; none means what scheduler_after_epoch says.",
        choices=("step", "epoch", "evaluation"),
    )
    grad_clip: float | list[float | None] | None = field(
        0.0, "Largest gradient norm, for all or for each optimizer; none, 0 or less clips nothing."
    )
    ema_decay: float | None = field(
        None, "Keep an exponential moving average of the weights, and evaluate and test with it.", min=0, max=1
    )

    def __iter__(self) -> Iterator[str]:
        """The names of the fields but for ``device``.

        Coqui TTS's models copy every field onto themselves, and have a property of that name.
        """
        return (name for name in super().__iter__() if name != "device")

    def check(self, complete: bool = True) -> None:
        """As for every config; also that fields which belong together go together."""
        super().check(complete)
        if self.save_all_best and self.save_n_best is not None:
            problem = f"save_n_best={self.save_n_best}: goes without save_all_best, which deletes none; choose one"
            raise ConfigError([problem], type(self).__name__)
        if self.optimizer_modules is not None and self.optimizer is None:
            problem = (
                f"optimizer_modules={self.optimizer_modules!r}: goes with optimizer, which is None; name one there, or "
                "leave the modules to the model's get_optimizer()"
            )
            raise ConfigError([problem], type(self).__name__)
        if self.deterministic and self.cudnn_benchmark:
            problem = (
                "cudnn_benchmark=True: the kernels that are fastest today may be others tomorrow; switch it off, or "
                "deterministic"
            )
            raise ConfigError([problem], type(self).__name__)
