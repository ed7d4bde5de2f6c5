"""The page is one file that needs nothing else, says what the checkpoint says, and takes nothing in it for a part of itself."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from qpc.page import render
from qpc.page.facts import facts
from qpc.report import LATER_FIELDS, Report, size
from tests.page.checkpoints import HOSTILE, NAMES, hostile, source

VOID = {"meta", "input", "img", "link", "br", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the text within each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.elements:
            key = str(self.elements[-1][1].get("id") or self.elements[-1][0])
            self.texts[key] = self.texts.get(key, "") + data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_well_formed_and_needs_nothing_else(name: str) -> None:
    text = render(source(name))
    page = Page(text)
    assert not page.open
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "img", "iframe", "base", "object", "embed"})
    assert not any(attribute in ("src", "href", "srcset") or attribute.startswith("on") for _, each in page.elements for attribute in each)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|innerHTML", text)
    assert "default-src 'none'" in text
    identities = [each["id"] for _, each in page.elements if "id" in each]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("name", NAMES)
def test_the_facts_in_the_page_are_those_of_the_checkpoint(name: str) -> None:
    page = Page(render(source(name)))
    assert json.loads(page.texts["facts"]) == facts(source(name))
    lines = [each for tag, each in page.elements if tag == "tr" and "data-row" in each]
    assert len(lines) == len(source(name).report.rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_headline_tells_size_and_rate(name: str) -> None:
    text, report = render(source(name)), source(name).report
    assert f"<strong>{report.bits_per_weight:.3f}</strong>" in text
    assert f"<strong>{size(report.model_bytes).split()[0]}</strong>" in text
    assert size(report.model_bytes_before) in text


def test_the_same_checkpoint_gives_the_same_page() -> None:
    assert render(source("llama")) == render(source("llama"))


def test_nothing_that_a_checkpoint_says_becomes_a_part_of_the_page() -> None:
    text = render(hostile())
    page, usual = Page(text), Page(render(source("llama")))
    assert not page.open
    assert page.count("script") == usual.count("script") == 2
    assert page.count("img") == 0
    assert not any(attribute.startswith("on") for _, each in page.elements for attribute in each)
    assert "49" not in page.texts["h1"] and HOSTILE in page.texts["h1"]
    assert json.loads(page.texts["facts"])["rows"][0]["name"] == HOSTILE
    tips = [json.loads(str(each["data-tip"])) for _, each in page.elements if "data-tip" in each]
    assert any(HOSTILE in tip[0] for tip in tips)


def test_a_checkpoint_of_before_says_what_it_does_not_hold() -> None:
    given = source("llama")
    entries = {name: entry for name, entry in given.report.to_json().items() if name not in LATER_FIELDS}
    text = render(replace(given, report=Report.from_json(entries)))
    assert "holds no sketch of a block" in text
    assert "No GPU was named" not in render(given)


def test_a_model_in_which_nothing_was_quantized_has_a_page() -> None:
    given = source("llama")
    rows = tuple(replace(row, quantizer=None, distortion=None, reason="excluded", group=(row.name,)) for row in given.report.rows)
    page = Page(render(replace(given, report=replace(given.report, rows=rows, block=None), quantizers={})))
    assert json.loads(page.texts["facts"])["rate"] == []
    assert json.loads(page.texts["facts"])["law"] is None
    empty = Page(render(replace(given, report=replace(given.report, rows=(), block=None, model_bytes=0), quantizers={}, tensors={})))
    assert json.loads(empty.texts["facts"])["rows"] == []
