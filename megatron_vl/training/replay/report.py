"""A replayed step as text, and as a page with the worst samples' pictures and words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.encode.media import thumbnail
from megatron_vl.data.encode.previews import text_of
from megatron_vl.data.encode.samples import ConversationSample
from megatron_vl.data.lint.named import samples_named
from megatron_vl.models.media import BadMedia
from megatron_vl.outputs import replacing_file
from megatron_vl.pages import escape, page, picture
from megatron_vl.training.paths import mixtures
from megatron_vl.training.replay.replayed import Replayed, badness
from megatron_vl.training.replay.source import Replay

_SHOWN = 12  # samples of a page, outputs of modules
_STYLE = """pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.one { border-top: 1px solid #ddd; padding: .8em 0; } .one img { margin: 0 .4em .4em 0; }
dt { font-weight: 600; } dd { margin: 0 0 .3em 1em; white-space: pre-wrap; }
"""


def lines(replay: Replay, found: Replayed) -> list[str]:
    """The report, a line each."""
    what = "row" if replay.plan.config.batch.micro_batch_size == 1 else "microbatch"
    said = [
        f"step {replay.step} of {replay.run}, from its checkpoint of iteration "
        f"{replay.checkpoint.iteration}, on {replay.plan.layout} (the run: {replay.layout})",
        _beside("loss", found.loss, replay), _beside("grad_norm", found.grad_norm, replay),
    ]
    dropout = replay.plan.config.lora.lora_dropout
    drawn_anew = replay.checkpoint.args.get("no_save_rng") or replay.plan.layout != replay.layout
    if dropout and drawn_anew:
        said.append(f"lora-dropout {dropout} drew other numbers here than in the run")
    if found.fault:
        said.append(f"not updated: {found.fault}")
    if found.not_finite is not None:
        first, (replica, number) = found.not_finite
        said.append(f"first output that is not finite: {first.module}, {first.count:,} of "
                    f"{first.size:,} numbers, in {what} {number} of data-parallel rank {replica}")
    said += ["", "gradient norm by layer, those that are not finite first:"]
    bad = sorted(found.layers.items(), key=lambda one: math.isfinite(one[1]))
    said += [f"  {norm:<14.6g} {name}" for name, norm in bad]
    said += ["", "largest finite outputs of modules:"]
    largest = sorted(found.largest.items(), key=lambda one: -one[1])[:_SHOWN]
    said += [f"  {value:<14.6g} {name}" for name, value in largest]
    rank = "" if replay.replica is None else f" of data-parallel rank {replay.replica}"
    said += ["", f"{what}s{rank}, the worst first:"]
    for row in sorted(found.rows, key=lambda one: badness(one.loss), reverse=True):
        place = f"{what} {row.number} of data-parallel rank {row.replica}"
        said.append(f"  {place}: loss {row.loss:.6g}")
        samples = sorted(row.samples, key=lambda one: badness(one.loss), reverse=True)
        said += [f"    {one.loss:<14.6g} {one.name}" for one in samples]
    said += [f"left out: {told}" for told in found.left_out]
    return said


def write_page(path: Path, replay: Replay, found: Replayed, text: list[str]) -> None:
    """Write the report with what the worst samples say and show."""
    worst = found.worst[:_SHOWN]
    train, _ = mixtures(replay.plan.config)
    samples = samples_named(train, "train", {one.name for one in worst})
    parts = [f"<pre>{escape(chr(10).join(text))}</pre>\n", "<h2>the worst samples</h2>\n"]
    for one in worst:
        parts.append(f"<div class=one><div>{escape(one.name)}: loss {one.loss:.6g}</div>\n")
        parts += _shown(samples[one.name])
        parts.append("</div>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as file:
        file.write_text(page(f"step {replay.step} of {replay.run}", parts, style=_STYLE),
                        encoding="utf-8", errors="backslashreplace")


def _beside(name: str, value: float | None, replay: Replay) -> str:
    """A number of the step and the one that the run had."""
    here = "none, for the loss scale was too large" if value is None else f"{value:.9g}"
    if replay.recorded is None:
        return f"{name:<10} {here} (the run's metrics do not say)"
    was = replay.recorded[name]
    same = was == value or (value is not None and math.isnan(was) and not math.isfinite(value))
    return f"{name:<10} {here} (the run: {was:.9g}{', equal' if same else ''})"


def _shown(sample: ConversationSample) -> Iterator[str]:
    for media in sample.media:
        try:
            yield picture(thumbnail(media, sample.read), media.kind)
        except (BadEntry, BadMedia) as error:
            yield f"<p>{escape(error)}</p>"
    said = "".join(f"<dt>{escape(turn.role)}</dt><dd>{escape(text_of(turn))}</dd>"
                   for turn in sample.turns)
    yield f"<dl>{said}</dl>\n"
