"""Pages in a real browser, without a window: how they look at some width, in light or dark, and what the browser says of them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
COMMAND = [str(CHROMIUM), "--enable-logging=stderr", *(f"--{option}" for option in OPTIONS.split())]
WINDOWS = pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1300, "light"), (1300, "dark")])

needed = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on this machine")

# Contrast is that of WCAG 2.2, of each text's color to the nearest color behind it.
_MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body>
{frames}<pre id="result"></pre>
<script>
const light = channels => {{
  const [r, g, b] = channels.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
}};
const channels = color => color.match(/[\\d.]+/g).map(Number);
function contrasts(inner, page) {{
  const found = [], seen = node => node.data.trim() && !node.parentElement.closest("script, style") ? 1 : 2;
  const words = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT, seen);
  while (words.nextNode()) {{
    const element = words.currentNode.parentElement, style = inner.getComputedStyle(element);
    let behind = element;
    while (behind && (channels(inner.getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const back = light(channels(inner.getComputedStyle(behind ?? page.body).backgroundColor));
    const front = light(channels(element instanceof inner.SVGElement ? style.fill : style.color));
    found.push(Math.max(front, back) / Math.min(front, back));
  }}
  return found;
}}
function measure(inner) {{
  const page = inner.document, images = [...page.images], found = contrasts(inner, page);
  return {{
    heading: page.querySelector("h1").textContent,
    width: page.documentElement.scrollWidth,
    dark: inner.matchMedia("(prefers-color-scheme: dark)").matches,
    paper: light(channels(inner.getComputedStyle(page.body).backgroundColor)),
    texts: found.length,
    contrast: Math.min(...found),
    images: images.length,
    decoded: images.filter(image => image.complete && image.naturalWidth > 1).length,
    wordless: images.filter(image => !image.alt).length,
    scripts: page.scripts.length,
    {more}
  }};
}}
onload = () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => measure(frame.contentWindow));
  document.getElementById("result").textContent = JSON.stringify(found);
}};
</script>"""


def look(pages: Sequence[Path], folder: Path, width: int, scheme: str, more: str = "") -> tuple[list[dict], list[str]]:
    """What a browser finds in each page in a window of that width, light or dark, and what it says on its console.

    ``more`` is further measures, as entries of a JavaScript object in terms of ``page``, its document.
    """
    style = f"width: {width}px; height: 900px; border: 0; color-scheme: {scheme}"
    frames = "".join(f'<iframe style="{style}" src="{page.as_uri()}"></iframe>' for page in pages)
    (folder / "measure.html").write_text(_MEASURE.format(frames=frames, more=more), encoding="utf-8")
    options = ["--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command = [*COMMAND, *options, (folder / "measure.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
