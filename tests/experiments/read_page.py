"""A page as a browser would read it, for tests of reports."""

import html.parser
from pathlib import Path


class Page(html.parser.HTMLParser):
    """Reads a page: checks that every tag is closed in order, and keeps texts, attributes and table rows."""

    VOID = {"meta", "link", "br", "hr", "img", "input"}

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = Path(path).read_text(encoding="utf-8")
        self.open, self.attributes, self.texts, self.tags, self.sections = [], [], [], [], {}
        self.section, self.tables = None, []  # a table: its rows of texts, the head first
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} near {self.getpos()}"
        self.open.pop()
        if tag == "section":
            self.section = None

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
            self.sections.setdefault(self.section, []).append(data)
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    def text(self, section=None):
        return " ".join(" ".join(self.sections.get(section, []) if section else self.texts).split())
