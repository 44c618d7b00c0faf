"""results.json of one model on one track: every figure, and all that it takes to judge it.

Beside it lie hypotheses.tsv (each utterance), left_out.tsv (each fault in the data, with its place) and
metrics.jsonl (training). docs/mlsuperb.md has the keys.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.mlsuperb.layout import PARTS, Part
from data_pipelines.mlsuperb.tracks import Track
from experiments.machine import describe_machine, git_commit
from experiments.mlsuperb.faults import EMPTY, INFEASIBLE, UNSEEN, Fault, Folder, faults_of, write_faults
from experiments.mlsuperb.protocol import CHALLENGE_DIFFERENCES, DIFFERENCES, ProtocolError, deviations
from experiments.mlsuperb.scoring import Judged, averages, chance, figures
from experiments.mlsuperb.training import Run, Trained, judged_set
from experiments.run import write_json
from wavlab_jax.model import count
from wavlab_jax.objectives.recognition import frames_for

FORMAT = 1
NAMED = 20  # of utterances with a fault, so many ids stand in results.json
EXAMPLES = 40  # hypotheses beside references in results.json


class Followed(NamedTuple):
    """Of a run's protocol, what the verbs have each in a way of their own: keys of "protocol" in results.json."""

    published: bool
    deviations: list[str]
    differences: list[str]
    accumulation: int
    learning_rate: float


def write_results(run: Run, trained: Trained, judged: Sequence[Judged], *, folder: Folder, seconds: float) -> dict:
    """Writes results.json and left_out.tsv of `superb`; returns the first."""
    challenge, lacks = judged_set(run.track) is not None, folder.lacks(run.track)
    deviates = deviations(
        run.cfg,
        run.schedule,
        miniature=folder.miniature,
        incomplete=lacks,
        challenge=challenge,
        downstream=run.downstream,
    )
    differences = list(CHALLENGE_DIFFERENCES if challenge else DIFFERENCES)
    followed = Followed(not deviates, deviates, differences, run.cfg.accumulate, run.cfg.learning_rate)
    config = run.encoder.config
    faults = faults_of(run.track, folder, frames_of=partial(frames_for, log_mel=config is None))
    facts = data_facts(run.track, folder, faults)
    weights = layer_weights(trained) if config else []
    results = results_of(run, trained, judged, followed, data=facts, layer_weights=weights, seconds=seconds)
    if challenge:
        results["challenge"] = averages(judged)
    return write(run, results, faults)


def results_of(
    run: Any,
    trained: Trained,
    judged: Sequence[Judged],
    followed: Followed,
    *,
    data: dict,
    layer_weights: list[float],
    seconds: float,
) -> dict:
    """What results.json holds. `run`: a `training.Run`, or a `finetuning.FineTuning`."""
    track, encoder, schedule = run.track, run.encoder, run.schedule
    return {
        "format": FORMAT,
        "model": {
            "name": encoder.name,
            "kind": encoder.kind,
            "identity": encoder.identity,
            "encoder_parameters": count(encoder.params) if encoder.params else 0,
            "downstream_parameters": count({k: v for k, v in trained.params.items() if k != "encoder"}),
            "layers": encoder.config.layers if encoder.config else 0,
            "width": encoder.config.width if encoder.config else trained.learner.head.channels,
            "notes": list(encoder.notes),
        },
        "protocol": {
            **followed._asdict(),
            "scale": run.cfg.scale,
            "iterations": schedule.iterations,
            "iterations_published": schedule.published,
            "updates": schedule.iterations // followed.accumulation,
            "batch": run.cfg.batches.size,
            "seed": run.cfg.seed,
        },
        "data": data,
        **figures(track, judged),
        "task": track.task if judged_set(track) is None else "challenge",
        "chance": chance(track, judged),
        "layer_weights": layer_weights,
        "examples": [example_of(each) for each in spread(judged, EXAMPLES)],
        "training": {
            "averaged": {str(step): loss for step, loss in trained.averaged.items()},
            "losses": trained.losses,
        },
        "seconds": round(seconds, 1),
        "machine": describe_machine(),
        "commit": git_commit(),
    }


def write(run: Any, results: dict, faults: Sequence[Fault]) -> dict:
    """Writes left_out.tsv, then results.json; returns the latter."""
    write_faults(run.files.left_out, faults)
    write_json(run.files.results, results)
    return results


def data_facts(track: Track, folder: Folder, faults: Sequence[Fault]) -> dict:
    """What was trained on and judged by, and every fault: counted, and the first few named."""

    def named(some: Sequence[Any]) -> dict:
        return {"count": len(some), "first": [str(each) for each in some[:NAMED]]}

    def places(kind: str, part: Part) -> dict:
        return named([each.place for each in faults if (each.kind, each.part) == (kind, part)])

    parts = {}
    for part in PARTS:
        utterances = [each.utterance for each in track.parts[part]]
        parts[part] = {
            "utterances": len(utterances),
            "hours": sum(each.seconds for each in utterances) / 3600,
            "languages": len({each.language for each in utterances}),
        }
    return {
        "root": str(folder.root),
        "miniature": folder.miniature,
        "missing_sources": list(folder.missing_sources),
        "missing_few_shot": named(folder.missing_few_shot),
        "ignored_folders": named(folder.ignored),
        "parts": parts,
        "left_out_places": {
            part: {
                reason: [each.place for each in track.left_out[part] if each.reason == reason][:NAMED]
                for reason in Counter(each.reason for each in track.left_out[part])
            }
            for part in PARTS
        },
        "recordings_without_text": named(folder.untold),
        "infeasible": {part: places(INFEASIBLE, part) for part in PARTS},
        "unseen_tokens_dev": dict(track.unseen("dev").most_common()),
        "unseen_tokens_in": {part: places(UNSEEN, part) for part in PARTS},
        "empty_references": places(EMPTY, "test"),
    }


def layer_weights(trained: Trained) -> list[float]:
    """The share of each hidden state in the weighted sum: the first layer's input, then each layer's output."""
    return [float(share) for share in jax.nn.softmax(jax.device_get(trained.params["head"]["layer_weights"]))]


def spread(judged: Sequence[Judged], count: int) -> list[Judged]:
    """So many utterances, evenly over their order, which is by source and language."""
    places = np.unique(np.linspace(0, len(judged) - 1, min(count, len(judged))).round().astype(int))
    return [judged[place] for place in places]


def example_of(each: Judged) -> dict:
    """A hypothesis beside its reference, as JSON."""
    utterance = each.example.utterance
    return {
        "id": utterance.id,
        "language": utterance.language,
        "source": utterance.source,
        "group": each.group,
        "reference": each.example.text,
        "hypothesis": each.hypothesis,
        "error_rate": None if each.errors is None or not each.errors.tokens else 100 * each.errors.rate,
        "said": each.said,
    }


def read_results(workdir: Path) -> Iterator[dict[str, Any]]:
    """Each results.json below a workdir, in order of model, set and track, with its "path".

    Raises what `read_result` raises.
    """
    folder = Path(workdir) / "mlsuperb"
    for path in sorted([*folder.glob("*/*/*/results.json"), *folder.glob("*/*/challenge/*/results.json")]):
        yield read_result(path) | {"path": str(path)}


def read_result(path: Path) -> dict[str, Any]:
    """One results.json. Raises ProtocolError if it is none, or of another format."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ProtocolError(f"{path} is not JSON ({error}): delete it and give the same command again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        said = found.get("format") if isinstance(found, dict) else None
        raise ProtocolError(f"{path} is of format {said}, this code reads {FORMAT}: judge it again")
    return found
