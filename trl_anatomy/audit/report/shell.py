"""What every page shares: one file, no request, no script but its own, and no text of the data that acts."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ...errors import require
from ..number_words import deviations, number, percent, points, probability

# Control characters but newline and tab, lone surrogates, and signs that change the direction of what follows.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
# "<", ">" and "&" so that no text ends the block or opens a comment; the separators end a line of JavaScript.
_IN_SCRIPT = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})
# plotly looks for this element before it adds the style of its street maps, which our pages do not draw.
_MAP_STYLE = re.compile(r'getElementById\("([0-9a-f]{64})"\)')


def render_page(
    template: str, package: str, scripts: Sequence[str], data: Mapping[str, Any], *, plots: bool = True, **view: Any
) -> str:
    """A page whose Content-Security-Policy allows its own style and scripts, by hash, and nothing else: no request, no
    inline handler, no `eval`.

    Args:
        template: file of the template, which extends shell.html.
        package: where template and scripts lie.
        scripts: files of `package`, run in this order after common.js.
        data: id of an element -> what it holds as JSON, for the scripts.
        plots: whether the scripts plot, for which the page carries plotly.
        view: what the template shows; escaped there.
    """
    css = _read(__package__, "page.css")
    plotly = _plotly() if plots else ""
    inline = [_read(__package__, "common.js"), *(_read(package, name) for name in scripts)]
    # plotly fills its style element rule by rule: only the empty text needs to be allowed.
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, [plotly, *inline] if plots else inline))}",
            f"style-src {_hash(css)} {_hash('')}" if plots else f"style-src {_hash(css)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    held = "".join(f'<template id="{found}"></template>\n' for found in dict.fromkeys(_MAP_STYLE.findall(plotly)))
    blocks = "".join(
        f'<script type="application/json" id="{name}">{to_script(value)}</script>\n' for name, value in data.items()
    )
    # As plain text plotly costs next to nothing; common.js makes it a script when the first plot is drawn.
    if plots:
        blocks += f'<script type="text/plain" id="plotly">{plotly}</script>\n'
    run = "".join(f"<script>{script}</script>\n" for script in inline)
    return _template(package, template).render(
        head=Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{css}</style>'),
        tail=Markup(held + blocks + run),
        **view,
    )


def render_part(template: str, package: str, **view: Any) -> Markup:
    """A part of a page that several templates show; `view` is escaped in it."""
    return Markup(_template(package, template).render(**view))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def to_script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element, and every string is `clean`.

    >>> to_script(["</script>", "\\x00"])
    '["\\\\u003c/script\\\\u003e","␀"]'
    """
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_IN_SCRIPT)


def _plain(value: Any) -> Any:
    """Strings cleaned, numbers to six digits, what is not a number as null."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@cache
def _plotly() -> str:
    require("plotly")
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@cache
def _template(package: str, name: str) -> Any:
    shared = FunctionLoader(lambda name: _read(__package__, name))  # what a template extends, and macros
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=shared
    )
    environment.filters |= {
        "points": points,
        "deviations": deviations,
        "number": number,
        "probability": probability,
        "clean": clean,
        "unbroken": unbroken,
        "percent": percent,
    }
    return environment.from_string(_read(package, name))


def _read(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def unbroken(text: str) -> str:
    """A sentence whose percentages stay on one line.

    >>> unbroken("72 % against 6 %").count("\\u00a0")
    2
    """
    return re.sub(r"(?<=\d) %", "\u00a0%", text)


def clean(text: str) -> str:
    """Text with what a browser would obey or hide made visible: control characters, direction overrides, surrogates.

    >>> clean("a\\x00b\\u202ec")
    'a␀b[U+202E]c'
    """
    return _ACTIVE.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else f"[U+{code:04X}]"
