"""Find the option (a letter from A to J) that a response to a multiple-choice problem chooses.

No option is returned for an ambiguous response, because a guess could count a wrong response as right.
"""

from __future__ import annotations

import re
import unicodedata

_BRACE = re.compile(r"\\[{}]|(?P<open>(?:\\f?box(?:ed)?\s{0,9})?{)|(?P<close>})")
_SPACE = re.compile(r"\\(?:q?quad|(?:thin|en)?space)\b|\\[,;: ]|~")
"""Regular expression for LaTeX commands that produce a space."""
_MARKUP = re.compile(
    r"\\(?:text[a-z]*|math[a-z]*|operatorname|boldsymbol|mbox|bm|bf|rm|left|right)\b|\\[()\[\]!]"
    r"|[*_`${}“”\"]|<[^<>\n]{1,20}>|(?<!\w)['‘’](?=\w{1,20}['‘’])|(?<=\w)['’](?=\s*(?:[:,.\n]|$))"
)
"""Regular expression for text to remove from a response: LaTeX, Markdown, HTML and quotation marks."""
_MARK, _END = "\x02", "\x03"
r"""Placeholder characters for the start and the end of a LaTeX ``\boxed{...}``."""
_WIDE = str.maketrans({"。": ". ", "、": ", ", "【": "[", "】": "]", _MARK: "", _END: ""})
"""Translation table to ASCII for the East Asian punctuation that NFKC normalization does not change.

The table also removes the placeholder characters ``_MARK`` and ``_END`` from a response.
"""
_DOUBLE = re.compile(r"\[\[\s*([A-J])\s*\]\]")
_BLANK = re.compile(r"\s+")

# ---- a letter and its context

_LETTER = (
    r"(?:\(\s*(?P<inside>[A-Ja-j])\s*\)|\[\s*(?P<bracketed>[A-J])\s*\]"
    r"|(?P<bare>[A-J])|(?P<small>[b-hj])(?=[.)]?\s*(?:\n|$)))"
)
_NAME = (
    r"\.\s?(?:[A-Z]\.|(?:coli|elegans|subtilis|cereus|anthracis|pertussis|burgdorferi|difficile|botulinum|tetani"
    r"|perfringens|albicans|jejuni|diphtheriae|trachomatis|melanogaster|rerio|thaliana|fumigatus|pylori|influenzae"
    r"|sapiens|erectus|lamblia|histolytica|faecalis|gallus|discoideum)\b)"
)
"""Regular expression for the text after a letter that is an initial of a name: J. K. Rowling; E. coli."""
_CORRECT = r"(?:(?:clearly|indeed|definitely|therefore)\s)?(?:the\s)?(?:only\s)?(?:correct|right|best|true)\b"
_AFTER = re.compile(
    rf"\s?(?:$|[\n,;:!?)\]\\{_MARK}{_END}]|[-–—]\s|—|\((?!\w\))|因为|而|(?:选项|项|是)?(?:正确|对)|选?项(?:$|[\n.,]))"
    rf"|(?!{_NAME})\.(?!\w)"
    rf"|\s(?:is\s{_CORRECT}|not\s(?:\(?[A-J]\b)|(?i:because|since|as|due|which|so|given|and|with|for|by|while|but"
    r"|rather|instead|only|then|hence|thus|therefore|explanation|reasoning|justification)\b)"
)
"""Regular expression for the text that must follow a bare letter (A to J) that is the chosen option.

In "B because", " because" matches, so B is the chosen option. In "A man", " man" does not match: A is an article.
Letters in parentheses, such as "(B)", are not checked with this expression.
"""
_SECOND = re.compile(
    r"\s*[).:]?\s*(?:(?:,?\s*(?:or|and)\b|/|&|\+|和|或|及)\s*(?:(?:option|choice)\s+)?\(?[A-HJ](?![\w'’-])"
    r"|,\s*\(?[A-HJ](?![\w'’-])\)?+(?!\s+[a-z]))"
)
"""Regular expression for a second option directly after an option letter: A or B; A, C."""
_AT_END = r"(?=\s*[.!]?\s*(?:\n|$|\.\s))"

# ---- words that introduce a letter

_OF = r"(?:\s(?:to|for|of|in|on)\s(?:this|the|that|your)(?:\s[\w-]{1,20}){0,4}?)?"
_IS = (
    r"(?:\b(?:is|are|was|(?:would|should|must|will|has\sto|appears\sto|seems\sto)\sbe|seems|appears)\b"
    r"|['’]s\b|:|=|->|→)"
)
_ADVERB = r"(?:(?:thus|therefore|clearly|definitely|indeed|likely|probably|most\slikely)\s)?"
_NOT = r"(?:not\s(?:option\s)?\(?[A-J]\)?\s?[,;.]?\s?(?:but(?:\srather)?|rather|it(?:\sis|['’]s))\s)?"
_OPTION = r"(?:(?:the\s)?(?:option|choice|letter)\s?:?\s?)?"
_STATEMENT = re.compile(
    rf"{_MARK}(?P<box>[^{_END}]*){_END}"
    r"|(?:(?i:\b(?:answer|choice|option|verdict|selection|correct\s(?:one|letter|statement|alternative))"
    rf"(?:\s(?:letter|choice|option|here)){{0,2}}{_OF}\s?{_IS}\s?:?\s?{_ADVERB}{_NOT}{_OPTION})"
    r"|\bI(?:['’]?(?:ll|d)|\swill|\swould)?\s(?i:choose|chose|pick|select|go\swith|answer)\s(?i:" + _OPTION + ")"
    r"|(?<![^\n])(?:A|Ans)\s?:\s?"
    r"|答案(?:应该|应)?(?:是|为|选)?\s?:?\s?(?:选项)?\s?"
    rf"|(?<![不没如若果])选(?:择|项?[是为])?\s?:?\s?){_LETTER}"
)
r"""Regular expression for a phrase that states which option is chosen.

It matches a ``\boxed{...}``, or a letter after certain words: Answer: B; the correct option is (B); I choose B.
"""
_CONCLUSION = re.compile(
    r"(?:\b(?i:so|hence|thus|therefore)|∴),?\s(?i:it(?:\sis|['’]s|\smust\sbe)\s)?(?i:" + _OPTION + r")"
    rf"\(?(?P<bare>[A-J])\)?{_AT_END}(?!{_NAME})"
)
"""Regular expression for a conclusion that consists of one option: Hence, B."""
_CALLED_CORRECT = re.compile(
    r"(?:\b(?i:option|choice|answer)\s\(?(?P<named>[A-J])\)?|(?<!\S)\((?P<inside>[A-J])\))"
    r"\sis\s(?:the\s)?(?:correct|right|best)\b"
    r"|(?:^|[\n.!?,]\s?|\b(?i:so|hence|thus|therefore|only|think|believe)\s)(?P<begins>[A-J])"
    rf"\sis\s(?:{_CORRECT}(?:\s(?:answer|option|choice)\b)?|the\sanswer\b)"
    r"(?=\s?(?:[.,;:!\n]|$)|\s(?:because|since|as|here)\b)"
    r"|选项\s?\(?(?P<chinese>[A-J])\)?\s?是?(?:正确|对)"
)
"""Regular expression for a statement that an option is correct: Option B is correct; B is the answer."""
_ALONE = re.compile(r"\(?\s*([A-Ja-j])\s*\)?\s*[.:,]?|\[([A-J])\]\.?")
"""Regular expression for an option letter without further text: B; (b); [B]."""
_LED = re.compile(
    rf"(?:(?:option|choice|answer)\s*:?\s*)?(?:\(([A-J])\)|([A-J])(?!(?-i:{_NAME}))"
    r"(?:[).:](?=\s|$)|(?-i:\s[-–—]\s(?=[^\W\d]{2}))))\s*(\S.*)?",
    re.IGNORECASE,
)
"""Regular expression for an option letter followed by the option's text: (B) Paris; B. Paris."""
_ABOUT = re.compile(r"(?:is|are|was|isn['’]t|can['’]?t|cannot)\b")
"""Regular expression for a verb after an option letter, as in a comment on the option: (B) is wrong."""
_BRACKETED = re.compile(r"(?<![^\s,;:])\(([A-J])\)")
_NEGATION = re.compile(
    r"\b(?:not|no|neither|nor|never|wrong|incorrect|false|except|eliminate\w*|rule[sd]?\s+out|either)\b|n['’]t\b", re.I
)


def chosen_option(text: str) -> str | None:
    r"""Return the letter of the option that ``text`` chooses; None if it chooses no option or several.

    The last phrase in ``text`` that states an option, such as ``\boxed{B}`` or "Answer: B", is used. If ``text``
    contains no such phrase, the option is read from the last line, or else from the first line.
    """
    plain = _plain(text)
    found = [(match.end(), _stated_letter(match, plain)) for match in _STATEMENT.finditer(plain)]
    found += [(match.end(), match["bare"]) for match in _CONCLUSION.finditer(plain)]
    correct = [(match.end(), _first_letter(match.groups())) for match in _CALLED_CORRECT.finditer(plain)]
    # "A is correct. B is correct." may discuss several statements, so it chooses no option.
    unique = len({letter for _, letter in correct}) == 1
    found += [(end, letter if unique else None) for end, letter in correct]
    stated = [letter for _, letter in sorted(found, key=lambda statement: statement[0]) if letter != ""]
    return stated[-1] if stated else _outer_line(plain)


def named_option(text: str) -> str | None:
    """Return the option letter if ``text`` is only one option (``B``, ``(b)``, ``B) Paris``), else None."""
    plain = _plain(text).replace(_MARK, "").replace(_END, "").strip()
    plain = re.sub(r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is)?\s*:?\s+", "", plain, flags=re.I)
    if alone := _ALONE.fullmatch(plain):
        return _first_letter(alone.groups())
    led = _LED.fullmatch(plain)
    if led is None or _SECOND.match(plain, led.end(1) if led[1] else led.end(2)):
        return None
    rest = led[3] or ""
    return None if _BRACKETED.search(rest) or _ABOUT.match(rest) else _first_letter(led.groups()[:2])


def _plain(text: str) -> str:
    r"""Return ``text`` without LaTeX, Markdown and HTML markup.

    The content of each ``\boxed{...}`` is placed between the characters ``_MARK`` and ``_END``. Each sequence of white
    space is replaced by one line break if it contains a line break, else by one space.
    """
    plain = unicodedata.normalize("NFKC", text).translate(_WIDE)
    plain = _mark_boxes(_DOUBLE.sub(r"\\boxed{\1}", plain))
    return _BLANK.sub(_one_blank, _MARKUP.sub("", _SPACE.sub(" ", plain)))


def _one_blank(blank: re.Match[str]) -> str:
    return "\n" if "\n" in blank.group() else " "


def _mark_boxes(text: str) -> str:
    r"""Replace each outermost closed ``\boxed{...}`` by the characters ``_MARK``, its content and ``_END``."""
    opened: list[tuple[bool, int, int]] = []
    boxes = []
    for brace in _BRACE.finditer(text):
        if brace["open"]:
            opened.append((brace["open"] != "{", brace.start(), brace.end()))
        elif brace["close"] and opened:
            is_box, start, inside = opened.pop()
            boxes += [(start, inside, brace.start())] * is_box
    parts, at = [], 0
    for start, inside, end in sorted(boxes):
        if start >= at:
            parts += [text[at:start], _MARK, text[inside:end], _END]
            at = end + 1
    return "".join([*parts, text[at:]])


def _stated_letter(match: re.Match[str], plain: str) -> str | None:
    """Return the option letter in a match of ``_STATEMENT``; None if it does not state exactly one option.

    A match is a phrase such as "Answer: B". Returns "" if the letter is an article or part of a name ("Answer: A man").
    ``plain``: the text that contains the match.
    """
    if match["box"] is not None:
        return named_option(match["box"])
    if _SECOND.match(plain, match.end()):
        return None
    return "" if match["bare"] and not _AFTER.match(plain, match.end()) else _first_letter(match.groups()[1:])


def _outer_line(plain: str) -> str | None:
    """Return the option letter in the last line of ``plain``, or else in the first line.

    Returns None if neither line states exactly one option, or if the lines are a list of options.
    """
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    if not lines:
        return None
    lines = [line for line in lines if not line.startswith("A:")] or [""]  # A: is the speaker of a dialogue
    last = lines[-1]
    if (len(lines) == 1 or _ALONE.fullmatch(last)) and (letter := named_option(last)):
        return letter
    if sum(_LED.match(line) is not None or _ALONE.fullmatch(line) is not None for line in lines) > 1:
        return None  # a list of options
    letters: set[str] = set(_BRACKETED.findall(last))
    if len(letters) == 1 and not _NEGATION.search(last):
        return letters.pop()
    return None if letters else named_option(lines[0])


def _first_letter(groups: tuple[str | None, ...]) -> str:
    return next(group for group in groups if group).upper()
