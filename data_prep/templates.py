"""The prompt templates that turn a history into text, and the choice of one by a config.

reads: nothing. writes: nothing. A template is data (see `cprec.template.Template`); an entry in TEMPLATES and its name
in `data_prep.records.TEMPLATE_NAMES` make a new one. `Red lamp` by `Acme` in the shop `home`, then `Oak desk`, become

    cprec       Items that one person chose, in order of time:⏎Red lamp⏎Oak desk⏎
    compact     Items that one person chose, in order of time: Red lamp; Oak desk;
    domains     Items that one person chose, in order of time, each with its shop:⏎[home] Red lamp⏎[home] Oak desk⏎
    attributes  Items that one person chose, in order of time:⏎Red lamp | Acme⏎Oak desk⏎
    supervised  Items that one person chose, in order of time:⏎Red lamp⏎Chosen next:⏎Oak desk⏎   (loss on `Oak desk⏎`)
"""

from __future__ import annotations

from cprec.template import Template

_LEAD_IN = "Items that one person chose, in order of time"

TEMPLATES: dict[str, Template] = {
    t.name: t for t in (
        Template(name="cprec", lead_in=f"{_LEAD_IN}:\n", item="{title}\n"),
        Template(name="compact", lead_in=f"{_LEAD_IN}:", item=" {title};"),
        Template(name="domains", lead_in=f"{_LEAD_IN}, each with its shop:\n", item="[{domain}] {title}\n"),
        Template(name="attributes", lead_in=f"{_LEAD_IN}:\n", item="{title}{ | brand}{ | category}\n"),
        Template(name="supervised", lead_in=f"{_LEAD_IN}:\n", item="{title}\n", before_target="Chosen next:\n"),
    )
}


def template_of(setting: str | Template) -> Template:
    """The template that a config names, or its own."""
    return TEMPLATES[setting] if isinstance(setting, str) else setting
