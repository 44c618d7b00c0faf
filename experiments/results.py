"""Everything that a recipe measured, gathered from its workdir: what the report renders."""

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
from wavlab_jax.evaluation.masked_accuracy import compare
from wavlab_jax.metrics import JSON_LINES, read_lines
from wavlab_jax.targets.kmeans import usage

LABELS = {
    "hubert_base_it1": "HuBERT iteration 1",
    "hubert_base_it2": "HuBERT iteration 2",
    "wavlab_mk": "stage 1",
    "wavlab_ms": "stage 2",
    "wavlab_mk_continued": "control",
}
LOW_RESOURCE_MINUTES = 3.0


def collect_results(title: str, workdir: Path, times: list[dict]) -> dict:
    """The content of results.json; what has not been made is left out."""
    manifest = Manifest.load(workdir / "corpus")
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
    results["curves"] = [{"stage": name, "label": LABELS[name], "points": _curve(workdir, name)} for name in stages]
    judged = [name for name in stages if StageFiles(workdir, name).clips.exists()]
    results["accuracy"] = [
        {"label": LABELS[name], **json.loads(StageFiles(workdir, name).evaluation.read_text())} for name in judged
    ]
    if {"wavlab_mk", "wavlab_ms", "wavlab_mk_continued"} <= set(judged):
        minutes = {code: s / 60 for code, s in manifest.seconds(Split.TRAIN).items()}
        low = [code for code in manifest.languages if minutes.get(code, 0.0) < LOW_RESOURCE_MINUTES]
        text = f"languages with under {LOW_RESOURCE_MINUTES:g} minutes of training audio"
        results["low_resource"] = _comparison(workdir, manifest, low, text)
        results["all_languages"] = _comparison(workdir, manifest, list(manifest.languages), "all languages")
    for key in ("probe", "export"):
        path = workdir / f"{key}.json"
        if path.exists():
            results[key] = json.loads(path.read_text())
    return results


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
        path = StageFiles(workdir, stage).inputs
        if path.exists():
            seen.setdefault(json.loads(json.loads(path.read_text())["units"])["name"], stage)
    return [(stage, name) for name, stage in seen.items()]


def _curve(workdir: Path, stage: str) -> list[dict]:
    return [
        {
            "step": line["step"],
            "loss": line["masked_loss"],
            "accuracy": line["masked_accuracy"],
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
