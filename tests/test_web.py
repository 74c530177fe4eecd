"""The frame of all pages: one script that is named by its hash, and data that no text breaks out of."""
import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from rl.report.web import data_block, document, finite

HOSTILE = ["</script><script>alert(1)</script>", "<!--<script>", "\u2028\u2029", "\u202eright to left", "\ud800",
           "😀&amp;", "]]>", "x" * 100000, "\0"]


class Blocks(HTMLParser):
    """What stands in each <script> of a page, as a browser splits it."""

    def __init__(self, text):
        super().__init__()
        self.inside = False
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "script"
        if self.inside:
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_stays_data_and_is_read_back(text):
    block = data_block("rows", {text: [text, 1.5, None]})
    assert block.count("<") == 2                        # of its own tag
    [inside] = Blocks(block).found
    assert json.loads(inside) == {text: [text, 1.5, None]}


def test_numbers_that_json_has_no_word_for_become_none():
    assert finite({"a": (float("nan"), [float("-inf"), 1.0]), "b": True}) == {"a": [None, [None, 1.0]], "b": True}
    assert "NaN" not in data_block("x", float("nan"))


def test_the_only_script_that_may_run_is_the_pages_own():
    page = document("<b>", "<p>body</p>", script="one();").decode()
    [allowed] = re.findall(r"script-src 'sha256-([^']+)'", page)
    assert base64.b64decode(allowed) == hashlib.sha256(b"one();").digest()
    assert "default-src 'none'" in page and "<title>&lt;b&gt;</title>" in page and "<h1>&lt;b&gt;</h1>" in page
    assert "script" not in document("t", "").decode()


def test_half_a_surrogate_pair_is_no_end_of_a_page():
    assert b"x ? y" in document("t", "x \ud800 y")
