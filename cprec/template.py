"""How a history becomes text: prompt templates, as preparation encodes them and ranking asks with them.

reads: nothing. writes: nothing. A template is data: it stands in the manifest of what was made with it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from cprec.errors import did_you_mean

ITEM_FIELDS = ("title", "domain", "brand", "category")
_PART = re.compile(rf"\{{([^{{}}]*)\b({'|'.join(ITEM_FIELDS)})\b([^{{}}]*)\}}")


class Template(BaseModel):
    """How a history becomes text: `lead_in`, then one `item` per item, then `tail` and the end-of-sequence token.

    An item's text may hold `{title}`, `{domain}`, `{brand}` and `{category}`. Only the title is always there; what
    else stands between the braces vanishes with an empty field: `{title}{ by brand}` is "Lamp by Ikea" or "Lamp" (the
    last field name between the braces is the field). Fields are put on one line. Two things would not be text to every
    tokenizer and are written otherwise: "▁", which SentencePiece takes for a space, as "_"; and a text that would start
    with "/" gets a "." before it, because the likes of Mistral's tekken join the slash with a line break before it.

    With `before_target` the template is supervised: the text stands before the last item, and only that item, the tail
    and the end-of-sequence token carry loss.

    Wherever two parts meet, the first ends in a line break and the second starts with no white space, or the second
    starts with one space: tokenizers do not merge across such borders. Preparation proves it for the one at hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int = 1
    lead_in: str
    item: str
    before_target: str | None = None
    tail: str = ""

    @field_validator("item")
    @classmethod
    def _holds_known_fields(cls, value: str) -> str:
        odd = re.search(r"\{[^{}]*\}|[{}]", _PART.sub("", value))
        if odd:
            word = re.sub(r"\W", "", odd[0])
            raise ValueError(f"{odd[0]!r} names no field; {did_you_mean(word, ITEM_FIELDS)} (one field name between "
                             f"braces, with text around it that vanishes where the field is empty: '{{ by brand}}')")
        if "title" not in [part[1] for part in _PART.findall(value)]:
            raise ValueError("no {title} in it: items could not be told apart")
        return value

    @model_validator(mode="after")
    def _has_exact_borders(self) -> Template:
        if not self.lead_in:
            raise ValueError("lead_in is empty: the first item would start the text, where tokenizers treat it in "
                             "another way; give at least a line break or a word")
        wrong = [f"{a!r} and {b!r}" for a, b in self._borders() if not _is_exact_border(a, b)]
        if wrong:
            raise ValueError(f"tokenizers merge where these parts of the text meet: {'; '.join(dict.fromkeys(wrong))}; "
                             f"end the first in a line break and start the second with neither white space nor '/', or "
                             f"start the second with one space and end the first without")
        return self

    def _borders(self) -> Iterator[tuple[str, str]]:
        """Every two parts that can meet in a document; "x" stands for the value of a field."""
        items = [self.line({"title": "x"} | dict.fromkeys(there, "x"))
                 for n in range(len(ITEM_FIELDS)) for there in itertools.combinations(ITEM_FIELDS[1:], n)]
        before_items = [self.lead_in, *items]
        if self.before_target:
            yield from ((a, self.before_target) for a in before_items)
            before_items.append(self.before_target)
        yield from itertools.product(before_items, items)
        if self.tail:
            yield from ((a, self.tail) for a in items)

    @property
    def is_supervised(self) -> bool:
        """Whether only the last item and what follows it carry loss."""
        return self.before_target is not None

    @property
    def hash(self) -> str:
        """Sha256 of what decides the text."""
        parts = [self.lead_in, self.item, self.before_target, self.tail]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def any_line(self) -> str:
        """Text of an item of which nothing is known: what stands before another part while that is encoded."""
        return self.line(dict.fromkeys(ITEM_FIELDS, "x"))

    def line(self, fields: Mapping[str, str]) -> str:
        """The item's whole text. Braces inside a field's value stay text: substitution is done once."""
        text = self._filled(fields).replace("▁", "_")
        return f".{text}" if text.startswith("/") else text

    def escapes(self, fields: Mapping[str, str]) -> bool:
        """Whether the item's text holds what is written otherwise."""
        text = self._filled(fields)
        return "▁" in text or text.startswith("/")

    def _filled(self, fields: Mapping[str, str]) -> str:
        def filled(part: re.Match[str]) -> str:
            value = " ".join(fields.get(part[2], "").split())
            return f"{part[1]}{value}{part[3]}" if value else ""

        return _PART.sub(filled, self.item)

    def render(self, lines: Sequence[str]) -> str:
        """A document's whole text but its end-of-sequence token, from its items' texts; of a supervised template
        the last is the target."""
        return "".join([self.lead_in, *lines[:-1], self.before_target or "", *lines[-1:], self.tail])


def _is_exact_border(before: str, after: str) -> bool:
    """Whether no tokenizer's rules that we know join characters of two texts that meet."""
    if after.startswith(" "):
        return not before[-1:].isspace() and after[1:2] != "" and not after[1:2].isspace()
    return before.endswith("\n") and after[:1] != "/" and not after[:1].isspace()
