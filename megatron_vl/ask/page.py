"""The worst answers as a page: what was shown, asked, expected and given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vl.ask.record import Answered
from megatron_vl.ask.samples import Dataset
from megatron_vl.ask.scores import Score, refusals
from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.encode.media import thumbnail
from megatron_vl.models.media import BadMedia
from megatron_vl.pages import escape, page, picture, table

_WORST = 50  # that are shown
_STYLE = """dt { font-weight: 600; } dd { margin: 0 0 .3em 1em; white-space: pre-wrap; }
.one { border-top: 1px solid #ddd; padding: .8em 0; } .one img { margin: 0 .4em .4em 0; }
"""


def write_page(
    path: Path, title: str, found: Sequence[Score], answered: Sequence[Answered],
    datasets: Sequence[Dataset], *, metric: str,
) -> None:
    """Write the page of `answered`, which `found` are the scores of."""
    wrong = sorted((one for one in answered if one.refused is None and one.score < 1),
                   key=lambda one: one.score)
    rows = [(one.name, f"{one.count:,}", f"{one.mean:.3f}", f"{one.of_commonest:.3f}",
             one.commonest) for one in found]
    header = ("questions", "number", metric, "always the commonest answer", "which is")
    parts = [table(rows, header=header, numeric=(False, True, True, True, False))]
    parts += [f"<p>{escape(line)}</p>\n" for line in refusals(answered)]
    parts.append(f"<h2>the worst {min(_WORST, len(wrong))} of {len(wrong):,} answers that are not "
                 f"right</h2>\n")
    by_name = {one.name: one for one in datasets}
    parts += [_one(one, by_name[one.dataset]) for one in wrong[:_WORST]]
    path.write_text(page(title, parts, style=_STYLE), encoding="utf-8", errors="backslashreplace")


def _one(one: Answered, dataset: Dataset) -> str:
    said = (("asked", one.question), ("expected", one.expected),
            ("given" if one.is_whole else "given, cut off", one.answer))
    listed = "".join(f"<dt>{escape(what)}</dt><dd>{escape(text)}</dd>" for what, text in said)
    where = f"{one.sample} of {one.dataset}, turn {one.turn + 1}: {one.score:.3f}"
    return (f"<div class=one>{''.join(_pictures(one, dataset))}"
            f"<div>{escape(where)}</div><dl>{listed}</dl></div>\n")


def _pictures(one: Answered, dataset: Dataset) -> list[str]:
    try:
        sample = dataset.sample(one.number)
        return [picture(thumbnail(media, sample.read), media.kind) for media in sample.media]
    except (BadEntry, BadMedia) as error:  # it was there when it was asked about
        return [f"<p>{escape(error)}</p>"]
