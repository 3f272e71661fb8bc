"""The documentation: what a page tells its reader to write is written, what it tells him to run is run, and no link leads nowhere.

A page is followed from top to bottom in an empty folder. A block whose first line is a comment with a file's name, such as
``# recipe.yaml``, is that file; other ``python`` blocks run one after the other in one namespace; of ``sh`` blocks, each line is a
command. Blocks of ``text`` are what came of it. ``<!-- not run: why -->`` before a block says why it cannot be run here.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import browser
from potstill import cli

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")])
# Why a block is not run: what it needs, which this machine and CI do not have.
REASONS = ("a GPU", "the Hub", "your own", "set-up")
_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]*?) -->\s*)?^```(?P<language>[\w{}-]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# ([\w-]+\.(?:py|yaml))\b")


@dataclass
class Block:
    language: str
    text: str
    why: str | None
    line: int


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [Block(f["language"], f["text"], f["why"], text.count("\n", 0, f.start("text"))) for f in _BLOCK.finditer(text)]


def sh(command, where):
    words = shlex.split(command, comments=True)
    if not words:
        return
    if words[0] == "potstill":
        assert cli.main(words[1:]) == 0, f"{where}: {command}"
        return
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    assert words[0] in programs, f"{where}: {command}: no program that a page may call; say why it is not run"
    done = subprocess.run(programs[words[0]] + words[1:], capture_output=True, text=True)
    assert done.returncode == 0, f"{where}: {command}: {done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_followed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"__name__": "page"}
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        assert block.language in ("python", "sh", "yaml", "text", "bibtex", "{eval-rst}", "{toctree}"), f"{where}: {block.language!r}"
        if block.why is not None:
            assert block.why.startswith(REASONS), f"{where}: not run: {block.why}"
            compile(block.text, where, "exec") if block.language == "python" else None
            continue
        first = _FILE.match(block.text)
        if first:
            Path(first[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        elif block.language == "sh":
            for command in block.text.replace("\\\n", " ").splitlines():
                sh(command, where)
        elif block.language == "yaml":
            raise AssertionError(f"{where}: a recipe without a name; begin it with # NAME.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_is_a_recipe_or_python_all_the_same(page):
    for block in blocks(page):
        if block.why is not None and block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with warnings as errors."""
    for builder in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(builder)
    folder = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_sites_links_lead_somewhere_within_it(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        ids = {*re.findall(r'\bid="([^"]+)"', text)}
        for target in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            address, _, at = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            place = page if not address else (page.parent / address.partition("?")[0])
            assert place.exists(), f"{page.name}: {target} leads nowhere"
            if at and not address:
                assert at in ids, f"{page.name}: {target} leads nowhere"
        loaded = re.findall(r'<(?:script|img|link)[^>]*\b(?:src|href)="(https?:[^"]+)"', text)
        assert not loaded, f"{page.name}: takes {loaded} from elsewhere"


@browser.needed
@browser.WINDOWS
def test_the_site_is_read_in_every_window(site, tmp_path, width, scheme):
    pages = [site / page.relative_to(DOCS).with_suffix(".html") for page in PAGES]
    found, said = browser.look(pages, tmp_path, width, scheme)
    assert len(found) == len(PAGES)
    for page, of in zip(pages, found, strict=True):
        assert of["width"] <= width, f"{page.name} scrolls sideways"
        assert of["dark"] == (scheme == "dark")
        assert (of["paper"] < 0.1) == of["dark"], page.name
        assert of["decoded"] == of["images"], page.name
        assert not of["wordless"], page.name
        assert of["texts"] > 50, page.name
    assert not said
