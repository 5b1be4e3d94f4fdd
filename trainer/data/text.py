"""From written English to the symbol ids that a speech model reads.

`clean_english` writes out what is not spelled as it is spoken (numbers, years, money, times, abbreviations);
`Tokenizer` turns the result into ids of the 178 symbols of the VITS authors (Kim et al. 2021, arXiv:2106.06103), by the
phonemes of espeak-ng where the extra `phonemes` is installed, letter by letter otherwise.

Deliberately not handled, because a rule would be wrong as often as right: Roman numerals (`I` is a word), units of
measure (`5 km`), dates with slashes (`3/4` is read as a fraction, `3/4/1999` number by number), URLs and e-mail
addresses, money used as an adjective (`a $5 bill` gets its plural), `St.` before a new sentence (it is `Saint` before
any capital), and the full stop that an abbreviation inside a paragraph shares with its sentence (`Jones Ltd. He left`):
it is spoken without pause. Four digits without a comma are read as a year from 1000 to 2099: `1234 men` becomes
`twelve thirty-four men`.
"""

import functools
import importlib
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable

from trainer.data.phonemes import phonemes_available, phonemize

logger = logging.getLogger("trainer")

_PAD = "_"
_PUNCTUATION = ';:,.!?¡¿—…"«»“” '
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_IPA = (
    "ɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɞɟʄɡɠɢʛɦɧħɥʜɨɪʝɭɬɫɮʟɱɯɰŋɳɲɴøɵɸθœɶʘɹɺɾɻʀʁɽʂʃʈʧʉʊʋⱱʌɣɤʍχʎʏʑʐʒʔʡʕʢǀǁǂǃˈˌːˑʼʴʰʱʲʷˠˤ˞↓↑→↗↘'\u0329'ᵻ"
)
SYMBOLS = [_PAD, *_PUNCTUATION, *_LETTERS, *_IPA]
"""The 178 symbols of the VITS authors, in their order; the index is the id. Id 0 is the pad and the blank."""

# A symbol that occurs twice (the apostrophe) takes its later index, as in the authors' dict. The pad is no letter.
_SYMBOL_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS) if symbol != _PAD}

_TITLES = {
    "mr": "Mister",
    # LJSpeech's own normalisation and the authors' phonemes say "misess"; there is no standard spelling.
    "mrs": "Misess",
    "dr": "Doctor",
    "drs": "Doctors",
    "maj": "Major",
    "gen": "General",
    "rev": "Reverend",
    "lt": "Lieutenant",
    "hon": "Honorable",
    "sgt": "Sergeant",
    "capt": "Captain",
    "col": "Colonel",
    "gov": "Governor",
    "prof": "Professor",
    "co": "Company",
    "jr": "Junior",
    "sr": "Senior",
    "esq": "Esquire",
    "ltd": "Limited",
}
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_MONTH_BY_SHORT = {month[:3]: month for month in _MONTHS}
_DIGIT_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_DENOMINATORS = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 6: "sixth", 8: "eighth", 10: "tenth"}
_CURRENCIES = {  # symbol -> (one, many, one hundredth, many hundredths)
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
    "¥": ("yen", "yen", "sen", "sen"),
}
_SCALES = {"k": "thousand", "m": "million", "mn": "million", "bn": "billion", "b": "billion", "tn": "trillion"}

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\w)\.\d+)"
# Kept from transliteration: the symbols' punctuation, and what the rules below read aloud.
_KEPT = set(_PUNCTUATION) | set("£€¥¢°½⅓⅔¼¾–×")
_UNICODE_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4"}
_LOOK_ALIKES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "‐": "-", "‑": "-", "−": "-", "_": " "})

_Rule = tuple[re.Pattern[str], "str | Callable[[re.Match[str]], str]"]


def clean_english(text: str) -> str:
    """Write out English text as it is read aloud.

    Args:
        text: any English text. Text that is already written out comes back unchanged but for whitespace.

    Returns:
        The text with numbers, money, times and common abbreviations in words, non-ASCII letters transliterated and
        white space collapsed. Capitals are kept.

    Raises:
        ImportError: the text holds digits or non-ASCII letters and the extra `speech` is not installed.
    """
    text = _plain_characters(text)
    text = _apply(_ABBREVIATION_RULES, text)
    if any(character.isdigit() for character in text):
        text = _apply(_NUMBER_RULES, text)
    text = _apply(_SIGN_RULES, text)
    return " ".join(text.split())


def _apply(rules: Iterable[_Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _plain_characters(text: str) -> str:
    """Reduce a text to printable ASCII and the characters of `_KEPT`; what is neither letter nor digit stays."""
    if text.isascii() and text.isprintable() and _PAD not in text:
        return text
    return "".join(map(_plain_character, unicodedata.normalize("NFC", text).translate(_LOOK_ALIKES)))


@functools.lru_cache(maxsize=4096)
def _plain_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":  # zero-width spaces, soft hyphens: nothing to read
        return ""
    if category[0] in "CZ":  # NUL and lone surrogates would break the way to espeak-ng
        return " "
    if character.isascii() or character in _KEPT or category[0] == "S":
        return character
    return _library("anyascii").anyascii(character)


def _library(name: str):
    """Import a library of the extra `speech` when it is first needed: inflect takes two seconds."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'cleaning this text needs {name}: pip install "onefile-trainer[speech]"') from error


# Abbreviations


def _spell_title(match: re.Match[str]) -> str:
    word = _TITLES[match["short"].lower()]
    if match["short"].islower():
        word = word.lower()
    return word + _shared_full_stop(match)


def _spell_saint(match: re.Match[str]) -> str:
    if re.match(r"[\s-]*[A-Z]", match.string[match.end() :]):
        return "Saint"
    return "Street" + _shared_full_stop(match)


def _shared_full_stop(match: re.Match[str]) -> str:
    """The full stop of an abbreviation that ends the text ends the sentence too."""
    at_end = match[0].endswith(".") and not match.string[match.end() :].strip("\"'”» \t\r\n")
    return "." if at_end else ""


_ABBREVIATION_RULES: list[_Rule] = [
    # Without a full stop (British) only before a name.
    (re.compile(r"\b(?P<short>Mr|Mrs|Dr)(?=\s+[A-Z])"), _spell_title),
    (re.compile(r"\b(?P<short>[Mm]rs?|[Dd]rs?|MRS?|DRS?)\."), _spell_title),
    (
        re.compile(
            r"\b(?P<short>(?:Maj|Gen|Rev|Lt|Hon|Sgt|Capt|Col|Gov|Prof|Co|Jr|Sr|Esq|Ltd|"
            r"MAJ|GEN|REV|LT|HON|SGT|CAPT|COL|CO|JR|SR|ESQ|LTD))\."
        ),
        _spell_title,
    ),
    (re.compile(r"\b(?:St|ST)\."), _spell_saint),
    (re.compile(r"\b(?:Ft|FT)\.(?=\s+[A-Z])"), "Fort"),
    (re.compile(r"\bNo\.\s*(?=\d)"), "Number "),
    (re.compile(r"\bNos\.\s*(?=\d)"), "Numbers "),
    (
        re.compile(r"\b(Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Oct|Nov|Dec)t?\.(?=\s+\d)"),
        lambda match: _MONTH_BY_SHORT[match[1]],
    ),
]


# Numbers


@functools.lru_cache(maxsize=1)
def _inflect_engine():
    return _library("inflect").engine()


def _digits(text: str) -> str:
    return " ".join(_DIGIT_WORDS[int(character)] for character in text if character.isdigit())


@functools.lru_cache(maxsize=4096)  # inflect takes 0.1 ms
def _cardinal(number: str) -> str:
    """`1,234.50` -> one thousand two hundred thirty-four point five zero; numbers written like codes digit by digit."""
    whole, point, decimals = number.replace(",", "").partition(".")
    if whole:
        # 007 and card numbers are read as they are written; inflect ends at 10^36 anyway
        as_code = len(whole) > 15 or (len(whole) > 1 and whole[0] == "0")
        whole = _digits(whole) if as_code else _inflect_engine().number_to_words(whole, andword="", comma="")
    return f"{whole} point {_digits(decimals)}".strip() if point else whole


def _ordinal(number: str) -> str:
    words = _inflect_engine().number_to_words(f"{number.replace(',', '')}th", andword="", comma="")
    return words.replace(",", "")


def _year(number: str) -> str:
    year = int(number)
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010 or 1000 <= year < 1010:
        return _cardinal(number)
    if rest == 0:
        return f"{_cardinal(str(century))} hundred"
    if rest < 10:
        return f"{_cardinal(str(century))} oh {_DIGIT_WORDS[rest]}"
    return f"{_cardinal(str(century))} {_cardinal(str(rest))}"


def _number(number: str) -> str:
    """A number that stands alone: a year where it looks like one."""
    is_year = re.fullmatch(r"1\d{3}|20\d{2}", number) is not None
    return _year(number) if is_year else _cardinal(number)


def _plural(words: str) -> str:
    if words.endswith("y"):
        return words[:-1] + "ies"
    return words + ("es" if words.endswith("x") else "s")


def _spell_number(match: re.Match[str]) -> str:
    """Any number left at the end, set off from letters that touch it: B52, 3D, but not five-year-old."""
    before = " " if match.start() and match.string[match.start() - 1].isalpha() else ""
    after = " " if match.string[match.end() : match.end() + 1].isalpha() else ""
    return before + _number(match[0]) + after


def _spell_phone(match: re.Match[str]) -> str:
    return ", ".join(_digits(group) for group in match[0].split("-"))


def _spell_iso_date(match: re.Match[str]) -> str:
    return f"{_MONTHS[int(match['month']) - 1]} {_ordinal(str(int(match['day'])))}, {_year(match['year'])}"


def _spell_time(match: re.Match[str]) -> str:
    hour, minute = int(match["hour"]), int(match["minute"])
    words = _cardinal(str(hour))
    if minute >= 10:
        return f"{words} {_cardinal(str(minute))}"
    if minute > 0:
        return f"{words} oh {_DIGIT_WORDS[minute]}"
    if re.match(r"\s*(?:[ap]\.m\.|o'clock)", match.string[match.end() :]):
        return words
    return f"{words} o'clock" if 1 <= hour <= 12 else f"{words} hundred hours"


def _spell_half_day(match: re.Match[str]) -> str:
    return f" {match[0].strip()[0].lower()}.m."


def _spell_money(match: re.Match[str]) -> str:
    """`$5`, `$1,234.50`, `£3.5 million`, `$5-10`, `$5 - $10 million`."""
    one, many, one_part, many_parts = _CURRENCIES[match["currency"]]
    amount, upper, scale = match["amount"], match["upper"], match["scale"] or ""
    scale = _SCALES.get(scale.lower(), scale)
    if scale or upper:
        words = _cardinal(amount) + (f" to {_cardinal(upper)}" if upper else "")
        return f"{words} {scale} {many}".replace("  ", " ")
    whole, _, parts = amount.replace(",", "").partition(".")
    if len(parts) not in (0, 2):
        return f"{_cardinal(amount)} {many}"
    said = []
    if int(whole or 0) or not int(parts or 0):
        said.append(f"{_cardinal(whole or '0')} {one if whole == '1' else many}")
    if int(parts or 0):
        said.append(f"{_cardinal(str(int(parts)))} {one_part if parts == '01' else many_parts}")
    return " and ".join(said)


def _spell_plural(match: re.Match[str]) -> str:
    """`1960s` and `1960's` -> nineteen sixties; `1855's` keeps its genitive."""
    words = _number(match["number"])
    if "'" in match["ending"] and not match["number"].endswith("0"):
        return words + "'s"
    return _plural(words)


def _spell_fraction(match: re.Match[str]) -> str:
    top, bottom, whole = int(match["top"]), int(match["bottom"]), match["whole"]
    if bottom not in _DENOMINATORS or not 0 < top < bottom:
        return match[0]
    part = _DENOMINATORS[bottom] + ("s" if top > 1 else "")
    if whole is None:
        return f"{_DIGIT_WORDS[top]} {part}"
    return f"{_cardinal(whole)} and {'a' if top == 1 else _DIGIT_WORDS[top]} {part}"


def _spell_range(match: re.Match[str]) -> str:
    low, high = (float(match[name].replace(",", "")) for name in ("low", "high"))
    # 1914-18 is a range of years; 747-400 and a score of 3-2 are none
    if low < high or re.fullmatch(r"1\d{3}-\d\d", match["low"] + "-" + match["high"]):
        return f"{match['low']} to {match['high']}"
    return match[0] if " " in match[0] else f"{match['low']} {match['high']}"


_NUMBER_RULES: list[_Rule] = [
    (re.compile("[½⅓⅔¼¾]"), lambda match: f" {_UNICODE_FRACTIONS[match[0]]}"),
    # The dashes first: en dash between numbers, phone numbers, dates, chains, ranges.
    (re.compile(r"(?<=[\d%.])\s*–\s*(?=[$£€¥]?\d)"), "-"),
    (re.compile(r"(?<![\d-])(?:\d{3}-\d{3}-\d{4}|\d{3}-\d\d(?!00)\d\d)(?![\d-])"), _spell_phone),
    (
        re.compile(r"\b(?P<year>[12]\d{3})-(?P<month>0[1-9]|1[0-2])-(?P<day>0[1-9]|[12]\d|3[01])\b"),
        _spell_iso_date,
    ),
    (re.compile(r"(?<![\w-])\d+(?:-\d+){2,}(?![\w-])"), lambda match: match[0].replace("-", " ")),
    (re.compile(r"(?<=\d)\s*(?:[AaPp]\.[Mm]\.|[AaPp]\.?[Mm]\b\.?)"), _spell_half_day),
    (re.compile(r"((?:\d:\d\d|\d%|\d(?:st|nd|rd|th|s)|[ap]\.m\.))\s*-\s*(?=\d)"), r"\1 to "),
    (
        re.compile(r"(?<![\d:.])(?P<hour>1?\d|2[0-4]):(?P<minute>[0-5]\d)(?![\d:])"),
        _spell_time,
    ),
    (re.compile(r"(?<![\d:.])(\d+):(\d+)(?![\d:])"), r"\1 to \2"),
    (re.compile(r"(?<![\w)])-(?=[$£€¥]?\.?\d)"), "minus "),
    (
        re.compile(
            rf"(?P<currency>[$£€¥])\s?(?P<amount>{_NUMBER})(?:\s*-\s*[$£€¥]?(?P<upper>{_NUMBER}))?"
            r"(?:\s?(?P<scale>(?i:hundred|thousand|million|billion|trillion|mn|bn|tn|[kmb]))\b)?"
        ),
        _spell_money,
    ),
    (re.compile(rf"({_NUMBER})\s?¢"), lambda match: _cardinal(match[1]) + (" cent" if match[1] == "1" else " cents")),
    (re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)\b"), lambda match: _ordinal(match[1])),
    (re.compile(r"(?<![\d.,])'?(?P<number>\d+)(?P<ending>'?s)\b"), _spell_plural),
    (
        re.compile(r"(?<![\d/.,])(?:(?P<whole>\d+)\s+)?(?P<top>\d)/(?P<bottom>\d{1,2})(?![\d/])"),
        _spell_fraction,
    ),
    (
        re.compile(rf"(?<![\w.,-])(?P<low>{_NUMBER})\s*-\s*(?P<high>{_NUMBER})(?![\w-])"),
        _spell_range,
    ),
    (re.compile(r"(?<=\d)\s*\+\s*(?=\d)"), " plus "),
    (re.compile(r"(?<=\d)\s*×\s*(?=\d)"), " times "),
    (re.compile(r"(?<=\d)\s*=\s*(?=-?\d)"), " equals "),
    (re.compile(r"#\s?(?=\d)"), "number "),
    # 3.1.2: a second point is read, not taken for a full stop
    (re.compile(r"(?<=\d)\.(?=\d+\.\d)|(?<=\.\d)\.(?=\d)|(?<=\.\d\d)\.(?=\d)"), " point "),
    (re.compile(_NUMBER), _spell_number),
]


_SIGN_RULES: list[_Rule] = [
    (re.compile(r"\s*%"), " percent"),
    (re.compile(r"\s*°\s?C\b"), " degrees Celsius"),
    (re.compile(r"\s*°\s?F\b"), " degrees Fahrenheit"),
    (re.compile(r"\s*°"), " degrees"),
    (re.compile(r"\s*&\s*"), " and "),
    (re.compile(r"\s*@\s*"), " at "),
    (re.compile(r"(?<=\w)\s*/\s*(?=\w)"), " "),
    (re.compile(r"\s*-{2,}\s*|\s+[-–]\s+"), " — "),
    (re.compile("–"), "-"),
]


# Symbols

_SYMBOL_RULES: list[_Rule] = [
    # None of the 178 is a bracket: a reader makes the pause of a comma.
    (re.compile(r"\s*[(\[{]+\s*|\s*[)\]}]+\s*(?=\w)"), ", "),
    (re.compile(r"\s*[)\]}]+\s*(?=[,;:.!?—…])|\s*[)\]}]+\s*$"), ""),
    (re.compile(r"\s*[)\]}]+"), ","),
    (re.compile(r"^[\s,]+"), ""),
    (re.compile(r"(?<=[,;:.!?—…]),\s*"), " "),
]


class Tokenizer:
    """Turns text into symbol ids and back.

    Args:
        phonemes: True for the phonemes of espeak-ng, False for letters; None takes phonemes where the extra
            `phonemes` is installed, and says once which it took.
        add_blank: put the blank (id 0) between all symbols and at both ends, as the VITS authors do: n symbols become
            2 n + 1 ids.

    Raises:
        ImportError: phonemes are asked for and the extra is not installed.
    """

    def __init__(self, phonemes: "bool | None" = None, add_blank: bool = True):
        if phonemes and not phonemes_available():
            raise ImportError('Tokenizer(phonemes=True) needs espeak-ng: pip install "onefile-trainer[phonemes]"')
        self.phonemes = _choose_phonemes() if phonemes is None else phonemes
        self.add_blank = add_blank
        self._reported: set[str] = set()

    def encode(self, text: str) -> list[int]:
        """Encode one text: cleaned, as phonemes or letters, as ids [T]; see `encode_all`."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """Encode many texts at once, which costs far less than one by one.

        Args:
            texts: any number of English texts.

        Returns:
            For every text its ids [T] in 0 .. 177. An empty text has no symbol: `[0]` with blanks, `[]` without.

        Raises:
            ImportError: a text needs a library that is not installed; the message has the command.
            RuntimeError: espeak-ng failed; the message has its error output.
        """
        symbols = [_apply(_SYMBOL_RULES, clean_english(text)) for text in texts]
        if self.phonemes:
            symbols = phonemize(symbols)
        else:
            symbols = [" ".join(line.replace("-", " ").split()) for line in symbols]
        self._report_dropped(symbols)
        return [self._ids(line) for line in symbols]

    def decode(self, ids: Iterable[int]) -> str:
        """Join the symbols of ids [T] (a list or a one-dimensional tensor) again, without blanks and padding.

        Raises:
            ValueError: an id is not in 0 .. 177.
        """
        numbers = [int(i) for i in ids]
        for number in numbers:
            if not 0 <= number < len(SYMBOLS):
                raise ValueError(
                    f"symbol id {number} is not in 0 .. {len(SYMBOLS) - 1}: were these ids made by this tokenizer?"
                )
        return "".join(SYMBOLS[number] for number in numbers if number != 0)

    def _ids(self, symbols: str) -> list[int]:
        kept = "".join(symbol for symbol in symbols if symbol in _SYMBOL_IDS)
        ids = [_SYMBOL_IDS[symbol] for symbol in " ".join(kept.split())]
        if not self.add_blank:
            return ids
        with_blanks = [0] * (2 * len(ids) + 1)
        with_blanks[1::2] = ids
        return with_blanks

    def _report_dropped(self, lines: list[str]) -> None:
        dropped = {character for line in lines for character in line} - _SYMBOL_IDS.keys() - self._reported
        if dropped:
            self._reported |= dropped
            names = ", ".join(
                f"{character!r} ({unicodedata.name(character, 'unnamed')})" for character in sorted(dropped)
            )
            logger.warning("characters that are none of the %d symbols are dropped: %s", len(SYMBOLS), names)


@functools.lru_cache(maxsize=1)  # so that it is said once
def _choose_phonemes() -> bool:
    if phonemes_available():
        logger.info("text is read as phonemes of espeak-ng")
        return True
    logger.warning(
        'text is read letter by letter, which sounds worse than phonemes: pip install "onefile-trainer[phonemes]"'
    )
    return False
