"""Sums that are divided once, and metric files in which no step stands twice."""

import json
import math

import numpy as np
import pytest

from wavlab_jax.metrics import MetricsWriter, Sum, add, ratios, read_lines


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    a, b = {"loss": Sum(10.0, 1.0)}, {"loss": Sum(10.0, 9.0)}
    assert ratios(add(a, b))["loss"] == pytest.approx(2.0)
    assert add({}, a) == a and math.isnan(ratios({"x": Sum(0.0, 0.0)})["x"])


def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1.0 / step, "bad": math.inf})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    writer = MetricsWriter(tmp_path, resume_step=20)
    writer.write(30, {"loss": np.float32(7.0).item()})
    writer.close()
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] == 7.0 and lines[0]["bad"] is None
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert any((tmp_path / "tensorboard").iterdir())
