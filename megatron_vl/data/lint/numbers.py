"""All that was found, as plain numbers: what `lint.json` holds and the tables are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_vl.data.dataset_dir import check_dataset, split_shards, splits
from megatron_vl.data.lint.forecast import Forecaster, least_length, lengths_around
from megatron_vl.data.lint.look import Look
from megatron_vl.data.lint.reading import Leaf
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.raw.prepare import REFUSED
from megatron_vl.data.raw.shards import show_progress
from megatron_vl.errors import InputError
from megatron_vl.inputs import json_value
from megatron_vl.models.media import IMAGE, VIDEO

_LISTED = 1000  # refused samples that are named, of each reason


def summarize(
    leaves: Sequence[Leaf], looks: Sequence[Look], config: DataConfig, *, split: str, seed: int,
    progress: bool,
) -> dict:
    """The report's numbers; those that need a model's tokens are absent where none was given."""
    used = [look for look in looks if look.reason is None]
    known = [look for look in looks if look.tokens is not None]
    readable = [look for look in looks if look.answers]
    numbers = {
        "split": split,
        "seq_length": config.seq_length,
        "max_patches_per_row": config.max_patches_per_row,
        "datasets": [_of_dataset(leaf, [x for x in looks if x.leaf == i])
                     for i, leaf in enumerate(leaves)],
        "looked_at": len(looks),
        "usable": len(used),
        "refused": _refused(looks),
        "kinds": {
            **{f"with {kind}s": sum(look.count(kind) > 0 for look in readable)
               for kind in (IMAGE, VIDEO)},
            "text only": sum(look.kind == "text" for look in readable),
            "of several turns": sum(look.answers > 1 for look in readable),
        },
        "media": {f"{kind}s": sum(look.count(kind) for look in readable)
                  for kind in (IMAGE, VIDEO)},
        "a_sample": {"images": spread([look.count(IMAGE) for look in readable])},
    }
    sizes = [(m.height, m.width) for look in readable for m in look.media]
    numbers["media_height"] = spread([height for height, _ in sizes])
    numbers["media_width"] = spread([width for _, width in sizes])
    if known:
        shown = [look.patches for look in known if look.media]
        numbers["a_sample"] |= {
            "tokens": spread([look.tokens for look in known]),
            "trained tokens": spread([look.trained for look in known]),
            "patches, where there are any": spread(shown),
        }
        tokens = sum(look.tokens for look in known)
        numbers["trained_share"] = sum(look.trained for look in known) / tokens
        forecaster = Forecaster(leaves, looks, endless=split == "train", seed=seed)
        numbers["forecast"] = _forecasts(forecaster, config, least_length(looks), progress)
        numbers["least_seq_length"] = least_length(looks)
    return numbers


def _of_dataset(leaf: Leaf, looks: Sequence[Look]) -> dict:
    return {
        "path": str(leaf.path),
        "splits": {
            name: {"samples": check_dataset(leaf.path, name),
                   "shards": len(split_shards(leaf.path, name))}
            for name in splits(leaf.path)
        },
        "samples": len(leaf.places),
        "share": leaf.share,
        "looked_at": len(looks),
        "usable": sum(look.reason is None for look in looks),
        "refused_by_prepare": _refused_by_prepare(leaf.path / REFUSED),
    }


def _refused_by_prepare(path: Path) -> dict[str, int]:
    """Entries that never became samples, by reason; of another tool's dataset nobody knows."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); see that it may be read.") from error
    reasons: Counter[str] = Counter()
    for line in lines:
        try:
            reasons[str(json_value(line)["reason"])] += 1
        except (ValueError, TypeError, KeyError):
            reasons["(a damaged line)"] += 1
    return dict(reasons.most_common())


def _refused(looks: Sequence[Look]) -> dict[str, dict]:
    """By reason, the most frequent first."""
    by_reason: dict[str, list[Look]] = {}
    for look in looks:
        if look.reason is not None:
            by_reason.setdefault(look.reason, []).append(look)
    return {
        reason: {
            "count": len(found),
            "samples": [{"sample": look.name, "message": look.message}
                        for look in found[:_LISTED]],
        }
        for reason, found in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    }


def _forecasts(
    forecaster: Forecaster, config: DataConfig, least: int, progress: bool
) -> list[dict]:
    """For several row lengths, and for each again with the limit of patches where there is one."""
    limits = dict.fromkeys((None, config.max_patches_per_row))
    asked = [(length, limit) for limit in limits
             for length in sorted({*lengths_around(config.seq_length), least})]
    found = [forecaster.rows(*one)
             for one in show_progress(asked, len(asked), "packing", progress)]
    return [asdict(one) | {"unevenness": one.unevenness} for one in found]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """How values lie; None where there are none."""
    if not values:
        return None
    array = np.asarray(values)
    return {
        "least": int(array.min()), "mean": float(array.mean()), "median": float(np.median(array)),
        "p95": float(np.percentile(array, 95)), "most": int(array.max()), "sum": int(array.sum()),
    }  # fmt: skip
