"""Speaks a corpus of 107 languages with espeak-ng: skewed hours, several corpora and speakers, a folder and a TSV.

    apt-get install espeak-ng
    PYTHONPATH=. python benchmarks/synthetic_corpus.py OUT --hours 0.5

For sampling laws, scale and smoke runs: formant synthesis is no evidence of a model's quality. What is said are
numbers, which nearly every voice can read in its own language, and syllables where it cannot; the hours fall with the
rank of a language as rank ** -zipf.
The same arguments and the same espeak-ng give the same bytes. Audio stays at espeak-ng's own rate (22,050 Hz), so that
preparing resamples it.
"""

import argparse
import concurrent.futures
import contextlib
import io
import os
import random
import subprocess
import wave
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_pipelines.languages import UnknownLanguage, normalise

LANGUAGES = 107  # as many as VoxLingua107 has
LEAST_SECONDS = 6.0  # of a language, however far down its rank
SYLLABLES = "mama, no, se, ti"
SHORTEST = 0.3  # seconds
HEADER = 44  # bytes before the samples of a WAV file
LICENCE = "made by espeak-ng (GPL-3.0-or-later)"
# Corpora differ in voices, speed (words a minute) and length of a sentence (numbers in it), as real ones do.
CORPORA = {
    "calm": (("m1", "m3", "f2", "f5"), (120, 150), (2, 6)),
    "quick": (("m2", "f1", "f4", "m6"), (170, 220), (1, 4)),
    "long": (("m4", "f3", "m5", "m7"), (140, 170), (10, 20)),
}


class Language(NamedTuple):
    """A language to speak: its ISO 639-3 code, espeak-ng's voice, and the seconds to make."""

    code: str
    voice: str
    seconds: float


class Spoken(NamedTuple):
    """A clip: its line of the table, and its seconds."""

    line: str
    seconds: float


def voices() -> dict[str, str]:
    """{ISO 639-3: espeak-ng voice}, the plainest voice of each living language; sorted."""
    listed = subprocess.run(["espeak-ng", "--voices"], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines()[1:]:
        tag = line.split()[1]
        with contextlib.suppress(UnknownLanguage):  # invented languages, and scripts given as languages
            code = normalise(tag)
            if not "qaa" <= code <= "qtz":
                found[code] = min(found.get(code, tag), tag, key=lambda name: (len(name), name))
    return {code: tag for code, tag in sorted(found.items()) if audible(say(tag, SYLLABLES, speed=150, pitch=50))}


def say(voice: str, text: str, *, speed: int, pitch: int) -> bytes:
    """A WAV file, its length not in its header; b"" where espeak-ng has no such voice."""
    command = ["espeak-ng", "--stdout", "-v", voice, "-s", str(speed), "-p", str(pitch), text]
    ran = subprocess.run(command, capture_output=True)
    return b"" if ran.returncode else ran.stdout


def audible(sound: bytes) -> bool:
    """Whether there is anything but zeros: some voices have no words for numbers."""
    return any(sound[HEADER:])


def plan(hours: float, *, languages: int, zipf: float, seed: int) -> list[Language]:
    """The languages with their seconds; which of them are the large ones, the seed decides."""
    known = list(voices().items())
    if languages > len(known):
        raise SystemExit(f"this espeak-ng speaks {len(known)} languages, {languages} were asked for: give --languages")
    random.Random(seed).shuffle(known)
    weights = [(rank + 1) ** -zipf for rank in range(languages)]
    total = sum(weights)
    return [
        Language(code, voice, max(LEAST_SECONDS, hours * 3600 * weight / total))
        for (code, voice), weight in zip(known, weights, strict=False)
    ]


def speak(out: Path, language: Language, seed: int) -> list[Spoken]:
    """Clips of all corpora in turn until the language has its seconds; writes them and returns their lines."""
    rng = random.Random(f"{seed} {language.code}")
    numbers = audible(say(language.voice, "12, 345", speed=150, pitch=50))
    spoken, total, tried = [], 0.0, 0
    while total < language.seconds and tried < 10 * len(spoken) + 50:
        tried += 1
        corpus = rng.choices(list(CORPORA), weights=(6, 3, 1))[0]
        variants, speeds, sizes = CORPORA[corpus]
        variant = rng.choice(variants)
        count = rng.randint(*sizes)
        if numbers:
            text = ", ".join(str(rng.randrange(10_000)) for _ in range(count))
        else:
            text = ", ".join("".join(rng.choices("mnstlk", k=1) + rng.choices("aeiou", k=1)) * 2 for _ in range(count))
        sound = say(f"{language.voice}+{variant}", text, speed=rng.randint(*speeds), pitch=rng.randint(30, 70))
        if not audible(sound):
            continue
        with wave.open(io.BytesIO(sound)) as header:
            rate, width = header.getframerate(), header.getsampwidth()
        seconds = (len(sound) - HEADER) / rate / width
        if seconds < SHORTEST:
            continue
        name = f"{language.code}/{corpus}/{len(spoken):05d}.wav"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(out / name), "wb") as file:  # espeak-ng cannot know the length when it writes to a pipe
            file.setnchannels(1)
            file.setsampwidth(width)
            file.setframerate(rate)
            file.writeframes(sound[HEADER:])
        split = "dev" if spoken and len(spoken) % 20 == 19 else "train"
        line = (name, language.code, corpus, f"{language.code}-{corpus}-{variant}", split, text, LICENCE)
        spoken.append(Spoken("\t".join(line), seconds))
        total += seconds
    return spoken


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--languages", type=int, default=LANGUAGES)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = plan(given.hours, languages=given.languages, zipf=given.zipf, seed=given.seed)
    made: dict[str, list[Spoken]] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(wanted), unit="language") as bar:
        running = {pool.submit(speak, given.out, language, given.seed): language for language in wanted}
        for done in concurrent.futures.as_completed(running):
            made[running[done].code] = done.result()
            bar.update()
    lines = ["path\tlanguage\tsource\tspeaker\tsplit\ttext\tlicence"]
    lines += [clip.line for code in sorted(made) for clip in made[code]]
    (given.out / "manifest.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    seconds = {code: sum(clip.seconds for clip in clips) for code, clips in made.items()}
    print(
        f"{len(lines) - 1:,} clips, {sum(seconds.values()) / 60:.1f} minutes, {len(seconds)} languages of "
        f"{min(seconds.values()):.1f} to {max(seconds.values()):.1f} s in {given.out}"
    )


if __name__ == "__main__":
    main()
