"""Everything that an accelerator at hand can show, in one command: `make accelerator-check`.

    PYTHONPATH=. .venv/bin/python benchmarks/accelerator_check.py --out work/accelerator [--only speed] [--small]

Parts, each in a process of its own: machine (devices, versions), encoders (small ones, forward and gradients, against
the CPU's), meshes (one update, the same over every mesh of the devices at hand), nonfinite (an update that is not
finite changes nothing), attention (cuDNN's beside XLA's), train (a demo-size stage, with curves), resume (kill -9, and
on, bit for bit), memory (of HuBERT Base's update: planned, and held), speed (of the same: steps a second, utilisation,
memory). Writes OUT/results.json and OUT/README.md with curves.png; the exit status is the number of parts that failed.
About half an hour on a GPU. `--small` is the same in minutes on any CPU: it shows that the command runs.

Run it on one host. On a GPU, XLA_PYTHON_CLIENT_PREALLOCATE=false leaves memory to others, and costs speed.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

from benchmarks.accelerator_runs import DETERMINISTIC, ROOT
from benchmarks.accelerator_sections import SECTIONS
from data_pipelines.atomic import whole_file

CURVES = (("masked_loss", "loss, nats"), ("masked_accuracy", "masked accuracy"), ("gradient_norm", "gradient norm"),
          ("audio_hours_per_hour", "audio-hours an hour"))  # fmt: skip


def run_section(name: str, out: Path, *, small: bool) -> dict:
    """A part in a process of its own: what it wrote, or how it ended."""
    command = [sys.executable, "-m", "benchmarks.accelerator_check", "--section", name, "--out", str(out)]
    began = time.monotonic()
    ended = subprocess.run([*command, *["--small"] * small], cwd=ROOT, capture_output=True, text=True)
    path = out / f"{name}.json"
    if ended.returncode or not path.exists():
        said = ended.stderr.strip() or f"status {ended.returncode}, without a word"
        last = said.splitlines()[-1][-200:]
        return {
            "failed": [f"the part did not end well: {last}"],
            "said": said[-2000:],
            "seconds": time.monotonic() - began,
        }
    return {**json.loads(path.read_text()), "seconds": time.monotonic() - began}


def write(path: Path, text: str) -> None:
    """The text, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


def page(results: dict, *, small: bool) -> str:
    """The Markdown page."""
    found = results.get("machine", {})
    lines = ["# What the accelerator at hand shows", ""]
    lines.append(
        f"Written by `benchmarks/accelerator_check.py`{' --small' * small}. {found.get('devices', 'no devices')}, "
        f"{found.get('runtime', '')}; " + ", ".join(f"{k} {v}" for k, v in found.get("versions", {}).items()) + "."
    )
    if found.get("platform") == "cpu":
        lines += ["", "**No accelerator**: this shows that the command runs, and nothing about one."]
    lines += ["", "| part | verdict | seconds |", "|---|---|---:|"]
    for name, result in results.items():
        verdict = "; ".join(" ".join(why.split())[-300:].replace("|", "/") for why in result["failed"]) or "holds"
        lines.append(f"| {name} | {verdict} | {result['seconds']:.0f} |")
    for name, title in (
        ("encoders", "Encoders against the CPU"), ("meshes", "One update on every mesh"),
        ("attention", "cuDNN's attention beside XLA's"), ("memory", "Memory, planned and held"),
        ("speed", "The whole update")):  # fmt: skip
        rows = results.get(name, {}).get("rows", [])
        if rows:
            lines += ["", f"## {title}", "", *table(rows)]
    if results.get("memory", {}).get("told") is False:
        lines += ["", "This device does not tell what it held, as no CPU does: the plan stands alone."]
    if "where" in results.get("nonfinite", {}):
        lines += ["", "## A step that is not finite", "", f"{results['nonfinite']['where']}."]
    if "resume" in results:
        told = {k: v for k, v in results["resume"].items() if k not in ("failed", "said", "seconds")}
        lines += ["", "## Killed and resumed", "", ", ".join(f"{k} {v}" for k, v in told.items()) + "."]
        lines.append(
            f"On GPUs this part runs with `XLA_FLAGS={DETERMINISTIC}`; without it no two runs need be the same."
        )
    if results.get("train", {}).get("lines"):
        lines += ["", "## Training", "", "![curves](curves.png)"]
    return "\n".join(lines) + "\n"


def table(rows: list[dict]) -> list[str]:
    """A Markdown table of all keys that occur."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [
        f"| {' | '.join(column.replace('_', ' ') for column in columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows),
    ]


def cell(value) -> str:
    """A number to four digits; a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def draw(lines: list[dict], path: Path) -> None:
    """Loss, accuracy, gradient norm and speed over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    """All parts, or one; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/accelerator"))
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--small", action="store_true", help="minutes on a CPU: shows that the command runs")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # what a part's own process is given
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.section:
        write(out / f"{arguments.section}.json", json.dumps(SECTIONS[arguments.section](out, small=arguments.small)))
        return 0
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in dict.fromkeys(["machine", *arguments.only]):
        print(f"{name} ...", flush=True)
        results[name] = run_section(name, out, small=arguments.small)
        print(f"{name}: {'; '.join(results[name]['failed']) or 'holds'} ({results[name]['seconds']:.0f} s)", flush=True)
        results = {name: results[name] for name in SECTIONS if name in results}
        write(path, json.dumps(results, indent=1))  # what came before an end by force stays
        try:
            draw(results.get("train", {}).get("lines", []), out / "curves.png")
        except Exception:  # a picture must not cost the numbers
            traceback.print_exc()
        write(out / "README.md", page(results, small=arguments.small))
    print(f"{out / 'README.md'}")
    return sum(bool(result["failed"]) for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
