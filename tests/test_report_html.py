"""The HTML report: what is in it, that it needs nothing else, that no text of it runs, and how a browser has it."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report import BUILT, INFEASIBLE, PI, anything, as_dict

from edgebuild import report
from edgebuild.report import content, plot
from edgebuild.report.content import Curve, Point
from edgebuild.spec import Finding, FrontierPoint, LayerRow, Report

VOID = {"meta", "link"}
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}\x1b\u202e $\\frac$"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    children: "list[Node | str]" = field(default_factory=list)

    def walk(self) -> "Iterator[Node]":
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str) -> "list[Node]":
        return [node for node in self.walk() if node.tag == tag]

    @property
    def text(self) -> str:
        words = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join(" ".join(words).split())


class Tree(HTMLParser):
    """A tree of the page; every element that is opened has to be closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is there twice"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(text: str) -> Node:
    tree = Tree()
    tree.feed(text)
    tree.close()
    (root,) = tree.open
    return root


def page(value: Report) -> Node:
    return parsed(report.html(as_dict(value)))


def rows(table: Node) -> list[list[str]]:
    return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in table.all("tr")]


# --------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("value", [BUILT, INFEASIBLE])
def test_it_answers_the_five_questions_in_order(value: Report) -> None:
    root = page(value)
    (title,) = root.all("h1")
    assert title.text == f"digits for raspberry-pi-4 {value.outcome}"
    expected = [f"{i}. {section.title}" for i, section in enumerate(content.sections(as_dict(value)), 1)]
    assert [node.text for node in root.all("h2")] == expected
    assert len(expected) == 5
    anchors = {link.attributes["href"] for link in root.all("a")}
    assert anchors == {f"#{section.attributes['id']}" for section in root.all("section")}
    assert root.all("html")[0].attributes["lang"] == "en"


@pytest.mark.parametrize("value", [BUILT, INFEASIBLE])
def test_it_says_all_that_the_markdown_says(value: Report) -> None:
    data = as_dict(value)
    root = page(value)
    tables = iter(root.all("table"))
    for section, node in zip(content.sections(data), root.all("section"), strict=True):
        for line in section.lines:
            assert " ".join(line.split()) in node.text
        for table in section.tables:
            if not table.lines:
                continue
            used = [k for k in range(len(table.columns)) if any(row[k] for row in table.lines)]
            wanted = [[" ".join(row[k].split()) for k in used] for row in (table.columns, *table.lines)]
            assert rows(next(tables)) == wanted, table.title
    assert next(tables, None) is None
    assert all(line in root.text for line in content.heading(data))


def test_every_row_of_the_json_is_there() -> None:
    data = as_dict(BUILT)
    found = {tuple(table[0]): table[1:] for table in map(rows, page(BUILT).all("table"))}
    by_first = {head[0]: body for head, body in found.items()}
    assert len(by_first["Budget"]) == len(data["reachable"])  # the last of the tables about budgets
    verdicts = next(body for head, body in found.items() if "Margin" in head)
    assert [row[6] for row in verdicts] == [verdict["status"] for verdict in data["verdicts"]]
    layers = next(body for head, body in found.items() if f"Predicted on {PI}" in head)
    assert [row[0] for row in layers] == [*(row["name"] for row in data["layers"]), "all layers"]
    assert len(by_first["Kind"]) == len(data["findings"])
    assert dict(by_first["What"]) == data["environment"]
    figures = next(body for head, body in found.items() if head[:2] == ("Quantity", "Of"))
    assert len(figures) == len(data["measurements"]) + len(data["original_measurements"])


def test_tables_are_named_and_scoped_and_sort_by_numbers() -> None:
    root = page(BUILT)
    for table in root.all("table"):
        heads = table.all("thead")[0].all("th")
        assert heads and all(head.attributes["scope"] == "col" and head.text for head in heads)
    for row in root.all("tbody")[0].all("tr"):
        assert [head.attributes["scope"] for head in row.all("th")] == ["row"]
    assert all(box.attributes["aria-label"] for box in root.all("div") if box.attributes.get("class") == "scroll")
    values = [cell.attributes["data-value"] for cell in root.all("td") if "data-value" in cell.attributes]
    assert len(values) > 20 and all(re.fullmatch(r"-?[\d.e+-]+", value) for value in values)


def test_bars_are_as_long_as_the_figures() -> None:
    root = page(BUILT)
    (layers,) = [table for table in root.all("table") if f"Predicted on {PI}" in table.text]
    conv, head, total = layers.all("tr")[1:]
    assert [bar.attributes["width"] for bar in conv.all("rect")] == ["24.62%", "18.46%", "100%", "75%", "100%", "50%"]
    assert [bar.attributes["width"] for bar in head.all("rect")][-2:] == ["100%", "100%"]
    assert not total.all("rect"), "the sums would dwarf every layer"
    size, latency = [svg for svg in root.all("svg") if svg.attributes.get("class", "").startswith("gauge")][:2]
    shape = {node.attributes.get("class"): node.attributes for node in latency.walk()}
    assert shape["found"]["width"] == "80%" and shape["bound"]["x1"] == "66.67%"  # 12 ms of 10 ms, to 15 ms
    assert (shape["band"]["x1"], shape["band"]["x2"]) == ("56%", "100%") and shape["predicted"]["x1"] == "60%"
    assert "fail" in latency.attributes["class"] and "pass" in size.attributes["class"]
    assert "band" not in {node.attributes.get("class") for node in size.walk()}


# ------------------------------------------------------------------------------------------------- self-contained


def test_it_needs_nothing_else() -> None:
    text = report.html(as_dict(BUILT))
    root = parsed(text)
    assert not root.all("iframe") + root.all("img") + root.all("object") + root.all("form")
    for node in root.walk():
        assert not {"src", "srcset", "action", "data", "poster", "style"} & set(node.attributes), node
        assert not [name for name in node.attributes if name.startswith("on")], node
        link = node.attributes.get("href", "")
        assert not link or link.startswith("#") or link == "data:,", link
    assert not re.search(r"\w://|[\"'(=]//", text.replace("http://www.w3.org/2000/svg", ""))
    (style,), (script,) = root.all("style"), root.all("script")
    assert "url(" not in style.text and "@import" not in style.text
    policy = next(node for node in root.all("meta") if "http-equiv" in node.attributes).attributes["content"]
    for node, name in ((style, "style-src"), (script, "script-src")):
        (source,) = node.children
        assert isinstance(source, str)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"; {name} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_no_text_of_a_report_becomes_markup() -> None:
    plain, hostile = as_dict(BUILT), as_dict(BUILT)
    changed = _everywhere(hostile)
    hostile["frontier"][0]["predicted"] = {HOSTILE: 1e-3}  # the axis that the point lies along
    assert changed > 60, "names, notes, details, targets and versions are all of the kind"
    text = report.html(report.from_json(json.dumps(hostile)))
    root, before = parsed(text), parsed(report.html(report.from_json(json.dumps(plain))))
    assert len(root.all("script")) == 1 and not root.all("img")
    assert {node.tag for node in root.walk()} == {node.tag for node in before.walk()}
    names = Counter(name for node in root.walk() for name in node.attributes)
    assert set(names) == set(Counter(name for node in before.walk() for name in node.attributes))
    assert "alert(1)" not in root.all("script")[0].text
    assert "{{ 7 * 7 }}" in root.all("h1")[0].text
    assert "\x1b" not in text and "\u202e" not in text


def _everywhere(value: Any, where: tuple = (), root: Any = None) -> int:
    """Put the hostile text into every string that a report may hold there; how many took it."""
    root = value if root is None else root
    items = value.items() if isinstance(value, dict) else enumerate(value)
    count = 0
    for key, item in list(items):
        if isinstance(item, (dict, list)):
            count += _everywhere(item, (*where, key), root)
        elif isinstance(item, str):
            value[key] = HOSTILE
            try:
                report.from_json(json.dumps(root))
                count += 1
            except Exception:
                value[key] = item
    return count


def test_it_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    layers = tuple(
        LayerRow(f"block.{i}.conv", "conv2d", "", "int8", (9, 9), (9, 9), {PI: (1e-3, 1e-4)}, 1e-3) for i in range(200)
    )
    data = as_dict(replace(BUILT, layers=layers))
    text = report.html(data)
    assert len(report.html(as_dict(BUILT)).encode()) < 80_000
    assert len(text.encode()) < 300_000
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nsvg.fonttype: path\nfont.size: 30\n", encoding="utf-8")
    (tmp_path / "report.json").write_text(json.dumps(data), encoding="utf-8")
    code = "import sys; from edgebuild.report import *; print(html(from_json(open(sys.argv[1]).read())), end='')"
    environment = {**os.environ, "MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", code, str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert done.stdout.decode() == text


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(anything(Report))
def test_any_report_can_be_shown(value: Report) -> None:
    root = page(value)
    assert len(root.all("h2")) == 5
    assert len(root.all("script")) == 1


# -------------------------------------------------------------------------------------------------------- the curve


def test_the_curve_has_every_plan_and_marks_the_artifact() -> None:
    frontier = (
        *BUILT.frontier,
        FrontierPoint("latency on host", 0.0003, {"latency on host": 0.0003, "size": 9e4}, 0.001, 0.0, False),
        FrontierPoint("size", 4e4, {"latency on host": 0.0003}, 0.02, 0.0, False),
    )
    latency, size = content.sections(as_dict(replace(BUILT, frontier=frontier)))[4].curves
    assert [point.kind for point in latency.points] == ["chosen", "plan", "artifact"]
    assert latency.points[2].text == "210 us, loss 0.0042 nats; built in round 1: the artifact"
    assert size.bound == 1 << 20 and not size.points, "neither the plan nor the round says what its size is"
    root = page(replace(BUILT, frontier=frontier))
    assert len(root.all("figure")) == 1
    points = [node for node in root.walk() if node.attributes.get("class") == "point"]
    assert [point.attributes["aria-label"] for point in points] == [point.text for point in latency.points]
    assert [point.all("title")[0].text for point in points] == [point.text for point in latency.points]
    assert all(point.attributes["tabindex"] == "0" for point in points)


def test_two_curves_share_no_id_and_carry_no_style() -> None:
    points = (Point(1e-4, 0.3, "plan", "a"), Point(2e-4, 1e-5, "artifact", "b"))
    drawn = [plot.svg(Curve(title, "latency", 1.5e-4, points)) for title in ("one", "two")]
    ids = [{node.attributes["id"] for node in parsed(text).walk() if "id" in node.attributes} for text in drawn]
    assert ids[0] and not ids[0] & ids[1]
    assert all("style" not in text and "DOCTYPE" not in text and "the budget" in text for text in drawn)
    assert "Latency (us)" in drawn[0]
    assert drawn[0] == plot.svg(Curve("one", "latency", 1.5e-4, points))
    assert "the budget" not in plot.svg(Curve("one", "latency", 1.0, points)), "it would press the points together"
    assert plot.svg(Curve("one", "latency", 1.0, ())) == ""


NUMBER = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, 5e-324, 1e308, -1.0])
KIND = st.sampled_from(sorted(plot.KINDS))
POINTS = st.lists(st.builds(Point, cost=NUMBER, loss=NUMBER, kind=KIND, text=st.just(HOSTILE)), max_size=3)
QUANTITY = st.sampled_from(["latency", "size", "$x$"])


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.builds(Curve, st.just(HOSTILE), QUANTITY, st.none() | NUMBER, POINTS.map(tuple)))
def test_any_curve_can_be_drawn(curve: Curve) -> None:
    drawn = plot.svg(curve)
    count = sum(node.attributes.get("class") == "point" for node in parsed(drawn).walk())
    assert count == len(plot.drawable(curve))


# ------------------------------------------------------------------------------------------------------- a browser

PROBE = """{
const table = [...document.querySelectorAll("table")].find((t) => t.textContent.includes("Predicted on"));
const order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
const button = table.querySelectorAll("thead button")[5];
table.closest("details").open = true;
button.click(); const rising = order(); button.click(); const falling = order();
const point = document.querySelector(".point");
point.dispatchEvent(new PointerEvent("pointerenter"));
const tip = document.querySelector(".tip");
const box = tip.getBoundingClientRect();
console.log("PROBE " + JSON.stringify({
  rising, falling, sorted: button.parentNode.getAttribute("aria-sort"), tip: tip.textContent, hidden: tip.hidden,
  inside: box.left >= 0 && box.right <= innerWidth, width: innerWidth, page: document.documentElement.scrollWidth,
  button: button.textContent, titles: document.querySelectorAll(".point title").length,
  network: performance.getEntriesByType("resource").length,
}));
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_phones_browser_sorts_and_shows_tips_and_scrolls_no_page_sideways(tmp_path: Path) -> None:
    text = report.html(as_dict(replace(BUILT, findings=(*BUILT.findings, Finding("note", "x" * 200, "y" * 400)))))
    (script,) = parsed(text).all("script")[0].children
    assert isinstance(script, str)
    old, new = (
        base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in (script, script + PROBE)
    )
    path = tmp_path / "report.html"
    path.write_text(text.replace(script, script + PROBE).replace(old, new), encoding="utf-8")
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    # 500 is the least width of a window, and has the layout of a phone
    command = [CHROMIUM, *flags, "--enable-logging=stderr", "--window-size=500,800", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console
    said = json.loads(console[0].partition("PROBE ")[2].rpartition('", source:')[0])
    assert said["rising"] == ["head", "conv1"] and said["falling"] == ["conv1", "head"], "640 MACs and 5,880"
    assert said["sorted"] == "descending" and said["button"] == "MACs"
    assert said["tip"] == "190 us, loss 0.0123 nats; this plan" and not said["hidden"] and said["inside"]
    assert said["titles"] == 0 and said["network"] == 0
    assert said["page"] <= said["width"] == 500
