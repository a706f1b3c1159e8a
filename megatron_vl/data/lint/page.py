"""The report as one HTML page that needs nothing beside it: no script, no other file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.data.encode.media import thumbnail
from megatron_vl.data.lint.look import Look, Looker
from megatron_vl.data.lint.mask import ShownPiece, pieces
from megatron_vl.data.lint.tables import Table, count, headline, notes, tables
from megatron_vl.models.media import BadMedia
from megatron_vl.pages import escape, page, picture, table

_LISTED = 20  # refused samples that are listed, of each reason
_RANDOM = 3  # samples shown beside those that are shown for what they are
_LONGEST = 20_000  # characters of one stretch of text that are shown

_STYLE = """tr.marked td { font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr));
  gap: 1em; }
figure { margin: 0; }
figure img { width: 100%; border: 1px solid #ddd; }
figcaption { font-size: .9em; color: #555; }
.sample { border: 1px solid #ccc; border-radius: 4px; margin: .4em 0 1.6em; padding: .7em 1em;
  max-height: 30em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .95em; line-height: 1.75; }
.sample span { unicode-bidi: isolate; }
.trained { background: #c7ecc9; box-shadow: 0 1px 0 #31a354; }
.special { color: #999; font-size: .82em; }
.trained.special { color: #4f7a52; }
.newline { color: #bbb; font-size: .8em; }
.trained .newline { color: #4f7a52; }
.chip { display: inline-block; vertical-align: middle; margin: .15em .2em; padding: .25em .5em;
  border-radius: 4px; background: #e6e9f5; color: #333; font-size: .8em; line-height: 1.3;
  text-align: center; white-space: normal; }
.chip img { display: block; margin: 0 auto .2em; max-width: 112px; max-height: 112px; }
.name { color: #555; font-size: .9em; overflow-wrap: anywhere; }
"""


def write_page(
    path: Path, numbers: dict, looks: Sequence[Look], looker: Looker, captions: dict[str, str],
    *, seed: int,
) -> None:
    """Write the page to `path`; the pictures of `captions` lie beside it and are copied in."""
    title = f"lint of {', '.join(Path(one['path']).name for one in numbers['datasets'])}"
    parts = [f"<p><b>{escape(headline(numbers))}</b></p>\n<ul>\n"]
    parts += [f"<li>{escape(note)}</li>\n" for note in notes(numbers)]
    parts.append("</ul>\n")
    parts += map(_table, tables(numbers))
    if captions:
        parts.append("<h2>pictures</h2>\n<div class=plots>\n")
        for name, caption in captions.items():
            image = picture((path.parent / name).read_bytes(), caption)
            parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>\n")
        parts.append("</div>\n")
    shown = choose(looks, seed=seed)
    if shown:
        parts.append("<h2>samples, and what of them is trained</h2>\n<p>")
        parts.append('<span class="trained">trained</span>, not trained, ')
        parts.append('<span class="special">the tokenizer\'s own marks</span>; of an image its ')
        parts.append("rows x columns of patches, of a video time x rows x columns</p>\n")
    parts += [_sample(look, why, looker) for look, why in shown]
    parts += _refused(numbers["refused"])
    path.write_text(page(title, parts, style=_STYLE), encoding="utf-8")


def choose(looks: Sequence[Look], *, seed: int) -> list[tuple[Look, str]]:
    """Samples worth seeing, each once, with what they are shown for."""
    known = sorted((look for look in looks if look.tokens), key=lambda look: look.tokens)
    if not known:
        return []

    def first(which) -> Look | None:
        """The one in the middle of those that are so: neither end is typical."""
        found = [look for look in known if which(look)]
        return found[len(found) // 2] if found else None

    chosen: dict[int, tuple[Look, list[str]]] = {}
    for why, look in (
        ("the shortest", known[0]), ("the longest", known[-1]),
        ("of median length", known[len(known) // 2]),
        ("with a video", first(lambda look: look.kind == "video")),
        ("of several images", first(lambda look: look.count("image") > 1)),
        ("of several turns", first(lambda look: look.answers > 1)),
        ("text only", first(lambda look: look.kind == "text")),
    ):  # fmt: skip
        if look is not None:
            chosen.setdefault(id(look), (look, []))[1].append(why)
    others = [look for look in known if id(look) not in chosen]
    more = random.Random(seed).sample(others, min(len(others), _RANDOM))
    return [
        *((look, ", ".join(whys)) for look, whys in chosen.values()),
        *((look, "at random") for look in more),
    ]


def _sample(look: Look, why: str, looker: Looker) -> str:
    encoded = looker.encode(look)
    model = looker.encoder.model
    places = model.places(encoded.grids)
    parts = []
    for piece in pieces(encoded.tokens, encoded.labels, chat=model.chat,
                        media_tokens=places):
        if piece.media is None:
            parts.append(_stretch(piece))
        else:
            number = piece.media
            grid = encoded.grids[number]
            parts.append(_chip(encoded.media[number], grid, places[number], encoded.read))
    refused = f"; refused: {look.reason}" if look.reason else ""
    about = (
        f"{look.name}: {count(look.tokens)} tokens, {count(look.trained)} of them trained, "
        f"{count(look.patches)} patches{refused}"
    )
    return (
        f"<div><b>{escape(why)}</b> <span class=name>{escape(about)}</span></div>\n"
        f"<div class=sample dir=auto>{''.join(parts)}</div>\n"
    )


def _stretch(piece: ShownPiece) -> str:
    text = piece.text[:_LONGEST]
    more = len(piece.text) - len(text)
    text = escape(text).replace("\n", "<span class=newline>↵</span>\n")
    if more:
        text += f"<span class=special> … and {count(more)} characters</span>"
    names = [name for name in ("trained", "special") if getattr(piece, name)]
    return f'<span class="{" ".join(names)}">{text}</span>'


def _chip(media, grid: tuple[int, int, int], places: int, read) -> str:
    """An image or video in the text: its picture, its patches, its tokens."""
    frames, rows, columns = grid
    name = f"{media.kind} {f'{frames}x' if media.kind == 'video' else ''}{rows}x{columns}"
    try:
        image = picture(thumbnail(media, read), name)
    except BadMedia as error:
        image = f"<b>{escape(str(error))}</b><br>"
    size = f"{media.width}x{media.height} pixels"
    if media.kind == "video":
        size += f", {count(media.num_frames)} frames"
    return (
        f'<span class=chip title="{escape(size)}">{image}{escape(name)}<br>'
        f"{count(places)} token{'s' if places != 1 else ''}</span>"
    )


def _refused(refused: dict[str, dict]) -> list[str]:
    parts = []
    for reason, of in refused.items():
        named = of["samples"][:_LISTED]
        more = of["count"] - len(named)
        parts.append(f"<h2>refused: {escape(reason)}</h2>\n<ul>\n")
        parts += [f"<li><b>{escape(one['sample'])}</b> {escape(one['message'])}</li>\n"
                  for one in named]
        parts.append(f"<li>and {count(more)} more</li>\n</ul>\n" if more else "</ul>\n")
    return parts


def _table(one: Table) -> str:
    marked = () if one.marked is None else (one.marked,)
    return f"<h2>{escape(one.title)}</h2>\n" + table(
        one.rows, header=one.header, marked=marked, numeric=one.numeric
    )
