"""A small spoken data set made on the spot, without a download, in LJSpeech's layout.

It is for seeing the whole pipeline run: loading, training, logging, resuming, export. It is no voice to learn from:
espeak-ng, a formant synthesiser, reads it, and a model trained on it can at best sound like that.
"""

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from trainer.data import cache_folder
from trainer.data.phonemes import phonemes_available, run_espeak

_VOICE = "en-us"
_FORMAT = 1  # part of the folder's name: raise it when espeak.py speaks otherwise

DEMO_SENTENCES: tuple[str, ...] = (
    "The kettle began to sing before anyone was awake.",
    "Where did you leave the blue umbrella?",
    "Nobody expected the bridge to open so early.",
    "She folded the map and looked up at the hills.",
    "What a strange and lovely morning!",
    "The ferry leaves at half past seven, rain or shine.",
    "Please close the gate, the goats are clever.",
    "In 1906 the mill stood where the library is now.",
    "My grandfather kept bees, two ponies, and a very old clock.",
    "Can you hear the river from your window?",
    "The baker sold 48 loaves before nine.",
    "It is never too late to plant a tree.",
    "Three small boats drifted past the lighthouse.",
    "Did the letter arrive on Thursday or on Friday?",
    "The orchestra tuned for a while, and then, at last, they played.",
    "He measured the board twice and cut it once.",
    "Watch out for the step!",
    "A thin blue smoke rose above the chimneys.",
    "The judge smiled, although she had heard the story before.",
    "Bread, cheese, and a handful of cherries were all they carried.",
    "The tunnel is 2,300 feet long and quite dark.",
    "Who painted the door that awful shade of green?",
    "Autumn came early to the northern valleys.",
    "If the wind turns, we shall have to row.",
    "The young doctor read every chart with great care.",
    "Yesterday the market was full of oranges and fish.",
    "I would rather walk than wait for another bus.",
    "The captain shouted twice, but only the gulls answered.",
    "Their train was 25 minutes late.",
    "Far below, a shepherd whistled to his dog.",
    "Have you ever slept under an open sky?",
    "The old piano had lost its highest notes.",
    "Every child in the village knew the way to the pond.",
    "Quick, hand me the other rope!",
    "The museum closes at 5:30 on Sundays.",
    "She wrote a long answer and then tore it up.",
    "Snow fell softly on the empty square.",
    "The thief, it turned out, was a magpie.",
    "Most of the apples went into the cider press.",
    "Why should a clock with no hands keep ticking?",
    "They built the wall from stones that the plough had turned up.",
    "The soup wants salt, pepper, and patience.",
    "A ticket costs $4.50, and children travel free.",
    "Beyond the orchard lies a field of yellow mustard.",
    "He laughed so loudly that the lamp shook.",
    "The lesson was short, but nobody forgot it.",
    "Will there be enough chairs for the guests?",
    "Seven crows sat in a row along the fence.",
    "The glass must cool slowly, or it will crack.",
    "Her voice was low, warm, and a little amused.",
    "On the 3rd of March the ice broke.",
    "The gardener trusted worms more than weather reports.",
    "Do not feed the swans, however politely they ask.",
    "A single candle lit the whole of the chapel.",
    "The road climbs steadily for eleven miles.",
    "We found an anchor, a boot, and half of a violin.",
    "How many bricks does a chimney need?",
    "The printer used black ink and thick, creamy paper.",
    "Before the storm, even the dogs were quiet.",
    "You could smell the pine trees from the station.",
    "The tailor finished 12 coats that winter.",
    "Nothing tastes better than water after a long climb.",
    "Look at the size of that pumpkin!",
    "The sailors told the same tale in four different ways.",
    "A cold wind slipped under the kitchen door.",
    "She asked for a window seat and a cup of tea.",
    "The engine coughed, shuddered, and finally caught.",
    "Is this the road to the harbor, or have we lost it?",
    "The new teacher knew every bird by its song.",
    "Half of the town came to see the comet.",
    "Put the heavy books on the lowest shelf.",
    "In the 1960s this valley had two railways.",
    "The fox crossed the frozen stream without a sound.",
    "He paid with a silver coin that nobody recognised.",
    "Late at night the bakery smelled of cinnamon.",
    "Some secrets are best kept by stones.",
    "The choir practised the last verse until it shone.",
    "Could you repeat the number, please?",
    "The potter threw away nine bowls and kept the tenth.",
    "Warm rain ran down the inside of the tent.",
    "The moon was so bright that the roosters were fooled.",
    "An honest scale is worth more than a golden one.",
    "The treaty was signed in 1855 and soon forgotten.",
    "Her brother joined the circus, of all things!",
    "They measured the depth of the lake with a knotted line.",
    "The smallest key opens the largest chest.",
    "When will the peaches be ripe?",
    "A broad avenue of limes leads down to the water.",
    "The postman knew the dogs better than the people.",
    "I counted 17 swallows on the wire.",
    "The recipe calls for flour, butter, and a steady hand.",
    "Slowly, the great doors of the theater swung open.",
    "The mayor promised a fountain, and he kept his word.",
    "Good ideas often arrive while one is washing dishes.",
    "The desert keeps the footprints of a whole century.",
    "Does anyone here speak Portuguese?",
    "The violin maker listened to the wood before he cut it.",
    "Mr. Hale mended clocks, radios, and quarrels.",
    "The horse refused the bridge but swam the river.",
    "Winter evenings are made for long stories.",
    "About 60% of the seeds came up.",
    "The photograph showed two sisters beside a motor car.",
    "Run, the tide is coming in!",
    "A good map tells you also what it leaves out.",
    "The bells rang until noon, and then the singing began.",
    "Someone had carved a heart into the oldest oak.",
    "What would you do with a thousand paper boats?",
    "The shop sells string, soap, and second-hand novels.",
    "He spoke gently, as one speaks to a nervous horse.",
    "The last lamp went out, and the stars took over.",
    "Copper turns green where the sea air touches it.",
    "We planted beans on Monday and ate them in July.",
    "The lift stopped between the 4th and 5th floors.",
    "Thank you for the honey, it is excellent.",
    "The mountain looks close, yet it is a day away.",
    "Why is the middle of the lake so dark?",
    "Fresh paint, said the sign, and he touched it anyway.",
    "The weaver used red, gold, and a very deep blue.",
    "Her first telescope was a cardboard tube and two lenses.",
    "When the last wagon had crossed the ford, the drivers lit a fire and counted their horses twice.",
    "The inventor, who had never owned a shop, explained to the bank that the wheels would sell themselves.",
    "Although the lighthouse was built in a single summer, it has outlived every house along that shore.",
    "First you warm the milk, then you stir in the honey, and only then do you add the saffron.",
    "Nobody could say whether the parrot had learned the song from the cook, or the cook from the parrot.",
    "If you follow the stream past the second mill, you find a stone bench facing the sea.",
    "Sit down and tell me.",
    "That is all for today, come back tomorrow.",
)
"""What is spoken, in order: clip `DEMO-0001` is the first."""

# How the sentences that are not written as spoken are read; by hand, so that no extra but `phonemes` is needed.
_READINGS = {
    "1906": "nineteen oh six",
    "48": "forty-eight",
    "2,300": "two thousand three hundred",
    "25": "twenty-five",
    "5:30": "five thirty",
    "$4.50": "four dollars and fifty cents",
    "3rd": "third",
    "12": "twelve",
    "1960s": "nineteen sixties",
    "1855": "eighteen fifty-five",
    "17": "seventeen",
    "Mr.": "Mister",
    "60%": "sixty percent",
    "4th": "fourth",
    "5th": "fifth",
}


def make_demo_set(folder: "str | Path | None" = None) -> Path:
    """Make the demo set, or find the one that an earlier call made: the same bytes every time.

    Args:
        folder: where to put it; None takes a folder in the user's cache whose name says what it was made from.

    Returns:
        The folder, in LJSpeech's layout: `metadata.csv` (id|text|normalized text, UTF-8) and `wavs/DEMO-0001.wav`
        and so on, 22,050 Hz, 16 bit, mono, 1 to 10 s each.

    Raises:
        ImportError: the extra `phonemes` is not installed (a given folder that holds the set needs none).
        FileExistsError: the given folder holds something else.
        RuntimeError: espeak-ng failed; the message has its error output.
    """
    if folder is not None and _is_complete(Path(folder)):
        return Path(folder)
    if not phonemes_available():
        raise ImportError('the demo set is spoken by espeak-ng: pip install "onefile-trainer[phonemes]"')
    target = cache_folder() / f"demo-speech-{_version()}" if folder is None else Path(folder)
    if _is_complete(target):
        return target
    if folder is not None and target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} holds files that are no complete demo set: give an empty or a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Made beside and renamed: whoever finds the folder finds it whole, and two processes may do this at once.
    with tempfile.TemporaryDirectory(prefix=".demo-speech-", dir=target.parent) as temporary:
        made = Path(temporary) / "set"
        _speak_into(made)
        if folder is None and target.exists() and not _is_complete(target):
            shutil.rmtree(target)  # our own folder in the cache, which lost files since it was made
        _publish(made, target)
    return target


def _clip_name(index: int) -> str:
    return f"DEMO-{index + 1:04d}"


def _reading(sentence: str) -> str:
    """The sentence as it is spoken."""
    words = sentence.split(" ")
    return " ".join(_READINGS.get(word.rstrip(","), word.rstrip(",")) + word[len(word.rstrip(",")) :] for word in words)


def _version() -> str:
    """What determines the bytes: the sentences, espeak-ng's version, the way it is asked."""
    library = importlib.metadata.version("espeakng-loader")
    content = "\n".join([str(_FORMAT), library, _VOICE, *map(_reading, DEMO_SENTENCES)])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _is_complete(folder: Path) -> bool:
    names = [_clip_name(i) for i in range(len(DEMO_SENTENCES))]
    return (folder / "metadata.csv").is_file() and all((folder / "wavs" / f"{name}.wav").is_file() for name in names)


def _speak_into(folder: Path) -> None:
    wavs = folder / "wavs"
    wavs.mkdir(parents=True)
    readings = [_reading(sentence) for sentence in DEMO_SENTENCES]
    names = [_clip_name(i) for i in range(len(readings))]
    # One process for all, in this order: what espeak-ng speaks depends on what it spoke before.
    requests = [[str(wavs / f"{name}.wav"), reading] for name, reading in zip(names, readings, strict=True)]
    run_espeak("speak", requests, _VOICE)
    rows = zip(names, DEMO_SENTENCES, readings, strict=True)
    metadata = "".join(f"{name}|{text}|{reading}\n" for name, text, reading in rows)
    (folder / "metadata.csv").write_text(metadata, encoding="utf-8", newline="\n")


def _publish(made: Path, target: Path) -> None:
    try:
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()  # a rename onto an empty folder works on POSIX alone
        os.rename(made, target)
    except OSError:
        if not _is_complete(target):  # else another process was faster, with the same bytes
            raise
