"""The prompt templates that turn a history into text.

reads: nothing. writes: nothing. Every segment ends in a newline, so that no tokenizer merges across a border; the
encoder proves it for the tokenizer at hand.
"""

from __future__ import annotations

from cprec.format import Template

TEMPLATES: dict[str, Template] = {
    t.name: t for t in (
        Template(name="cprec", version=1, lead_in="Items that one person chose, in order of time:\n",
                 item_line="{title}\n"),
    )
}
