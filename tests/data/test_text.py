"""Text cleaning and tokens, against expectations written by hand and the VITS authors' symbols and phonemes."""

import logging
import os
import pickle
import subprocess
import sys

import pytest

from trainer.data import text as text_module
from trainer.data.phonemes import phonemes_available
from trainer.data.text import SYMBOLS, Tokenizer, clean_english

needs_phonemes = pytest.mark.skipif(not phonemes_available(), reason="the extra 'phonemes' is not installed")

YEARS = [
    ("In 1855 it rained.", "In eighteen fifty-five it rained."),
    ("1900", "nineteen hundred"),
    ("1906", "nineteen oh six"),
    ("2000", "two thousand"),
    ("2005", "two thousand five"),
    ("2010", "twenty ten"),
    ("2024", "twenty twenty-four"),
    ("1066", "ten sixty-six"),
    ("1002", "one thousand two"),
    ("800", "eight hundred"),
    ("the 1960s", "the nineteen sixties"),
    ("the 1960's", "the nineteen sixties"),
    ("the '60s", "the sixties"),
    ("the 1900s", "the nineteen hundreds"),
    ("1855's harvest", "eighteen fifty-five's harvest"),
    ("Nov. 22, 1963", "November twenty-two, nineteen sixty-three"),
    ("Sept. 5", "September five"),
    ("2024-03-05", "March fifth, twenty twenty-four"),
    ("1914-18", "nineteen fourteen to eighteen"),
    ("1914–1918", "nineteen fourteen to nineteen eighteen"),
    ("mid-1960s", "mid-nineteen sixties"),
]
NUMBERS = [
    ("0", "zero"),
    ("105", "one hundred five"),
    ("1,855", "one thousand eight hundred fifty-five"),
    ("1,234,567", "one million two hundred thirty-four thousand five hundred sixty-seven"),
    ("3.14", "three point one four"),
    ("2.50", "two point five zero"),
    (".5", "point five"),
    ("-5 degrees", "minus five degrees"),
    ("−5", "minus five"),
    ("pages 12-15", "pages twelve to fifteen"),
    ("12 – 15", "twelve to fifteen"),
    ("won 3-2", "won three two"),
    ("5 - 3", "five — three"),
    ("50%", "fifty percent"),
    ("12.5 %", "twelve point five percent"),
    ("5-10%", "five to ten percent"),
    ("5%-10%", "five percent to ten percent"),
    ("1/2", "one half"),
    ("2/3", "two thirds"),
    ("5 1/2", "five and a half"),
    ("2¾", "two and three quarters"),
    ("24/7", "twenty-four seven"),
    ("9/11", "nine eleven"),
    ("3/4/1999", "three four nineteen ninety-nine"),
    ("3rd", "third"),
    ("21st", "twenty-first"),
    ("1,012th", "one thousand twelfth"),
    ("19th-20th", "nineteenth to twentieth"),
    ("No. 5", "Number five"),
    ("Nos. 5 and 6", "Numbers five and six"),
    ("#5", "number five"),
    ("five-year-old and 5-year-old", "five-year-old and five-year-old"),
    ("B52", "B fifty-two"),
    ("3D", "three D"),
    ("66s", "sixty-sixes"),
    ("007", "zero zero seven"),
    ("1234567890123456", "one two three four five six seven eight nine zero one two three four five six"),
    ("555-123-4567", "five five five, one two three, four five six seven"),
    ("100-1000", "one hundred to one thousand"),
    ("12-34-56", "twelve thirty-four fifty-six"),
    ("3.1.2", "three point one point two"),
    ("1 + 1 = 2", "one plus one equals two"),
    ("4×4", "four times four"),
    ("3:1", "three to one"),
    ("20°C, 70 °F, 90°", "twenty degrees Celsius, seventy degrees Fahrenheit, ninety degrees"),
    ("We met 3. Then 4 came.", "We met three. Then four came."),
    ("1, 2, 3", "one, two, three"),
]
MONEY_AND_TIMES = [
    ("$1,234.50", "one thousand two hundred thirty-four dollars and fifty cents"),
    ("$1855", "one thousand eight hundred fifty-five dollars"),
    ("£5", "five pounds"),
    ("£1", "one pound"),
    ("£2.01", "two pounds and one penny"),
    ("€1.20", "one euro and twenty cents"),
    ("¥500", "five hundred yen"),
    ("$0.50", "fifty cents"),
    ("$0", "zero dollars"),
    ("$1.5", "one point five dollars"),
    ("$3 million", "three million dollars"),
    ("$3.5bn", "three point five billion dollars"),
    ("$5-10", "five to ten dollars"),
    ("$5–$10 million", "five to ten million dollars"),
    ("-$5", "minus five dollars"),
    ("50¢", "fifty cents"),
    ("9 p.m.", "nine p.m."),
    ("9pm", "nine p.m."),
    ("9 A.M. sharp", "nine a.m. sharp"),
    ("3:30", "three thirty"),
    ("9:05", "nine oh five"),
    ("9:00", "nine o'clock"),
    ("9:00 a.m.", "nine a.m."),
    ("14:00", "fourteen hundred hours"),
    ("12:35 p.m.", "twelve thirty-five p.m."),
    ("3:30-4:30", "three thirty to four thirty"),
    ("9am-5pm", "nine a.m. to five p.m."),
]
ABBREVIATIONS = [
    ("Mr. Smith", "Mister Smith"),
    ("Mr Smith", "Mister Smith"),
    ("mr. smith", "mister smith"),
    ("Mrs. Connally", "Misess Connally"),
    ("Dr. Jones and Drs. Hall", "Doctor Jones and Doctors Hall"),
    ("St. Paul", "Saint Paul"),
    ("on Main St.", "on Main Street."),
    ("on Main St. yesterday", "on Main Street yesterday"),
    ("Smith & Co.", "Smith and Company."),
    ("Dickens Jr. came", "Dickens Junior came"),
    ("Maj. Gen. Lee", "Major General Lee"),
    ("Rev. Hill, Hon. Grey, Sgt. Bell", "Reverend Hill, Honorable Grey, Sergeant Bell"),
    ("Lt.-Col. Bligh", "Lieutenant-Colonel Bligh"),
    ("Capt. Cook, Col. Burr", "Captain Cook, Colonel Burr"),
    ('"John Hall, Esq."', '"John Hall, Esquire."'),
    ("Jones Ltd. grew", "Jones Limited grew"),
    ("Ft. Worth", "Fort Worth"),
    ("No. I said no.", "No. I said no."),
    ("Thanks, hon.", "Thanks, hon."),
    ("and/or", "and or"),
    ("a@b", "a at b"),
]
CHARACTERS = [
    ("café, naïve, Łódź", "cafe, naive, Lodz"),
    ("“Hi” — so… «ok» ¡no! ¿sí?", "“Hi” — so… «ok» ¡no! ¿si?"),
    ("don’t ‘quote’", "don't 'quote'"),
    ("a--b and a - b and a – b", "a — b and a — b and a — b"),
    ("Paris–London", "Paris-London"),
    ("snake_case", "snake case"),
    ("so\u00adft", "soft"),
    (" a\n\tb\u00a0c\x00d\u200b ", "a b c d"),
    ("lone \ud800 surrogate", "lone surrogate"),
    ("東", "Dong"),
    ("١٢", "twelve"),
    ("", ""),
]


@pytest.mark.parametrize(("written", "spoken"), YEARS + NUMBERS + MONEY_AND_TIMES + ABBREVIATIONS + CHARACTERS)
def test_text_is_written_out_as_it_is_read_aloud(written, spoken):
    assert clean_english(written) == spoken


NORMALISED = [
    'the Gutenberg, or "forty-two line Bible" of about fourteen fifty-five,',
    "The first books were printed in black letter, i.e. the letter which was a Gothic development;",
    "psalters, etc., produced by printing in the fifteenth century.",
    "Between the hours of eight and nine p.m. they were occupied; Special Agent Lyndal L. Shaneyfelt of the FBI,",
    "at about twelve:thirty-five p.m. (which was late) he said: 'No!'",
]


@pytest.mark.parametrize("text", NORMALISED)
def test_normalised_text_is_unchanged_but_for_whitespace(text):
    assert clean_english("  " + text.replace(" ", " \n ") + "\t") == text


def test_real_normalised_text_is_unchanged(ljspeech_sample):
    rows = (ljspeech_sample / "metadata.csv").read_text(encoding="utf-8").splitlines()
    for row in rows:
        _, written, normalised = row.split("|")
        assert clean_english(normalised) == normalised
        assert clean_english(written) == normalised


def test_symbols_are_the_authors_178_in_their_order():
    assert len(SYMBOLS) == 178
    assert all(len(symbol) == 1 for symbol in SYMBOLS)
    # Positions counted in the authors' list: pad 0, punctuation 1..16, A 17, a 43, the first IPA letter 69.
    assert [SYMBOLS[i] for i in (0, 1, 16, 17, 42, 43, 68, 69, 177)] == list("_; AZazɑᵻ")
    assert [i for i, symbol in enumerate(SYMBOLS) if SYMBOLS.count(symbol) > 1] == [174, 176]
    assert SYMBOLS[174] == "'"
    # The letters as the authors list them: vowels and consonants, then clicks, marks, arrows.
    listed = (
        "ɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɞɟʄɡɠɢʛɦɧħɥʜɨɪʝɭɬɫɮʟɱɯɰŋɳɲɴøɵɸθœɶʘɹɺɾɻʀʁɽʂʃʈʧʉ"
        "ʊʋⱱʌɣɤʍχʎʏʑʐʒʔʡʕʢǀǁǂǃˈˌːˑʼʴʰʱʲʷˠˤ˞↓↑→↗↘'\u0329'ᵻ"
    )
    assert "".join(SYMBOLS[69:]) == listed
    assert SYMBOLS[175] == "\u0329"


def test_ids_of_a_plain_word():
    # a = 43 .. z = 68, space = 16, the apostrophe has its later index
    assert Tokenizer(phonemes=False, add_blank=False).encode("ab z'") == [43, 44, 16, 68, 176]
    assert Tokenizer(phonemes=False, add_blank=True).encode("ab") == [0, 43, 0, 44, 0]


@pytest.mark.parametrize("add_blank", [True, False])
def test_letters_survive_the_round_trip(add_blank):
    tokenizer = Tokenizer(phonemes=False, add_blank=add_blank)
    text = 'He said: “Don\'t go; wait…” — and left, twice! ¿Why? «Ah» "so".'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == (2 * len(text) + 1 if add_blank else len(text))
    assert tokenizer.encode_all([text, "a", ""]) == [ids, tokenizer.encode("a"), [0] if add_blank else []]


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("Hello (world).", "Hello, world."),
        ("He (the one) said", "He, the one, said"),
        ("(Yes) no", "Yes, no"),
        ("a [b], c", "a, b, c"),
        ("forty-two", "forty two"),
        ("so (he said, (twice)) he went", "so, he said, twice, he went"),
        ("_", ""),
    ],
)
def test_brackets_and_hyphens_are_not_symbols(text, symbols):
    tokenizer = Tokenizer(phonemes=False)
    assert tokenizer.decode(tokenizer.encode(text)) == symbols


def test_characters_outside_the_symbols_are_dropped_with_one_warning(caplog):
    tokenizer = Tokenizer(phonemes=False)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        ids = tokenizer.encode_all(["a * b", "c ~ d 😀"])
        assert [tokenizer.decode(line) for line in ids] == ["a b", "c d"]
        assert len(caplog.records) == 1
        message = caplog.records[0].getMessage()
        assert "'*' (ASTERISK)" in message
        assert "'~' (TILDE)" in message
        assert "'😀' (GRINNING FACE)" in message
        tokenizer.encode("again *")  # known by now
        assert len(caplog.records) == 1


def test_ids_out_of_range_are_refused():
    tokenizer = Tokenizer(phonemes=False)
    with pytest.raises(ValueError, match=r"symbol id 178 is not in 0 \.\. 177"):
        tokenizer.decode([43, 178])
    with pytest.raises(ValueError, match="symbol id -1"):
        tokenizer.decode([-1])


def test_the_tokenizer_says_once_what_it_took(caplog, monkeypatch):
    monkeypatch.setattr(text_module, "phonemes_available", lambda: False)
    text_module._choose_phonemes.cache_clear()
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert Tokenizer().phonemes is False
        assert Tokenizer().phonemes is False
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert 'pip install "onefile-trainer[phonemes]"' in caplog.records[0].getMessage()
        monkeypatch.setattr(text_module, "phonemes_available", lambda: True)
        text_module._choose_phonemes.cache_clear()
        assert Tokenizer().phonemes is True
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    text_module._choose_phonemes.cache_clear()


def test_phonemes_without_the_extra_name_the_command(monkeypatch):
    monkeypatch.setattr(text_module, "phonemes_available", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "onefile-trainer\[phonemes\]"'):
        Tokenizer(phonemes=True)


@pytest.mark.parametrize(("library", "text"), [("inflect", "98,765 men"), ("anyascii", "café")])
def test_cleaning_without_the_extra_names_the_command(monkeypatch, library, text):
    monkeypatch.setitem(sys.modules, library, None)
    text_module._inflect_engine.cache_clear()
    text_module._plain_character.cache_clear()
    with pytest.raises(ImportError, match=rf'needs {library}: pip install "onefile-trainer\[speech\]"'):
        clean_english(text)
    assert clean_english("No digit, no accent.") == "No digit, no accent."


def test_a_tokenizer_can_be_sent_to_a_loader_worker():
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(phonemes=False)))
    assert tokenizer.encode("ab") == [0, 43, 0, 44, 0]


def test_nothing_heavy_and_nothing_under_the_gpl_is_imported(tmp_path):
    code = (
        "import sys; from trainer.data.text import Tokenizer, clean_english; clean_english('No digit.');"
        "Tokenizer().encode('Plain words only.');"
        "print(sorted({'inflect', 'anyascii', 'phonemizer', 'espeakng_loader'} & set(sys.modules)))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def _distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@needs_phonemes
def test_phonemes_differ_from_the_authors_in_few_characters(ljspeech_phonemes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _distance("kitten", "sitting") == 3
    rows = [line.split("\t") for line in ljspeech_phonemes.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(phonemes=True)
    ours = [tokenizer.decode(ids) for ids in tokenizer.encode_all(text for _, text, _ in rows)]
    scored = [(_distance(mine, theirs), name, mine, theirs) for (name, _, theirs), mine in zip(rows, ours, strict=True)]
    rate = sum(score for score, *_ in scored) / sum(len(theirs) for _, _, theirs in rows)
    worst = "\n".join(
        f"{d} in {name}\n  ours    {mine}\n  authors {theirs}" for d, name, mine, theirs in sorted(scored)[:-6:-1]
    )
    report = f"{rate:.2%} of the characters of {len(rows)} sentences differ from the authors'; the worst five:\n{worst}"
    print(report)
    assert len(rows) == 100
    assert rate <= 0.025, report


@needs_phonemes
def test_phonemes_are_symbols_and_keep_the_punctuation(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = Tokenizer(phonemes=True)
    said = tokenizer.decode(tokenizer.encode('“Hello,” he said (in 1906): "world"!'))
    # Written by hand: American English in espeak-ng's notation.
    assert said == '“həlˈoʊ,” hiː sˈɛd, ɪn nˈaɪntiːn ˈoʊ sˈɪks: "wˈɜːld"!'
    assert tokenizer.decode(tokenizer.encode("?!")) == "?!"
    assert tokenizer.encode("") == [0]
