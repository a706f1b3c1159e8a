"""What a run starts from and what it saves: a group of its options."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.errors import InputError, check_bounds
from megatron_vl.training.options.bounds import BOUNDS
from megatron_vl.training.options.option import option


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointOptions:
    """What is read at the start and written on the way."""

    load: str | None = option(
        None, "checkpoint directory to start from, or a model's name on a hub, such as "
        "Qwen/Qwen2-VL-2B-Instruct", kind=str
    )
    model_size: str = option("auto", "a published size, as 7B: refuse another's config.json; "
                             "auto: take what it says")
    hf_config: str | None = option(
        None, "directory with config.json and the tokenizer; default: save where it holds a "
        "checkpoint, else load", kind=str
    )
    save: str | None = option(None, "directory of the run's checkpoints; resumes what it holds",
                              kind=str)
    save_interval: int = option(1000, "steps between checkpoints; the last step is always saved")
    export_hf: bool = option(
        False, "write save/hf, the model of the run's end as a Hugging Face directory"
    )
    export_hf_interval: int | None = option(
        None, "write it also every so many steps, a multiple of save-interval, while training goes "
        "on", kind=int
    )
    ckpt_format: str = option("torch_dist", "format of the run's checkpoints; megatron-vl convert "
                              "makes torch of it", choices=("torch_dist",))
    finetune: bool = option(False, "take only the weights of load, start at step 0")
    no_load_optim: bool = option(False, "do not load optimizer state")
    no_load_rng: bool = option(False, "do not load random-number state")
    no_save_optim: bool = option(False, "do not save optimizer state; the run cannot resume")
    no_save_rng: bool = option(False, "do not save random-number state")
    async_save: bool = option(
        False, "write checkpoints behind training, by processes that need up to a copy of the "
        "state in host memory"
    )
    save_total_limit: int | None = option(
        None, "checkpoints to keep, the newest; default: all", kind=int
    )
    save_best: str | None = option(
        None, "keep the checkpoint of the best validation too, by its loss or its exact answers",
        choices=("eval_loss", "eval_exact"), kind=str
    )
    verify_checksums: bool = option(
        True, "read a checkpoint once before resuming from it, and take the one before if it is "
        "damaged"
    )

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        if self.exports and self.save is None:
            option = "export-hf" if self.export_hf else "export-hf-interval"
            raise InputError(f"{option} writes save/hf and there is no save; give save.")
        if self.export_hf_interval is not None and self.export_hf_interval % self.save_interval:
            raise InputError(
                f"export-hf-interval {self.export_hf_interval} is not a multiple of save-interval "
                f"{self.save_interval}, and it is checkpoints that are exported; give a multiple."
            )

    @property
    def exports(self) -> bool:
        """Whether save/hf is written at the end."""
        return self.export_hf or self.export_hf_interval is not None
