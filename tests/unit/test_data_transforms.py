from __future__ import annotations

import pytest
import torch

from opensora_repro.data.dataset import crop, mirror, names_a_side, to_tensor
from opensora_repro.data.sample_frames import frame_window


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle moving left",
        "A car turns RIGHT.",
        "the left-handed pitcher",
        "a lefthander bowls",
        "the wheel turns counter-clockwise",
        "turning anticlockwise",
        "the leftmost door",
        "drifting leftwards",
        "a train heading east",
        "north-western shore",
        "a southbound, then westbound lane",
        "his right-hand side",
        "ein Auto fährt nach links",
        "mit der rechten Hand",
        "ein Linkshänder wirft",
        "im Uhrzeigersinn",
        "auf der östlichen Seite",
        "une femme tourne à gauche",
        "sa main droite",
        "le train va vers l'ouest",
        "el hombre mira a la izquierda",
        "con la mano derecha",
        "camina hacia el este",
        "l'uomo va a sinistra, poi a destra",
        "à direita da mesa",
        "она поворачивает налево",
        "в правой руке",
        "一只猫从左边走到右边",
        "車子向東行駛",
        "輪子順時針轉動",
        "犬が左へ走る",
        "時計回りに回る",
        "왼쪽으로 간다",
        "رجل يسير إلى اليسار",
        "वह बाएं मुड़ता है",
        "cô ấy rẽ trái",
        "mężczyzna skręca w lewo",
        "hij draait naar rechts",
        "une femme a\u0300 gauche",
        "at her 3 o'clock", "turned clock-wise", "rechtsgerichtete Pfeile", "oben links", "obenlinks im Bild",
        "auf drei Uhr", "Steuerbord voraus", "à 9 heures", "a las tres en punto",
        "el sentido de las manecillas del reloj",
        "arriba a la dcha.", "праворукий музыкант", "从东到西", "三点钟方向", "順時鐘旋轉", "三時の方向",
        "3시 방향", "北東の空",
        "좌상단에",
        "sola döner", "saat yönünde", "jobb kezével", "searah jarum jam", "theo chiều kim đồng hồ",
        "باتجاه عقارب الساعة",
        "עם כיוון השעון", "ตามเข็มนาฬิกา", "кола вдясно", "ulijevo", "desno od stola", "a l'esquerra", "ezkerrera",
    ],
)  # fmt: skip
def test_captions_that_name_a_side(caption: str) -> None:
    assert names_a_side(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "a bright light", "a cleft rock at the beach", "moving up", "a feast", "wrights at work", "",
        "the least of it",
        "a signal, an assignment, a contextual password", "the dog's ball and the cats' bowls", "a 5\" pipe",
        "A clear view; no visible text, logos or watermarks.", "a blue sky without any text", "a wooden vest",
        "ein aufrechter Baum am Rechteck", "eine Schildkröte im Texas-Hemd", "Recht haben", "die Antwort",
        "c'est un chien qui est grand", "este perro corre", "un enfant et un motif", "un perro detesta el agua",
        "лев лежит, это правда", "словно ветер", "这个东西很漂亮", "十字路口有一辆车", "東京の夜", "해가 떠오른다",
        "una mujer sola", "large numbers of birds", "un gran número de aves", "der Rechtsanwalt",
        "balcony jobs in Prague", "barbaric kirin", "at three in the afternoon",
    ],
)  # fmt: skip
def test_captions_that_do_not(caption: str) -> None:
    assert not names_a_side(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "a stop sign in the rain", "a sign reading OPEN", "the words are painted", "subtitles appear",
        "a company's logo", "large letters on a wall", 'a wall with "OPEN" on it', "a shirt that says ‘hello’",
        "a neon “BAR” glows",
        "a license plate", "ein Straßenschild", "eine Leuchtschrift", "mit Untertiteln", "des lettres rouges",
        "un panneau", "un letrero rojo", "texto en la pared", "un cartello", "uma placa", "красная надпись",
        "墙上写着字", "屏幕上的文字", "黃色的招牌", "下方有字幕", "看板の前", "赤い文字", "간판이 보인다",
        "a clock face", "Chinese characters", "números en la camiseta", "一行字", "英語の文",
        "a computer screen full of code", "a T-shirt printed with NASA",
        "a road marking that says STOP",
        "equations on a board", "it is 12:30", "eine Werbetafel", "er liest eine Zeitung", "des équations",
        "un periódico",
        "un giornale", "газета", "书本上的字", "扫描二维码", "报纸", "新聞を読む", "番号", "신문을 읽는다",
        "이름이 적혀 있다",
    ],
)  # fmt: skip
def test_captions_that_name_writing(caption: str) -> None:
    assert names_a_side(caption)


def test_window_starts_cover_the_clip() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = [frame_window(20, 5, 3, generator) for _ in range(300)]
    assert {w[0] for w in windows} == set(range(8))  # a window of 13 frames has 8 places in 20
    assert all(w == list(range(w[0], w[0] + 13, 3)) for w in windows)


@pytest.mark.parametrize(
    ("clip", "count", "interval", "expected"),
    [
        (20, 5, 3, [3, 6, 9, 12, 15]),  # the middle
        (13, 5, 3, [0, 3, 6, 9, 12]),
        (12, 5, 3, [0, 3, 6, 8, 11]),  # too short for the interval: evenly over all of it
        (5, 5, 3, [0, 1, 2, 3, 4]),
        (1, 1, 3, [0]),
        (9, 1, 3, [4]),
    ],
)
def test_window_without_a_generator(clip: int, count: int, interval: int, expected: list[int]) -> None:
    assert frame_window(clip, count, interval) == expected


def test_crop_reaches_every_corner() -> None:
    frames = torch.arange(6 * 5).reshape(1, 6, 5, 1)
    generator = torch.Generator().manual_seed(0)
    corners = {int(crop(frames, (4, 4), generator)[0][0, 0, 0, 0]) for _ in range(100)}
    assert corners == {0, 1, 5, 6, 10, 11}
    assert int(crop(frames, (4, 3))[0][0, 0, 0, 0]) == 6
    with pytest.raises(ValueError, match="smaller than the crop"):
        crop(frames, (7, 5))


def test_to_tensor_and_mirror() -> None:
    frames = torch.zeros(2, 3, 4, 3, dtype=torch.uint8)
    frames[1, 2, 0, 1] = 255
    video = to_tensor(mirror(frames))
    assert (video.shape, video.dtype) == ((3, 2, 3, 4), torch.float32)
    assert video[1, 1, 2, 3] == 1.0
    assert (video == -1.0).sum() == video.numel() - 1
