"""A real browser that opens a page and says what is wrong with it: too wide, overlapping, hardly legible."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MEASURE = """
<script>
addEventListener("load", () => {
  const shown = [];  // every text that can be seen, with its box
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement, text = node.data.trim();
    if (!text || parent.closest("script, style")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const boxes = parent.closest("svg") ? [parent.getBoundingClientRect()] : [...range.getClientRects()];
    for (const box of boxes) if (box.width > 1 && box.height > 1) shown.push({text: text.slice(0, 60), parent, box});
  }
  const inside = e => e.parentElement.closest(".frame, pre");  // a frame scrolls by itself
  const wide = [...document.querySelectorAll("body *:not(svg *)"), ...document.querySelectorAll("svg text")]
    .filter(e => !inside(e)).filter(e => {
      const box = e.getBoundingClientRect();
      return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
    }).map(e => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 60)}`);
  const clipped = shown.filter(({parent, box}) => {
    const frame = parent.closest("svg")?.getBoundingClientRect();
    return frame && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1);
  }).map(s => s.text);
  const overlapping = [];
  shown.forEach(({text, box: a}, i) => shown.slice(i + 1).forEach(({text: other, box: b}) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 1 && down > 3) overlapping.push(`${text} / ${other}`);  // lines of one text touch by less
  }));
  const channels = color => (color.match(/[\\d.]+/g) ?? []).map(Number);
  const luminance = color => {
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(color).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
  };
  const contrast = e => {
    const style = getComputedStyle(e);
    const ink = e.closest("svg") ? style.fill : style.color;
    const [low, high] = [luminance(ink), luminance(behind(e))].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const pale = shown.filter(s => contrast(s.parent) < 4.5).map(s => s.text);
  const scale = svg => svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const smallest = Math.min(...shown.map(({parent}) => parseFloat(getComputedStyle(parent).fontSize)
                                                       * scale(parent.closest("svg"))));
  const outside = [...document.querySelectorAll("[src], link[href], svg [*|href]")]
    .map(e => e.getAttribute("src") ?? e.getAttribute("href") ?? e.getAttribute("xlink:href"))
    .filter(url => !url.startsWith("#") && !url.startsWith("data:"));
  parent.document.getElementById("seen").textContent = JSON.stringify({
    width: innerWidth, scrolls: document.documentElement.scrollWidth > innerWidth, wide, clipped, overlapping, pale,
    smallest, outside, texts: shown.length, charts: document.querySelectorAll("svg").length,
    background: luminance(behind(document.body))});
});
</script>
"""


@dataclass(frozen=True)
class Seen:
    """What the browser saw. `wide`, `clipped` (texts that stick out of their chart), `overlapping`, `pale` (contrast
    below 4.5), `outside` (addresses of other files) are empty on a good page; `smallest` text in pixels; `background`:
    0 is black, 1 white."""

    width: int
    scrolls: bool
    wide: list[str]
    clipped: list[str]
    overlapping: list[str]
    pale: list[str]
    smallest: float
    outside: list[str]
    texts: int
    charts: int
    background: float


def find_browser() -> str:
    """Path of a Chromium; the test that asks is skipped where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    return found


def dump(address: str, folder: Path, *, is_dark: bool = False, budget_ms: int = 5000) -> str:
    """The page as it stands once loaded and `budget_ms` of its own time have gone by."""
    done = subprocess.run(
        [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--window-size=1400,1000", f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
         f"--virtual-time-budget={budget_ms}", "--dump-dom", address], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr[-2000:]
    return done.stdout


def framed(page: str, *, width: int, height: int = 900) -> str:
    """A page that shows `page` in a frame so wide: a window cannot be as narrow as a telephone's."""
    return (f'<!doctype html><html><head><meta name="color-scheme" content="light dark"></head><body style="margin: 0">'
            f'<iframe style="border: 0; width: {width}px; height: {height}px" srcdoc="{html.escape(page)}"></iframe>'
            f'<script type="application/json" id="seen"></script></body></html>')


def look_at(page: str, folder: Path, *, width: int, is_dark: bool) -> Seen:
    """Open the page `width` pixels wide, in the dark or not."""
    path = folder / "page.html"
    path.write_text(framed(page.replace("</body>", f"{MEASURE}</body>"), width=width), encoding="utf-8")
    dom = dump(path.as_uri(), folder, is_dark=is_dark)
    found = re.search(r'id="seen">(.+?)</script>', dom, re.DOTALL)
    assert found, "the page was not measured"
    return Seen(**json.loads(html.unescape(found[1])))
