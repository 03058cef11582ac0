"""Words that a mirrored picture would contradict: sides, compass points, ways of turning, and writing.

In the languages that the text encoders read (T5, umT5, mT5), those with most speakers. A word may mean something else
in another language, or in its own ("right" is also correct, German "links" is English for golf): such captions merely
lose the augmentation, so the lists lean to more. Left out are words that are common in another meaning ("este" is
Spanish for this, "est" French for is, "Recht" German for law): they count only in phrases.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

WORDS = (  # with word boundaries on both sides
    # English
    r"left(?:s|wards?|most|y|ie|ies)?|right(?:s|wards?|most|y|ie|ies)?",
    r"(?:left|right)-?(?:hand|hander|handed|side|sided)s?",
    r"(?:counter-?|anti-?)?clockwise|(?:north-?|south-?)?(?:east|west)(?:s|wards?|erly|bound|ern)?|starboard",
    r"port ?side",
    # German, Dutch
    r"(?:halb)?links(?:wärts|herum|rum|seitig\w*|kurven?|abbieg\w*|händ\w*|hänger\w*|außen|drehend\w*|verkehr|um|af|om|boven|onder|achter|voor)?",
    r"(?:halb)?rechts(?:wärts|herum|rum|seitig\w*|kurven?|abbieg\w*|händ\w*|außen|drehend\w*|verkehr|um|af|om|boven|onder|achter|voor)?",
    r"linke[rsnm]?|rechte[rsnm]?|linkerhand|rechterhand|(?:linker|rechter)(?:arm|been|hand|kant|oog|voet|zijde|seits)",
    r"(?:gegen)?uhrzeigersinn\w*|(?:nord|süd)?(?:osten|westen|ost|west)s?|(?:nord|süd)?(?:öst|west)lich\w*",
    r"(?:ost|west)wärts",
    r"(?:noord|zuid)?(?:oosten|westen|oostelijk\w*|westelijk\w*)|klok mee|tegen de klok",
    # French, Spanish, Portuguese, Italian, Romanian
    r"gauch(?:es?|ère?s?|ers?)|droit(?:e?s?|ière?s?|iers?)|bâbord|tribord|(?:anti-?)?horaires?",
    r"aiguilles d[’']une montre",
    r"ouest|(?:nord|sud)-?(?:ouest|est)|(?:à|vers|de) l[’']est",
    r"izquierd[oa]s?|derech[oa]s?|zurd[oa]s?|diestr[oa]s?|babor|estribor|(?:anti)?horari[oa]|agujas del reloj",
    r"oeste|(?:nor|nord|sur|sud)(?:este|oeste)|(?:al|del|hacia el|para o|a|do) este|occidental(?:es)?|oriental(?:es)?",
    r"esquerd[oa]s?|direit[oa]s?|canhot[oa]s?|destr[oaie]s?|bombordo|estibordo|boreste|(?:anti-?)?horário",
    r"ponteiros do relógio",
    r"leste|sinistr[oaei]|mancin[oaei]|(?:anti|in senso )orario|senso orario|ovest|(?:nord|sud)-?ovest",
    r"(?:a|verso|da) est",
    r"stâng\w*|dreapt\w*|(?:spre|la|dinspre) (?:est|vest)",
    # Scandinavian, Finnish, Hungarian
    r"vänster\w*|höger\w*|venstre\w*|høyre\w*|højre\w*|medurs|moturs|öster(?:ut|ifrån)|väster(?:ut|ifrån)|østover",
    r"vestover",
    r"vasen|vasem\w+|oikea(?:n|lla|lle|lta|ssa|sta|an|npuol\w*)?|myötäpäivään|vastapäivään|itään|länteen",
    r"bal(?:ra|ról|oldal\w*|kez\w*)?|jobb(?:ra|ról|oldal\w*|kez\w*)",
    # Polish, Czech
    r"lew(?:y|a|e|ego|ej|emu|ym|ą|ych|ymi|o)|praw(?:y|a|e|ego|ej|emu|ym|ą|ych|ymi|o)|zegara",
    r"(?:na|od) (?:wschód|zachód|wschodu|zachodu)",
    r"lev(?:ý|á|é|ého|ou|ém|ým|ých|ými)|prav(?:ý|á|é|ého|ou|ém|ým|ých|ými)|vlevo|vpravo|doleva|doprava|zleva|zprava",
    r"nalevo|napravo",
    # Russian, Ukrainian
    r"лев(?:ый|ая|ое|ые|ого|ой|ому|ым|ом|ую|ых|ыми|ее|ша|осторонн\w+)",
    r"прав(?:ый|ая|ое|ые|ого|ой|ому|ым|ом|ую|ых|ыми|ее|ша|осторонн\w+)",
    r"слева|влево|налево|справа|вправо|направо|часов(?:ой|ою) стрелк\w+|(?:северо-?|юго-?)?(?:восто[кч]\w*|запад\w*)",
    r"лів(?:ий|а|е|і|ого|ої|ій|ому|им|ою|у|их|ими)|прав(?:ий|а|ої|ій|ою|у)|ліворуч|праворуч|зліва|вліво|наліво",
    r"годинников\w+",
    # Turkish, Indonesian, Vietnamese
    r"sol(?:da|dan|daki|una|unda)|sol (?:taraf|el|kol|köşe)\w*|sağ(?:a|da|dan|daki|ına|ında)?|doğu\w*",
    r"batı(?:ya|da|dan|daki)?",
    r"kiri|kanan|timur|barat|(?:bên|phía|sang|tay|chân|rẽ|quẹo|mắt|góc) (?:trái|phải)|(?:phía|hướng) (?:đông|tây)",
    # Greek, Hebrew, Arabic, Persian; Arabic and Hebrew join small words in front
    r"αριστερ\w+|δεξι\w+|δεξ(?:ί|ιά|ιός)|ανατολικ\w+|δυτικ\w+",
    r"[הבלמשו]{0,3}(?:שמאל\w*|ימין|ימינה|ימני\w*|מזרח\w*|מערב\w*)",
    r"(?:و|ف)?(?:ب|ل|ك)?(?:ال|ل)?(?:يسار|يمين|أيسر|أيمن|ايسر|ايمن|يسرى|يمنى|شرق|غرب)(?:ي|ية|ه|ها|ا)?|چپ|راست|شرق|غرب",
)
PIECES = (  # of scripts that are written without spaces, or whose vowel signs are no letters
    "左", "右", "ひだり", "みぎ", "順時針|逆時針|顺时针|逆时针|時計回り|時計まわり",
    "[向朝往][东西東]|[东西東][边邊侧側面部方北南]|[東西](?:へ|に|から|側|向き|の空)",
    "왼|오른(?:쪽|손|발|편|팔|눈|다리)|좌측|우측|좌회전|우회전|좌우|시계 ?(?:반대 ?)?방향|반시계|동쪽|서쪽",
    "बाए[ँंं]|बाय[ाेीें]|बाई[ंँ]|दाए[ँंं]|दाय[ाेीें]|दाई[ंँ]|दाहिन|पूर्व|पश्चिम", "ซ้าย|ขวา|ตะวันออก|ตะวันตก",
)  # fmt: skip
TEXT_WORDS = (
    r"signs?|signage|sign-?(?:boards?|posts?)|bill-?boards?|posters?|banners?|placards?|subtitles?|captions?",
    r"captioned|logos?",
    r"letters?|letter(?:ed|ing)|texts?|words?|wording|writings?|written|hand-?writ\w+|labels?|label+ed|watermark\w*",
    r"headlines?",
    r"(?:licen[cs]e|number|registration) ?plates?|numerals?|digits?|numbers? \d+|titles?|titled|credits|inscri\w+",
    r"graffiti|fonts?",
    r"typograph\w*|alphabet\w*|calligraph\w*|signatures?|slogans?|score-?boards?|reads|spell(?:s|ed|ing)|newspapers?",
    # German, Dutch
    r"\w*schild(?:er|ern|es|chen)?|\w*schrift(?:en|zug|züge|zeichen|lich\w*)?|beschriftet\w*|geschrieben\w*",
    r"(?:unter|ober)?titeln?",
    r"buchstaben?|text(?:e|es|en|zeilen?|tafeln?)|wort|wörter[n]?|worten?|\w*plakate?n?s?|kennzeichen|leuchtreklamen?",
    r"etiketten?|ziffern?",
    r"bord(?:en|je)?|letters|woorden?|tekst(?:en)?|opschrift\w*|ondertitel\w*",
    # French
    r"panneaux?|enseignes?|textes?|lettres?|mots?|sous-titr\w+|légendes?|affich\w+|pancartes?",
    r"écrit(?:e?s?|ures?|eaux?)",
    r"étiquett\w+|plaques? d[’']immatriculation|titres?|chiffres?|on peut lire",
    # Spanish, Portuguese, Italian
    r"letreros?|letreiros?|cartel(?:es)?|cartaz(?:es)?|carteles|textos?|letras?|palabras?|palavras?|subtítulos?",
    r"legendas?|logotip\w+",
    r"rótulos?|inscripci\w+|inscriç\w+|escrit[oa]s?|escritura|pancartas?|etiquetas?|matrículas?|títulos?|señal(?:es)?",
    r"placas?",
    r"cartell\w+|insegn[ae]|test[oi]|lettere?|parol[ae]|sottotitol\w+|scritt[aeoi]|etichett[ae]|targ(?:a|he)",
    r"titol[oi]|manifest[oi]",
    # Russian, Polish
    r"надпис\w+|вывеск\w+|текст(?:а|у|ом|е|ы|ов|ами)?|букв\w+|слов(?:о|а|ами|ом|е)|субтитр\w*|логотип\w*|табличк\w+",
    r"плакат\w*",
    r"знак(?:и|а|ом|ами|е)?|написан\w*|этикетк\w+|заголов\w+|иероглиф\w*|цифр\w+",
    r"napis\w*|tekst\w*|liter(?:a|y|ę|ami)|słow[oa]\w*|szyld\w*|tablic\w+|plakat\w*",
    # Turkish, Indonesian, Vietnamese, Arabic, Hebrew
    r"yazı(?:lar|lı|sı)?|tabela\w*|levha\w*|harf\w*|altyazı\w*|tulisan\w*|huruf\w*|papan nama|teks|chữ",
    r"biển (?:báo|hiệu)|phụ đề",
    r"(?:و)?(?:ب)?(?:ال)?(?:لافتة|لافتات|نص|نصوص|حروف|كلمة|كلمات|مكتوب|مكتوبة|شعار|ترجمة)",
    r"[הבלמשו]{0,3}(?:שלט\w*|כיתוב|טקסט\w*|אותיות|כתוב\w*|לוגו)",
)
TEXT_PIECES = (
    "文字|字幕|标志|標誌|标识|標識|招牌|路牌|牌子|标语|標語|横幅|橫幅|海报|海報|字母|字样|字樣|字体|字體|[写寫][着著有]|印[着著有]|刻[着著有]",
    "[车車門门站告][牌示]|广告牌|廣告牌|单词|單字|单字|词语|标题|標題|标签|標籤|商标|商標|水印|徽标|[汉漢数數]字|书法|書法|条幅",
    "看板|ロゴ|テロップ|ひらがな|カタカナ|書かれ|書いて|ポスター|ラベル|テキスト|タイトル|ナンバープレート|[貼張]り紙|表札|横断幕",
    "글자|글씨|간판|자막|문자|로고|표지판|번호판|텍스트|현수막|포스터|한글|단어|अक्षर|लिखा|लिखे|शब्द|ตัวอักษร|ป้าย|ข้อความ|คำว่า",
    r'(?<!\w)"[^"]+"', "“[^”]+”", "„[^“”]+[“”]", r"«[^»]+»", "「[^」]+」", "『[^』]+』",
    r"(?<!\w)'[^']+'(?!\w)", r"(?<!\w)‘[^’]+’(?!\w)",
)  # fmt: skip
_SEEN = r"(?:visible|legible|readable|discernible|on-?screen|other|written|overlaid)"
_TEXT = r"(?:text|words?|writing|captions?|subtitles?|logos?|watermarks?|letters?|signs?|signage|titles?)"
_LISTED = rf"(?:{_SEEN} )*{_TEXT}"
_NO_TEXT = re.compile(rf"\b(?:no|without(?: any)?) {_LISTED}(?:(?:,|,? or|,? and) {_LISTED})*\b", re.IGNORECASE)


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    """Return one pattern for all lists; words end where no letter follows, so that "left_hand" has one."""
    letter = r"[^\W\d_]"
    words = "|".join((*WORDS, *TEXT_WORDS))
    return re.compile(rf"(?<!{letter})(?:{words})(?!{letter})|{'|'.join((*PIECES, *TEXT_PIECES))}", re.IGNORECASE)


@lru_cache(maxsize=1 << 14)
def names_a_side(caption: str) -> bool:
    """True if the caption tells left from right, or names writing: a mirrored sample would contradict it."""
    caption = unicodedata.normalize("NFC", caption)
    return _pattern().search(_NO_TEXT.sub("", caption)) is not None
