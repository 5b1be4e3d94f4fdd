"""Data in LJSpeech's layout (`metadata.csv`, `wavs/`): read, split, found, and downloaded.

LJSpeech-1.1 (Ito and Johnson, 2017, public domain): 13,100 clips of one speaker, 24 hours at 22,050 Hz.
"""

import contextlib
import errno
import hashlib
import http.client
import itertools
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from trainer.data.cache import exclusive
from trainer.data.demo import make_demo_set
from trainer.data.speech import DataError, SpeechSample

logger = logging.getLogger("trainer")

LJSPEECH_URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"
LJSPEECH_SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"
LJSPEECH_SIZE = 2_748_572_632  # bytes

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")  # in this order, when an id has several files
EVAL_CLIPS, TEST_CLIPS, ALL_CLIPS = 100, 500, 13_100  # the split of Kim et al. 2021, section 3.1

DEMO_NOTICE = """
*** No data set: training on the DEMO SET, sentences spoken by the espeak-ng synthesizer.
*** It shows that everything runs. For a voice, train on LJSpeech-1.1: add --download (2.7 GB),
*** unpack it as {default}, or give --coqpit.dataset_path=DIR.
"""

_BLOCK = 1 << 20
_ROOM = 2.5  # archive and unpacked files together, in units of the archive's size (measured: 2.4)
_LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no retry helps against these


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_ljspeech(folder: str | Path) -> list[SpeechSample]:
    """Reads `metadata.csv` of a folder in LJSpeech's layout; every problem in it is reported at once.

    A line is `id|text` or `id|text|normalized text`, in UTF-8, where quotes are text; the normalized text is taken
    unless it is blank. The clip is `wavs/<id>.wav`, `.flac` or `.ogg`.

    Args:
        folder: holds `metadata.csv` and `wavs/`.

    Returns:
        The samples in the order of the file; their name is the id.

    Raises:
        DataError: (a ValueError) the folder has another layout; the metadata are empty, not UTF-8 or have a wrong
            number of columns; an id is empty, repeated or points outside the folder; a text is empty; a clip is
            missing.
    """
    folder = Path(folder)
    _require_layout(folder, f"give the folder that holds them instead of {folder}")
    metadata = folder / "metadata.csv"
    samples, problems = [], []
    seen: dict[str, int] = {}
    lines = metadata.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            name, text = _parse(line.removesuffix(b"\r"))
            if name in seen:
                raise DataError(f"{name}: the id is on line {seen[name]} already")
            seen[name] = number
            samples.append(SpeechSample(name, _clip_of(folder, name), text))
        except DataError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise DataError.listing(str(metadata), problems, "Mend these lines or take them out.")
    if not samples:
        raise DataError(f"{metadata}: the file is empty: it needs a line `id|text|normalized text` for each clip")
    return samples


def _parse(line: bytes) -> tuple[str, str]:
    try:
        columns = line.decode("utf-8").split("|")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
        raise DataError(f"not UTF-8 ({byte}): {line[:40]!r}; save the file as UTF-8") from None
    name = columns[0]
    if len(columns) not in (2, 3):
        raise DataError(f"{name[:40]}: {len(columns)} columns, id|text or id|text|normalized text is needed")
    if not name.strip():
        raise DataError("the id is empty")
    if _leaves_folder(name):
        raise DataError(f"{name}: the id points outside the folder of the data set")
    text = columns[-1].strip() or columns[1].strip()
    if not text:
        raise DataError(f"{name}: the text is empty")
    return name, text


def _leaves_folder(name: str) -> bool:
    path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    return bool(path.drive or path.root) or ".." in path.parts


def _clip_of(folder: Path, name: str) -> str:
    for suffix in AUDIO_SUFFIXES:
        path = os.path.join(folder, "wavs", name + suffix)
        if os.path.isfile(path):
            return path
    raise DataError(f"{name}: no clip wavs/{name}{{{','.join(AUDIO_SUFFIXES)}}}")


def split_ljspeech(
    samples: Iterable[SpeechSample], seed: int
) -> tuple[list[SpeechSample], list[SpeechSample], list[SpeechSample]]:
    """Splits the samples as the VITS authors did: of 13,100 clips 12,500 to train, 100 to evaluate, 500 to test.

    Which clip goes where depends on its name and the seed, not on the order of the samples. A smaller set is split
    in proportion, but for evaluation and test it gives four samples each where these are at most a tenth, so that
    the evaluation of a small set is not that of one clip. A larger set keeps the 100 and 500.

    Args:
        samples: three or more, with names that differ.
        seed: another seed, another split.

    Returns:
        The samples for training, evaluation and test, each sorted by name.

    Raises:
        DataError: (a ValueError) fewer than three samples, or a repeated name.
    """
    samples = sorted(samples, key=lambda sample: sample.name)
    if len(samples) < 3:
        raise DataError(f"{len(samples)} samples cannot be split into train, eval and test: 3 or more are needed")
    for one, next_one in itertools.pairwise(samples):
        if one.name == next_one.name:
            raise DataError(f"{one.name}: the name occurs more than once: give each sample its own")
    key = str(seed).encode()
    shuffled = sorted(samples, key=lambda sample: hashlib.blake2b(sample.name.encode(), key=key).digest())
    share = min(1.0, len(samples) / ALL_CLIPS)
    least = max(1, min(4, len(samples) // 10))
    evals = max(least, round(EVAL_CLIPS * share))
    tests = max(least, round(TEST_CLIPS * share))
    parts = shuffled[evals + tests :], shuffled[:evals], shuffled[evals : evals + tests]
    train, evaluation, test = (sorted(part, key=lambda sample: sample.name) for part in parts)
    return train, evaluation, test


# --- Finding ----------------------------------------------------------------------------------------------------------


def _missing(folder: Path) -> list[str]:
    missing = [] if (folder / "metadata.csv").is_file() else ["the file metadata.csv"]
    return missing if (folder / "wavs").is_dir() else [*missing, "the folder wavs"]


def _require_layout(folder: Path, remedy: str) -> None:
    missing = _missing(folder)
    if missing:
        what = "is not there" if not folder.exists() else f"lacks {' and '.join(missing)}"
        inside = [child for child in (sorted(folder.iterdir()) if folder.is_dir() else []) if not _missing(child)]
        hint = f" (but {inside[0]} has both)" if inside else ""
        raise DataError(
            f"{folder.absolute()} {what}{hint}: a data set in LJSpeech's layout has the file metadata.csv and the "
            f"folder wavs; {remedy}"
        )


def locate_ljspeech(dataset_path: str, default: Path = Path("data/LJSpeech-1.1")) -> Path | None:
    """Finds the data set of a recipe.

    Args:
        dataset_path: the folder that the user named; "" when none was named.
        default: where it is looked for then.

    Returns:
        The folder; None when none was named and the default is not there.

    Raises:
        DataError: (a ValueError) the folder that was named is not there, or one of the two has another layout.
    """
    if dataset_path:
        folder = Path(dataset_path).expanduser()
        _require_layout(folder, "set dataset_path to such a folder, or leave it out")
        return folder
    if not default.exists():
        return None
    _require_layout(default, "complete or remove it, or set dataset_path to another folder")
    return default


# --- Download ---------------------------------------------------------------------------------------------------------


def find_ljspeech(dataset_path: str, default: Path, download: bool = False) -> tuple[Path, bool]:
    """The data set that a recipe trains on, or the demo set, announced loudly, when there is none.

    Args:
        dataset_path: the folder that the user named; "" when none was named.
        default: where LJSpeech is looked for then, or downloaded to.
        download: fetch LJSpeech-1.1 to the default first.

    Returns:
        The folder, and whether it is the demo set.

    Raises:
        DataError: (a ValueError) as locate_ljspeech and download_ljspeech.
    """
    if download and dataset_path:
        raise DataError(f"--download goes to {default}, not to dataset_path={dataset_path}: give one of the two")
    folder = download_ljspeech(default) if download else locate_ljspeech(dataset_path, default)
    if folder is not None:
        return folder, False
    print(DEMO_NOTICE.format(default=default), flush=True)
    return make_demo_set(), True


def download_ljspeech(
    target: str | Path,
    url: str = LJSPEECH_URL,
    sha256: str = LJSPEECH_SHA256,
    size: int = LJSPEECH_SIZE,
    *,
    attempts: int = 8,
    wait: float = 1.0,
) -> Path:
    """Downloads a `.tar.bz2` with one folder in LJSpeech's layout, checks it and unpacks it to `target`.

    A download that breaks off goes on where it stopped, in this call and in the next one. The folder appears whole
    or not at all; one that is there already is kept.

    Args:
        target: the folder to make; the archive lies beside it until it is unpacked.
        url: http or https.
        sha256: of the archive, in hexadecimal.
        size: of the archive, in bytes.
        attempts: how often the server is asked before giving up.
        wait: seconds before the second attempt; they double with each one, to a minute at most.

    Returns:
        `target`.

    Raises:
        DataError: (a ValueError) the archive is not the expected one or is not safe to unpack, or `target` holds
            something else.
        ConnectionError: the server could not be reached, or not for long enough; what came is kept.
        OSError: no room on the disk, or no right to write.
    """
    target = Path(target)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url={url}: an http or https address is needed")
    if _is_there(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".tar.bz2.part")
    with exclusive(part) as held:
        if _is_there(target):  # another process was faster
            part.unlink(missing_ok=True)
            return target
        if held:  # so these were left by a killed process
            for stale in target.parent.glob(f".{target.name}-*.tmp"):
                shutil.rmtree(stale)
        _require_room(target.parent, int(size * _ROOM) - part.stat().st_size)
        _fetch(url, part, size, attempts, wait)
        _require_sum(url, part, sha256)
        _unpack(part, target)
        part.unlink()
    logger.info("LJSpeech is in %s", target)
    return target


def _is_there(target: Path) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    _require_layout(target, "nothing is downloaded over it: complete, move or remove it")
    logger.info("%s is there already", target)
    return True


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e9:.2f} GB are needed in {folder.absolute()}, {free / 1e9:.2f} GB are free: make room or "
            "choose a folder on another disk",
        )


def _fetch(url: str, part: Path, size: int, attempts: int, wait: float) -> None:
    """Brings `part` to its full size, asking the server again where a connection breaks."""
    reason = ""
    for attempt in range(attempts):
        if attempt:
            pause = min(wait * 2 ** (attempt - 1), 60.0)
            logger.warning("%s: %s; attempt %d of %d in %g s", url, reason, attempt + 1, attempts, pause)
            time.sleep(pause)
        if part.stat().st_size == size:
            return
        try:
            _receive(url, part, size)
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            error.close()
            if error.code == 416:  # it has fewer bytes than we: start again
                part.write_bytes(b"")
            elif error.code < 500 and error.code not in (408, 429):
                raise ConnectionError(f"{url}: {reason}: unpack the archive by hand and set dataset_path") from error
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in _LOCAL_FAULTS:
                raise
            reason = str(error) or type(error).__name__
    if part.stat().st_size != size:
        raise ConnectionError(
            f"{url}: {reason}; gave up after {attempts} attempts with {part.stat().st_size} of {size} bytes in {part}: "
            "start again to go on from there"
        )


def _receive(url: str, part: Path, size: int) -> None:
    """Asks once for what is missing in `part` and adds what comes; a server without ranges starts from zero."""
    have = part.stat().st_size if part.stat().st_size < size else 0  # larger: not what was asked for
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        span, _, total = response.headers.get("Content-Range", "").partition("/")
        if not span.startswith(f"bytes {have}-"):  # the whole file is coming
            have, total = 0, response.headers.get("Content-Length", "")
        if total.isdigit() and int(total) != size:
            raise DataError(f"{url}: the server's file has {total} bytes, {size} are expected: a wrong address?")
        with open(part, "r+b") as out, _progress(f"downloading {url}", size) as show:
            out.truncate(have)
            out.seek(have)
            while block := response.read(_BLOCK):
                have += len(block)
                if have > size:
                    raise DataError(
                        f"{url}: the server sends more than the {size} bytes expected: is this the address?"
                    )
                out.write(block)
                show(have)


def _require_sum(url: str, part: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256.lower():
        part.unlink()
        raise DataError(
            f"{url}: the SHA-256 of what came is {digest.hexdigest()}, expected is {sha256.lower()}; the file is "
            "removed: try again, and if it stays so, the file on the server is another one"
        )


def _unpack(part: Path, target: Path) -> None:
    """Unpacks the archive beside `target`, after a look at all its members, and renames its folder to it."""
    with _members(part, f"checking {part.name}") as members:
        top, unpacked = _check_members(part, members)
    _require_room(target.parent, unpacked)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", suffix=".tmp", dir=target.parent) as temporary:
        with _members(part, f"unpacking {part.name}") as members:
            for archive, member in members:
                path = Path(temporary, *PurePosixPath(member.name).parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                if member.isdir():
                    path.mkdir(exist_ok=True)
                    continue
                # Not extract(): neither owners nor modes are wanted, and older Pythons have no filter.
                with archive.extractfile(member) as source, open(path, "wb") as out:
                    shutil.copyfileobj(source, out, _BLOCK)
        _require_layout(Path(temporary) / top, f"the archive {part} holds something else")
        os.replace(Path(temporary) / top, target)


@contextlib.contextmanager
def _members(part: Path, what: str) -> Iterator[Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]]:
    """The members of the archive, in their order, with the progress through the file shown."""

    def walk() -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        with open(part, "rb") as raw, tarfile.open(fileobj=raw, mode="r:bz2") as archive:
            for member in archive:
                show(raw.tell())
                yield archive, member

    with _progress(what, part.stat().st_size) as show:
        try:
            yield walk()
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{part}: not a readable tar.bz2: {error}: remove it and download it again") from error


def _check_members(part: Path, members: Iterable[tuple[tarfile.TarFile, tarfile.TarInfo]]) -> tuple[str, int]:
    """The archive's one folder and the bytes it unpacks to; refuses what could touch a file elsewhere."""
    problems: list[str] = []
    tops: set[str] = set()
    unpacked = 0
    for _, member in members:
        if not (member.isfile() or member.isdir()):
            kind = "link" if member.issym() or member.islnk() else "device"
            problems.append(f"{member.name} is a {kind}, only files and folders are unpacked")
        elif _leaves_folder(member.name):
            problems.append(f"{member.name} points outside the folder")
        tops.update(PurePosixPath(member.name).parts[:1])
        unpacked += member.size
    if not problems and len(tops) != 1:
        problems.append(f"{len(tops)} files or folders at its top, one folder is expected: {sorted(tops)[:5]}")
    if problems:
        raise DataError.listing(str(part), problems, "Nothing was unpacked: do not use this archive.")
    return tops.pop(), unpacked


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that shows progress on stderr: a bar in a terminal, a line every 5 % elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    shown = -1

    def show(done: int) -> None:
        nonlocal shown
        if done * 20 // total > shown:
            shown = done * 20 // total
            print(f"{what}: {shown * 5} % of {total / 1e6:.0f} MB", file=sys.stderr, flush=True)

    yield show
