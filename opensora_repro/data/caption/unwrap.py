"""Takes the caption out of what chat models wrap around it: thoughts, marks of turns, courtesies, headings.

What a rule cuts is never said of a clip, and has to end as its kind ends (a colon, a mark, a stop), so that "Here is
where the river bends" and "Sure-footed goats climb" stay whole.
"""

from __future__ import annotations

import re

# ---- thoughts
#
# Models that reason aloud write it before the answer, between marks that differ from maker to maker. Many chat
# templates put the opening one into the prompt, so that only the closing one is seen.

_NAME = r"(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad|rationale)"
_L, _R = r"(?:<|&lt;)\s?\|?\s?", r"\s?\|?\s?(?:>|&gt;)"
_CHANNEL = r"<\|?channel\|?>\s*"
_OPENS = re.compile(
    rf"{_L}(?:begin_of_)?{_NAME}(?:\s[\w-]+=[^<>]{{1,60}})?{_R}|\[(?:think|thinking|reasoning)\]|◁think▷"
    rf"|{_CHANNEL}(?:analysis|commentary|thought)\b|<unused94>",
    re.IGNORECASE,
)
_CLOSES = re.compile(
    rf"{_L}(?:/\s?|end_of_){_NAME}{_R}|\[/(?:think|thinking|reasoning)\]|◁/think▷"
    rf"|{_CHANNEL}final\b[^<]{{0,40}}<\|message\|>|<channel\|>|<unused95>",
    re.IGNORECASE,
)
# The marks of channels are special tokens; servers that drop those leave "analysisWe see ...assistantfinalA dog".
_UNMARKED = re.compile(r"\s*analysis(?=[A-Z])(?:.*assistant\s?final)?", re.DOTALL)


def without_thoughts(text: str) -> str | None:
    """Return what follows the last thought; None where a thought has no end, so that no answer follows."""
    if unmarked := _UNMARKED.match(text):
        return text[unmarked.end() :] if unmarked[0].endswith("final") else None
    rest = text[max((closing.end() for closing in _CLOSES.finditer(text)), default=0) :]
    return None if _OPENS.search(rest) else rest


def opens_thoughts(prompt: str) -> bool:
    """True for a prompt that ends within a thought: what is written next begins there."""
    return without_thoughts(prompt) is None


# ---- turns

_ROLE = r"(?:user|human|system|developer|tool|assistant|model|bot|gpt)"
_TURN = re.compile(
    rf"<\|(?:im_start|start|start_of_role|turn)\|?>\s*(?P<a>{_ROLE})?\b[^\S\n]*"
    rf"|<\|start_header_id\|>\s*(?P<b>{_ROLE})?\s*<\|end_header_id\|>"
    rf"|<start_of_turn>\s*(?P<c>{_ROLE})?\b"
    rf"|<[|｜]\s?(?P<d>{_ROLE})\s?[|｜]>"
    rf"|(?:^|\n)\s*#+\s*(?P<e>{_ROLE}|instruction|response)\s*:"
    r"|(?:^|\n)\s*assistant\s*(?::|\n)|\n\s*(?P<f>user|human)\s*:|^\s*(?P<h>user|human)\s*:(?=(?s:.*)\nassistant\s*:)"
    r"|(?P<g>\[INST\])|\[/INST\]"
    r"|<[|｜](?:im_end|end|eot_id|eom_id|eot|endoftext|end_of_text|begin_of_text|begin_of_sentence|end_of_turn|return"
    r"|call|message|end_of_role|end[▁_]of[▁_]sentence|begin[▁_]of[▁_]sentence)[|｜]>"
    r"|</?s>|<(?:bos|eos|pad|end_of_turn|end_of_utterance|turn\||eot_id)>",
    re.IGNORECASE,
)
_ASKED = re.compile(r"user|human|system|developer|tool|instruction|\[inst\]", re.IGNORECASE)
# Vicuna's form has both turns on one line; what follows a mark of places, boxes or answers is text.
_ONE_LINE = re.compile(r"\s*USER:.*?ASSISTANT:", re.DOTALL)
_INLINE = re.compile(r"<[|｜][^|｜<>\n]{1,40}[|｜]>|</?(?:answer|caption|response|output|image|video)>|<</?SYS>>")


def answer_turn(text: str) -> str:
    """Return the first turn of a chat that is no question, without the marks; models may go on with another."""
    text = _ONE_LINE.sub("", text, count=1)
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
    r"no problem|with pleasure|gladly|happy to help|(?:i'd|i would) be (?:happy|glad) to[^.!:\n]*|"
    r"(?:hello|hi)(?: there)?|thanks?(?: you)? for [^.!:\n]*|"
    r"natürlich|gerne?|klar|selbstverständlich|sicher|bien sûr|certainement|d'accord|avec plaisir|"
    r"claro(?: que sí)?|por supuesto|desde luego|certo|certamente|claro que sim|com certeza|конечно|"
    r"好的|当然(?:可以)?|没问题|もちろん(?:です)?|承知しました|물론(?:입니다|이죠)?)"
    # A sentence ends where the next begins with a capital: "Sure! brand soap" is a name.
    r"\s?(?:[!.]+(?:\s+(?!(?-i:[a-z]))|$)|[:,，。！：、]+\s*|\n+)",
    re.IGNORECASE,
)
_WORK = (
    r"(?:description|caption|summary|paragraph|overview|breakdown|account|analysis|rewrite|version|answer|response|details"
    r"|beschreibung|zusammenfassung|bildunterschrift|description|légende|résumé|descripción|leyenda|resumen"
    r"|descrição|legenda|descrizione|didascalia|описание)"
)
_OF = r"(?:of|for|based|as|that|in|from|you|der|des|von|zum|de|du|del|della|da|do|i|видео)"
_THE_CLIP = r"(?:the|this|these|your|what) (?:\w+ ){0,3}(?:video|clip|footage|frames?|images?|scene|sequence|happens)"
_ANNOUNCED = re.compile(
    r"(?:here(?: is|['’]s| are)|below (?:is|are)|the following is|this is|i have written|"
    r"hier (?:ist|sind|kommt)|voici|ci-dessous|aquí (?:está|tienes?|va)|a continuación|aqui está|segue|ecco|вот)"
    rf"(?! (?:where|when|how|why)\b)[^.!?:\n]{{0,60}}?\b{_WORK}(?:s|en)?"
    rf"(?:(?:\s+{_OF}\b[^.!?:\n]{{0,100}})?(?:\s?[:：]\s*|\s*\n+\s*)"
    rf"|(?:\s+{_OF} {_THE_CLIP}[^.!?:\n]{{0,60}})?[.](?:\s+|$))"
    r"|here(?:['’]s| is) what (?:happens|is happening|i see|can be seen|the \w+ shows)[^.!?:\n]{0,60}[:：]\s*"
    r"|(?:以下是|下面是|这是)[^。：:\n]{0,40}(?:描述|说明|字幕|概述|总结)[^。：:\n]{0,20}[：:。\n]\s*"
    r"|以下は[^。：:\n]{0,40}(?:説明|キャプション|描写)[^。：:\n]{0,20}[：:。\n]\s*",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"(?:#+\s+)?(?:\*\*|__)?(?:(?:video|clip|image|scene|detailed|short|final|the|your|generated)[ \t]+){0,3}"
    rf"{_WORK}(?:\*\*|__)?[ \t]?[:：](?:\*\*|__)?\s*"
    rf"|(?:#+\s+|\*\*)(?:[\w]+[ \t]+){{0,3}}{_WORK}(?:\*\*)?[ \t]*\n+\s*",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"(?<=[.!?。！？\"”*])\s*(?:i hope (?:this|that)|hope this helps|let me know|feel free to|please let me know|"
    r"is there anything else|would you like me to|do you want me to|if you (?:need|have|want|would like|'d like))\b"
    r"[^.!?\n]{0,200}[.!?]*\s*$",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "«": "»", "「": "」", "„": "“"}


def without_courtesies(text: str) -> str:
    """Return the text without "Sure!", "Here is a description of the clip:", "Caption:", "I hope this helps!"."""
    rest = text.strip()
    while found := _COURTESY.match(rest) or _ANNOUNCED.match(rest) or _HEADING.match(rest):
        rest = rest[found.end() :]
    while found := _CLOSING.search(rest):
        rest = rest[: found.start()].rstrip()
    if rest == text.strip():
        return text
    if len(rest) > 1 and _QUOTES.get(rest[0]) == rest[-1] and rest[-1] not in rest[1:-1]:
        rest = rest[1:-1]
    return rest[:1].upper() + rest[1:]


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
