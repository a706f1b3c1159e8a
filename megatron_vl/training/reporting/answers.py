"""What the model says to the same few validation samples, from the first validation to the last."""

from __future__ import annotations

import base64

from megatron_vl.pages import escape, picture, table

_COLUMNS = 4  # validations whose answers stand side by side

ANSWERS_STYLE = """.answers td { max-width: 16em; white-space: pre-wrap; }
.answers img { width: auto; max-width: 112px; margin: 0 .2em .2em 0; }
.right { background: #e3f4e8; } .wrong { background: #fbe9e7; }
"""


def answers(validations: list[dict]) -> list[str]:
    """HTML of the figures of each dataset, and of the samples' answers; none of older runs."""
    if not validations:
        return []
    parts, last = [], validations[-1]
    if datasets := last.get("datasets"):
        rows = [(name, f"{one['samples']:,}", f"{one['validation_loss']:.4f}",
                 f"{one['token_accuracy']:.1%}", f"{one['exact_accuracy']:.1%}")
                for name, one in datasets.items()]
        header = ("dataset", "samples", "loss", "token accuracy", "exact answers")
        parts += [f"<h2>validation at iteration {last['iteration']:,}</h2>\n",
                  table(rows, header=header, numeric=(False, *[True] * 4))]
    having = [one for one in validations if one.get("answers")]
    if not having:
        return parts
    asked = {answer["sample"]: answer for one in having for answer in one["answers"]
             if "question" in answer}
    columns = _spread(having)
    header = ["", "question", "expected", *(f"iteration {one['iteration']:,}" for one in columns)]
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    said = [{answer["sample"]: answer for answer in one["answers"]} for one in columns]
    body = "".join(
        _row(asked[name], [one.get(name) for one in said])
        for name in said[-1] if name in asked
    )
    return [
        *parts, "<h2>validation samples</h2>\n<p class=small>The likeliest token at every "
        "position of an answer, behind the true tokens before it. ✓: all are right, so that greedy "
        "decoding gives the expected answer.</p>\n",
        f"<div class=wide><table class=answers>\n<tr>{head}</tr>\n{body}</table></div>\n",
    ]


def _spread(validations: list[dict]) -> list[dict]:
    """The first, the last, and some evenly between them."""
    if len(validations) <= _COLUMNS:
        return validations
    last = len(validations) - 1
    return [validations[last * at // (_COLUMNS - 1)] for at in range(_COLUMNS)]


def _row(asked: dict, said: list[dict | None]) -> str:
    pictures = "".join(
        picture(base64.b64decode(data), asked["sample"], kind="jpeg") for data in asked["pictures"]
    )
    if asked["other_media"]:
        pictures += f"<br>and {asked['other_media']:,} more"
    cells = [f"<td>{pictures}</td>", f"<td>{escape(asked['question'])}</td>",
             f"<td>{escape(asked['expected'])}</td>"]
    for one in said:
        if one is None:  # not read in that validation
            cells.append("<td>-</td>")
        else:
            css, mark = ("right", "✓") if one["exact"] else ("wrong", "✗")
            cells.append(f"<td class={css}>{mark} {escape(one['answer'])}</td>")
    return f"<tr>{''.join(cells)}</tr>\n"
