"""Templates: the text each gives, by hand; what a config may write of its own; what is refused and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shops
from pydantic import ValidationError

from cprec.errors import ConfigError
from cprec.settings import dump_settings, load_settings
from cprec.template import Template
from data_prep.config import PrepConfig
from data_prep.templates import TEMPLATES, template_of

LAMP = {"title": "Red lamp", "domain": "home", "brand": "Acme", "category": "Lights"}
DESK = {"title": "Oak desk", "domain": "home", "brand": "", "category": "Desks"}
MUG = {"title": "Mug", "domain": "kitchen"}
LEAD_IN = "Items that one person chose, in order of time"
GOLDEN = {
    "cprec": f"{LEAD_IN}:\nRed lamp\nOak desk\nMug\n",
    "compact": f"{LEAD_IN}: Red lamp; Oak desk; Mug;",
    "domains": f"{LEAD_IN}, each with its shop:\n[home] Red lamp\n[home] Oak desk\n[kitchen] Mug\n",
    "attributes": f"{LEAD_IN}:\nRed lamp | Acme | Lights\nOak desk | Desks\nMug\n",
    "supervised": f"{LEAD_IN}:\nRed lamp\nOak desk\nChosen next:\nMug\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_history_becomes_the_text_written_by_hand(name: str) -> None:
    template = TEMPLATES[name]
    assert template.render([template.line(item) for item in (LAMP, DESK, MUG)]) == GOLDEN[name]


def test_a_tail_follows_the_last_item() -> None:
    own = Template(name="own", lead_in="Bag:\n", item="{title}\n", before_target="Then:\n", tail="Done\n")
    assert own.render(["a\n", "b\n"]) == "Bag:\na\nThen:\nb\nDone\n"
    assert own.render(["b\n"]) == "Bag:\nThen:\nb\nDone\n"


@pytest.mark.parametrize(("item", "fields", "text"), [
    ("{title}{ by brand}\n", {"title": "Lamp", "brand": "Acme"}, "Lamp by Acme\n"),
    ("{title}{ by brand}\n", {"title": "Lamp"}, "Lamp\n"),
    ("{title}{ by brand}\n", {"title": "Lamp", "brand": " \n"}, "Lamp\n"),  # nothing but white space is empty
    ("{title}{, brand: brand}\n", {"title": "Lamp", "brand": "Acme"}, "Lamp, brand: Acme\n"),  # the last name is it
    ("{title}{ (category)}\n", {"title": "Lamp", "category": "Lights"}, "Lamp (Lights)\n"),
    ("{title}\n", {"title": "a {brand} {x", "brand": "Acme"}, "a {brand} {x\n"),  # braces in a title are text
    ("{title}{ brand}\n", {"title": "a\u2028 b\r\n", "brand": "c\u0085\td"}, "a b c d\n"),  # always one line
    ("{title}\n", {"title": "/dev/null"}, "./dev/null\n"),
    (" {title};", {"title": "/dev/null"}, " /dev/null;"),  # the text starts with a space, not with the slash
    ("{title}\n", {"title": "▁a ▁"}, "_a _\n"),
])
def test_an_items_text_is_its_fields_on_one_line(item: str, fields: dict[str, str], text: str) -> None:
    lead_in = "Bag:" if item.startswith(" ") else "Bag:\n"
    assert Template(name="own", lead_in=lead_in, item=item).line(fields) == text


def test_an_item_written_otherwise_is_known_to_be() -> None:
    by_line, by_space = Template(name="own", lead_in="Bag:\n", item="{title}{ brand}\n"), TEMPLATES["compact"]
    assert [by_line.escapes({"title": t}) for t in ("/dev", " /dev", "a/b", "./dev", "▁", "_")] == [
        True, True, False, False, True, False]
    assert by_line.escapes({"title": "a", "brand": "▁"}) and not by_line.escapes({"title": "a", "category": "▁"})
    assert not by_space.escapes({"title": "/dev"})


@pytest.mark.parametrize(("change", "message"), [
    ({"item": "{brand}\n"}, "no {title} in it"),
    ({"item": "{titel}\n"}, "'{titel}' names no field; did you mean 'title'?"),
    ({"item": "{title} }\n"}, "'}' names no field"),
    ({"item": "{title}"}, "'x' and 'x'"),  # items would run into each other
    ({"item": "{title} "}, "'x ' and 'x '"),
    ({"item": "  {title};"}, "'  x;' and '  x;'"),
    ({"item": "{title}{, brand}"}, "'x, x' and 'x'"),
    ({"lead_in": ""}, "lead_in is empty"),
    ({"lead_in": "Bag:"}, "'Bag:' and 'x\\n'"),
    ({"lead_in": "Bag: ", "item": " {title};"}, "'Bag: ' and ' x;'"),
    ({"before_target": "Then:"}, "'Then:' and 'x\\n'"),
    ({"before_target": "/then\n"}, "'x\\n' and '/then\\n'"),
    ({"tail": "\nDone"}, "'x\\n' and '\\nDone'"),
    ({"tail": " "}, "'x\\n' and ' '"),
])
def test_a_template_whose_parts_tokenizers_would_merge_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError) as e:
        Template(**{"name": "own", "lead_in": "Bag:\n", "item": "{title}\n"} | change)
    assert message in str(e.value)


def test_the_hash_is_of_the_text_alone_and_changes_with_every_part() -> None:
    base = Template(name="own", lead_in="Bag:\n", item="{title}\n")
    others = [base.model_copy(update=change) for change in (
        {"lead_in": "Cart:\n"}, {"item": "- {title}\n"}, {"before_target": "Then:\n"}, {"before_target": ""},
        {"tail": "Done\n"})]
    assert len({t.hash for t in (base, *others)}) == 6
    assert base.model_copy(update={"name": "other", "version": 2}).hash == base.hash


def config_values(raw: Path, template: Any) -> dict[str, Any]:
    return shops.config_values(raw, raw / "out") | {"template": template}


def test_a_config_may_write_a_template_of_its_own(tmp_path: Path) -> None:
    own = {"name": "mine", "lead_in": "Bought:\n", "item": "{title}{ by brand}\n", "before_target": "Then:\n"}
    config = shops.config(config_values(tmp_path, own))
    assert template_of(config.template) == Template(**own)
    (tmp_path / "config.yaml").write_text(dump_settings(config), encoding="utf-8")
    assert load_settings(PrepConfig, tmp_path / "config.yaml") == config
    assert template_of(shops.config(config_values(tmp_path, "compact")).template) == TEMPLATES["compact"]


def test_a_supervised_template_needs_the_border_of_its_target(tmp_path: Path) -> None:
    slow = {"tokenizer": {"train_vocab_size": 512, "exact": "slow"}}
    shops.config(config_values(tmp_path, "cprec") | slow)
    with pytest.raises(ConfigError, match="does not say where its target starts; use exact: gather"):
        shops.config(config_values(tmp_path, "supervised") | slow)


@pytest.mark.parametrize(("template", "message"), [
    ("compct", "template='compct': no such template; did you mean 'compact'?"),
    (7, "template=7: give the name of a built-in template, or a mapping"),
    ({"name": "mine", "lead_in": "Bag:\n"}, "template: item: missing"),
    ({"name": "mine", "lead_in": "Bag:\n", "itm": "{title}\n"}, "itm: unknown key; did you mean 'item'?"),
    ({"name": "cprec", "lead_in": "Bag:\n", "item": "{title}\n"}, "name='cprec' is a built-in template's"),
    ({"name": "mine", "lead_in": "Bag:", "item": "{title}\n"}, "tokenizers merge where these parts of the text meet"),
])
def test_a_bad_template_in_a_config_is_refused_naming_the_way_out(tmp_path: Path, template: Any, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        shops.config(config_values(tmp_path, template))
    assert message in str(e.value)
