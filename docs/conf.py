"""The documentation: `make docs` builds it to docs/_build/html, and a warning is an error."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))

from potstill import __version__, cli, config  # noqa: E402

project = "potstill"
author = "The potstill authors"
copyright = "The potstill authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "potstill"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]


def _command_line() -> str:
    """Every command as its own help has it."""
    parser = cli._parser()
    commands: dict[str, argparse.ArgumentParser] = next(
        action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    parts = [("potstill", parser), *((f"potstill {name}", command) for name, command in commands.items())]
    return "# Command line\n\n" + "\n\n".join(f"## {name}\n\n```text\n{of.format_help().strip()}\n```" for name, of in parts) + "\n"


def _kind(schema: dict[str, Any]) -> str:
    """What a value of a recipe is, in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if union := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(part) for part in union))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if isinstance(schema.get("items"), dict) else "list"
    bounds = [f"{word} {schema[key]:g}" for key, word in _BOUNDS.items() if abs(schema.get(key, 2**31)) < 2**16]
    return " ".join([str(schema.get("type", "anything")).replace("null", "nothing"), *bounds])


_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _cell(text: object) -> str:
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|")


def _default(value: dict[str, Any]) -> str:
    """What stands where a key is left out; a section's own keys have theirs."""
    found = value.get("default")
    parts = found if isinstance(found, list) else [found]
    return "" if found in (None, [], {}, "") or any(isinstance(part, dict) for part in parts) else f"`{json.dumps(found)}`"


def _section(name: str, schema: dict[str, Any]) -> str:
    lines = [f"## {name}", "", schema.get("description", "").strip(), "", "| key | | value | by default |", "|---|---|---|---|"]
    for key, value in schema.get("properties", {}).items():
        default = "*has to be given*" if key in schema.get("required", []) else _default(value)
        lines.append(f"| `{key}` | {_cell(value.get('description', ''))} | {_cell(_kind(value))} | {_cell(default)} |")
    return "\n".join(lines)


def _recipe() -> str:
    """Every key of a recipe, from its schema."""
    schema = config.Recipe.model_json_schema()
    parts = {"Recipe": schema} | dict(sorted((n, s) for n, s in schema["$defs"].items() if "properties" in s))
    told = (
        "Every key of a recipe. Paths in it are relative to the current directory, not to the recipe. `potstill schema` prints the same as "
        "JSON schema, for editors."
    )
    return f"# Recipe\n\n{told}\n\n" + "\n\n".join(_section(name, section) for name, section in parts.items())


def _write(app: Sphinx) -> None:
    for name, text in (("command-line", _command_line()), ("recipe", _recipe())):
        path = HERE / "reference" / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", _write)
