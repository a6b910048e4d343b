"""Heuristics that judge one response without a reference.

They see form, not truth. A fluent falsehood scores well and a terse truth may score less; a
heuristic reads surface signs (loops, cut ends, refusals, stray tokens, shared words), knows
English best, and understands nothing. Use the score to compare two models on the same prompts
and to find rows worth reading, never as proof that an answer is right.

Each heuristic is a pure function to a share between 0 and 1, 1 best. Regular expressions here
use no construct that backtracks over unbounded text: the time is linear in the text.
"""

import json
import math
import re
import unicodedata
from typing import TypedDict

# Why these weights: the mean is geometric (see `judge`), and a share of 0 counts as FLOOR, so a
# heuristic that fails alone leaves FLOOR ** weight. A loop or a refusal is worthless however
# tidy: 0.02 ** 0.24 = 0.39. Cut or far too short leaves 0.58. Bad format does the least harm
# and relevance is the least sure sign: 0.63.
WEIGHTS = {
    "repetition": 0.24,
    "refusal": 0.24,
    "completeness": 0.14,
    "length": 0.14,
    "relevance": 0.12,
    "format": 0.12,
}
FLOOR = 0.02
NEUTRAL = 0.5

# An ideograph or kana counts as a word: those scripts do not put spaces between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_CLOSED_PROMPT = re.compile(
    r"\b(?:classify|sentiment|categor(?:y|ize|ise)|label|(?:one|single|1)[ -]word|yes or no"
    r"|true or false|only with|who|when|where|which|how (?:many|much|old|far|long|tall))\b"
    r"|^(?:is|are|was|were|do|does|did|can|has|have)\b",
    re.I,
)
_OPEN_PROMPT = re.compile(
    r"\b(?:explain|describe|discuss|compare|summari[sz]e|why|write|essay|story|poem|steps"
    r"|how (?:do|does|did|can|could|should|would|to))\b",
    re.I,
)
_LOOP = re.compile(r"([^\s\d\-=_*#.~\u2500-\u257f]{1,8}?)\1{9,}")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+", re.M)
_FENCE = re.compile(r"^[ \t]*```", re.M)
_DANGLING = (
    "a an and are as at because but by for from if in into is of on or than that the their to was "
    "were which with your"
)
_STOPWORDS = (
    f"{_DANGLING} about be been briefly can classify could define describe did do does explain "
    "following give had has have he her his how i it its list make me my name not our please s she "
    "should so some t tell text them then there these they this those us we what when where who "
    "why will word words would write you"
)
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b[\w ]{0,30},? i\b"
    r"|\b(?:sorry|apologi[sz]e),? (?:but )?i (?:can't|cannot|can not|won't|am un)"
    r"|\bi (?:can't|cannot|can not|won't|will not) (?:be able to )?"
    r"(?:help(?! it| but)|assist|provide|comply|answer|fulfill?|do that|generate|discuss|engage"
    r"|respond|support|create|write|access)\b"
    r"|\bi(?:'m| am) (?:unable|not able|not allowed|not comfortable)\b"
    r"|\bi (?:must|have to) (?:respectfully )?(?:decline|refuse)\b",
    re.I,
)
_CONTROL = re.compile(
    r"<[|｜][^\s<>]{1,40}[|｜]>|</s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|\n(?:user|assistant)\n|^### (?:Human|Instruction|Response):",
    re.M,
)
_MOJIBAKE = re.compile(
    r"[\ufffd\ud800-\udfff\x00-\x08\x0e-\x1f\x7f-\x9f]|Ã[\x80-\xbf]|Â[\xa1-\xbf]|â[€‚]"
)
_ASKS_JSON = re.compile(
    r"\b(?:as|in|return|output|(?:respond|reply|answer) (?:with|in)|valid|only) (?:an? )?json\b",
    re.I,
)
_ASKS_LIST = re.compile(
    r"^(?:please )?list\b|\bbullet|\bnumbered list\b|\b(?:as|make|write|give me) a list\b", re.I
)
_JSON_BLOCK = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.S | re.I)


LABELS = ("good", "fair", "poor")


class Judgement(TypedDict):
    """The score (0 to 1), its label, and the share (0 to 1) that each heuristic gave."""

    score: float
    label: str
    shares: dict[str, float]


def judge(
    prompt: str,
    response: str,
    *,
    good_threshold: float,
    fair_threshold: float,
    finished: bool | None = None,
) -> Judgement:
    """Weighted geometric mean of the heuristics: score = Π max(share, FLOOR) ** weight.

    Geometric, because good marks do not make up for a fatal one: a tidy loop is still a loop.
    The label is "good" at `good_threshold` or more, "fair" at `fair_threshold` or more, else
    "poor". An empty response scores 0. `finished` says whether generation ended by itself
    (True), was stopped at the length limit (False), or that nobody knows (None).
    """
    if not response.strip():
        return Judgement(score=0.0, label="poor", shares=dict.fromkeys(WEIGHTS, 0.0))
    shares = {
        "repetition": repetition(response),
        "refusal": refusal(response),
        "completeness": completeness(response, finished),
        "length": length(prompt, response),
        "relevance": relevance(prompt, response),
        "format": format(prompt, response),
    }
    score = math.prod(max(shares[name], FLOOR) ** weight for name, weight in WEIGHTS.items())
    fair = "fair" if score >= fair_threshold else "poor"
    return Judgement(score=score, label="good" if score >= good_threshold else fair, shares=shares)


def length(prompt: str, response: str) -> float:
    """min(1, words / words needed): is there enough of an answer?

    One word is enough for a prompt that asks for a label, a fact or yes/no; 12 for one that asks
    to explain or write; 4 for the rest. A prompt that reads both ways counts as closed, because
    the text to classify often holds the words of an open question. Length alone is no fault at
    the other end: rambling shows as repetition or as a cut end.
    """
    needed = 1 if _CLOSED_PROMPT.search(prompt) else 12 if _OPEN_PROMPT.search(prompt) else 4
    return min(1.0, len(_words(response)) / needed)


def repetition(response: str) -> float:
    """1 - the largest of three shares: repeated word trigrams, repeated lines, looping characters.

    Lines are compared without their list markers, which would hide a loop ("1. Eat. 2. Eat."),
    and only if they hold two words. A loop is a unit of 1 to 8 characters ten times in a row;
    digits, whitespace and rules (`-----`) are exempt. A thousand words of honest prose score over
    0.95, a page of code about 0.85.
    """
    words = _words(response)
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    lines = [_LIST_ITEM.sub("", line).strip() for line in response.splitlines()]
    lines = [line for line in lines if len(line.split(maxsplit=2)) > 1]
    looping = sum(len(match[0]) for match in _LOOP.finditer(response)) / max(1, len(response))
    repeated = [1 - len(set(items)) / len(items) for items in (trigrams, lines) if items]
    return 1 - max(looping, *repeated, 0.0)


def completeness(response: str, finished: bool | None = None) -> float:
    """Does the response end like a finished one?

    By its shape: 0.2 with an open code fence or bracket, or an end that calls for more (a comma,
    "the"); 1 when it ends in other punctuation or a symbol, in a list item, or is at most five
    words (an answer such as "Paris" needs no full stop); else 0.6. When `finished` is known,
    the mean of the shape and of `finished` as 0 or 1.
    """
    text = response.strip()
    if not text:
        return 0.0
    bare = text.rstrip("*_\"'`”’ ") or text
    words = _words(text)
    last_line = text.rsplit("\n", 1)[-1]
    ends_in_word = unicodedata.category(bare[-1])[0] in "LMN"
    if (
        _fence_is_open(text)
        or _brackets_are_open(text)
        or bare[-1] in ",:-–—/&+=<([{"
        or (ends_in_word and words and words[-1] in _DANGLING.split())
    ):
        shape = 0.2
    elif not ends_in_word or _LIST_ITEM.match(last_line) or len(words) <= 5:
        shape = 1.0
    else:
        shape = 0.6
    return shape if finished is None else (shape + finished) / 2


def relevance(prompt: str, response: str) -> float:
    """Share of the prompt's content words that come back: shared / min(2, content words).

    Content words are those that are not stopwords, cut to five letters as a cheap stemmer. A
    short factual answer ("Paris") need not repeat the question, so lack of overlap is little
    evidence there: the share is at least 0.5 * (1 - words / 30). A prompt without content words
    gives a neutral 0.5, and one with a single content word at least that: a definition need not
    hold the word it defines. A response that only echoes a prompt of four or more words gives 0.
    """
    asked, answered = _words(prompt), _words(response)
    if not answered or (asked == answered and len(asked) > 3):
        return 0.0
    content = {word[:5] for word in set(asked) - set(_STOPWORDS.split())}
    if not content:
        return NEUTRAL
    shared = len(content & {word[:5] for word in answered}) / min(2, len(content))
    floor = NEUTRAL * (1 - len(answered) / 30) if len(content) > 1 else NEUTRAL
    return min(1.0, max(shared, floor))


def refusal(response: str) -> float:
    """1 with no refusal, 0 when one opens the response (first 100 characters), 0.5 further on.

    English phrases only. It cannot tell a refusal that is right from one that is not.
    """
    match = _REFUSAL.search(response.replace("’", "'"))
    if match is None:
        return 1.0
    return 0.0 if match.start() < 100 else 0.5


def format(prompt: str, response: str) -> float:
    """0 with a leaked control token (one that the prompt does not hold), else 0.5 ** faults.

    Faults: an open code fence; unbalanced brackets; unbalanced double quotes; mojibake, control
    or replacement characters; not JSON, or not a list, where the prompt asks for one.
    """
    if any(match[0] not in prompt for match in _CONTROL.finditer(response)):
        return 0.0
    stray = any(response.count(a) < response.count(b) for a, b in ("[]", "{}"))
    faults = [
        _fence_is_open(response),
        _brackets_are_open(response) or stray,
        response.count('"') % 2 or response.count("“") > sum(map(response.count, "”„")),
        _MOJIBAKE.search(response),
        _ASKS_JSON.search(prompt) and not _is_json(response),
        _ASKS_LIST.search(prompt) and not _is_list(response),
    ]
    return float(0.5 ** sum(map(bool, faults)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _fence_is_open(text: str) -> bool:
    return len(_FENCE.findall(text)) % 2 == 1


def _brackets_are_open(text: str) -> bool:
    # By counts. A stray ")" is no fault: "1)" and ":)" are common.
    return any(text.count(a) > text.count(b) for a, b in ("()", "[]", "{}"))


def _is_json(text: str) -> bool:
    block = _JSON_BLOCK.search(text)
    try:
        json.loads(block[1] if block else text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_list(text: str) -> bool:
    items = len(_LIST_ITEM.findall(text))
    return items > 1 or len(text.splitlines()) > 1 or len(re.findall("[,;、，]", text)) > 1
