"""A plan as one HTML page that needs nothing beside it."""

from __future__ import annotations

from megatron_vl.pages import escape, page, table
from megatron_vl.planner.answer import WARNING, choice_rows, head_lines, stage_rows, yaml_text
from megatron_vl.planner.commands import command, script_variables
from megatron_vl.planner.drawings import STYLE, memory, scatter, timeline
from megatron_vl.planner.search import Found, Question

_STYLE = STYLE + """pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8;
  padding: .7em 1em; font-size: .85em; }
.legend { margin: .2em 0 1em; font-size: .85em; color: #444; }
.legend span { margin-right: 1.4em; white-space: nowrap; }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em;
  vertical-align: -.1em; border-radius: 2px; }
.small { color: #555; font-size: .9em; }
"""


def page_text(question: Question, found: Found) -> str:
    """Of a search that found something."""
    first = found.best[0]
    title, *lines = head_lines(question, found)
    header, *rows = choice_rows(question, found.best)
    stages_header, *stages = stage_rows(first)
    said = escape("\n".join(lines))
    parts = [
        f"<pre>{said}</pre>\n",
        f"<p class=small>{escape(WARNING)}</p>\n",
        "<h2>the fastest</h2>\n",
        table(rows, header=header, marked=[0], numeric=_numeric(header, "layout", "recompute")),
        scatter(found.best) if len(found.best) > 1 else "",
        f"<h2>a step of the first: {escape(first.plan.layout)}</h2>\n",
        f"<p>{first.step.seconds:.2f} s, {first.plan.num_microbatches} microbatches"
        f"{_chunks(first)}.</p>\n",
        timeline(first),
        "<h2>its memory, by stage</h2>\n",
        memory(first, question.card),
        "<h2>its stages</h2>\n",
        table(stages, header=stages_header, numeric=_numeric(stages_header, stages_header[0])),
        "<h2>run it</h2>\n",
        f"<pre>{escape(command(question, first))}</pre>\n",
        "<p>In the launcher scripts, these variables:</p>\n",
        f"<pre>{escape(script_variables(question, first))}</pre>\n",
        "<p>As a file for <code>megatron-vl train --config</code>:</p>\n",
        f"<pre>{escape(yaml_text(question, first))}</pre>\n",
    ]
    return page(title, parts, style=_STYLE)


def _chunks(choice) -> str:
    chunks = choice.plan.layout.vp
    return f", each through {chunks} chunks of every stage" if chunks > 1 else ""


def _numeric(header: tuple[str, ...], *words: str) -> list[bool]:
    return [name not in words for name in header]
