"""The command line as it is shipped, with stages cut down to seconds: `python -m tests.experiments.small_launcher ...`.

The recipe ends after its first stage, and its report is a word: neither is what the tests that stop it are about. Its
audio is the folder that the environment variable AUDIO names. Stages make STEPS steps.
"""

import os
import sys
from pathlib import Path

STAGE = "hubert_base_it1"
STEPS = int(os.environ.get("STEPS", "40"))


def main() -> int:
    """`experiments.__main__.main` with small stages."""
    from experiments import __main__ as launcher
    from experiments import recipes, report, results
    from tests.experiments.conftest import small

    def stage_function(name, size="paper"):
        return lambda: small(name, steps=STEPS)

    def first_stage(workdir, corpus):
        return recipes.multi_stage(workdir, Path(os.environ["AUDIO"]), size="demo")[:3]

    def write_report(_, path):
        path.write_text("report")
        return path

    launcher.stage_function = recipes.stage_function = stage_function
    recipes.RECIPES["demo"] = first_stage
    results.collect_results = lambda *_, **__: {}
    report.write_report = write_report
    return launcher.main()


if __name__ == "__main__":  # the processes that this one starts import this file again
    sys.exit(main())
