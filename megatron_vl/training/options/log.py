"""What is shown of a run: a group of its options."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.errors import InputError, check_bounds
from megatron_vl.training.options.bounds import BOUNDS
from megatron_vl.training.options.option import option


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """What is shown."""

    log_interval: int = option(10, "steps between log lines")
    tensorboard_dir: str | None = option(None, "TensorBoard directory", kind=str)
    metrics_file: str | None = option(
        None, "JSONL with the numbers of every step; default: metrics.jsonl in save", kind=str
    )
    report: bool = option(True, "write a page about the run at its end")
    report_file: str | None = option(
        None, "that page; default: report.html beside metrics-file, or X.html beside X.jsonl",
        kind=str
    )
    log_tps: bool = option(False, "print the run's average throughput at its end")
    device_peak_tflops: float | None = option(
        None, "what one device can do at most in bf16, in 10^12 FLOPs a second, for MFU; default: "
        "by the device's name", kind=float
    )
    wandb_project: str | None = option(None, "log to this project of Weights & Biases", kind=str)
    wandb_exp_name: str | None = option(None, "the run's name there", kind=str)
    swanlab_project: str | None = option(None, "log to this project of SwanLab", kind=str)
    swanlab_exp_name: str | None = option(None, "the run's name there", kind=str)
    mlflow_experiment: str | None = option(None, "log to this experiment of MLflow", kind=str)
    mlflow_run_name: str | None = option(None, "the run's name there", kind=str)
    profile: bool = option(False, "trace some steps with torch's profiler")
    profile_step_start: int = option(10, "the first iteration that is traced")
    profile_step_end: int = option(12, "the first iteration after it that is not")
    profile_ranks: tuple[int, ...] = option((0,), "ranks that are traced", kind=int)
    profile_dir: str | None = option(
        None, "directory of the traces; default: tensorboard-dir, or profile beside metrics-file",
        kind=str
    )

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        if self.profile_step_end <= self.profile_step_start:
            raise InputError(
                f"profile-step-end {self.profile_step_end} must be above profile-step-start "
                f"{self.profile_step_start}: it is the first iteration that is not traced."
            )
        for tracker in ("wandb_project", "swanlab_project", "mlflow_experiment"):
            name = tracker.split("_")[0] + ("_run_name" if "mlflow" in tracker else "_exp_name")
            if getattr(self, name) is not None and getattr(self, tracker) is None:
                raise InputError(
                    f"{name.replace('_', '-')} is given without {tracker.replace('_', '-')}; give "
                    f"both, or neither."
                )
