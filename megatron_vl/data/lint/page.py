"""The report as one HTML page that needs nothing beside it: no script, no other file."""

from __future__ import annotations

import base64
import html
import random
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.data.lint.look import Look, Looker
from megatron_vl.data.lint.mask import Piece, pieces, thumbnail
from megatron_vl.data.lint.tables import Table, count, headline, notes, plain, tables
from megatron_vl.data.media import BadMedia

_LISTED = 20  # refused samples that are listed, of each reason
_RANDOM = 3  # samples shown beside those that are shown for what they are
_LONGEST = 20_000  # characters of one stretch of text that are shown

# The text is another's: should any of it ever pass for markup, the browser loads and runs nothing.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
  "Microsoft YaHei", sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff; }}
h1 {{ font-size: 1.5em; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15em; margin: 2em 0 .4em; }}
table {{ border-collapse: collapse; font-size: .9em; }}
th, td {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd;
  vertical-align: top; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; background: #f4f6f8; }}
.words {{ text-align: left; overflow-wrap: anywhere; }}
tr.marked td {{ background: #e6f0fa; font-weight: 600; }}
.wide {{ overflow-x: auto; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr));
  gap: 1em; }}
figure {{ margin: 0; }}
figure img {{ width: 100%; border: 1px solid #ddd; }}
figcaption {{ font-size: .9em; color: #555; }}
.sample {{ border: 1px solid #ccc; border-radius: 4px; margin: .4em 0 1.6em; padding: .7em 1em;
  max-height: 30em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .95em; line-height: 1.75; }}
.sample span {{ unicode-bidi: isolate; }}
.trained {{ background: #c7ecc9; box-shadow: 0 1px 0 #31a354; }}
.special {{ color: #999; font-size: .82em; }}
.trained.special {{ color: #4f7a52; }}
.newline {{ color: #bbb; font-size: .8em; }}
.trained .newline {{ color: #4f7a52; }}
.chip {{ display: inline-block; vertical-align: middle; margin: .15em .2em; padding: .25em .5em;
  border-radius: 4px; background: #e6e9f5; color: #333; font-size: .8em; line-height: 1.3;
  text-align: center; white-space: normal; }}
.chip img {{ display: block; margin: 0 auto .2em; max-width: 112px; max-height: 112px; }}
.name {{ color: #555; font-size: .9em; overflow-wrap: anywhere; }}
</style>
</head>
<body>
"""


def write_page(
    path: Path, numbers: dict, looks: Sequence[Look], looker: Looker, captions: dict[str, str],
    *, seed: int,
) -> None:
    """Write the page to `path`; the pictures of `captions` lie beside it and are copied in."""
    title = f"lint of {', '.join(Path(one['path']).name for one in numbers['datasets'])}"
    parts = [_HEAD.format(title=_text(title)), f"<h1>{_text(title)}</h1>\n",
             f"<p><b>{_text(headline(numbers))}</b></p>\n<ul>\n"]
    parts += [f"<li>{_text(note)}</li>\n" for note in notes(numbers)]
    parts.append("</ul>\n")
    parts += map(_table, tables(numbers))
    if captions:
        parts.append("<h2>pictures</h2>\n<div class=plots>\n")
        for name, caption in captions.items():
            picture = _picture((path.parent / name).read_bytes(), caption)
            parts.append(f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>\n")
        parts.append("</div>\n")
    shown = choose(looks, seed=seed)
    if shown:
        parts.append("<h2>samples, and what of them is trained</h2>\n<p>")
        parts.append('<span class="trained">trained</span>, not trained, ')
        parts.append('<span class="special">the tokenizer\'s own marks</span>; of an image its ')
        parts.append("rows x columns of patches, of a video time x rows x columns</p>\n")
    parts += [_sample(look, why, looker) for look, why in shown]
    parts += _refused(numbers["refused"])
    parts.append("</body>\n</html>\n")
    path.write_text("".join(parts), encoding="utf-8")


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
    media = looker.encoder.media
    grids = [tuple(grid) for grid in encoded.grids.tolist()]
    places = [media.num_tokens(grid) for grid in grids]
    parts = []
    for piece in pieces(encoded.tokens, encoded.labels, chat=looker.encoder.chat,
                        media_tokens=places):
        if piece.media is None:
            parts.append(_stretch(piece))
        else:
            number = piece.media
            parts.append(_chip(encoded.media[number], grids[number], places[number], encoded.read))
    refused = f"; refused: {look.reason}" if look.reason else ""
    about = (
        f"{look.name}: {count(look.tokens)} tokens, {count(look.trained)} of them trained, "
        f"{count(look.patches)} patches{refused}"
    )
    return (
        f"<div><b>{_text(why)}</b> <span class=name>{_text(about)}</span></div>\n"
        f"<div class=sample dir=auto>{''.join(parts)}</div>\n"
    )


def _stretch(piece: Piece) -> str:
    text = piece.text[:_LONGEST]
    more = len(piece.text) - len(text)
    text = _text(text).replace("\n", "<span class=newline>↵</span>\n")
    if more:
        text += f"<span class=special> … and {count(more)} characters</span>"
    names = [name for name in ("trained", "special") if getattr(piece, name)]
    return f'<span class="{" ".join(names)}">{text}</span>'


def _chip(media, grid: tuple[int, int, int], places: int, read) -> str:
    """An image or video in the text: its picture, its patches, its tokens."""
    frames, rows, columns = grid
    name = f"{media.kind} {f'{frames}x' if media.kind == 'video' else ''}{rows}x{columns}"
    try:
        picture = _picture(thumbnail(media, read), name)
    except BadMedia as error:
        picture = f"<b>{_text(str(error))}</b><br>"
    size = f"{media.width}x{media.height} pixels"
    if media.kind == "video":
        size += f", {count(media.num_frames)} frames"
    return (
        f'<span class=chip title="{_text(size)}">{picture}{_text(name)}<br>'
        f"{count(places)} token{'s' if places != 1 else ''}</span>"
    )


def _refused(refused: dict[str, dict]) -> list[str]:
    parts = []
    for reason, of in refused.items():
        named = of["samples"][:_LISTED]
        more = of["count"] - len(named)
        parts.append(f"<h2>refused: {_text(reason)}</h2>\n<ul>\n")
        parts += [f"<li><b>{_text(one['sample'])}</b> {_text(one['message'])}</li>\n"
                  for one in named]
        parts.append(f"<li>and {count(more)} more</li>\n</ul>\n" if more else "</ul>\n")
    return parts


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str, marked: bool) -> str:
        inner = "".join(
            f"<{tag}{'' if right else ' class=words'}>{_text(cell)}</{tag}>"
            for cell, right in zip(cells, table.numeric, strict=True)
        )
        return f"<tr{' class=marked' if marked else ''}>{inner}</tr>\n"

    rows = "".join(row(cells, "td", i == table.marked) for i, cells in enumerate(table.rows))
    return (
        f"<h2>{_text(table.title)}</h2>\n<div class=wide><table>\n"
        f"{row(table.header, 'th', False)}{rows}</table></div>\n"
    )


def _picture(png: bytes, what: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{_text(what)}" src="data:image/png;base64,{data}">'


def _text(text: str) -> str:
    """Anyone's text as HTML shows it and never obeys it."""
    return html.escape(plain(text), quote=True)
