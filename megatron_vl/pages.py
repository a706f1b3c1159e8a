"""HTML pages that need nothing beside them: no script, no other file.

What they show is often another's. It is escaped; and should any of it ever pass for markup, the
browser loads and runs nothing.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Iterable, Sequence

from megatron_vl.errors import printable

_PAGE = """<!DOCTYPE html>
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
th, td {{ padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd;
  vertical-align: top; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; background: #f4f6f8; }}
.number {{ text-align: right; overflow-wrap: normal; }}
tr.marked td {{ background: #e6f0fa; }}
.wide {{ overflow-x: auto; }}
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}</body>
</html>
"""


def page(title: str, parts: Iterable[str], *, style: str = "") -> str:
    """A whole page.

    Args:
        parts: its HTML, made by the functions below.
        style: CSS beyond what every page has.
    """
    return _PAGE.format(title=escape(title), body="".join(parts), style=style)


def table(
    rows: Iterable[Sequence[object]], *, header: Sequence[object] = (),
    marked: Collection[int] = (), numeric: Sequence[bool] = (),
) -> str:
    """Cells as text.

    Args:
        marked: numbers of the rows that stand out.
        numeric: of each column, whether it holds numbers; without, none does.
    """

    def row(cells: Sequence[object], tag: str, css: str = "") -> str:
        right = numeric or [False] * len(cells)
        inner = "".join(
            f"<{tag}{' class=number' if number else ''}>{escape(cell)}</{tag}>"
            for cell, number in zip(cells, right, strict=True)
        )
        return f"<tr{css}>{inner}</tr>\n"

    head = row(header, "th") if header else ""
    body = "".join(row(cells, "td", " class=marked" if number in marked else "")
                   for number, cells in enumerate(rows))
    return f"<div class=wide><table>\n{head}{body}</table></div>\n"


def picture(data: bytes, what: str, *, kind: str = "png", css: str = "") -> str:
    """A picture inside the page; `what` is said where it cannot be seen.

    Args:
        kind: of the file, png or jpeg.
        css: the class of its looks.
    """
    data = base64.b64encode(data).decode("ascii")
    looks = f'class="{escape(css)}" ' if css else ""
    return f'<img {looks}alt="{escape(what)}" src="data:image/{kind};base64,{data}">'


def escape(anyones: object) -> str:
    """Anyone's text as HTML shows it and never obeys it."""
    return html.escape(printable(str(anyones)), quote=True)
