"""A step's and a validation's numbers, a log of them, and a tracker that keeps what it got."""

from megatron_vl.data.encode.previews import Preview
from megatron_vl.training.reporting.metrics import MetricLog, StepMetrics
from megatron_vl.training.reporting.validation import Answer, Figures, Validation

STEP = StepMetrics(
    iteration=1, loss=3.0, lr=1e-3, grad_norm=1.0, step_seconds=0.5, data_wait_seconds=0.05, rows=4,
    positions=1200, tokens=1000, trained_tokens=100, samples=20, images=30, vision_flops=1e12,
    llm_flops=3e12, memory_bytes=2**30, skipped=False,
)

VALIDATION = Validation(
    figures=Figures(loss=2.5, token_accuracy=0.75, exact_accuracy=0.5, samples=4),
    datasets={
        "a": Figures(loss=2.0, token_accuracy=0.5, exact_accuracy=0.25, samples=3),
        "b": Figures(loss=3.0, token_accuracy=1.0, exact_accuracy=1.0, samples=1),
    },
    answers=[Answer(
        preview=Preview(name="x", dataset="a", question="What?", pictures=(b"\xff\xd8",)),
        expected="red", answer="blue", exact=False,
    )],
    trained=50, seconds=1.0,
)


def log(**changes) -> MetricLog:
    return MetricLog(2, **{"jsonl": None, "tensorboard_dir": None, **changes})


def line(log: MetricLog, step: StepMetrics = STEP) -> str:
    return log.line(step)


class Kept:
    """A tracker that keeps what it got."""

    def __init__(self):
        self.got = []

    def log(self, values, iteration):
        self.got.append((iteration, values))

    def close(self):
        self.got.append("closed")
