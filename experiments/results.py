"""Everything that a recipe measured, gathered from its workdir: what the report renders."""

import ast
import json
from collections import Counter
from pathlib import Path

import numpy as np

from data_pipelines.languages import name_of
from data_pipelines.manifest import Manifest, Split
from data_pipelines.units import UnitStore
from experiments.evaluate import load_scores
from experiments.stage_files import StageFiles
from experiments.stages import STAGES
from experiments.units import UnitFiles
from wavlab_jax.evaluation.masked_accuracy import compare, times_trivial
from wavlab_jax.metrics import JSON_LINES, PROBE_LINES, read_lines
from wavlab_jax.targets.kmeans import usage

LABELS = {
    "hubert_base_it1": "HuBERT iteration 1",
    "hubert_base_it2": "HuBERT iteration 2",
    "cv_hubert_base": "CV-HuBERT",
    "wavlab_ek": "WavLabLM-EK",
    "wavlab_mk": "stage 1",
    "wavlab_ms": "stage 2",
    "wavlab_mk_continued": "control",
    "wavlm_base_plus": "WavLM Base+",
    "wavlm_large": "WavLM Large",
    "xlsr_300m": "XLS-R 0.3B",
    "xlsr_2b": "XLS-R 2B",
    "mhubert_147_it3": "mHuBERT-147",
    "best_rq_base": "BEST-RQ",
}
LOW_RESOURCE_MINUTES = 3.0
# The one definition: the report and docs/design.md say it in these words.
LOW_RESOURCE = f"languages of which the training split holds under {LOW_RESOURCE_MINUTES:g} minutes of audio"


def collect_results(title: str, workdir: Path, times: list[dict], *, corpus: Path | None = None) -> dict:
    """The content of results.json; what has not been made is left out. `corpus`: by default that of the workdir."""
    manifest = Manifest.load(corpus or workdir / "corpus")
    results = {"title": title, "steps": times, "corpus": _corpus(manifest), "units": _units(workdir, manifest)}
    stages = [name for name in STAGES if StageFiles(workdir, name).finished.exists()]
    results["shares"] = [
        {
            "stage": name,
            "label": LABELS[name],
            "languages": json.loads((StageFiles(workdir, name).folder / "shares.json").read_text()),
        }
        for name in stages
        if name.startswith("wavlab")
    ]
    results["curves"] = [
        {
            "stage": name,
            "label": LABELS[name],
            "continues": _continues(workdir, name),
            "unit_set": _unit_set(workdir, name),
            "points": _curve(workdir, name, low=set(low_resource(manifest))),
        }
        for name in stages
    ]
    lines = {name: list(read_lines(StageFiles(workdir, name).metrics / PROBE_LINES)) for name in stages}
    results["probes"] = [
        {"stage": name, "label": LABELS[name], "points": points} for name, points in lines.items() if points
    ]
    evaluated = [name for name in stages if StageFiles(workdir, name).evaluation.exists()]
    results["accuracy"] = [{"label": LABELS[name], **_evaluation(workdir, name)} for name in evaluated]
    if all(StageFiles(workdir, name).clips.exists() for name in ("wavlab_mk", "wavlab_ms", "wavlab_mk_continued")):
        results["low_resource"] = _comparison(workdir, manifest, low_resource(manifest), LOW_RESOURCE)
        results["all_languages"] = _comparison(
            workdir, manifest, list(manifest.languages), "every language with held-out clips"
        )
    for key in ("probe", "export"):
        path = workdir / f"{key}.json"
        if path.exists():
            results[key] = json.loads(path.read_text())
    return results


def low_resource(manifest: Manifest) -> list[str]:
    """Codes of the languages that `LOW_RESOURCE` describes."""
    minutes = {code: seconds / 60 for code, seconds in manifest.seconds(Split.TRAIN).items()}
    return [code for code in manifest.languages if minutes.get(code, 0.0) < LOW_RESOURCE_MINUTES]


def _corpus(manifest: Manifest) -> dict:
    train, total = manifest.rows(Split.TRAIN), manifest.seconds()
    corpora = Counter(language for language, _ in manifest.seconds(by=("language", "corpus")))
    rows = []
    for code, name in enumerate(manifest.languages):
        mine = manifest.language == code
        trained = mine & (manifest.split == Split.TRAIN)
        rows.append(
            {
                "language": name,
                "name": name_of(name),
                "corpora": corpora[name],
                "train_clips": int(manifest.clips[trained].sum()),
                "held_out_clips": int((mine & ~trained).sum()),
                "hours": total.get(name, 0.0) / 3600,
            }
        )
    return {
        "hours": sum(total.values()) / 3600,
        "train_hours": float(manifest.samples[train].sum()) / 16_000 / 3600,
        "clips": int(manifest.clips.sum()),
        "languages": rows,
    }


def _units(workdir: Path, manifest: Manifest) -> list[dict]:
    found = []
    for stage, name in _unit_sets(workdir):
        if not UnitFiles(workdir, name).store.exists():  # computed in the step
            continue
        store = UnitStore.load(UnitFiles(workdir, name).store, manifest)
        counts = store.counts(manifest.rows(Split.TRAIN))
        use = usage(counts)
        found.append(
            {
                "name": name,
                "stage": stage,
                "units": store.units,
                "perplexity": use.perplexity,
                "dead": use.dead,
                "counts": np.asarray(counts).tolist(),
            }
        )
    return found


def _unit_sets(workdir: Path) -> list[tuple[str, str]]:
    """(first stage that trains on it, name) of each unit set."""
    seen: dict[str, str] = {}
    for stage in STAGES:
        if StageFiles(workdir, stage).inputs.exists():
            seen.setdefault(_unit_set(workdir, stage) or "", stage)
    return [(stage, name) for name, stage in seen.items() if name]


def _unit_set(workdir: Path, stage: str) -> str | None:
    """Name of the units that a stage was trained on; None if it learned its own."""
    source = json.loads(StageFiles(workdir, stage).inputs.read_text())["units"]
    return source and json.loads(source)["name"]


def _continues(workdir: Path, stage: str) -> str | None:
    """The stage whose encoder this one took over, as the configuration that it was trained with says."""
    lines = (line.split(" = ", 1) for line in StageFiles(workdir, stage).config.read_text().splitlines())
    return next((ast.literal_eval(value) for path, value in lines if path == "init_from"), None)


def _evaluation(workdir: Path, stage: str) -> dict:
    """evaluation.json, with how many times the better trivial predictor's accuracy each overall accuracy is."""
    result = json.loads(StageFiles(workdir, stage).evaluation.read_text())
    judged = {
        key: {**result[key], "times_trivial": times_trivial(result[key])} for key in ("total", "macro") if key in result
    }
    return {**result, **judged}


def _curve(workdir: Path, stage: str, *, low: set[str]) -> list[dict]:
    """A point a line of metrics. Of languages only means, each counting alike: metrics.jsonl has them all."""

    def mean(line: dict, *, of: set[str] | None = None) -> float | None:
        heard = line.get("languages", {}).items()
        each = [
            row.get("masked_accuracy", row.get("contrastive_accuracy")) for name, row in heard if not of or name in of
        ]
        return float(np.mean(each)) if each else None

    same = ("input_wait", "step_seconds", "mfu", "update_to_weight", "largest_hidden", "target_perplexity",
            "predicted_perplexity", "skipped")  # fmt: skip
    return [
        {
            **{key: line[key] for key in same if key in line},
            "accuracy_of_languages": mean(line),
            "accuracy_of_low_resource": mean(line, of=low) if low else None,
            "step": line["step"],
            "loss": line.get("masked_loss", line.get("contrastive_loss")),
            "accuracy": line.get("masked_accuracy", line.get("contrastive_accuracy")),
            "learning_rate": line["learning_rate"],
            "hours": line["audio_hours"],
        }
        for line in read_lines(StageFiles(workdir, stage).metrics / JSON_LINES)
    ]


def _comparison(workdir: Path, manifest: Manifest, languages: list[str], definition: str) -> dict:
    """Macro accuracy over some languages after stage 1, stage 2 and the control, and stage 2's paired differences."""
    scores = {name: load_scores(workdir, name) for name in ("wavlab_mk", "wavlab_ms", "wavlab_mk_continued")}
    codes = [manifest.languages.index(name) for name in languages]
    any_scores = scores["wavlab_ms"]
    chosen = np.isin(any_scores.language, codes)
    present = sorted(set(any_scores.language[chosen].tolist()))

    def accuracy(score) -> float | None:
        each = [score.correct[score.language == c].sum() / score.frames[score.language == c].sum() for c in present]
        return float(np.mean(each)) if each else None

    differences = []
    for against in ("wavlab_mk", "wavlab_mk_continued"):
        found = compare(scores["wavlab_ms"], scores[against], languages=codes)
        if found is not None:
            differences.append({"of": "wavlab_ms", "against": against, **found._asdict()})
    return {
        "definition": definition,
        "languages": languages,
        "judged": [manifest.languages[c] for c in present],
        "clips": int(chosen.sum()),
        "rows": [{"stage": name, "label": LABELS[name], "accuracy": accuracy(score)} for name, score in scores.items()],
        "differences": differences,
    }
