"""Short prompts in the words of the captions that a model learned from, as a language model rewrites them.

It may add what it likes, and has to keep what was asked: every content word of the prompt is looked for in what it
wrote, in any number and form. Where one is lost at the second try, too, the prompt is used as it is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opensora_repro.config import ConfigError
from opensora_repro.data.caption.chat import Endpoint, NoAnswer
from opensora_repro.data.caption.text import EMPTY, LOOP, REFUSAL, THOUGHTS, TRUNCATED, clean, judged
from opensora_repro.data.progress import progress
from opensora_repro.errors import DataError
from opensora_repro.files import write_text
from opensora_repro.sampling.sample_folder import RECORD

EXAMPLES, ROWS_LOOKED_AT = 5, 4096  # captions that are shown, of the manifest's first so many rows
LONGEST_EXAMPLE = 600  # characters
MAX_TOKENS = 4096  # of an answer: models that think aloud need them
TIMEOUT, RETRIES = 120.0, 2  # seconds for an answer
KEY = "OPENAI_API_KEY"
UNUSABLE = {EMPTY: "it is empty", THOUGHTS: "thoughts without an answer", REFUSAL: "a refusal", LOOP: "a loop",
            TRUNCATED: "it has no end"}  # fmt: skip
INSTRUCTION = (
    "Rewrite a short prompt for a model that makes videos of text, so that it reads like the captions which that model "
    "learned from. Keep all that the prompt asks for in its own words: every thing, number, colour, direction and "
    "action. Add only what fits to it, and what can be seen. Answer with the rewritten prompt alone."
)

_HEADING = re.compile(r"^(?:here (?:is|['’]s) )?(?:(?:the|a|your|my|rewritten|expanded|new) )*prompt(?: \w+)?: ?", re.I)

Write = Callable[[str], tuple[str, bool]]  # a question -> what a model wrote, and whether its limit cut it


@dataclass(frozen=True)
class Expander:
    """`where`: an OpenAI-compatible endpoint, URL or URL#MODEL, or a causal language model, folder or hub name."""

    where: str
    manifest: str = ""  # whose captions are shown
    device: str = "cpu"

    @property
    def remote(self) -> bool:
        return self.where.startswith(("http://", "https://"))

    def check(self) -> None:
        """Raise ConfigError, ModelNotFound, without asking anything; within five seconds for a server."""
        if self.remote:
            with _own_words():
                self._endpoint().check_reachable()
            return
        from opensora_repro.frozen.rewriter import check_rewriter

        check_rewriter(self.where, key="--expand")

    def __call__(self, texts: Sequence[str], remember: Callable[[dict[str, str]], None]) -> dict[str, str]:
        """What each text becomes; `remember` is given them one by one. Prints what was not used. Raises DataError."""
        examples = captions_of(self.manifest)
        if not examples:
            print("--expand: no captions of its training are at hand to show their style")
        write, found = self._writer(), dict[str, str]()
        with progress("prompts rewritten", len(texts), "prompt") as advance, _own_words():
            for text in dict.fromkeys(texts):
                try:
                    found[text], told = rewrite(text, write, examples)
                except NoAnswer as trouble:
                    raise DataError(f"--expand {self.where}: {trouble}; the same command goes on") from None
                if told:
                    print(f"prompt {text!r} is used as it is: {told}")
                remember(found)
                advance(1)
        return found

    def _endpoint(self) -> Endpoint:
        url, _, model = self.where.partition("#")
        return Endpoint(url, model, key_env=KEY, max_tokens=MAX_TOKENS, timeout=TIMEOUT, retries=RETRIES)

    def _writer(self) -> Write:
        if not self.remote:
            from opensora_repro.frozen.rewriter import load_rewriter

            return load_rewriter(self.where, key="--expand", device=self.device, max_tokens=MAX_TOKENS).write
        with _own_words():
            endpoint = self._endpoint()
            endpoint.check_reachable()
            if not endpoint.model:
                endpoint.model = only_model(endpoint.list_models(), self.where)

        def write(question: str) -> tuple[str, bool]:
            answer = endpoint.ask([{"role": "user", "content": question}])
            return answer.text, answer.cut

        return write


@contextmanager
def _own_words() -> Iterator[None]:
    """The endpoint's errors name the caption tool's option; here they name this one."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("--endpoint", "--expand")) from None


def only_model(names: Sequence[str], where: str) -> str:
    """Of a server that tells no names, any will do. Raises ConfigError for several."""
    if len(names) > 1:
        raise ConfigError(f"--expand {where}: this server has several models, name one: {where}#{names[0]}")
    return names[0] if names else "default"


def captions_of(manifest: str) -> list[str]:
    """Some captions of a manifest, evenly from its beginning; none where it cannot be read."""
    from opensora_repro.data.tables import is_missing, open_table

    found: dict[str, None] = {}
    try:
        table = open_table(Path(manifest).expanduser())
        if "caption" not in table.schema.names:
            return []
        rows = 0
        for batch in table.batches(["caption"]):
            told = (caption for caption in batch["caption"].to_pylist() if not is_missing(caption))
            found |= dict.fromkeys(clean(str(caption))[0][:LONGEST_EXAMPLE] for caption in told)
            rows += batch.num_rows
            if rows >= ROWS_LOOKED_AT:
                break
    except (OSError, DataError):
        return []
    captions = [caption for caption in found if caption]
    return captions[:: max(1, len(captions) // EXAMPLES)][:EXAMPLES]


def rewrite(text: str, write: Write, examples: Sequence[str]) -> tuple[str, str]:
    """A prompt rewritten, and ""; or as it is, and why. Asks a second time where words were lost."""
    told, lost = "", list[str]()
    for _ in range(2):
        answer, cut = write(question(text, examples, lost))
        caption = judged(answer, cut=cut)
        # Of a script by clips `|0|` would be a mark
        found = _HEADING.sub("", caption.text, count=1).strip('"“” ').replace("|", ",")
        lost = lost_words(text, found)
        if caption.flag in UNUSABLE:
            told = f"of what was written for it, {UNUSABLE[caption.flag]}"
        elif lost:
            told = f"what was written for it loses {', '.join(map(repr, lost))}"
        else:
            return found, ""
    return text, told


def question(text: str, examples: Sequence[str], lost: Sequence[str] = ()) -> str:
    parts = [INSTRUCTION]
    if examples:
        words = round(sum(len(example.split()) for example in examples) / len(examples))
        parts += ["Captions that it learned from, of about {} words:\n{}".format(words, "\n".join(examples))]
    if lost:
        parts += [f"These words have to be in it: {', '.join(lost)}."]
    return "\n\n".join([*parts, f"The prompt: {text}"])


# ---------------------------------------------------------------------------------------------------------------------
# What of a prompt has to be kept. Without a tagger nouns are not told from other words with a meaning of their own:
# those are kept all, directions among them.

_WORD = re.compile(r"[^\W_]+(?:['’][^\W\d_]+)?")
_GRAMMAR = """
a an the this that these those some any each every all both either neither another other such same own very
and or but nor so yet if then than as of in on at by for with without from to into onto upon over under above
below between among through across along around about against towards toward behind beside beyond near within
during before after while when where whose which who whom what how why is are was were be been being am do does
did done has have had having will would shall should can could may might must it its he she they them him his
hers her their theirs i me my we us our you your there here not no just only also too still again ever one
please make show showing shows video clip film footage scene image picture
"""
_EMPTY_WORDS = frozenset(_GRAMMAR.split())
_SAME = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "grey": "gray", "colour": "color", "2": "two", "3": "three", "4": "four",
    "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine", "10": "ten",
}  # fmt: skip
_ENDINGS = (
    ("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("ing", ""), ("ing", "e"), ("ying", "ie"),
    ("ed", ""), ("d", ""), ("ied", "y"),
)  # fmt: skip
_HAN_GRAMMAR = frozenset("的了在是一着和与有个只条这那")


def lost_words(prompt: str, rewritten: str) -> list[str]:
    """Content words of a prompt that what was made of it has in no form."""
    there = {form for word in _words(rewritten) for form in _forms(word)}
    asked = dict.fromkeys(word for word in _words(prompt) if word not in _EMPTY_WORDS)
    return [word for word in asked if not there & _forms(word)]


def _words(text: str) -> Iterator[str]:
    """Words in lower case; of scripts without spaces their characters, but for those that are grammar."""
    for word in _WORD.findall(unicodedata.normalize("NFKC", text).lower()):
        names = [unicodedata.name(character, "") for character in word]
        if any(name.startswith(("CJK", "HIRAGANA", "KATAKANA")) for name in names):
            kept = zip(word, names, strict=True)
            yield from (a for a, name in kept if not name.startswith("HIRAGANA") and a not in _HAN_GRAMMAR)
        else:
            yield re.sub(r"['’]s?$", "", word)


def _forms(word: str) -> set[str]:
    """The word and what it may be a plural, a participle or another person of, right or not: forms are compared."""
    word = _SAME.get(word, word)
    found = {word}
    for ending, instead in _ENDINGS:
        bare = word.removesuffix(ending) + instead
        if word.endswith(ending) and len(bare) > 2:
            found.add(bare)
            if len(bare) > 3 and bare[-1] == bare[-2]:  # running
                found.add(bare[:-1])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is remembered, in the samples' record


def remembered(out: Path) -> dict[str, str]:
    """What prompts became, by the prompt as it was asked."""
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))["expanded"]
        return {str(asked): str(used) for asked, used in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def remember(out: Path, expanded: dict[str, str]) -> None:
    """Put these into the record, which may be there already or not."""
    try:
        record = dict(json.loads((out / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or what --overwrite replaces
        record = {}
    record["expanded"] = remembered(out) | expanded
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
