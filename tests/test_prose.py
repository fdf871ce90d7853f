"""No measured number is typed: sentences of pages and chapters that have to be computed.

How a typed measurement is told from a setting, a definition or a paper's number: sentence by
sentence, outside code, maths, links and citations. A sentence is suspected when it holds a
quantity of the kind that is measured (QUANTITY), or when it compares (COMPARISON) and speaks of
evidence (EVIDENCE). It is excused when it names whose number it is (ATTRIBUTED), or when it states
a setting (SETTING) and speaks of no outcome (OUTCOME). What is left belongs into a cell that
computes it, or into EXCEPTIONS with a reason.
"""

import re

import nbformat
import pytest

from jahs_utils.chapters import book_root, chapter_names, chapter_path


def words(*alternatives: str) -> re.Pattern:
    """Any of these expressions as whole words, in upper or lower case."""
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b", re.IGNORECASE)


COUNT = r"(?:two|three|four|five|six|seven|eight|nine|ten|half|\d[\d.,]*)"
UNITS = "percent|points?|seconds?|s|ms|milliseconds?|minutes?|min|hours?|thousand|million|[MG]i?B"
MORE = "as|the|more|less|faster|slower|cheaper|larger|smaller|better"
QUANTITY = re.compile(
    rf"\d\s*%|{COUNT}\s*\b(?:{UNITS})\b|±|\bp\s*[=<]\s*0|\b{COUNT} of (?:the |all )?{COUNT}\b"
    rf"|\b{COUNT} times (?:{MORE})\b|(?<![\w.])\d+\.\d+(?!\w|\.\d)",
    re.IGNORECASE,
)
COMPARISON = words(
    *("better", "worse", "best", "worst", "beats?", "wins?", "won", "loses?", "lost", "ahead"),
    *("behind", "level with", "no difference", "faster", "slower", "cheaper", "more accurate"),
    *("less accurate", "outperforms?", "as good as", "higher", "lower"),
)
EVIDENCE = words(
    *("here", "ours?", "we found", "measured", "recorded", "rows?", "seeds?", "runs"),
    *("tables? (?:above|below)", "figure"),
)
ATTRIBUTED = re.compile(
    words(
        *("papers?", "reports?", "reported", "slides?", "prints?", "printed", "authors?"),
        *("appendix", r"table \d", r"figure \d", "Berg", "Zela", "Grathwohl", "Brock", "Yüce"),
        *("Falkner", "Li et al", "Maile", "Roy and Vetterli"),
    ).pattern
    + r"|\{cite",
    re.IGNORECASE,
)
SETTING = words(
    *("rates?", "momentum", "decay", "budgets?", "limit(?:s|ed)?", "thresholds?", "held[ -]out"),
    *("hold", "batch(?:es)?", "epochs?", "steps?", "profiles?", "defaults?", "temperatures?"),
    *("probability", "intervals?", "level", "images", "kernels?", "channels", "between", "from"),
    *("at most", "at least", "factor", "share", "weights?", "exponent", "standard", "quick", "gpu"),
    *("epsilon", "gamma", "beta", "python", "version", "session", "reading"),
)
OUTCOME = words(
    *(r"accura\w+", "errors?", "correlation", "correlates?", "regret", "better", "worse", "faster"),
    *("slower", "points", "wins?", "loses?", "lost", "costs", "took", "takes", "cheaper", "gains?"),
    "found",
)
SKIPPED = re.compile(
    r"```.*?```|~~~.*?~~~|\$\$.*?\$\$(?: *\([\w-]+\))?|<!--.*?-->|\\begin\{.*?\\end\{\w+\*?\}",
    re.DOTALL,
)
INLINE = re.compile(r"`[^`]*`|\$[^$\n]*\$|(?<=\])\([^)\s]*\)")

# (page, what the sentence holds): why it may stand as text. At most 25.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def prose(text: str) -> str:
    """Markdown without code, maths, links' targets, option lines and tables of settings."""
    text = re.sub(r"(\{cite[^}]*\})`[^`]*`", r"\1", SKIPPED.sub("", text))
    lines = (line for line in text.splitlines() if not re.match(r"\s*(?::\w[\w-]*:|:{3,}|#)", line))
    return INLINE.sub("CODE", "\n".join(lines))


def sentences(text: str) -> list[str]:
    """Sentences of prose; an item of a list and a line of a table are sentences of their own."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) ?)", prose(text))
    return [
        " ".join(sentence.split())
        for block in blocks
        for sentence in re.split(r"(?<=[.:;!?])\s+(?=[A-Z*(])", block)
        if sentence.strip()
    ]


def suspected(sentence: str) -> bool:
    """Whether a sentence says something measured that nobody computed."""
    if ATTRIBUTED.search(sentence):
        return False
    if COMPARISON.search(sentence) and EVIDENCE.search(sentence):
        return True
    excused = SETTING.search(sentence) and not OUTCOME.search(sentence)
    return bool(QUANTITY.search(sentence)) and not excused


def texts() -> dict[str, str]:
    """The Markdown of every chapter and page."""
    pages = {
        name: "\n\n".join(
            cell.source
            for cell in nbformat.read(chapter_path(name), as_version=4).cells
            if cell.cell_type == "markdown"
        )
        for name in chapter_names()
    }
    folder = book_root() / "book"
    return pages | {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}


@pytest.mark.parametrize("page", sorted(texts()))
def test_no_measured_number_is_typed(page):
    known = [part for where, part in EXCEPTIONS if where == page]
    typed = [s for s in sentences(texts()[page]) if suspected(s) and not any(k in s for k in known)]
    assert typed == []


def test_exceptions_are_few_reasoned_and_used():
    assert len(EXCEPTIONS) <= 25
    assert all(EXCEPTIONS.values())
    pages = {page: sentences(text) for page, text in texts().items()}
    unused = [(p, k) for p, k in EXCEPTIONS if not any(k in s and suspected(s) for s in pages[p])]
    assert unused == []


@pytest.mark.parametrize(
    "typed",
    [
        "Joint search needs 36 to 40 percent less.",
        "SHR is worse than NASH in every seed.",
        "The error falls by 1.7 points.",
        "Three of eight children do better without their parent.",
        "A score is 117 times cheaper than a training.",
        "The restart wins in three of four steps.",
        "Spearman's correlation is 0.72.",
        "BOHB is ahead of random search on all recorded functions.",
        "At learning rate 0.1 the accuracy is 92 %.",
    ],
)
def test_a_typed_measurement_is_noticed(typed):
    assert suspected(typed)


@pytest.mark.parametrize(
    "text",
    [
        "The paper prints 91.2 ± 0.5 % for the baseline.",
        "{cite:t}`zela2018towards` report an error of 3.18 %.",
        "The learning rate is 0.05, and 10 % of the training images are held out.",
        "Successive halving keeps the better half and gives it more epochs.",
        "Two convolutions make a block.",
        "Budgets go from 1 to 81 in factors of 3.",
        "$\\\\sigma > 0.1$ counts, and `lr=0.1` is the default.",
    ],
)
def test_settings_definitions_and_numbers_of_papers_may_stand(text):
    assert not any(map(suspected, sentences(text)))
