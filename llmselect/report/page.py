"""Data into a page: nothing that comes from data can become an element or a script."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "methods.js", "map.js", "explorer.js", "page.js")
# In a script element only these could end it, open a comment, or (the separators) trip an old reader.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def as_json(value: Any) -> str:
    """Strict JSON that may stand inside a script element.

    Errors: `ValueError` for numbers that are not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


def render(data: dict[str, Any]) -> str:
    """The whole page. Its policy allows its own script and style by their digests, and no requests at all."""
    import jinja2
    from markupsafe import Markup

    style = (HERE / "page.css").read_text("utf-8")
    script = "\n".join(["'use strict';", "(() => {", *((HERE / name).read_text("utf-8") for name in SCRIPTS), "})();", ""])
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    allowed = f"script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return environment.get_template("page.html").render(
        run=data["run"], policy=Markup(policy), style=Markup(style), script=Markup(script), data=Markup(as_json(data))
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
