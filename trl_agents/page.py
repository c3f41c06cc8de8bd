# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Static HTML pages of one file: styles, script and data are inside, nothing is asked for from outside.

What a model wrote is on such a page as data only. It stands in JSON scripts, which are never run and which no text can
end; the page's own script puts it in by `textContent`. The policy in the head lets nothing run or load but the styles
and the script whose digests it names, so that markup that slipped through would still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any


@cache
def asset(name: str) -> str:
    """The text of one of the package's own `assets`."""
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def html_page(
    title: str, body: str, *, styles: Sequence[str], script: str = "", data: Iterable[tuple[str, Any]] = ()
) -> str:
    """
    A page of one file.

    Args:
        title (`str`):
            Plain text.
        body (`str`):
            Markup, in which foreign text is escaped (`html.escape`). It has no `style` attribute and no handler: the
            page's policy forbids both.
        styles (`Sequence[str]`):
            Names of stylesheets among the assets.
        script (`str`, *optional*):
            Name of a script among the assets. It runs when body and data are there.
        data (`Iterable[tuple[str, Any]]`, *optional*):
            `(id, value)` for each element `<script type="application/json" id=...>`.
    """
    style = "\n".join(asset(name) for name in styles)
    code = asset(script) if script else ""
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(code)}'" if code else "script-src 'none'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    blocks = [
        f'<script type="application/json" id="{html.escape(id_)}">{as_data(value)}</script>' for id_, value in data
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="referrer" content="no-referrer">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{html.escape(title)}</title>",
            '<link rel="icon" href="data:,">',  # else a browser asks the server for one
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            body,
            *blocks,
            *([f"<script>{code}</script>"] if code else []),
            "</body>",
            "</html>",
            "",
        ]
    )


def as_data(value: Any) -> str:
    """
    `value` as JSON that may stand in a script element: without `<`, so that neither `</script>` nor `<!--` in a text
    ends it or changes how it is read, and in ASCII, so that half a character that a model wrote can be stored.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_text(path: str | Path, text: str) -> Path:
    """Write a file that is there when it is whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(path)
    return path


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def describe_env(env_id: str | None, env_kwargs: Mapping[str, Any] | None) -> str:
    """An environment in a line: its id and arguments."""
    arguments = ", ".join(f"{name}={value}" for name, value in (env_kwargs or {}).items())
    return (env_id or "") + (f" ({arguments})" if arguments else "")
