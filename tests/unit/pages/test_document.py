"""A page stays the page that was written, whatever texts it is made of."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from opentau_train.pages.document import document, embed, facts, html, picture, section, table, tag
from opentau_train.pages.drawing import histogram

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b>&amp;",
    "<!--<script>",
    "abc\u2028\u2029\x00",
    "Öffne die Schublade 引き出しを開ける 🤖",
]


class Parsed(HTMLParser):
    """What a reader of HTML takes for elements, for text, and for the content of scripts."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.scripts, self.inside = "", [], False
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        self.inside = name == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, name):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_becomes_an_element_or_leaves_its_own(hostile):
    def page(word: str) -> Parsed:
        body = [tag("h1", word), facts({word: word}), table([word], [[word, 1.5]]), section(word, html(word))]
        body += [picture(b"x", "png", word, title=word), embed("data", {word: [word]})]
        return Parsed(document(word, body, scripts=["go()"]))

    made, plain = page(hostile), page("plain")
    assert made.tags == plain.tags and [n for n, _ in made.attributes] == [n for n, _ in plain.attributes]
    assert made.text == plain.text.replace("plain", hostile)
    assert json.loads(made.scripts[0]) == {hostile: [hostile]}


def test_a_page_lets_only_its_own_scripts_run_and_asks_for_nothing():
    text = document("t", [], scripts=["const end = '</script>';"])
    (policy,) = re.findall(r'http-equiv=Content-Security-Policy content="([^"]*)"', text)
    (script,) = Parsed(text).scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    assert script == "const end = '<\\/script>';"
    assert "script-src 'none'" in document("t", []) and "<script" not in document("t", [])


def test_numbers_that_json_lacks_are_null():
    assert '{"a":[null,null,1.5]}' in embed("x", {"a": (float("nan"), float("inf"), 1.5)})


def test_a_histogram_draws_a_bar_for_each_range_that_has_any_and_marks_what_lies_outside_at_its_end():
    drawn = histogram(np.array([3, 0, 1]), np.array([0.0, 1.0, 2.0, 3.0]), "x <m>", "rows", marks=[99.0])
    assert drawn.count('<rect class="bar"') == 2 and "<title>0 to 1: 3</title>" in drawn and "x &lt;m&gt;" in drawn
    assert re.search(r'class="mark" x1="550.0"', drawn) and "<title>99</title>" in drawn
