"""What a run was told and what it ran on, beside its checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import yaml

import megatron_vl
from megatron_vl.training.checkpoint.same_model import BEGINNING, Beginning
from megatron_vl.training.plan import Plan
from megatron_vl.training.resilience.preflight import versions
from megatron_vl.weights.found import weights_mark

OPTIONS = "train_options.yaml"


def facts_of(plan: Plan, **more) -> dict:
    """What a metrics file begins a run with: enough for a page about it, wherever it is read."""
    return {
        "options": plan.config.resolved(),
        "versions": versions() | {"megatron_vl": megatron_vl.__version__},
        "model_type": plan.spec.model_type,
        "tied": plan.spec.decoder.tie_word_embeddings,
        "layout": asdict(plan.layout),
        "split": plan.split.to_dict(),
        "experts": None if plan.spec.decoder.experts is None else plan.spec.decoder.experts.count,
        **more,
    }


def write_options(plan: Plan, platform_name: str) -> None:
    """SAVE/train_options.yaml: every resolved option, for `--config`, and the versions as comments.

    One rank calls it; without a SAVE nothing is written. A resumed run replaces it, each checkpoint
    keeps its own.
    """
    if plan.config.checkpoint.save is None:
        return
    known = versions() | {"megatron_vl": megatron_vl.__version__}
    words = ", ".join(f"{name} {version}" for name, version in known.items())
    _write(
        Path(plan.config.checkpoint.save) / OPTIONS,
        f"# {words}\n# {plan.layout} on {platform_name}: {plan.split}\n"
        + yaml.safe_dump(plan.config.to_dict(), sort_keys=False),
    )


def write_beginning(plan: Plan) -> None:
    """SAVE/began_with.json: which weights a new run begins with; see `check_same_model`.

    One rank calls it; without a SAVE, or with random weights, nothing is written.
    """
    save, load = plan.config.checkpoint.save, plan.config.checkpoint.load
    if save is not None and load is not None:
        began = Beginning(load=os.path.abspath(load), weights=weights_mark(Path(load)))
        _write(Path(save) / BEGINNING, json.dumps(began.model_dump(), indent=1))


def _write(path: Path, text: str) -> None:
    """That it cannot be written, as on a full disk, is said and ends nothing."""
    pending = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pending.write_text(text, encoding="utf-8")
        os.replace(pending, path)
    except OSError as error:
        print(f"warning: {path} was not written: {error}", flush=True)
        with contextlib.suppress(OSError):
            pending.unlink(missing_ok=True)
