"""Cleaning captions, and telling descriptions from what is none."""

from __future__ import annotations

import pytest

from opensora_repro.data.caption.text import MAX_CHARACTERS, REJECTED, Caption, clean, ends_sentence, flag_of, judged

REFUSALS = [
    "I'm sorry, I can't assist with that.",
    "I’m sorry, but I can’t help with that request.",
    "I'm sorry, but I cannot provide a description of the image.",
    "Sorry, I can't describe the people in this video.",
    "I apologize, but I'm unable to identify the person shown.",
    "I apologize for the confusion, but I cannot view images.",
    "Unfortunately, I am not able to see the video you uploaded.",
    "I am unable to process this request.",
    "As an AI language model, I cannot watch videos.",
    "As an AI, I don't have the ability to see images, but I can help with text.",
    "Unfortunately, as a large language model I do not have access to the frames.",
    "I'm just an AI and can't view files.",
    "I'm an AI assistant. I cannot identify real people.",
    "As an AI I see a dog.",
    "I can't help you with that.",
    "I cannot fulfill this request. It goes against the guidelines.",
    "I won't be able to assist with this.",
    "I don't see any image attached. Please upload it.",
    "I do not have access to the video.",
    "Hello! I'm sorry, but I can't see any frames.",
    "No image was provided.",
    "There is no video attached to your message.",
    "It seems no image was uploaded.",
    "The image could not be loaded.",
    "Please provide the video so I can describe it.",
    "Could you please share the frames of the video?",
    "This request violates the content policy.",
    "Unable to describe the content.",
    "I'm sorry.",
    "Thank you for sharing. However, I cannot identify individuals in the picture.",
    "If you want a caption of it, I'm afraid I can't provide one.",
    "Based on the frames provided, I cannot identify the person.",
    "The video was not uploaded correctly.",
    "抱歉，我无法描述这张图片。",
    "作为一个AI语言模型，我看不到图片。",
]
CAPTIONS = [
    "A woman says she is sorry and hugs her friend.",
    "A man holds a sign that reads \"I'm sorry, I can't help you\".",
    "A cartoon cat with the words 'I can't see the video' above its head.",
    "Sorry! board game pieces on a wooden table.",
    "I can't help falling in love, sung by a band on a small stage.",
    "An apology letter lies on a desk; a hand signs it.",
    "I am walking along the beach with my dog, waves behind us.",
    "I can see a red car that drives along a road.",
    "A robot, an AI, looks into the camera.",
    "As an airplane takes off, the camera follows it.",
    "As a large crowd gathers, a singer enters.",
    "A speaker unable to stand is helped off the stage.",
    "No people are in the image, only a lake and mountains.",
    "There is no wind; the trees in the video stand still.",
    "The image shows a street at night. The people cannot be identified.",
    "A politician refuses to answer questions of the press.",
    "We can't stop here, says a road sign in the desert.",
    "The video was uploaded to a screen in the background while people dance.",
    "Two men apologise to each other: I'm sorry, says one.",
    "一只猫坐在窗台上，外面下着雨。",
    "Please stand clear of the doors: a train leaves the platform.",
    "As a man walks by, a dog barks.",
    "A woman in a kitchen, I cannot identify her, cooks.",
    "From above, we do not see the people who dance below.",
    "Please do not feed the ducks, says a sign beside a pond.",
]


@pytest.mark.parametrize("caption", REFUSALS)
def test_refusals_are_flagged(caption: str) -> None:
    assert flag_of(caption) == "refusal"


@pytest.mark.parametrize("caption", CAPTIONS)
def test_descriptions_are_not(caption: str) -> None:
    assert flag_of(caption) == ""


def test_loops() -> None:
    for looped in (
        "a dog " * 5,
        "A man walks. " + "and then he walks away " * 3,
        "red, red, red, red, red, red, red, red",
        "The sky is very blue. A bird flies. The sky is very blue. A tree. The sky is very blue.",
        "一只猫一只猫一只猫",
    ):
        assert flag_of(looped.strip()) == "loop", looped
    for fine in (
        "A very very very long train passes.",
        "Knock knock knock knock: a fist on a door.",
        "A red car, a blue car, a green car and a white car stand in a row.",
        "A man walks to the left, a woman walks to the right, a child walks to the left.",
    ):
        assert flag_of(fine) == "", fine


def test_empty_and_cut() -> None:
    assert [flag_of(text) for text in ("", "...", "—")] == ["empty"] * 3
    assert judged("\u200b\x00 \n").flag == "empty"
    assert judged("A dog runs across the", cut=True).flag == "truncated"
    assert judged("I'm sorry, I can't describe", cut=True).flag == "refusal"  # the gravest
    assert ends_sentence('He says "stop."') and ends_sentence("一只猫。") and not ends_sentence("a dog in the")


def test_cleaning() -> None:
    dirty = " a\tdog\r\n\x1b[31mruns\x07 \u202efast\u2066\u200b \ufeff\x85 now "
    assert clean(dirty) == ("a dog [31mruns fast now", False)
    assert clean("می\u200cخواهم 👩\u200d🚀") == ("می\u200cخواهم 👩\u200d🚀", False)
    assert clean("a\ud800b\ue000")[0] == "ab"
    long, cut = clean("word " * 2000)
    assert cut and len(long) <= MAX_CHARACTERS and long.endswith("word")
    assert judged("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 1 + "x" * 9000).flag == "truncated"
    assert len(clean("\u200b" * 10**6 + "a")[0]) == 0


DOG = "A dog runs across a lawn."
WRAPPED = [
    "<think>A cat?</think> {}",
    "the prompt opened it\n</think>\n\n{}",
    "<think>one</think> a cat <THINK>two</THINK>{}",
    "<thinking>\nx</thinking>\n<answer>{}</answer>",
    "<reasoning>x</reasoning>{}",
    "&lt;think&gt;x&lt;/think&gt; {}",
    "◁think▷x◁/think▷{}",
    "[THINK]x[/THINK]{}",
    "<seed:think>x</seed:think>{}",
    "<|begin_of_thought|>x<|end_of_thought|><|begin_of_solution|>{}<|end_of_solution|>",
    "<|channel|>analysis<|message|>We see<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "analysisWe see a cat.assistantfinal{}",
    "<|channel>thought\nx<channel|>{}",
    "{}<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\nA cat.",
    "<|im_start|>system\nYou see.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{}",
    "<|assistant|>\n{}</s>",
    "assistant: {}",
    "assistant\n\n{}<|eot_id|>",
    "[INST] Describe. [/INST] {}</s>",
    "USER: <video>\nDescribe. ASSISTANT: {}",
    "User: what?\nAssistant: {}\nUser: more?",
    "<start_of_turn>model\n{}<end_of_turn>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}",
    "### Instruction:\nDescribe.\n### Response:\n{}",
    "<｜Assistant｜>{}<｜end▁of▁sentence｜>",
    "<|begin_of_box|>{}<|end_of_box|>",
    "Sure! {}",
    "Sure! Here is a description of the video:\n\n{}",
    'Certainly, here’s a caption: "{}"',
    "Of course! I'd be happy to help. Here's a one-paragraph description: {}",
    "Here is a description of the clip. {}",
    "Here are the details of what happens in the clip: {}",
    "The following is a summary of the frames you gave me:\n{}",
    "**Caption:** {}",
    "### Video Description\n\n{}",
    "Natürlich! Hier ist eine Beschreibung des Videos: {}",
    "Bien sûr ! Voici une description de la vidéo : {}",
    "¡Claro! Aquí tienes una descripción del video: {}",
    "Конечно! Вот описание видео: {}",
    "好的，以下是视频的描述：{}",
    "<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "<think:opensource>x</think:opensource>{}",
    "[BEGIN OF THOUGHT]x[END OF THOUGHT]{}",
    "**Thinking:** a lawn?\n\n**Answer:** {}",
    "The frames show a lawn.\n\nFinal caption: {}",
    "```text\n{}\n```",
    '```json\n{{"caption": "{}"}}\n```',
    '{{"description": "{}"}}',
    '"{}"',
    "**{}**",
    "> {}",
    "\\boxed{{\\text{{{}}}}}",
    "Sure — {}",
    "Great! Here you go: {}",
    "Based on the frames, here is a detailed description of what happens: {}",
    "The description of the video is as follows:\n\n{}",
    "Dense caption: {}",
    "Bien sûr, voici une description détaillée : {}",
    "當然！以下是影片的描述：{}",
    "視頻描述：{}",
    "はい、こちらが動画の説明です：{}",
    "물론입니다! 다음은 영상에 대한 설명입니다: {}",
    "Natuurlijk! Hier is een beschrijving van de video: {}",
    "Oczywiście! Oto opis wideo: {}",
    "Tentu! Berikut adalah deskripsi video: {}",
    "Elbette! İşte videonun açıklaması: {}",
    "Chắc chắn rồi! Đây là mô tả video: {}",
    "بالتأكيد! إليك وصف الفيديو: {}",
    "ज़रूर! यहाँ वीडियो का विवरण है: {}",
    "{}\n\nNote: the frames are dark.",
    "{} (Word count: 6)",
    "{} #dog #lawn",
    "{}\n\nQuestion: what colour?\nAnswer: brown",
    "{} I hope this helps!",
    "{}\n\nLet me know if you need anything else!",
]


def test_what_is_around_a_caption_is_cut() -> None:
    for wrapped in WRAPPED:
        assert judged(wrapped.format(DOG)) == Caption(DOG, unwrapped=True), wrapped


def test_captions_that_begin_alike_stay_whole() -> None:
    for caption in (
        "Sure-footed goats climb a cliff.",
        "Sure enough, the dog returns.",
        "Sure! brand soap on a shelf.",
        "Certainly the largest crowd of the year fills a square.",
        "Okay sign made with two fingers.",
        "Here is where the river bends: a narrow pass.",
        "Here is where a description ends.",
        "Here comes a train: people wave.",
        "This is a caption contest.",
        "This is a busy street.",
        "Caption contest poster on a wall.",
        "Description boards stand along a path.",
        "Assistant coach shouts at players.",
        "User interface of a phone.",
        "Human: a mannequin in a shop window.",
        "Model: a woman walks along a runway.",
        "The thinking statue: a man sits.",
        "A sign of the <think tank> over a door.",
        "Analysis of a chess game on a screen.",
        "Let me know, says a sign. A dog runs.",
        'A man says "Sure!" and laughs.',
        '"Stop!", a sign says.',
        '"Stop now."',
        "Great crested grebes dance on a lake.",
        "Output of a plotter dries.",
        "Thinking man's statue: a crowd around it.",
        "Reasoning about a chess move, a boy frowns.",
        "A list: *milk*, *bread*, written by hand.",
        "{braces} are drawn on a board {twice}",
        "A sticky note: do not touch. A hand does.",
        "A door with #12 on it.",
    ):
        assert judged(caption) == Caption(caption)


def test_what_a_stuck_model_writes_is_read_in_time() -> None:  # or each of these would take minutes
    for stuck in ("\n", "USER: ", " \n", "#dog ", "<think>"):
        judged("A dog runs." + stuck * (200_000 // len(stuck)) + "x")


def test_thoughts_without_an_end_are_no_caption() -> None:
    for text in ("<think>A dog", "◁think▷A dog", "<|channel|>analysis<|message|>A dog", "analysisWe see a dog",
                 "[THINK]A dog", "<think>a</think><think>A dog"):  # fmt: skip
        assert judged(text, cut=True).flag == "thoughts" and "thoughts" in REJECTED
    assert judged("Sure! Here is a description of the video:").flag == "empty"


def test_words_about_the_video_are_flagged() -> None:
    for text in ("The video shows a dog.", "In this clip, a dog runs.", "这段视频展示了一只狗。"):
        assert judged(text) == Caption(text, "opener")
    for text in ("The video game has a dog.", "A video shows a dog.", "The video shop is closed."):
        assert judged(text) == Caption(text)
