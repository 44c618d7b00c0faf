"""What a step measures, against the same worked out in NumPy; where time goes; what is told to whom."""

import gzip
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.stats import entropy

from tests.wavlab_jax import tiny
from wavlab_jax import clock as clock_module
from wavlab_jax.clock import Clock, Work, since_launch
from wavlab_jax.encoder import encode, formulation_for
from wavlab_jax.encoder.encoder import LayerStatistics
from wavlab_jax.health import combine, observe
from wavlab_jax.metrics import MetricsWriter, Sum
from wavlab_jax.model import assemble
from wavlab_jax.objectives import Keys, Measured, draw_masks, prediction
from wavlab_jax.profile import Profile
from wavlab_jax.sharding import MeshConfig, make_mesh, place_batch
from wavlab_jax.step import initial_state, make_train_step
from wavlab_jax.weights_and_biases import TrackerError, WandbTracker
from wavlab_jax.window import Window


@pytest.fixture(scope="module")
def stepped():
    """Configuration, batch, parameters before and after, and what the step said, without dropout."""
    cfg = tiny.learner()
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    batch = tiny.batch(6)._replace(language=np.array([2, 0, 2, 2, 3, 0], np.int32))
    state = initial_state(cfg, mesh)
    before = jax.device_get(state.params)
    placed = place_batch(batch, mesh=mesh, passes=1)
    state, result = make_train_step(cfg, mesh, languages=5)(state, placed)
    return cfg, batch, before, jax.device_get(state.params), jax.device_get(result)


def test_languages_units_and_coverage_are_those_of_the_predictions(stepped):
    """Counted frame by frame on what the model says of these rows under the masks of this step."""
    cfg, batch, before, _, result = stepped
    line = Window().plus(result).line(("a", "b", "c", "d", "e"))
    assert set(line["languages"]) == {"a", "c", "d"}  # heard ones only
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), 1), 0)
    keys = Keys(*jax.random.split(key))
    mask = np.asarray(draw_masks(batch, keys.asked, cfg.objective.mask))
    settings = dict(cfg=cfg.objective, head=cfg.head, padded=False, formulation=formulation_for("cpu"))

    def answer(params):
        return prediction.predict(assemble(params, cfg.encoder, cfg.head), batch, mask, keys=keys, **settings).logits[0]

    answers = np.asarray(jax.jit(answer)(before)).argmax(-1)
    assert line["mask_coverage"] == pytest.approx(mask.mean(), rel=1e-6)
    units = batch.units[..., 0]
    for name, labels in (("target_perplexity", units), ("predicted_perplexity", answers)):
        counts = np.bincount(labels[mask], minlength=tiny.UNITS)
        assert line[name] == pytest.approx(np.exp(entropy(counts)), rel=1e-6)
    for name, index in (("a", 0), ("c", 2), ("d", 3)):
        own = mask & (batch.language == index)[:, None]
        told = line["languages"][name]
        assert told["frames"] == own.sum()
        assert told["masked_accuracy"] == pytest.approx((answers == units)[own].mean(), rel=1e-5)
    whole = sum(told["masked_loss"] * told["frames"] for told in line["languages"].values()) / mask.sum()
    assert whole == pytest.approx(line["masked_loss"], rel=1e-5)


def test_layers_and_updates_are_those_of_the_weights(stepped):
    _, _, before, after, result = stepped
    line = Window().plus(result).line("abcde")

    def ratio(old, new):
        old, new = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (old, new))
        return np.linalg.norm(new - old) / np.linalg.norm(old)

    assert line["update_to_weight"] == pytest.approx(ratio(before, after), rel=1e-3)
    for name in ("frontend", "position"):
        told = line["modules"][name]["update_to_weight"]
        assert told == pytest.approx(ratio(before["encoder"][name], after["encoder"][name]), rel=1e-3)
    assert line["modules"]["head"]["update_to_weight"] == pytest.approx(ratio(before["head"], after["head"]), rel=1e-3)
    for index in (0, 1):
        layer = [jax.tree.map(lambda x, i=index: x[i], params["encoder"]["layers"]) for params in (before, after)]
        assert line["layers"][str(index + 1)]["update_to_weight"] == pytest.approx(ratio(*layer), rel=1e-3)
    assert "update_to_weight" not in line["layers"]["0"]


@pytest.mark.parametrize("scan", [False, True])
def test_statistics_of_layers_are_those_of_the_hidden_states(scan):
    """Of a layer whose output overflows too: the largest is then that of the finite ones."""
    cfg = tiny.encoder(pre_norm=True)
    encoder = tiny.randomised(cfg)
    bias = np.array(encoder.layers.contract.bias[...])
    bias[1, 3] = np.inf
    encoder.layers.contract.bias.set_value(bias)
    waveform = tiny.batch(3).waveform
    formulation = formulation_for("tpu" if scan else "cpu")
    assert formulation.scan_layers == scan
    encoded = jax.jit(lambda e, w: encode(e, w, watch=True, formulation=formulation))(encoder, waveform)
    for index in (0, 1):  # the last one's output is normalised after it was watched
        hidden = np.asarray(encoded.hidden[index])
        np.testing.assert_allclose(encoded.statistics.largest[index], np.abs(hidden).max((1, 2)), rtol=1e-6)
    frames = encoded.features.shape[1]
    np.testing.assert_array_equal(encoded.statistics.nonfinite, [[0] * 3, [0] * 3, [frames] * 3])
    assert np.isfinite(encoded.statistics.largest).all()
    assert jax.eval_shape(encode, encoder, waveform).statistics is None


def measured(rng, rows, *, layers=3, units=7):
    """Random measurements of a pass."""
    return Measured(
        sums={"masked_loss": Sum(rng.random(), float(rows))},
        rows={"masked_loss": Sum(rng.random(rows), np.full(rows, 9.0))},
        counts={"target_perplexity": rng.integers(0, 9, units).astype(np.float32)},
        layers=LayerStatistics(rng.random((layers, rows)), rng.integers(0, 2, (layers, rows)).astype(np.float32)),
    )


def test_passes_add_up_but_for_the_largest_values():
    rng = np.random.default_rng(0)
    batches = [tiny.batch(4)._replace(language=np.array(codes, np.int32)) for codes in ([0, 1, 1, 2], [2, 2, 0, 3])]
    batches[1].valid[3] = False  # a filler row: whatever stands in it does not count
    passes = [measured(rng, 4) for _ in batches]
    passes[1].layers.largest[:, 3], passes[1].layers.nonfinite[:, 3] = 99.0, 7.0
    parts = [observe(one, batch, languages=3, width=16) for one, batch in zip(passes, batches, strict=True)]
    both = jax.tree.map(np.asarray, combine(*parts))
    a, b = (one.layers for one in passes)
    np.testing.assert_allclose(
        both.extremes["largest"], np.maximum(a.largest.max(1), b.largest[:, :3].max(1)), rtol=1e-6)  # fmt: skip
    np.testing.assert_array_equal(both.layers["nonfinite"].total, a.nonfinite.sum(1) + b.nonfinite[:, :3].sum(1))
    assert both.layers["nonfinite"].weight[0] == 7 * batches[0].valid.shape[1] * 16
    losses = np.concatenate([one.rows["masked_loss"].total for one in passes])
    codes = np.concatenate([batch.language for batch in batches])
    wanted = [losses[codes == code].sum() for code in range(3)]
    np.testing.assert_allclose(both.languages["masked_loss"].total, wanted, rtol=1e-6)


def test_only_small_sums_and_maxima_cross_devices():
    """The compiled program over eight devices: all-reduces of the vectors that are reported, and nothing else."""
    mesh = make_mesh(MeshConfig(fsdp=2))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    batch, one = tiny.batch(16), measured(np.random.default_rng(0), 16)
    placed = jax.tree.map(lambda x: jax.device_put(x, rows), (one.rows, batch))
    layers = jax.device_put(one.layers, NamedSharding(mesh, P(None, ("data", "fsdp"))))

    def program(terms, batch, layers):
        return observe(one._replace(rows=terms, layers=layers), batch, languages=5, width=16)

    everywhere = NamedSharding(mesh, P())
    text = jax.jit(program, out_shardings=everywhere).lower(*placed, layers).compile().as_text()
    collectives = re.findall(r"= (\S.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
    assert {kind for _, kind in collectives} == {"all-reduce"}
    sizes = [math.prod(map(int, dims.split(","))) if dims else 1 for shape, _ in collectives
             for dims in re.findall(r"[fs]32\[([\d,]*)\]", shape)]  # fmt: skip
    assert max(sizes) <= 5 and len(sizes) <= 8


def test_a_window_is_carried_exactly_by_a_checkpoint(stepped):
    result = stepped[-1]
    other = result._replace(extremes={"largest": result.extremes["largest"] * np.float32([3, 1 / 3, 1])})
    window = Window().plus(result).plus(other)
    again = Window.restored(json.loads(json.dumps(window.record())))
    assert again.line("abcde") == window.line("abcde") and again.steps == 2
    assert again.plus(result).line("abcde") == window.plus(result).line("abcde")
    largest = [window.line("abcde")["layers"][str(i)]["largest"] for i in range(3)]
    np.testing.assert_allclose(largest, result.extremes["largest"] * np.float32([3, 1, 1]), rtol=1e-5)
    assert Window.restored(None).line("abcde") == {}


def test_where_the_time_goes(monkeypatch):
    """Three steps of 2 s, 2 s and 6 s, of which 1 s each is waiting: 300 ms of audio and 2 TFLOP a row."""
    now = [100.0]
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: now[0])
    work = Work(lambda samples: samples * 1e12 / 2400, devices=4, peak=1e12)
    ours = Clock(seconds=50.0, audio_seconds=3600.0, work=work)
    batch = SimpleNamespace(waveform=np.zeros((5, 4800)))
    for seconds in (1.0, 1.0, 5.0):
        with ours.waiting():
            now[0] += 1.0
        now[0] += seconds
        ours.heard(batch)
        ours.stepped()
    line = ours.line()
    assert line["input_wait"] == pytest.approx(0.3) and line["step_seconds"] == pytest.approx(2.0)
    assert line["audio_hours"] == pytest.approx(1 + 4.5 / 3600) and line["audio_hours_per_hour"] == pytest.approx(0.45)
    assert line["mfu"] == pytest.approx(0.75) and line["teraflops"] == pytest.approx(0.75)  # 30 TFLOP, 10 s, 4 devices
    assert line["seconds"] == pytest.approx(60.0) and 1e-2 < line["host_memory_gb"] < 1e3
    assert math.isnan(ours.line()["step_seconds"])  # a new window
    unknown = Clock(seconds=0.0, audio_seconds=0.0, work=work._replace(peak=None))
    now[0] += 1.0
    assert "mfu" not in unknown.line() and "teraflops" in unknown.line()


def test_the_start_is_told_once_and_in_parts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock_module, "since_launch", lambda: now[0] - 80.0)

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(clock_module.jax, "block_until_ready", lambda loss: wait(loss))
    ours = Clock(seconds=0.0, audio_seconds=0.0)
    with ours.probing():
        now[0] += 2.0
    with ours.waiting():
        now[0] += 3.0
    now[0] += 7.0
    said = ours.first_step(1.5)
    assert said == (
        "the first step ended 33.5 s after the launch: 20.0 s until the loop, 3.0 s for the first batch, "
        "2.0 s for a probe, 7.0 s to compile or load the step, 1.5 s to run it"
    )
    assert ours.first_step(1.5) is None and now[0] == 113.5
    assert ours.line()["first_step_seconds"] == 33.5 and "first_step_seconds" not in ours.line()


def test_time_since_the_launch():
    """Beside what the system's own `ps` says of this process."""
    told = subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    assert abs(since_launch() - int(told.stdout)) < 3


def test_a_trace_of_some_steps(tmp_path, monkeypatch):
    """Steps 3 and 4 of four: the warm-up is as long as what is left over."""
    double = jax.jit(lambda x: x * 2)
    with Profile(tmp_path / "profile", steps=2, left=4) as profile:
        for number in (1, 2, 3, 4):
            with profile.step(number) as awaited:
                awaited.append(double(np.ones(8)))
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    numbers = {event["args"]["step_num"] for event in events if event.get("name") == "step" and "args" in event}
    assert numbers == {"3", "4"}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with Profile(tmp_path / "none", steps=0, left=4) as profile, profile.step(1):
        pass
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # two hosts' traces in one folder would end the run
    with Profile(tmp_path / "none", steps=1, left=1) as profile, profile.step(1):
        pass
    assert not (tmp_path / "none").exists()


def test_weights_and_biases_is_one_run_however_often_it_is_continued(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(TrackerError, match="loop.wandb is 'speech', but Weights & Biases is not installed: pip"):
        WandbTracker(tmp_path, project="speech", name="stage", config={})
    no_key = SimpleNamespace(init=lambda **_: {}["api_key not configured"])
    monkeypatch.setitem(sys.modules, "wandb", no_key)
    (tmp_path / "refused").mkdir()
    with pytest.raises(TrackerError, match="api_key not configured.*`wandb login`, or WANDB_MODE=offline"):
        WandbTracker(tmp_path / "refused", project="speech", name="stage", config={})
    told = []

    def init(**given):
        told.append(given)
        log = lambda values, *, step: told.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: told.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for resume_step in (0, 10):
        tracker = WandbTracker(tmp_path, project="speech", name="stage", config={"loop.steps": "20"})
        writer = MetricsWriter(tmp_path, resume_step=resume_step, tracker=tracker)
        writer.write(resume_step + 10, {"loss": 1.0, "bad": math.nan, "languages": {"eng": {"masked_loss": 2.0}}})
        writer.close()
    first, line, ended, second, *_ = told
    assert first == second and first["resume"] == "allow" and first["id"] and first["dir"] == str(tmp_path)
    assert (first["project"], first["name"], first["config"]) == ("speech", "stage", {"loop.steps": "20"})
    assert line == (10, {"loss": 1.0, "language/eng/masked_loss": 2.0}) and ended == "finished"
