"""One spelling for what LaTeX, Markdown and Unicode write in many ways; pure string work, in linear time."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho".split()
_SYMBOLS = (
    dict.fromkeys("−‐‑‒﹣", "-")
    | dict.fromkeys("÷∕⁄", "/")
    | dict.fromkeys("·⋅∙", r"\cdot ")
    | dict.fromkeys("≤⩽", r"\le ")
    | dict.fromkeys("≥⩾", r"\ge ")
    | dict.fromkeys("≈≅", r"\approx ")
    | dict.fromkeys("∅Ø", r"\emptyset ")
    | dict.fromkeys("°º˚∘", r"^\circ ")
    | dict.fromkeys("“”", '"')
    | dict.fromkeys("‘’′", "'")
    | dict.fromkeys("，、", ", ")
    | {
        "×": r"\times ", "∗": "*", "≠": r"\ne ", "∞": r"\infty ", "√": r"\sqrt ", "∪": r"\cup ",
        "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "ℝ": r"\R ", "ℤ": r"\Z ",
        "ℕ": r"\N ", "ℚ": r"\Q ", "ℂ": r"\C ",
        "±": r"\pm ", "∓": r"\mp ", "℃": r"^\circ C", "℉": r"^\circ F", "∠": r"\angle ", "△": r"\triangle ",
        "Δ": r"\Delta ", "→": r"\to ", "。": ". ", "：": ": ", "；": "; ", "％": "%", "…": "...",
        "⟨": "(", "⟩": ")",
    }
    | {chr(0x3B1 + i): f"\\{name} " for i, name in enumerate(_GREEK)}
    | {"σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ϕ": r"\phi ", "ω": r"\omega ", "ψ": r"\psi "}
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
    | dict.fromkeys("\u2009\u200a\u202f\u00a0\u2007\u2003\u2002", " ")
)  # fmt: skip
_TRANSLATION = str.maketrans(_SYMBOLS)
_RANGE = re.compile(r"(?<=\d) ?[–—] ?(?=\d)")
_DASH = re.compile("[–—]")

_TEXT_FONTS = (
    "text|textbf|textit|textrm|textsf|texttt|textnormal|emph|underline|mbox|hbox|mathrm|mathbf|mathit"
)
_TEXT_FONTS += (
    "|mathsf|mathtt|mathnormal|boldsymbol|bm|bf|rm|it|operatorname|pmb|textup|uline|mathcal|mathscr|mathfrak"
)
_FONT = re.compile(rf"\\(?:{_TEXT_FONTS})\*?\s?\{{([^{{}}]*)\}}")
_FONT_OF_MORE = re.compile(rf"\\(?:{_TEXT_FONTS})\*?(?![A-Za-z])")
_SIZES = (
    "displaystyle|textstyle|scriptstyle|tiny|small|normalsize|large|Large|LARGE|huge|Huge|limits|nolimits"
)
_SIZES += (
    "|bfseries|itshape|left|right|middle|[bB]ig[gl]?[lr]?|[bB]igg[lr]?|mathstrut|strut|nonumber|hfill|phantom"
)
_SIZE = re.compile(rf"\\(?:{_SIZES})(?![A-Za-z])[.]?")
_COLOUR = re.compile(r"\\(?:text|math)?color\*?\{[^{}]*\}")
_NO_SPACE = re.compile(r"\\! ?")
_SPACE = re.compile(r"\\(?:[,;: >]|quad|qquad|thinspace|enspace|space|hspace\*?\{[^{}]*\}|newline)|~")
_NAMES = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:leq?|leqslant|leqq)(?![A-Za-z])"), "<="),
    (re.compile(r"\\(?:geq?|geqslant|geqq)(?![A-Za-z])"), ">="),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\neq?(?![A-Za-z])|!="), "≠"),
    (re.compile(r"\\(?:approx|simeq|cong|doteq|sim)(?![A-Za-z])"), "≈"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\var(epsilon|theta|phi|rho|sigma|kappa)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\(?:mathbb|mathds|Bbb)\s?\{?\s?([A-Z])\s?\}?"), r"\\\1 "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])"), "|"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\(?:dots|ldots|cdots)(?![A-Za-z])"), "..."),
    (re.compile(r"\^ ?(?:\{ ?)?\\(?:circ|degree)(?![A-Za-z])(?: ?\})?|\^ ?\{ ?o ?\}"), "°"),
    (re.compile(r"\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:pounds|textsterling)(?![A-Za-z])"), "£"),
    (re.compile(r"\\(?:euro|texteuro)(?![A-Za-z])(?:\{\})?"), "€"),
    (re.compile(r"\\(?:textdollar)(?![A-Za-z])(?:\{\})?"), "$"),
    (re.compile(r"\\(?:land|wedge)(?![A-Za-z])"), " and "),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), " or "),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r" ?\{ ?, ?\} ?"), ","),
    (re.compile(r"\{\.\}"), "."),
    (re.compile(r"\{ ?([<>]=?|=) ?\}"), r"\1"),
)  # fmt: skip
_POWER = re.compile(r"(?:(?<=[\d)\]}])|(?<=\b[A-Za-z]))(?:\*\*| \*\* )(?=[\w(\\{]|[.-]\d)")
_EMPHASIS = re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])([^*\n]*[^\s*])\*\*")
_BOLD = re.compile(r"\*\*|__(?!\w)|(?<!\w)__|`+")
_ITALIC = re.compile(r"(?<![\w*)}\]])([*_])(?=\S)([^*_\n]*)(?<=\S)\1(?![\w*])")
_TAG = re.compile(r"</?(?:[A-Za-z][a-z]{2,20}|br?|p|em)/?>|<\|[\w-]{1,30}\|>|</?s>")
_CALCULATION = re.compile(r"<<[^<>]{0,200}>>")
"""What GSM8K's solutions give to a calculator."""
_FANCY = re.compile("[✀-➿☀-⛿\U0001f000-\U0001faff️]")


def fold_symbols(text: str) -> str:
    """Unicode's mathematical, full-width and typographic characters as ASCII and LaTeX."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda m: "^{" + "".join(map(_SUPERSCRIPTS.__getitem__, m[0])) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + "".join(map(_SUBSCRIPTS.__getitem__, m[0])) + "}", text)
    text = _VULGAR.sub(_vulgar, text)
    text = _DASH.sub("-", _RANGE.sub(" to ", text.translate(_TRANSLATION)))
    return unicodedata.normalize("NFKC", _FANCY.sub("", text))


def _vulgar(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return f"\\frac{{{above}}}{{{below}}}"


def without_markdown(text: str) -> str:
    """The text without emphasis, code marks, closing tags and end-of-turn tokens; a Python power is ``^``."""
    text = _EMPHASIS.sub(r"\1", _TAG.sub(" ", _CALCULATION.sub("", text)))
    text = _POWER.sub("^", text)
    text = _BOLD.sub("", text)
    return _ITALIC.sub(r"\2", text)


def plain(answer: str) -> str:
    """An answer in one spelling: LaTeX's fonts, sizes, spaces and synonyms are gone, and ``$`` around it.

    What is left of LaTeX are \\frac, \\sqrt, braces, Greek letters, functions, sets and environments.
    """
    text = without_markdown(fold_symbols(answer))
    text = _NO_SPACE.sub("", text).replace("\\\\ ", "\\\\")
    for left, right in (("\\(", "\\)"), ("\\[", "\\]")):
        text = text.replace(left, " ").replace(right, " ")
    text = _SIZE.sub(" ", _COLOUR.sub("", text))
    for _ in range(3):  # fonts within fonts
        text, changes = _FONT.subn(r" \1 ", text)
        if not changes:
            break
    text = _FONT_OF_MORE.sub("", text)
    text = _SPACE.sub(" ", text)
    for pattern, name in _NAMES:
        text = pattern.sub(name, text)
    return " ".join(text.split())
