"""`python -m data_pipelines`: prepare, describe, inspect, lengths, sample, miniature, challenge.

prepare PATH --out DIR      make a corpus, or those of a composition file, ready for training
describe DIR                minutes by language and split of what was prepared
inspect DIR                 the same in depth: what any balance would draw, suspicious rows; --html PAGE makes a page
lengths DIR                 propose static lengths
sample DIR                  make some training batches, and compare what was drawn with what was declared
miniature PATH --out DIR    a small folder in the layout of ML-SUPERB, to try the benchmark with
challenge PATH --out DIR    ML-SUPERB 2.0's data set, from Parquet files to the layout of ESPnet's recipe
"""

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_pipelines.interrupts import SAID, STATUS, interrupts_end_at_once

with interrupts_end_at_once():
    import tyro

    from data_pipelines.atomic import whole_file
    from data_pipelines.audio import AudioError
    from data_pipelines.balance import DrawConfig, SamplingError
    from data_pipelines.batch import SAMPLE_RATE
    from data_pipelines.corpora import CorpusError
    from data_pipelines.crops import CropError
    from data_pipelines.inspection import AUDIO_MEGABYTES, inspect
    from data_pipelines.inspection_page import render, table_text
    from data_pipelines.languages import name_of
    from data_pipelines.lengths import LengthsError, declaration, propose, report
    from data_pipelines.manifest import Manifest, ManifestError, Split
    from data_pipelines.mlsuperb.challenge import unpack
    from data_pipelines.mlsuperb.layout import MlSuperbError
    from data_pipelines.mlsuperb.miniature import write_miniature
    from data_pipelines.pipeline import DataConfig, PipelineError
    from data_pipelines.prepare import QUARANTINE_NAME, Part, PartDone, PrepareError, prepare
    from data_pipelines.shards import Filters
    from data_pipelines.sources import ShardSource, SourceError, check_records
    from data_pipelines.stalls import StallError
    from data_pipelines.storage import StorageError, local
    from data_pipelines.trial import try_steps

LONGEST = 15 * SAMPLE_RATE  # samples of the longest row that `sample` proposes


@dataclass(frozen=True)
class Prepare:
    """Decode a corpus once, to shards of FLAC and a manifest that training reads. After a stop, it goes on."""

    folder: tyro.conf.Positional[Path]
    """The corpus: a folder with a table, or with audio under <language>/<corpus>/; a folder of another kind, with
    --reader; or a composition file (.toml) of several."""
    out: Path
    """The folder to write (made if need be)."""
    table: Path | None = None
    """Tab-separated, with a header: path, language; perhaps source, speaker, split, id, text, licence, n_samples.
    Without it: manifest.tsv if the folder has one, else the folder's own structure."""
    reader: str = "folder"
    """How the folder is read: fairseq, kaldi, parquet, webdataset, lhotse, tfds, or a corpus' name."""
    option: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """The reader's own options, as language=fra; a wrong one is answered with those that there are."""
    workers: int | None = None
    """Processes; by default one a core that this one may run on. The result does not depend on it."""
    clips_per_shard: int = 1000
    """Clips in one shard file; more for corpora of millions (1 GB a shard is fine)."""
    join_seconds: float = 4.0
    """Training clips of one speaker are joined until they have this length; 0 (and --min-seconds 0) joins nothing."""
    min_seconds: float = 2.0
    """A speaker with less than this is repeated up to it; the shortest training length must not be longer."""
    min_clip_seconds: float = 0.0
    """Leave out clips that are shorter."""
    max_clip_seconds: float | None = None
    """Leave out clips that are longer (else they are kept whole, and cropped in training)."""
    min_peak_dbfs: float | None = None
    """Leave out clips whose loudest sample is quieter, in dB re full scale."""
    min_rms_dbfs: float | None = None
    """Leave out clips whose root mean square is lower, in dB re full scale."""
    duplicates: bool = True
    """Keep clips with the same samples as another; without them, the first is kept, of a held-out split if any."""
    part: int | None = None
    """Write only this share of the shards, 1 to --of: for jobs of a cluster. A call without it ends the work."""
    of: int | None = None
    """How many shares there are."""
    scratch: Path | None = None
    """Where listings of millions of clips lie while this runs, 250 to 500 bytes a clip; by default in OUT. For jobs of
    a cluster, a disk of the machine itself."""
    overwrite: bool = False
    """Replace what was prepared there with another table or other options; shards that stay the same are kept."""

    def run(self) -> None:
        """Prepares the corpus; prints minutes by language, hours read and written, and why clips were left out."""
        if (self.part is None) != (self.of is None):
            raise PrepareError("--part and --of go together")
        made = prepare(
            self.folder,
            out=self.out,
            table=self.table,
            reader=self.reader,
            options=_options(self.option),
            filters=Filters(self.min_clip_seconds, self.max_clip_seconds, self.min_peak_dbfs, self.min_rms_dbfs),
            duplicates=self.duplicates,
            part=None if self.part is None else Part(self.part, self.of),
            scratch=self.scratch,
            workers=self.workers,
            clips_per_shard=self.clips_per_shard,
            join_seconds=self.join_seconds,
            min_seconds=self.min_seconds,
            overwrite=self.overwrite,
        )
        if isinstance(made, PartDone):
            print(
                f"part {self.part} of {self.of} is done: {made.shards:,} shards; {made.elsewhere:,} are still missing"
            )
            return
        if not made.fresh:
            print(f"{made.root} is already prepared; nothing to do")
        _print_seconds(made.manifest)
        tally = made.tally
        print(
            f"{tally.clips:,} clips, {tally.read / SAMPLE_RATE / 3600:.3f} h decoded -> "
            f"{tally.utterances:,} utterances, {tally.written / SAMPLE_RATE / 3600:.3f} h written "
            f"({tally.repeated / SAMPLE_RATE:.1f} s of it repeated); {tally.rejected:,} clips, "
            f"{tally.left_out / SAMPLE_RATE:.1f} s of audio, left out; {tally.clipped:,} samples clipped"
        )
        if made.rejected:
            for reason, count in Counter(re.split(r"[:;]| \(", r.reason)[0] for r in made.rejected).most_common():
                print(f"  {count:>6} {reason}")
            print(
                f"warning: {len(made.rejected):,} of {tally.clips:,} clips were left out; which, in which row and why, "
                f"says {made.root / QUARANTINE_NAME}",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Describe:
    """Hours by language and split of a prepared corpus; with --check, every record is read and decoded."""

    root: tyro.conf.Positional[Path]
    """The prepared folder."""
    check: bool = False
    """Read every record and decode it: as slow as decoding, as sure as it gets."""

    def run(self) -> None:
        """Prints minutes by language and split, utterances, shards, fingerprint; with `check`, reads every record."""
        manifest = Manifest.load(self.root)
        _print_seconds(manifest)
        shards, fingerprint = len(manifest.shard_names), manifest.fingerprint[:16]
        print(f"{len(manifest):,} utterances in {shards} shards, fingerprint {fingerprint}")
        if self.check:
            check_records(manifest)
            source = ShardSource(manifest)
            for i in range(len(manifest)):
                source.read(i)
            print("every record is whole")


@dataclass(frozen=True)
class Lengths:
    """Proposes the static lengths for a prepared corpus, and says what they and the usual ways would waste of it."""

    root: tyro.conf.Positional[Path]
    """The prepared folder."""
    count: int = 4
    """How many lengths; each is a program to compile."""
    seconds_per_step: float = 64.0
    """Audio in one step, over all hosts; every length makes a step of whole rows."""
    longest_seconds: float = 15.0
    """The longest row that fits the devices."""

    def run(self) -> None:
        """Prints the lengths, what a stage declares to have them, and waste by language."""
        manifest = Manifest.load(self.root, check_shards=False)
        samples = manifest.samples[manifest.rows(Split.TRAIN)]
        longest = round(self.longest_seconds * SAMPLE_RATE)
        found = propose(samples, count=self.count, seconds_per_step=self.seconds_per_step, longest=longest)
        for length, rows in zip(found.lengths, found.rows, strict=True):
            print(f"{length:>9,} samples {length / SAMPLE_RATE:>8.3f} s, {rows:>6,} rows a step")
        print(f"crops of these leave {found.cropped:.2%} off, another part in each epoch; declare")
        print(f"  {declaration(found, seconds_per_step=self.seconds_per_step)}")
        print(
            "by language, in one epoch: unheard with these; padded to the longest or cropped to the shortest of a batch"
        )
        print(report(manifest, found))


@dataclass(frozen=True)
class Inspect:
    """What a prepared corpus holds by language, what any balance would draw of it, and which rows look wrong."""

    root: tyro.conf.Positional[Path]
    """The prepared folder."""
    html: Path | None = None
    """Write a page that shows the same, with a slider for the balance and with audio; one file, no network."""
    alpha: tuple[float, ...] = (1.0, 0.7, 0.5, 0.3)
    """Exponents over languages to show: 1 is as found, 0 is all languages alike."""
    beta: float = 1.0
    """Exponent over the corpora of a language."""
    steps: int | None = None
    """Steps of a run: with it, how often the run hears each language."""
    seconds_per_step: float = 64.0
    """Seconds of audio in a step, over all hosts."""
    sample: int = 1000
    """Utterances to decode in search of silence, clipping and duplicates; half of them are such as have another of
    exactly their length. 0 decodes none."""
    decode: bool = False
    """Decode every utterance instead of a sample."""
    clips: int = 2
    """Clips a language to listen to in the page."""
    audio_megabytes: float = AUDIO_MEGABYTES
    """At most this much audio in the page."""

    def run(self) -> None:
        """Prints the table, then the suspicious rows; writes the page."""
        html = None if self.html is None else local(self.html, what="the page")
        draws = tuple(DrawConfig(language_exponent=alpha, corpus_exponent=self.beta) for alpha in self.alpha)
        found = inspect(
            Manifest.load(self.root),
            sample=None if self.decode else self.sample,
            clips=self.clips if html else 0,
            audio_megabytes=self.audio_megabytes if html else 0,
        )
        print(table_text(found, draws=draws, steps=self.steps, seconds_per_step=self.seconds_per_step))
        if html:
            page = render(found, draw=draws[-1], steps=self.steps, seconds_per_step=self.seconds_per_step)
            with whole_file(html) as temporary:
                temporary.write_text(page, encoding="utf-8")
            print(f"{html}: {len(page.encode()) / 1e6:.1f} MB")


@dataclass(frozen=True)
class Sample:
    """Make some training batches for real, and compare what of each language was in them with what was declared."""

    root: tyro.conf.Positional[Path]
    """The prepared folder."""
    steps: int = 100
    """How many batches."""
    alpha: float = 1.0
    """Exponent over languages: 1 is as found, 0 is all languages alike."""
    beta: float = 1.0
    """Exponent over the corpora of a language."""
    seconds_per_step: float = 64.0
    """Seconds of audio in a step, over all hosts."""
    lengths: tuple[int, ...] | None = None
    """Static lengths in samples; without them, three that `lengths` proposes."""

    def run(self) -> None:
        """Prints hours, shares and epochs by language, and how fast the batches came."""
        manifest = Manifest.load(self.root)
        lengths = self.lengths
        if lengths is None:
            samples = manifest.samples[manifest.rows(Split.TRAIN)]
            lengths = propose(samples, count=3, seconds_per_step=self.seconds_per_step, longest=LONGEST).lengths
        draw = DrawConfig(language_exponent=self.alpha, corpus_exponent=self.beta)
        cfg = DataConfig(lengths=lengths, seconds_per_step=self.seconds_per_step, draw=draw)
        found = try_steps(cfg, manifest, steps=self.steps)
        print(f"{'':<4} {'language':<24} {'train h':>9} {'declared':>9} {'drawn':>9} {'epochs':>8} {'utterances':>11}")
        for row in found.languages:
            print(
                f"{row.language:<4} {name_of(row.language)[:24]:<24} {row.hours:>9.3f} {row.declared:>9.2%} "
                f"{row.drawn:>9.2%} {row.epochs:>8.2f} {row.utterances:>11,}"
            )
        furthest = max(found.languages, key=lambda row: abs(row.drawn - row.declared))
        heard = sum(row.utterances > 0 for row in found.languages)
        print(
            f"{heard} of {len(found.languages)} languages heard in {found.audio_hours:.3f} h of audio; furthest from "
            f"what is declared: {furthest.language}, by {abs(furthest.drawn - furthest.declared):.2%}; made at "
            f"{found.audio_hours * 3600 / found.seconds:,.0f} times real time"
        )


@dataclass(frozen=True)
class Miniature:
    """A small folder in exactly ML-SUPERB's layout, out of a folder of clips with texts such as demo_corpus."""

    folder: tyro.conf.Positional[Path]
    """Audio, with a manifest.tsv that has the columns path, language, source, split and text."""
    out: Path
    """The folder to write: a new one, or an empty one."""

    def run(self) -> None:
        """Writes it, and says how much it holds."""
        count = write_miniature(self.folder, self.out, progress=sys.stderr.isatty())
        print(f"{self.out}: {count:,} utterances; README.md says what stands in for what")


@dataclass(frozen=True)
class Challenge:
    """ML-SUPERB 2.0's data set from its Parquet files to the layout of ESPnet's recipe. After a stop, it goes on."""

    folder: tyro.conf.Positional[Path]
    """A local copy of the data set espnet/ml_superb_hf: data/train-*.parquet and so on."""
    out: Path
    """The folder to write: data/train/text and wav.scp, likewise dev and dev_dialect, and data/raw_audio."""

    def run(self) -> None:
        """Writes it, and says how much it holds."""
        made = unpack(self.folder, self.out, progress=sys.stderr.isatty())
        for row in made.left_out:
            print(f"left out: {row.place}: {row.reason}")
        print(f"{self.out}: {', '.join(f'{count:,} of {name}' for name, count in made.counts.items())}")


def _options(given: tuple[str, ...]) -> dict[str, str]:
    options = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        if not equals:
            raise CorpusError(f"--option {entry}: write KEY=VALUE")
        options[key.replace("-", "_")] = value
    return options


def _print_seconds(manifest: Manifest) -> None:
    by_split = {split: manifest.seconds(split) for split in Split}
    total = manifest.seconds()
    corpora = Counter(language for language, _ in manifest.seconds(by=("language", "corpus")))
    print(f"{'':<4} {'language':<24} {'corpora':>7} {'train':>9} {'dev':>9} {'test':>9}   (minutes)")
    for code in sorted(total, key=lambda c: -total[c]):
        minutes = [by_split[split].get(code, 0.0) / 60 for split in Split]
        columns = " ".join(f"{value:>9,.2f}" for value in minutes)
        print(f"{code:<4} {name_of(code)[:24]:<24} {corpora[code]:>7} {columns}")
    minutes = [sum(by_split[split].values()) / 60 for split in Split]
    print(f"{'all':<29} {len(manifest.corpora):>7} {' '.join(f'{value:>9,.2f}' for value in minutes)}")


Verb = (
    Annotated[Prepare, tyro.conf.subcommand("prepare", prefix_name=False)]
    | Annotated[Describe, tyro.conf.subcommand("describe", prefix_name=False)]
    | Annotated[Lengths, tyro.conf.subcommand("lengths", prefix_name=False)]
    | Annotated[Sample, tyro.conf.subcommand("sample", prefix_name=False)]
    | Annotated[Miniature, tyro.conf.subcommand("miniature", prefix_name=False)]
    | Annotated[Challenge, tyro.conf.subcommand("challenge", prefix_name=False)]
    | Annotated[Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
)


def main() -> int:
    """Runs the command line; returns the exit status: 0, 1 on error, 130 if interrupted, 141 on a broken pipe."""
    try:
        tyro.cli(Verb, prog="python -m data_pipelines", description=__doc__).run()
    except BrokenPipeError:  # `... | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (
        CorpusError,
        PrepareError,
        ManifestError,
        SamplingError,
        SourceError,
        StorageError,
        AudioError,
        LengthsError,
        MlSuperbError,
        PipelineError,
        CropError,
        StallError,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(SAID, file=sys.stderr)
        return STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
