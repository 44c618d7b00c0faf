"""Results of a made-up recipe in the shape of results.json, for tests of the report."""

import math

import numpy as np

from experiments.ledger import COUNTED
from experiments.results import LOW_RESOURCE

LANGUAGES = [  # code, name, source corpora, training clips, held-out clips, hours: a real small corpus
    ("spa", "Spanish", 4, 1136, 282, 0.885), ("fra", "French", 4, 1267, 291, 0.7962),
    ("rus", "Russian", 4, 1285, 311, 0.7887), ("eng", "English", 4, 615, 165, 0.4837),
    ("ron", "Romanian", 2, 639, 156, 0.4313), ("ita", "Italian", 3, 539, 149, 0.3926),
    ("mal", "Malayalam", 2, 437, 87, 0.3508), ("bul", "Bulgarian", 1, 623, 156, 0.2991),
    ("ell", "Modern Greek (1453-)", 2, 518, 104, 0.2887), ("cat", "Catalan", 2, 772, 199, 0.2673),
    ("bel", "Belarusian", 1, 482, 139, 0.2443), ("dan", "Danish", 3, 422, 114, 0.2029),
    ("lit", "Lithuanian", 3, 225, 65, 0.1205), ("ukr", "Ukrainian", 2, 228, 50, 0.0951),
    ("nno", "Norwegian Nynorsk", 1, 143, 39, 0.0551), ("hun", "Hungarian", 1, 66, 16, 0.0456),
    ("nld", "Dutch", 3, 104, 24, 0.0409), ("deu", "German", 2, 101, 33, 0.0406),
    ("nds", "Low German", 2, 74, 17, 0.0366), ("por", "Portuguese", 3, 102, 28, 0.0338),
    ("heb", "Hebrew", 1, 38, 12, 0.022), ("ara", "Arabic", 1, 21, 7, 0.0209), ("glg", "Galician", 1, 58, 13, 0.0165),
    ("wln", "Walloon", 1, 57, 14, 0.0153), ("slv", "Slovenian", 1, 57, 13, 0.0146),
    ("tsn", "Tswana", 1, 36, 6, 0.0122), ("ces", "Czech", 1, 40, 7, 0.0084), ("gle", "Irish", 1, 9, 4, 0.004),
    ("swe", "Swedish", 1, 13, 0, 0.0037), ("fin", "Finnish", 1, 9, 2, 0.003), ("srp", "Serbian", 1, 10, 5, 0.0028),
]  # fmt: skip
STAGES = [  # name, label, number of units, where they come from, accuracy
    ("hubert_base_it1", "first iteration", 100, "mfcc", 0.35),
    ("hubert_base_it2", "second iteration", 200, "hubert_base_it1-layer3", 0.33),
    ("wavlab_mk", "stage 1", 200, "hubert_base_it2-layer3", 0.30),
    ("wavlab_ms", "stage 2", 200, "hubert_base_it2-layer3", 0.32),
    ("wavlab_mk_continued", "control", 200, "hubert_base_it2-layer3", 0.315),
]


def difference(of, against, value, low, high, verdict, **clips):
    return {"of": of, "against": against, **clips, "difference": value, "low": low, "high": high, "verdict": verdict}


def with_ratio(row):
    return {**row, "times_trivial": row["accuracy"] / max(row["majority"], row["copy"])}


def make_results(languages=31):
    """Results of a made-up run in the shape of results.json."""
    rng = np.random.default_rng(0)
    rows = LANGUAGES[:languages]
    codes = [row[0] for row in rows]
    hours = np.array([row[5] for row in rows])
    natural = hours / hours.sum()
    balanced = natural**0.5 / (natural**0.5).sum()
    low = [row[0] for row in rows if row[5] < 0.05] or codes[-1:]

    def shares(stage, label, drawn, steps):
        table = zip(codes, natural, drawn, hours, strict=True)
        return {
            "stage": stage,
            "label": label,
            "languages": {
                code: {"natural": float(n), "drawn": float(d), "epochs": float(d * steps * 0.02 / h)}
                for code, n, d, h in table
            },
        }

    def points(loss, accuracy, steps, start=None):
        at = np.arange(10, steps + 1, 10)
        fall = np.exp(-at / 60) if start is None else np.exp(-at / 20)
        losses = loss + (4.6 - loss if start is None else start) * fall + 0.04 * rng.standard_normal(at.size)
        right = accuracy - (accuracy if start is None else 0.02) * fall + 0.004 * rng.standard_normal(at.size)
        return [
            {
                "step": int(s),
                "loss": float(a),
                "accuracy": float(b),
                "learning_rate": 1e-3,
                "hours": float(s * 0.02),
                "accuracy_of_languages": float(b) - 0.03,
                "accuracy_of_low_resource": float(b) - 0.1,
                "input_wait": 0.031 + 0.001 * (s % 3),
                "step_seconds": 1.25,
                "update_to_weight": 1.7e-4,
                "largest_hidden": 10.0 + s,
                "target_perplexity": 88.4,
                "predicted_perplexity": 61.2,
                "skipped": 7,
            }
            for s, a, b in zip(at, losses, right, strict=True)
        ]

    def accuracy(stage, label, units, unit_set, value):
        table = {}
        for code, _, _, _, held_out, size in rows:
            right = value * (0.75 + 0.25 * (size / 0.885) ** 0.3) + 0.2 * rng.standard_normal() / (held_out + 4)
            majority, repeat = 0.07 + 0.03 * rng.random(), 0.19 + 0.06 * rng.random()
            scores = {"accuracy": float(right), "majority": float(majority), "copy": float(repeat)}
            empty = {"accuracy": None, "majority": None, "copy": None}
            table[code] = {"clips": held_out, "frames": 50 * held_out, **(scores if held_out else empty)}
        judged = [row for row in table.values() if row["clips"]]
        macro = {key: float(np.mean([row[key] for row in judged])) for key in ("accuracy", "majority", "copy")}
        return {
            "stage": stage, "label": label, "unit_set": unit_set, "units": units,
            "total": with_ratio(
                {"clips": 2509, "frames": 125000, "accuracy": value, "majority": 0.081, "copy": 0.225}
            ),
            "macro": with_ratio({"languages": len(judged), **macro}),
            "languages": table,
        }  # fmt: skip

    def curve(stage, continues, points):
        unit_set = next(row[3] for row in STAGES if row[0] == stage)
        return {"stage": stage, "continues": continues, "unit_set": unit_set, "points": points}

    def unit_row(name, stage, units, dead):
        counts = rng.permutation(np.concatenate([rng.gamma(1.6, 300, units - dead), np.zeros(dead)])).astype(int)
        shares_of = counts[counts > 0] / counts.sum()
        perplexity = float(np.exp(-(shares_of * np.log(shares_of)).sum()))
        return {
            "name": name, "stage": stage, "units": units, "perplexity": perplexity, "dead": dead,
            "counts": counts.tolist(),
        }  # fmt: skip

    def probe_row(name, layer, value, chance=0.121):
        said = "better" if value - 0.045 > chance else "not distinguishable"
        return {
            "name": name, "layer": layer, "accuracy": value, "low": value - 0.045, "high": value + 0.048,
            "chance": chance, "clips": 412, "languages": 12, "folds": 4, "verdict_against_chance": said,
        }  # fmt: skip

    minutes = {
        "prepare": 31.2,
        "units mfcc": 42.0,
        "train hubert_base_it1": 301.0,
        "units hubert_base_it1-layer3": 38.4,
    }
    minutes |= {"train hubert_base_it2": 312.5, "units hubert_base_it2-layer3": 40.1, "train wavlab_mk": 520.0}
    minutes |= {
        "train wavlab_ms": 262.0,
        "train wavlab_mk_continued": 258.0,
        "evaluate": 121.0,
        "probe": 66.5,
        "export": 4.2,
    }
    return {
        "title": "recipe demo",
        "finished": "2026-11-22T21:00:00Z",
        "time_counted": COUNTED,
        "commit": "abc1234",
        "machine": {
            "processor": "AMD EPYC 9B14 96-Core Processor", "cores": 2, "memory_gb": 24, "devices": "1 x cpu",
            "python": "3.11.7", "jax": "0.10.2",
        },
        "steps": [
            {"name": name, "seconds": value, "note": "12,634 clips, 6.0 h, 0 refused" if name == "prepare" else ""}
            for name, value in minutes.items()
        ],
        "corpus": {
            "hours": float(hours.sum()),
            "clips": sum(row[3] + row[4] for row in rows),
            "languages": [
                dict(zip(("language", "name", "corpora", "train_clips", "held_out_clips", "hours"), row, strict=True))
                for row in rows
            ],
        },
        "shares": [
            shares("wavlab_mk", "stage 1, natural skew", natural, 300),
            shares("wavlab_ms", "stage 2, balanced", balanced, 150),
        ],
        "curves": [
            curve("hubert_base_it1", None, points(2.7, 0.36, 200)),
            curve("hubert_base_it2", "hubert_base_it1", points(2.9, 0.33, 200)),
            curve("wavlab_mk", "hubert_base_it2", points(2.8, 0.30, 300)),
            curve("wavlab_ms", "wavlab_mk", points(2.75, 0.31, 150, start=0.3)),
            curve("wavlab_mk_continued", "wavlab_mk", points(2.68, 0.325, 150, start=0.1)),
        ],
        "units": [
            unit_row("mfcc", "hubert_base_it1", 100, 0),
            unit_row("hubert_base_it1-layer3", "hubert_base_it2", 200, 3),
            unit_row("hubert_base_it2-layer3", "wavlab_mk", 200, 11),
        ],
        "accuracy": [accuracy(name, label, units, source, value) for name, label, units, source, value in STAGES],
        "low_resource": {
            "definition": LOW_RESOURCE,
            "languages": low,
            "judged": [code for code in low if code != "swe"],
            "clips": 232,
            "rows": [
                {"stage": "wavlab_mk", "accuracy": 0.251},
                {"stage": "wavlab_ms", "accuracy": 0.272},
                {"stage": "wavlab_mk_continued", "accuracy": 0.269},
            ],
            "differences": [
                difference("wavlab_ms", "wavlab_mk", 0.021, 0.010, 0.032, "better", clips=232),
                difference("wavlab_ms", "wavlab_mk_continued", 0.003, -0.008, 0.014, "not distinguishable", clips=232),
            ],
        },
        "all_languages": {
            "definition": "every language with held-out clips",
            "languages": codes,
            "clips": 2509,
            "rows": [
                {"stage": "wavlab_mk", "accuracy": 0.300},
                {"stage": "wavlab_ms", "accuracy": 0.320},
                {"stage": "wavlab_mk_continued", "accuracy": 0.327},
            ],
            "differences": [
                difference("wavlab_ms", "wavlab_mk", 0.020, 0.016, 0.024, "better", clips=2509),
                difference("wavlab_ms", "wavlab_mk_continued", -0.007, -0.011, -0.003, "worse", clips=2509),
            ],
        },
        "probe": {
            "protocol": "Mean-pooled frames, multinomial logistic regression, leave one source out; intervals are 95% "
            "bootstrap over clips within language and source.",
            "rows": [
                probe_row("log-mel", None, 0.171),
                probe_row("random", 3, 0.139),
                probe_row("wavlab_mk", 1, 0.203),
                probe_row("wavlab_mk", 3, 0.236),
                probe_row("wavlab_ms", 1, 0.214),
                probe_row("wavlab_ms", 3, 0.262),
                probe_row("wavlab_mk_continued", 3, 0.241),
            ],
            "differences": [
                difference("wavlab_ms layer 3", "log-mel", 0.091, 0.032, 0.149, "better", clips=412),
                difference(
                    "wavlab_ms layer 3", "wavlab_mk layer 3", 0.026, -0.021, 0.071, "not distinguishable", clips=412
                ),
            ],
            "languages": {
                "log-mel": {"spa": {"clips": 40, "accuracy": 0.2}, "fra": {"clips": 38, "accuracy": 0.15}},
                "wavlab_ms layer 3": {"spa": {"clips": 40, "accuracy": 0.41}, "fra": {"clips": 38, "accuracy": 0.3}},
            },
        },
        "export": {
            "folder": "work/demo/export", "files": ["config.json", "model.safetensors", "preprocessor_config.json"],
            "bytes": 1_834_560, "largest_difference": 3.1e-6, "checked_with": "transformers 5.23.0",
        },
    }  # fmt: skip


def pierced(value, draw):
    """The same with parts missing, None and NaN, as `draw` (random.Random) has it."""
    if isinstance(value, dict):
        kept = {key: pierced(part, draw) for key, part in value.items() if draw.random() > 0.12}
        return {key: None if draw.random() < 0.06 else part for key, part in kept.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [pierced(part, draw) for part in value]
    return math.nan if isinstance(value, float) and draw.random() < 0.1 else value
