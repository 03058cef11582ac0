"""What a caption may look like: cleaned of what no text needs, and flagged where it is no description.

Captions come from files, models and servers of others. The flags:

    empty      nothing is left after cleaning
    thoughts   a model that reasons aloud was stopped before it answered
    refusal    who should describe the clip speaks of itself instead: declines, or tells that it sees nothing
    loop       the same words again and again, as a model that cannot stop writes them
    truncated  it was cut: at the writer's limit of tokens, or at MAX_CHARACTERS
    opener     it begins with words about the video ("The video shows"), not with what is seen
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from opensora_repro.data.caption.unwrap import answer_turn, is_about_video, without_courtesies, without_thoughts

MAX_CHARACTERS = 4000  # several times what a text encoder reads
EMPTY, THOUGHTS, REFUSAL, LOOP, TRUNCATED = "empty", "thoughts", "refusal", "loop", "truncated"
OPENER = "opener"
REJECTED = {  # what is no caption at all
    EMPTY: "the caption is empty",
    THOUGHTS: "a model's thoughts without an answer (a higher --max-tokens lets it finish)",
    REFUSAL: "looks like a refusal",
}


@dataclass(frozen=True)
class Caption:
    """A clean caption, its flag ("" for none), and the reason for which the clip is without one.

    `unwrapped`: thoughts, marks of a chat or courtesies were around it.
    """

    text: str = ""
    flag: str = ""
    reason: str = ""
    unwrapped: bool = False


def judged(text: str, *, cut: bool = False) -> Caption:
    """Return a text unwrapped, cleaned and flagged; `cut`: its writer was stopped before it had finished."""
    answer = without_thoughts(text)
    if answer is None:
        return Caption(clean(text)[0], THOUGHTS)
    bare = without_courtesies(answer_turn(answer))
    caption, shortened = clean(bare)
    flag = flag_of(caption, cut=cut or shortened) or (OPENER if is_about_video(caption) else "")
    return Caption(caption, flag, unwrapped=bare.strip() != text.strip())


def clean(text: str) -> tuple[str, bool]:
    """Return the text on one line, without characters that are not seen, and whether it had to be cut.

    Joiners stay, which some scripts and pictograms need; other control and format characters go, among them those that
    turn the direction of writing.
    """
    text = text[: 4 * MAX_CHARACTERS]  # bounds the work
    kept = "".join(" " if c.isspace() else c for c in text if c.isspace() or c in "\u200c\u200d" or _is_seen(c))
    kept = " ".join(kept.split())
    if len(kept) <= MAX_CHARACTERS:
        return kept, len(text) == 4 * MAX_CHARACTERS
    return kept[:MAX_CHARACTERS].rsplit(" ", 1)[0].rstrip(), True


def _is_seen(character: str) -> bool:
    return unicodedata.category(character)[0] != "C"  # control, format, surrogate, private, unassigned


def flag_of(caption: str, *, cut: bool = False) -> str:
    """Return the flag of a clean caption, the gravest where there are several; "" for none."""
    if not any(c.isalnum() for c in caption):
        return EMPTY
    if is_refusal(caption):
        return REFUSAL
    if is_loop(caption):
        return LOOP
    return TRUNCATED if cut else ""


def ends_sentence(text: str) -> bool:
    """True for a text that ends with a full stop or its like, whatever closes after it."""
    return text.rstrip("\"'”’»)]*` \n").endswith((".", "!", "?", "…", "。", "！", "？", "।", "۔"))


# ---- refusals
#
# A description speaks of what is seen; a refusal of the one who should see. So a caption is one if, in its first two
# sentences and at a sentence's start, the writer says "I cannot describe ...", "As an AI ...", or asks for the picture
# that it did not get. Speech that a caption quotes does not count, nor what somebody in the clip is sorry for.

OPENING = 2  # sentences
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»|「[^」]*」|(?<!\w)'[^\"]*?'(?!\w)")
_SENTENCE = re.compile(r"[.!?;:…。！？；]+\s*|\s+[-–—]\s+")
_LEAD = re.compile(
    r"^(?:(?:well|hello|hi|thanks?(?: you)?(?: for [^,]*)?|unfortunately|regrettably|however|but|and|so|sadly|"
    r"sorry|apologies|my (?:sincere )?apologies|(?:i|we) apologi[sz]e(?: for [^,]*)?|"
    r"(?:i|we)(?: am|'m| are|'re) (?:very |really |so |truly )?(?:sorry|afraid)(?: for [^,]*| to say)?(?: that)?|"
    r"at this time|currently|(?:based on|given|from|without|since|because|as|if|while|although) [^,]*(?=,))\b[\s,]*)+"
)
_APOLOGY = re.compile(r"^(?:(?:i|we)(?: am|'m| are|'re) (?:very |really |so |truly )?sorry|(?:i|we) apologi[sz]e)\b")
_MEDIA = r"(?:image|picture|photo(?:graph)?|video|clip|footage|frame|screenshot|media|file|attachment|link|content)s?"
_CANNOT = (
    r"(?:can(?:no|')t|can not|could(?: not|n't)|won't|will not|do(?: not|n't)|did(?: not|n't)|must decline to|"
    r"(?:am|'m|are|'re|was|were) (?:not (?:able|allowed|permitted|designed|programmed|comfortable)|unable)(?: to)?|"
    r"have no (?:way to|ability to|means to)|lack the ability to)"
)
_SKILL = r"(?:have|possess) (?:the (?:ability|capability|capacity)|access|any (?:image|visual|video)|enough details?)"
_TASK = (
    r"(?:assist|comply|fulfil+|describ\w+|identif\w+|caption\w*|generat\w+|provid\w+|process\w*|analy[sz]\w+|"
    r"interpret\w*|recogni[sz]\w+|determin\w+|continue|complete|engage|answer\w*|"
    r"help(?= you\b| with\b| in\b|[ ,]*$)|" + _SKILL + ")"
)
_SENSE = r"(?:see|view|access|open|watch|play|load|display|receive)"
_ADVERB = r"(?:(?:just|also|\w+ly) )*"
_MODEL = r"(?:ai|artificial intelligence|(?:\w+[- ])?(?:large )?language model|text-based|multimodal model)"
_MISSED = rf"(?:no {_MEDIA}|(?:the|your) {_MEDIA} (?:was|were|is|are|has|have|did)(?: not|n't))"
_BROKE = r"(?:(?:can(?:no|')t|could(?: not|n't)) be|failed to|did not|didn't)"
_RULES = r"(?:violat\w+|goes against|against (?:my|our)|not (?:allowed|permitted)|inappropriate for me)"
_REFUSALS = [
    re.compile(pattern)
    for pattern in (
        rf"^(?:i|we) ?{_CANNOT} {_ADVERB}(?:be able to )?{_TASK}\b",
        rf"^(?:i|we) ?{_CANNOT} {_ADVERB}{_SENSE}\b.*\b{_MEDIA}\b",
        rf"^(?:unable|not able) to (?:{_TASK}|{_SENSE})\b",
        rf"^as an? {_MODEL}\b",
        rf"^(?:i am|i'm) (?:just |only |merely )?an? {_MODEL}\b",
        r"^(?:i )?(?:must|have to) (?:respectfully )?(?:decline|refuse)\b",
        rf"^(?:there (?:is|was|were|are|seems to be) |i see |it (?:seems|looks|appears)(?: that)? )?{_MISSED}\b"
        r".{0,30}\b(?:provided|attached|uploaded|supplied|c[ao]me through|shared with)",
        rf"^(?:the|this|your) {_MEDIA} {_BROKE} (?:load|display|process|open|access|analy[sz]|describ|come through)",
        r"^(?:please|could you(?: please)?|can you(?: please)?|kindly) (?:re-?)?(?:provide|upload|share|attach|send)\b"
        rf".*\b(?:{_MEDIA}|description|details|it)\b",
        rf"^(?:this|the|your) (?:request|prompt|content|image|video)\b.{{0,40}}\b{_RULES}\b",
        r"^作为(?:一个|一名|一款)?(?:大型)?(?:ai|人工智能|语言模型)",
        r"^(?:很?抱歉|非常抱歉|对不起|不好意思)?[,，、 ]*我?(?:无法|不能|没有办法|没法)"
        r"(?:为您|帮您|对|看到|查看|识别|描述|提供|处理|分析|回答|满足|协助)",
    )
]


def is_refusal(caption: str) -> bool:
    """True where the writer speaks of itself instead of the clip."""
    text = caption[:MAX_CHARACTERS].lower().replace("’", "'").replace("‘", "'")
    text = _QUOTED.sub(" ", text)
    sentences = [part.strip(" ,*_#>\"'") for part in _SENTENCE.split(text)]
    sentences = [part for part in sentences if part][: OPENING + 1]  # one more where the first only greets
    for sentence in sentences:
        rest = _LEAD.sub("", sentence).strip(" ,")
        if any(pattern.search(part) for pattern in _REFUSALS for part in (sentence, rest)):
            return True
    return len(sentences) == 1 and bool(_APOLOGY.match(sentences[0]))


# ---- loops

FEWEST, LATEST = 8, 600  # words: that repeats must cover, that are looked at (a model's loops last to the end)
# Of scripts without spaces, a character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+(?:'[^\W_]+)*")


def is_loop(caption: str) -> bool:
    """True where a phrase follows itself three times (one or two words: five and four), or a sentence comes thrice."""
    words = _WORD.findall(caption.lower())[-LATEST:]
    for period in range(1, len(words) // 3 + 1):
        wanted = max(FEWEST, period * {1: 5, 2: 4}.get(period, 3))
        run = period
        for at in range(period, len(words)):
            run = run + 1 if words[at] == words[at - period] else period
            if run >= wanted:
                return True
    sentences = Counter(tuple(_WORD.findall(part)) for part in _SENTENCE.split(caption.lower()))
    return any(count >= 3 and len(sentence) >= 4 for sentence, count in sentences.items())
