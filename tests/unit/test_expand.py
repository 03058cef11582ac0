"""Prompts rewritten: what has to survive, whose captions are shown, and what a local model is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora_repro.config import ConfigError
from opensora_repro.files import write_text
from opensora_repro.frozen.pretrained import ModelNotFound
from opensora_repro.frozen.rewriter import check_rewriter, load_rewriter
from opensora_repro.sampling.expand import captions_of, lost_words, only_model, question, rewrite
from tests.tiny_models import make_tiny_causal, make_tiny_text


@pytest.mark.parametrize(
    ("prompt", "rewritten", "lost"),
    [
        ("A cat runs over the fence", "Two fluffy cats running", ["fence"]),
        ("three red balls moving left", "3 RED ball moves towards the left.", []),
        ("a red ball moving left", "A red ball moving right", ["left"]),
        ("children on a bus", "A child, who waits for buses", []),
        ("the wolves' dying leaves", "A wolf; a leaf dies", []),
        ("a grey man's knife", "Gray men with knives", []),
        ("Größe der Häuser", "die Größe der Häuser, von oben", []),
        ("一只红色的猫在奔跑", "红色小猫奔跑着", []),
        ("一只红色的猫", "一只红色的狗", ["猫"]),
        ("a glass and a boy", "glasses, boys", []),
        ("a bed", "a bee", ["bed"]),
    ],
)
def test_content_words_survive_in_any_form(prompt: str, rewritten: str, lost: list[str]) -> None:
    assert lost_words(prompt, rewritten) == lost


def writer(*answers: str) -> tuple[list[str], object]:
    asked: list[str] = []

    def write(text: str) -> tuple[str, bool]:
        asked.append(text)
        return answers[len(asked) - 1], False

    return asked, write


def test_a_second_question_names_what_was_lost() -> None:
    asked, write = writer("A cat.", "Sure! Here is the rewritten prompt: A cat on a |2| fence.")
    assert rewrite("a cat on a fence", write, ["A dog in a park."]) == ("A cat on a ,2, fence.", "")
    assert "A dog in a park." in asked[0] and "have to be in it" not in asked[0]
    assert asked[1] == question("a cat on a fence", ["A dog in a park."], ["fence"])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("A dog.", "what was written for it loses 'cat'"),
        ("<think>A cat, they say", "of what was written for it, thoughts without an answer"),
        ("", "of what was written for it, it is empty"),
        ("I'm sorry, but I cannot help with a cat.", "of what was written for it, a refusal"),
        ("the cat sat on " * 30, "of what was written for it, a loop"),
    ],
)
def test_what_cannot_be_used_leaves_the_prompt(answer: str, told: str) -> None:
    assert rewrite("a cat", writer(answer, answer)[1], []) == ("a cat", told)


def test_captions_of_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    write_text(path, "id,caption\n" + "".join(f"{i},a thing of number {i % 40}\n" for i in range(100)) + "200,\n")
    found = captions_of(str(path))
    assert found == [f"a thing of number {i}" for i in (0, 8, 16, 24, 32)]
    for none in ("", str(tmp_path / "none.parquet"), str(tmp_path)):
        assert captions_of(none) == []
    write_text(path, "id,words\n0,x\n")
    assert captions_of(str(path)) == []


def test_a_server_of_several_models_wants_one_named() -> None:
    assert (only_model([], "u"), only_model(["m"], "u")) == ("default", "m")
    with pytest.raises(ConfigError, match="several models, name one: u#a"):
        only_model(["a", "b"], "u")


def test_a_local_model_writes_on(tmp_path: Path) -> None:
    """Asked by its chat template, or given words to go on from; the limit is told, special tokens are dropped."""
    path = make_tiny_causal(tmp_path / "chat", chat=True)
    model = load_rewriter(str(path), key="--expand", device="cpu", max_tokens=7)
    text, cut = model.write("a cat")
    assert text and cut and "<" not in text
    assert model.write("a cat") == (text, cut)
    assert model.write("a dog")[0] != text
    assert model.write("cat " * 600) == ("", True)  # no room to answer
    plain = load_rewriter(str(make_tiny_causal(tmp_path / "plain")), key="--expand", device="cpu", max_tokens=7)
    assert plain.write("a cat")[0]


def test_what_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"--expand=.*: this is a T5EncoderModel, expected a transformers causal"):
        check_rewriter(str(make_tiny_text(tmp_path)), key="--expand")
    with pytest.raises(ModelNotFound, match="no such folder"):
        check_rewriter(str(tmp_path / "none"), key="--expand")
