"""What a caption may look like: unwrapped, cleaned of what no text needs, and flagged where it is no description.

Captions come from files, models and servers of others. The flags:

    empty      nothing is left after cleaning
    thoughts   a model that reasons aloud was stopped before it answered
    refusal    who should describe the clip speaks of itself instead: declines, or tells that it sees nothing
    loop       the same words again and again, as a model that cannot stop writes them
    truncated  it was cut: at the writer's limit of tokens, or at MAX_CHARACTERS
    opener     it begins with words about the video ("The video shows"), not with what is seen
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from opensora_repro.data.caption_values import texts_in

MAX_CHARACTERS = 4000  # several times what a text encoder reads
EMPTY, THOUGHTS, REFUSAL, LOOP, TRUNCATED = "empty", "thoughts", "refusal", "loop", "truncated"
OPENER = "opener"
REJECTED = {  # what is no caption at all
    EMPTY: "the caption is empty",
    THOUGHTS: "a model's thoughts without an answer (a higher --max-tokens lets it finish)",
    REFUSAL: "looks like a refusal",
}


_SPACES = re.compile(r"\s{3,}")


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
    text = _SPACES.sub(lambda run: "\n\n" if "\n" in run[0] else " ", text)  # else a rule tries each of a long run
    answer = without_thoughts(text)
    if answer is None:
        return Caption(clean(text)[0], THOUGHTS)
    bare = without_courtesies(answer_turn(answer)[: 5 * MAX_CHARACTERS])  # bounds the work; `clean` tells of the cut
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
        least = max(FEWEST, period * {1: 5, 2: 4}.get(period, 3))
        run = period
        for at in range(period, len(words)):
            run = run + 1 if words[at] == words[at - period] else period
            if run >= least:
                return True
    sentences = Counter(tuple(_WORD.findall(part)) for part in _SENTENCE.split(caption.lower()))
    return any(count >= 3 and len(sentence) >= 4 for sentence, count in sentences.items())


# ---- what chat models wrap around a caption: thoughts, marks of turns, courtesies, headings
#
# What a rule cuts is never said of a clip, and has to end as its kind ends (a colon, a mark, a stop), so that "Here is
# where the river bends" and "Sure-footed goats climb" stay whole.
#
# Models that reason aloud write it before the answer, between marks that differ from maker to maker. Many chat
# templates put the opening one into the prompt, so that only the closing one is seen.

_NAME = (
    r"(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad|rationale|cot"
    r"|inner_monologue)(?:[:_]\w+)?"
)
_L, _R = r"(?:<|&lt;)\s?\|?\s?", r"\s?\|?\s?(?:>|&gt;)"
_CHANNEL = r"<\|?channel\|?>\s*"
_OPENS = re.compile(
    rf"{_L}(?:begin_of_|start_)?{_NAME}(?:\s[\w-]+=[^<>]{{1,60}})?{_R}"
    r"|\[(?:begin of )?(?:think|thought|reason)(?:ing)?\]|◁think▷"
    rf"|{_CHANNEL}(?:analysis|commentary|thought)\b|<unused94>",
    re.IGNORECASE,
)
_CLOSES = re.compile(
    rf"{_L}(?:/\s?|end_of_|end_){_NAME}{_R}|\[(?:/|end of )(?:think|thought|reason)(?:ing)?\]|◁/think▷"
    rf"|{_CHANNEL}final\b[^<]{{0,40}}<\|message\|>|<channel\|>|<unused95>",
    re.IGNORECASE,
)
# The marks of channels are special tokens; servers that drop those leave "analysisWe see ...assistantfinalA dog".
_UNMARKED = re.compile(r"\s*analysis(?=[A-Z])(?:.*assistant\s?final)?", re.DOTALL)
# Without any marks, headings part thoughts and answer.
_HEADED = re.compile(
    r"\W{0,4}(?:thinking|thoughts?|reasoning|analysis|step[ -]by[ -]step|let(?: me|'s) think)\b.*"
    r"\n\W{0,4}(?:final )?(?:answer|caption|description|response|output)\b(?=\W{0,3}[:：])"
    r"|.*\n\W{0,4}final (?:answer|caption|description|response)\b(?=\W{0,3}[:：])",
    re.DOTALL | re.IGNORECASE,
)


def without_thoughts(text: str) -> str | None:
    """Return what follows the last thought; None where a thought has no end, so that no answer follows."""
    if unmarked := _UNMARKED.match(text):
        return text[unmarked.end() :] if unmarked[0].endswith("final") else None
    rest = text[max((closing.end() for closing in _CLOSES.finditer(text)), default=0) :]
    if _OPENS.search(rest):
        return None
    headed = _HEADED.match(rest)
    return f"answer{rest[headed.end() :]}" if headed else rest


# ---- turns

_ROLE = r"(?:user|human|system|developer|tool|assistant|model|bot|gpt)"
_TURN = re.compile(
    rf"<\|(?:im_start|start|start_of_role|turn)\|?>\s*(?P<a>{_ROLE})?\b[^\S\n]*"
    rf"|<\|start_header_id\|>\s*(?P<b>{_ROLE})?\s*<\|end_header_id\|>"
    rf"|<start_of_turn>\s*(?P<c>{_ROLE})?\b"
    rf"|<[|｜]\s?(?P<d>{_ROLE})\s?[|｜]>"
    rf"|(?:^|\n)\s*#+\s*(?P<e>{_ROLE}|instruction|response)\s*:"
    r"|(?:^|\n)\s*(?:ai |gpt4 correct )?assistant\s*(?::|\n)|\n\s*(?P<f>user|human|question)\s*:"
    r"|^\s*(?P<h>user|human)\s*:(?=(?s:.*)\nassistant\s*:)"
    r"|(?P<g>\[INST\])|\[/INST\]"
    r"|<[|｜](?:im_end|end|eot_id|eom_id|eot|endoftext|end_of_text|begin_of_text|begin_of_sentence|end_of_turn|return"
    r"|call|message|end_of_role|end[▁_]of[▁_]sentence|begin[▁_]of[▁_]sentence)[|｜]>"
    r"|</?s>|<(?:bos|eos|pad|end_of_turn|end_of_utterance|turn\||eot_id)>",
    re.IGNORECASE,
)
_ASKED = re.compile(r"user|human|question|system|developer|tool|instruction|\[inst\]", re.IGNORECASE)
# Vicuna's form has both turns on one line; what follows a mark of places, boxes or answers is text.
_ONE_LINE = re.compile(r"\s*USER:.*?ASSISTANT:", re.DOTALL)
_INLINE = re.compile(
    r"<[|｜][^|｜<>\n]{1,40}[|｜]>|</?(?:answer|caption|response|output|image|video|p)>"
    r"|<</?SYS>>|\[/?EOS\]|<0x[0-9A-F]{2}>"
)


def answer_turn(text: str) -> str:
    """Return the first turn of a chat that is no question, without the marks; models may go on with another."""
    text = _ONE_LINE.sub("", text, count=1) if "ASSISTANT:" in text else text
    asked, at = False, 0
    for mark in [*_TURN.finditer(text), None]:
        turn = _INLINE.sub("", text[at : mark.start() if mark else len(text)]).strip()
        if turn and not asked:
            return turn
        if mark:
            asked, at = bool(_ASKED.match(mark[mark.lastgroup] if mark.lastgroup else "")), mark.end()
    return ""


# ---- courtesies and headings

_COURTESY = re.compile(
    r"¡?(?:sure(?: thing)?|certainly|of course|absolutely|definitely|ok(?:ay)?|alright|all right|got it|understood|"
    r"no problem|with pleasure|gladly|happy to help|(?:i'd|i would) be (?:happy|glad) to[^.!:\n]*|here you (?:go|are)|"
    r"(?:great|perfect|excellent)(?=\s?!)|(?:hello|hi)(?: there)?|thanks?(?: you)? for [^.!:\n]*|"
    r"natürlich|gerne?|klar|selbstverständlich|sicher|bien sûr|certainement|d'accord|avec plaisir|"
    r"claro(?: que sí)?|por supuesto|desde luego|certo|certamente|claro que sim|com certeza|конечно|"
    r"natuurlijk|zeker|oczywiście|jasne|tentu(?: saja)?|elbette|tabii|chắc chắn(?: rồi)?|"
    r"बिल्कुल|ज़रूर|بالتأكيد|بالطبع|แน่นอน(?:ครับ|ค่ะ)?|"
    r"好的|[当當]然(?:可以)?|[没沒][问問][题題]|はい|もちろん(?:です)?|承知しました|네|물론(?:입니다|이죠)?)"
    # A sentence ends where the next begins with a capital: "Sure! brand soap" is a name.
    r"(?:\s?(?:[!.]+(?:\s+(?!(?-i:[a-z]))|$)|[:,،，。！：、]+\s*|\n+)|\s[—–-]\s+)",
    re.IGNORECASE,
)
_WORK = (
    r"(?:description|caption|summary|paragraph|overview|breakdown|account|analysis|rewrite|version|answer|response"
    r"|details|output|beschreibung|zusammenfassung|bildunterschrift|légende|résumé|descripción|leyenda|resumen|descrição"
    r"|legenda|descrizione|didascalia|описание|подпись|beschrijving|bijschrift|opis|deskripsi|keterangan|açıklama\w*"
    r"|mô tả|chú thích|विवरण|वर्णन|وصف|คำอธิบาย|설명|캡션|説明|キャプション|[说說]明|描述|字幕)"
)
_OF = r"(?:of|for|based|as|that|in|from|you|der|des|von|zum|de|du|del|della|da|do|van|i|видео)"
_THE_CLIP = r"(?:the|this|these|your|what) (?:\w+ ){0,3}(?:video|clip|footage|frames?|images?|scene|sequence|happens)"
_ANNOUNCED = re.compile(
    r"(?:(?:based on|from) [^.!?:,\n]{1,60}, )?(?:here(?: is|['’]s| are)|below (?:is|are)|the following is|this is"
    r"|i have written|hier (?:ist|sind|kommt)|voici|ci-dessous|aquí (?:está|tienes?|va)|a continuación|aqui está|segue"
    rf"|ecco|вот)(?! (?:where|when|how|why)\b)[^.!?:\n]{{0,60}}?\b{_WORK}(?:s|en)?"
    rf"(?:(?:\s+{_OF}\b[^.!?:\n]{{0,100}}|(?:\s+\w+){{1,2}})?(?:\s?[:：]\s*|\s*\n+\s*)"
    rf"|(?:\s+{_OF} {_THE_CLIP}[^.!?:\n]{{0,60}})?[.](?:\s+|$))"
    r"|here(?:['’]s| is) what (?:happens|is happening|i see|can be seen|the \w+ shows)[^.!?:\n]{0,60}[:：]\s*"
    rf"|the (?:\w+ )?{_WORK}(?: of [^.!?:\n]{{1,60}})? (?:is|reads)(?: as follows)?\s?:\s*|voici\s?:\s*"
    # Of languages whose words stand in another order, or change, a colon after one of them is enough.
    r"|(?:hier (?:is|volgt)|oto|berikut|işte|đây là|यहाँ|إليك|นี่คือ|다음은|こちらが|以下[はがに])"
    rf"[^.!?:：\n]{{0,60}}?{_WORK}[^.!?:：\n]{{0,40}}[:：]\s*"
    r"|(?:以下是|下面是|[这這]是)[^。：:\n]{0,40}(?:描述|[说說]明|字幕|概述|[总總][结結])[^。：:\n]{0,20}[：:。\n]\s*"
    r"|以下は[^。：:\n]{0,40}(?:説明|キャプション|描写)[^。：:\n]{0,20}[：:。\n]\s*",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"(?:#+\s+)?(?:\*\*|__)?(?:(?:video|clip|image|scene|detailed|dense|short|brief|long|final|the|your|my|generated"
    r"|[视視][频頻]|影片|動画)[ \t]*){0,3}"
    rf"{_WORK}(?:\*\*|__)?[ \t]?(?:[:：]|[-–—][ \t]*\n)(?:\*\*|__)?\s*"
    rf"|(?:#+\s+|\*\*)(?:[\w]+[ \t]+){{0,3}}{_WORK}(?:\*\*)?[ \t]*\n+\s*",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"(?<=[.!?。！？\"”*])\s*(?:i hope (?:this|that)|hope this helps|let me know|feel free to|please let me know|"
    r"is there anything else|would you like me to|do you want me to|if you (?:need|have|want|would like|'d like))\b"
    r"[^.!?\n]{0,200}[.!?]*\s*$"
    r"|(?:\n|\s\()\W{0,3}note\b\W{0,3}:[^\n]{0,300}$"
    r"|\s\(?(?:word|character) count: ?\d{1,6}\)?$|\s\(\d{1,6} words\)$"
    r"|\s(?:hashtags: )?#\w{1,60}(?: #\w{1,60}){1,40}$",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "«": "»", "「": "」", "„": "“"}
_AROUND = ("```", "---", "***", "**", "__", "*", "_")  # markdown around the whole; the longer before its beginning
FEW_WORDS, CLOSINGS = 4, 4
_BOXED = re.compile(r"\\boxed\{(?:\\text\{(.*)\}|(.*))\}", re.DOTALL)


def without_courtesies(text: str) -> str:
    """Return the text without "Sure!", "Here is a description of the clip:", "Caption:", "I hope this helps!"."""
    rest = text.strip()
    while found := _COURTESY.match(rest) or _ANNOUNCED.match(rest) or _HEADING.match(rest):
        rest = rest[found.end() :]
    for _ in range(CLOSINGS):
        if found := _CLOSING.search(rest):
            rest = rest[: found.start()].rstrip()
    rest = _unwrapped(rest)
    if len(rest) > 1 and _QUOTES.get(rest[0]) == rest[-1] and rest[-1] not in rest[1:-1]:
        told = rest[1:-1]  # alone, a few words in quotes are what somebody says or what is written somewhere
        rest = told if rest != text.strip() or (ends_sentence(told) and len(told.split()) > FEW_WORDS) else rest
    if rest == text.strip():
        return text
    return rest[:1].upper() + rest[1:]


def _unwrapped(text: str) -> str:
    """Return a text without what is around all of it: a fence or other markdown, an object of JSON, a box."""
    for mark in _AROUND:
        inner = text[len(mark) : -len(mark)]
        if text.startswith(mark) and text.endswith(mark) and inner.strip() and mark not in inner:
            inner = re.sub(r"\A\w*\n", "", inner) if mark == "```" else inner  # its language
            return _unwrapped(inner.strip())
    if box := _BOXED.fullmatch(text):
        return (box[1] or box[2] or "").strip()
    if text.startswith("{") and text.endswith("}"):
        with suppress(ValueError, RecursionError):
            return next((part.strip() for part in texts_in(json.loads(text, strict=False)) if part.strip()), text)
    return re.sub(r"\A(?:[->•]|#+)\s+(?!.*\n)", "", text)  # a list or quotation of one line


# Not cut, for it is part of a sentence, but no words about what is seen either.
_ABOUT = re.compile(
    r"(?:in|throughout|based on) (?:the|this|these|that) (?:short )?(?:video|clip|footage|frames|images?)\b[^.]{0,30},"
    r"|(?:the|this|these) (?:short |given |provided )?(?:video|clip|footage|frames?|images?|sequence)(?: clip)? (?:"
    r"shows?|depicts?|features?|captures?|displays?|presents?|portrays?|illustrates?|begins? with|opens? with|is of)\b"
    r"|(?:das|dieses) video zeigt|(?:la|cette) vidéo montre|(?:el|este) v[ií]deo muestra|o vídeo mostra|"
    r"(?:这|该)?(?:段|个)?(?:视频|画面|短片)(?:中)?(?:展示|显示|呈现|描绘)了?|この(?:動画|映像)(?:で)?は",
    re.IGNORECASE,
)


def is_about_video(caption: str) -> bool:
    """True where a caption begins with the video instead of with what it shows: "The video shows", "In this clip,"."""
    return _ABOUT.match(caption) is not None


def judge(record: dict[str, Any]) -> Caption:
    """Return what became of a clip: a text, or the error in its place."""
    return Caption(reason=record["error"]) if "error" in record else judged(record["text"], cut=record["cut"])
