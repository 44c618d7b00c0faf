"""The page that a finished recipe leaves behind: results.json as one HTML file that needs nothing else to be read.

`results` reads and writes numbers and decides what counts as better; `findings` says it in sentences; `done` (with
`health`), `probes` and `scores` make the sections; `charts` and `trends` draw; `page` is how it looks. What a run did
not produce is said to be missing.
"""

from pathlib import Path

from data_pipelines.atomic import whole_file


def write_report(results: dict, path: Path) -> Path:
    """Writes `results` (what results.json holds) as one HTML page at `path`; returns the path.

    The same results give the same bytes. The file is there as a whole or not at all.
    """
    # Here and not above: matplotlib takes a second to import, and most commands draw nothing.
    from experiments.report import done, probes, scores
    from experiments.report.findings import findings
    from experiments.report.page import render
    from experiments.report.results import Results

    run = Results(results)
    probed = probes.probes_section(run)
    page = render(
        title=run.name_of_run,
        facts=run.facts(),
        findings=findings(run),
        sections=[
            done.data_section(run),
            done.training_section(run),
            *([] if probed is None else [probed]),
            done.units_section(run),
            scores.accuracy_section(run),
            scores.balance_section(run),
            scores.probe_section(run),
            done.export_section(run),
            done.time_section(run),
        ],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
