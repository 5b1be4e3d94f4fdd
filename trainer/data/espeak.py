"""The child process that holds espeak-ng: the one file of the trainer that loads GPL code, and never into the trainer.

Run as `python espeak.py phonemize <voice>` or `python espeak.py speak <voice>`: one JSON value a line on standard
input, one JSON answer a line on standard output. `phonemize` takes strings and answers IPA; `speak` takes
`[file, text]` and answers the number of samples written. Any failure ends the process with its traceback on standard
error.

It is run by its path, not as a module, and imports nothing of the trainer: so torch is not loaded here.
"""

import json
import os
import re
import sys
import wave
from types import ModuleType
from typing import TextIO

# What espeak-ng must not see, as it would drop it: kept as it is between the phonemes (punctuation of the 178 symbols).
_PUNCTUATION = re.compile(r'(\s*[;:,.!?¡¿—…"«»“”]+\s*)')

RATE_WPM, PITCH_RANGE, VOLUME = 160, 70, 80  # of 80..450; of 0..100, the default is 50; of 0..200, the default is 100
_PARAMETER_RATE, _PARAMETER_VOLUME, _PARAMETER_RANGE = 1, 2, 4  # espeak_PARAMETER in speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS, _CHARS_UTF8 = 2, 1
_SAMPLE_RATE_HZ = 22050


def make_phonemizer(voice: str):
    """Build a function from text to IPA with stress marks and punctuation, by phonemizer and espeak-ng.

    Args:
        voice: espeak-ng's name of the language, such as `en-us`.

    Raises:
        RuntimeError: espeak-ng does not know the voice.
    """
    import espeakng_loader
    from phonemizer.backend.espeak.espeak import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    backend = EspeakBackend(voice, with_stress=True, language_switch="remove-flags")

    def phonemize(text: str) -> str:
        # Cut at the punctuation here: phonemizer's own way loses its place when a piece has no sound (" ' ").
        pieces = _PUNCTUATION.split(text)
        spoken = [backend.phonemize([piece], strip=True)[0] if piece.strip() else piece for piece in pieces[::2]]
        pieces[::2] = spoken
        return " ".join("".join(pieces).split())

    return phonemize


def make_speaker(voice: str):
    """Build a function that speaks into 22,050 Hz 16-bit mono wave files, by espeak-ng's library alone.

    Args:
        voice: espeak-ng's name of the voice.

    Raises:
        RuntimeError: the library does not start or does not know the voice.
    """
    import ctypes

    import espeakng_loader

    library = _start_library(espeakng_loader, voice)
    chunks: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    library.espeak_SetSynthCallback(receive)

    def speak(file: str, text: str) -> int:
        chunks.clear()
        library.espeak_ng_SetRandSeed(1)  # else from the clock (en-us alone was not seen to need it)
        data = text.encode()
        size = ctypes.c_size_t(len(data) + 1)
        _check(library.espeak_Synth(data, size, 0, 0, 0, _CHARS_UTF8, None, None), f"text {text!r}")
        _check(library.espeak_Synchronize(), f"text {text!r}")
        with wave.open(file, "wb") as out:
            out.setparams((1, 2, _SAMPLE_RATE_HZ, 0, "NONE", "not compressed"))
            out.writeframes(b"".join(chunks))
        return sum(map(len, chunks)) // 2

    speak.keep_alive = receive  # ctypes does not: a callback that is collected crashes the next call
    return speak


def _start_library(espeakng_loader: ModuleType, voice: str):
    """Load the shared library and set its voice, rate, range and volume."""
    import ctypes

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data_path = espeakng_loader.get_data_path().encode()
    sample_rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
    if sample_rate != _SAMPLE_RATE_HZ:
        raise RuntimeError(f"espeak_Initialize returned {sample_rate} instead of {_SAMPLE_RATE_HZ} Hz")
    _check(library.espeak_SetVoiceByName(voice.encode()), f"voice {voice!r}")
    for parameter, value in (
        (_PARAMETER_RATE, RATE_WPM),
        (_PARAMETER_RANGE, PITCH_RANGE),
        (_PARAMETER_VOLUME, VOLUME),
    ):
        _check(library.espeak_SetParameter(parameter, value, 0), f"parameter {parameter} = {value}")
    return library


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"espeak-ng refused {what}: status {status}")


def main(task: str, voice: str, answers: TextIO) -> None:
    """Answer every line of standard input by one line.

    Args:
        task: `phonemize` or `speak`.
        voice: espeak-ng's name of the voice.
        answers: where the answers go.
    """
    if task == "phonemize":
        handle = make_phonemizer(voice)
    elif task == "speak":
        speak = make_speaker(voice)

        def handle(request):
            return speak(*request)

    else:
        raise ValueError(f"task {task!r} is none of phonemize, speak")
    for line in sys.stdin:
        answers.write(json.dumps(handle(json.loads(line))) + "\n")


if __name__ == "__main__":
    # Run by its path, this folder would come first: its text.py or audio.py must not hide a library's.
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
    # Whatever a library prints goes to standard error: the parent reads answers alone.
    with os.fdopen(os.dup(1), "w", encoding="ascii") as standard_output:
        os.dup2(2, 1)
        main(*sys.argv[1:], answers=standard_output)
