"""The tables of docs/scaling.md, Plans: `python -m experiments plan` of each stage and pod, one after the other.

    python -m benchmarks.plans --out work/plans [--only NAME ...] [--search]

Every plan is a process of its own and is kept in OUT/NAME.json; what is there is not made again. TPUs need libtpu
(`make venv ACCELERATOR=tpu`) and take minutes each: the program of the whole step is compiled. `--search` compiles
further sizes, to find the most audio that a chip holds in a pass. The tables are printed from the files.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

GIB = 2**30
# name -> what is shown, arguments of the verb
PLANS: dict[str, tuple[str, list[str]]] = {
    "hubert_base_v5e_4": ("HuBERT Base, v5e:2x2", ["hubert_base_it1", "--topology", "v5e:2x2"]),
    "hubert_base_a100_4": ("HuBERT Base, 4 A100", ["hubert_base_it1", "--chips", "4", "--chip", "a100-80"]),
    "wavlab_mk_v4_32": ("WavLabLM MK, v4:4x4x2", ["wavlab_mk", "--topology", "v4:4x4x2"]),
    "wavlab_mk_v5e_256": ("WavLabLM MK, v5e:16x16", ["wavlab_mk", "--topology", "v5e:16x16"]),
    "wavlm_large_v5e_64": ("WavLM Large, v5e:8x8", ["wavlm_large", "--topology", "v5e:8x8"]),
    "xlsr_2b_v5e_256": ("XLS-R 2B, v5e:16x16", ["xlsr_2b", "--topology", "v5e:16x16"]),
}


def main() -> int:
    """Makes what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=PLANS, default=list(PLANS), metavar="NAME", help=", ".join(PLANS))
    parser.add_argument("--search", action="store_true", help="find the most audio that a chip holds, too")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in tqdm(given.only, desc="plans") if not make(name, given.out, search=given.search)]
    found = {}
    for name in PLANS:
        path = given.out / f"{name}.json"
        if path.exists():
            found[PLANS[name][0]] = json.loads(path.read_text())
    print(tables(found))
    if failed:
        print(f"failed: {', '.join(failed)}; what they said is in {given.out}", file=sys.stderr)
    return 1 if failed else 0


def make(name: str, out: Path, *, search: bool) -> bool:
    """Whether OUT/NAME.json is there, after it was made if it was not."""
    path = out / f"{name}.json"
    if path.exists():
        return True
    command = [sys.executable, "-m", "experiments", "plan", *PLANS[name][1], "--json", "--search", str(search)]
    with open(out / f"{name}.log", "w") as log:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ)
    if ended.returncode:
        return False
    path.with_suffix(".part").write_text(ended.stdout[ended.stdout.index("{") :])
    path.with_suffix(".part").rename(path)
    return True


def tables(found: dict[str, dict]) -> str:
    """Three tables in Markdown: what a step takes, what is exchanged, what the run takes."""
    return "\n\n".join(table(found) for table in (_step_table, _exchange_table, _run_table))


def _rows(header: str, rows: list[list[str]]) -> str:
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _step_table(found: dict[str, dict]) -> str:
    rows = []
    for name, plan in found.items():
        memory, flops, step = plan.get("memory"), plan["flops_per_step"], plan["step"]
        fits = "does not fit" if "does_not_fit" in plan else "not compiled"
        if memory:
            parts = ("parameters", "optimizer", "batch", "temporaries", "program")
            fits = f"**{memory['total'] / GIB:.1f}** of {plan['devices']['memory_bytes'] / GIB:.0f}: "
            fits += " + ".join(f"{memory[part] / GIB:.2f}" for part in parts)
        formula = plan["memory_by_formula"]["total"] / GIB
        about, largest = plan.get("extrapolated_seconds_per_chip"), plan.get("largest_seconds_per_chip")
        rows.append(
            [
                name,
                f"{sum(plan['parameters'].values()) / 1e6:,.1f}",
                f"{step['passes']} x {step['seconds_per_chip_and_pass']:g} s",
                f"{flops['formula'] / 1e12:,.0f} + {flops['recomputed'] / 1e12:,.0f}",
                f"{flops['ratio']:.3f}" if "ratio" in flops else "",
                fits,
                f"{formula:.1f}",
                f"{largest:g} s" if largest is not None else "" if about is None else f"about {about:g} s",
            ]
        )
    header = (
        "plan | parameters, M | passes x audio a chip | TFLOP a step by formula + rematerialised | compiled / both | "
        "GiB a chip: parameters + optimizer + batch + temporaries + program | by formula | most audio a chip and pass"
    )
    return _rows(header, rows)


def _exchange_table(found: dict[str, dict]) -> str:
    rows = []
    for name, plan in found.items():
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan["devices"]["mesh"].items())
        each = [
            f"{one['count']} {one['kind']} over {one['axes']}, {one['bytes'] / GIB:.2f}"
            for one in plan.get("exchanges", ())
        ]
        others = "; ".join(plan["unexplained"]) or "none" if "unexplained" in plan else "not compiled"
        rows.append([name, mesh, "; ".join(each), others])
    return _rows("plan | mesh | exchanges a step: number, kind, axes, GiB of arrays on a chip | others", rows)


def _run_table(found: dict[str, dict]) -> str:
    rows = []
    for name, plan in found.items():
        run = plan["run"]
        rows.append(
            [
                name,
                f"{run['steps']:,}",
                f"{run['audio_hours']:,.0f}",
                f"{run['frames'] / 1e9:,.1f}",
                f"{run['steps_per_second']:.2f}",
                f"{run['hours']:,.0f}",
                f"{run['chip_hours']:,.0f}",
            ]
        )
    used = {f"{plan['run']['utilisation']:.0%}" for plan in found.values()}
    header = (
        f"plan | steps | hours of audio | G frames | steps/s at {'/'.join(sorted(used))} of peak, nothing "
        "rematerialised counted | hours | chip-hours"
    )
    return _rows(header, rows)


if __name__ == "__main__":
    sys.exit(main())
