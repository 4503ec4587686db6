"""Plots: the files are what their endings say, and hold what was drawn."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lite.errors import ReportError
from lite.report.plots import curves, timeline

PEAKS = {"all layers": ([1024, 2048, 4096], [1.0, 1.5, 2.5]), "none": ([1024, 2048, 3000], [2.0, 4.0, 6.0])}


class Page(HTMLParser):
    """Every text and tag of a page; what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and tag not in ("use", "svg")]

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def draw(file: Path) -> Path:
    return curves(
        file, PEAKS, x="tokens", y="peak (GiB)", title="Peak & <length>", limit=(5.0, "24 GB card"), log2_x=True
    )


def test_a_png_is_one(tmp_path: Path) -> None:
    content = draw(tmp_path / "peaks.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 5_000


def test_an_svg_has_the_words_and_is_the_same_again(tmp_path: Path) -> None:
    file = draw(tmp_path / "peaks.svg")
    words = {element.text.strip() for element in ElementTree.parse(file).iter() if (element.text or "").strip()}
    assert {"tokens", "peak (GiB)", "24 GB card", "all layers", "none", "1,024", "2,048", "4,096"} <= words
    assert draw(tmp_path / "again.svg").read_bytes() == file.read_bytes()


def test_a_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    page = Page(draw(tmp_path / "peaks.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.fetched == []
    assert page.texts.count("Peak & <length>") == 2  # the page's title and the plot's
    assert "24 GB card" in page.texts


def test_a_timeline_names_parts_phases_and_times(tmp_path: Path) -> None:
    parts = {"weights": [2**30] * 100, "activations": [i * 2**24 for i in range(100)]}
    phases = [(0, "forward"), (50, "head"), (51, "backward")]  # the head too narrow for its name
    seconds = {"forward": 1.0, "head": 0.01, "backward": 2.0}
    page = Page(timeline(tmp_path / "t.html", parts, phases, seconds, title="step 2").read_text(encoding="utf-8"))
    assert {"weights", "activations", "live memory (GiB)", "forward 1 s", "head 0.01 s", "backward 2 s"} <= {
        *page.texts
    }
    assert [page.texts.count(name) for name in ("forward", "backward", "head")] == [2, 2, 0]
    assert timeline(tmp_path / "t.png", parts, phases, seconds, title="").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_drawn(tmp_path: Path) -> None:
    assert timeline(tmp_path / "t.svg", {}, [], {}, title="").exists()
    assert curves(tmp_path / "c.svg", {}, x="tokens", y="GiB", log2_x=True).exists()


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"peaks\.bmp: .*\.png, \.svg, \.html"):
        draw(tmp_path / "peaks.bmp")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    with pytest.raises(ReportError, match=r'pip install "lite\[plot\]"'):
        draw(tmp_path / "peaks.png")
