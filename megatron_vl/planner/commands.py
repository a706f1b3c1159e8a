"""A layout as a run: a command, and the launcher scripts' variables."""

from __future__ import annotations

import shlex

from megatron_vl.planner.search import Choice, Question
from megatron_vl.training.options.spellings import flags_of


def run_options(question: Question, choice: Choice) -> dict[str, object]:
    """All options of the run but where the model and its data are."""
    return {"bf16": True, **question.options, **choice.options}


def command(question: Question, choice: Choice) -> str:
    """`megatron-vl train` with these options."""
    words = ["megatron-vl", "train", "--load", str(question.hf_dir), "--train-data-path",
             question.dataset or "DATA", "--save", "RUN"]
    nodes = question.gpus // question.per_node
    words += ["--nnodes", str(nodes)] if nodes > 1 else []
    words += ["--nproc-per-node", str(min(question.gpus, question.per_node))]
    return shlex.join([*words, *flags(run_options(question, choice))])


def script_variables(question: Question, choice: Choice) -> str:
    """What the positional launcher scripts call these options."""
    plan, layout = choice.plan, choice.plan.layout
    batch, options = plan.config.batch, run_options(question, choice)
    recompute = {None: "false", "selective": "sel", "full": "full"}[
        options.get("recompute_granularity")]
    values = {
        "BATCH_SIZE": batch.micro_batch_size, "GLOBAL_BATCH_SIZE": batch.global_batch_size,
        "SEQ_LEN": batch.seq_length, "PAD_LEN": plan.row_length, "PR": "bf16",
        "TP": layout.tp, "PP": layout.pp, "CP": layout.cp,
        "SP": str(layout.sequence_parallel).lower(), "DO": "true", "AC": recompute,
        "MP_PACKING_BUFFER": plan.config.data.packing_buffer_size,
    }
    values |= {name: value for name, value, usual in (
        ("MP_VP", layout.vp, 1), ("MP_EP", layout.ep, 1), ("MP_ETP", layout.etp, None),
    ) if value != usual}
    named = {"micro_batch_size", "global_batch_size", "seq_length", "bf16",
             "tensor_model_parallel_size", "pipeline_model_parallel_size",
             "context_parallel_size", "sequence_parallel", "recompute_granularity",
             "num_virtual_stages_per_pipeline_rank", "expert_model_parallel_size",
             "expert_tensor_parallel_size"}
    more = flags({name: value for name, value in options.items() if name not in named})
    values |= {"MP_EXTRA": " ".join(more)} if more else {}  # which is split at blanks
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


def flags(options: dict[str, object]) -> list[str]:
    """Options as words of the command line."""
    words = []
    for name, value in options.items():
        flag = flags_of(name)[0]
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            several = isinstance(value, (list, tuple))
            words += [flag, *map(str, value if several else [value])]
    return words
