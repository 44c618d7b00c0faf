"""The benchmark for one model: every track that was asked for, trained, decoded, judged, written down."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines.mlsuperb.challenge import read_challenge
from data_pipelines.mlsuperb.layout import Duration
from data_pipelines.mlsuperb.tracks import MONOLINGUAL_SETS, Task, read_track
from experiments.mlsuperb.encoders import FrozenEncoder
from experiments.mlsuperb.faults import challenge_folder, read_folder
from experiments.mlsuperb.judging import decode, write_hypotheses
from experiments.mlsuperb.protocol import ProtocolConfig, ProtocolError
from experiments.mlsuperb.results import read_result, write_results
from experiments.mlsuperb.scoring import judge
from experiments.mlsuperb.training import Run, TrackFiles, check_unchanged, train_track
from wavlab_jax.downstream import DownstreamConfig


def tracks_of(tasks: Sequence[Task], sets: Sequence[str]) -> list[tuple[Task, str | None]]:
    """Tasks, and of the monolingual one the sets (all 13 by default).

    Raises ProtocolError: no such set, no task, or sets without the monolingual one.
    """
    unknown = [name for name in sets if name not in MONOLINGUAL_SETS]
    if unknown or not tasks:
        said = f"no monolingual set {unknown[0]!r}; there are" if unknown else "no track was named; of monolingual ones"
        raise ProtocolError(f"{said} {', '.join(MONOLINGUAL_SETS)}")
    if sets and "monolingual" not in tasks:
        raise ProtocolError(f"--sets {' '.join(sets)} is of the monolingual track: add it to --track, or leave it out")
    found: list[tuple[Task, str | None]] = []
    for task in dict.fromkeys(tasks):
        found += [(task, name) for name in sets or MONOLINGUAL_SETS] if task == "monolingual" else [(task, None)]
    return found


def run_benchmark(
    encoder: FrozenEncoder,
    *,
    root: Path,
    workdir: Path,
    tracks: Sequence[tuple[Task | Literal["challenge"], str | None]],
    duration: Duration,
    cfg: ProtocolConfig,
    mesh: Mesh,
    downstream: DownstreamConfig | None = None,
) -> list[dict]:
    """Results of each track; those that are there already are read. Killed at any point, it goes on when run again.

    A track is a task, and of the monolingual one a set; or, in a `root` of its own, "challenge" and the judged set.

    All tracks are read, and their texts held, before the first is trained: what is wrong with the last one is said at
    once. Raises MlSuperbError (the folder is not the benchmark's, a transcript is missing, or a
    package that makes phones), and what `train_track` raises.
    """
    results, runs = [], []
    for task, name in tracks:
        if task == "challenge":
            folder, track = challenge_folder(root, judged_on=name), read_challenge(root, judged_on=name)
        else:
            folder = runs[0][0] if runs else read_folder(root, duration=duration)
            track = read_track(root, task, duration=duration, monolingual=name)
        run = Run(track, encoder, cfg, mesh, TrackFiles(workdir, encoder.name, track), downstream)
        check_unchanged(run, begins=False)
        runs.append((folder, run))
    for number, (folder, run) in enumerate(runs, 1):
        track, title = run.track, f"[{number}/{len(runs)}] {encoder.name}, {run.track.name}, {run.track.duration}"
        check_unchanged(run)
        if run.files.results.exists():
            results.append(read_result(run.files.results))
            tqdm.write(f"{title}: done already\n{summary(results[-1])}")
            continue
        schedule = run.schedule
        tqdm.write(f"{title}: {schedule.iterations:,} batches, {len(track.tokens):,} tokens")
        began = time.monotonic()
        trained = train_track(run)
        judged = judge(track, decode(run, trained))
        write_hypotheses(run.files.hypotheses, judged)
        seconds = time.monotonic() - began
        results.append(write_results(run, trained, judged, folder=folder, seconds=seconds))
        tqdm.write(summary(results[-1]))
    return results


def summary(results: dict) -> str:
    """A few lines for people: the figures of each group, what was left out, in what the protocol was not followed."""
    lines = []
    kind = {"character": "character errors", "phone": "phone errors"}.get(results["token"])
    for name, row in results["groups"].items():
        said = []
        if kind and "error_rate" in row:
            said.append(f"{kind} {row['error_rate']:.1f} % [{_interval(row['error_rate_interval'])}]")
        elif kind:
            said.append(f"no {kind.removesuffix('s')} rate, as all references are empty")
        if "accuracy" in row:
            least = results["chance"]
            chance = f"chance {least['uniform']:.1f}, always {least['language']} {least['majority'][name]:.1f}"
            said.append(f"languages right {row['accuracy']:.1f} % [{_interval(row['accuracy_interval'])}], {chance}")
        lines.append(f"  {name}: {'; '.join(said)}; {row['utterances']:,} utterances")
    data = results["data"]
    for part, reasons in results["left_out"].items():
        for reason, count in reasons.items():
            lines.append(f"  left out of {part}: {count:,}, {reason} ({data['left_out_places'][part][reason][0]})")
    for what, found in (
        ("recordings without text", data["recordings_without_text"]),
        *((f"of {part} with more tokens than frames", found) for part, found in data["infeasible"].items()),
        ("empty references in test", data["empty_references"]),
        ("of train with white space that is <unk>", data.get("unseen_tokens_in", {}).get("train", {"count": 0})),
        ("folders that are not read", data.get("ignored_folders", {"count": 0})),
    ):
        if found["count"]:
            more = ", ..." if found["count"] > 3 else ""
            lines.append(f"  {what}: {found['count']:,} ({', '.join(found['first'][:3])}{more})")
    unseen = results["unseen_tokens"]
    if unseen:
        times, first = sum(unseen.values()), ", ".join(list(unseen)[:10])
        where = data.get("unseen_tokens_in", {}).get("test", {}).get("first", [])[:1]
        said = "".join(f"; first in {id}" for id in where)
        lines.append(f"  of test never seen in training: {len(unseen):,} tokens, {times:,} times: {first}{said}")
    if found := results.get("challenge"):
        said = (value if name == "note" else f"{name.replace('_', ' ')} {value:.1f}" for name, value in found.items())
        lines.append(f"  by ML-SUPERB 2.0's averages over languages: {', '.join(said)}")
    lines += [f"  NOT THE PUBLISHED PROTOCOL: {each}" for each in results["protocol"]["deviations"]]
    return "\n".join(lines)


def _interval(interval: list[float]) -> str:
    return f"{interval[0]:.1f}, {interval[1]:.1f}"
