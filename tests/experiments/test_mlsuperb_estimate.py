"""`superb MODEL --plan CHIP`: operations against what the compiler counts, and hours that add up."""

import jax
import jax.numpy as jnp
import pytest

from data_pipelines.mlsuperb.batches import TrackBatchesConfig
from experiments.mlsuperb import verbs
from experiments.mlsuperb.encoders import read_encoder, shape_of
from experiments.mlsuperb.estimate import estimate, summed
from experiments.mlsuperb.protocol import ProtocolConfig, ProtocolError
from experiments.stage_files import StageFiles
from tests.experiments.small_mlsuperb import write_challenge, write_folder
from tests.wavlab_jax import tiny
from wavlab_jax.compiled_program import read_program
from wavlab_jax.downstream import Downstream, DownstreamConfig, logits_of
from wavlab_jax.encoder.architectures import architecture
from wavlab_jax.flops import downstream_flops, row_flops
from wavlab_jax.model import write_description
from wavlab_jax.sharding import MeshConfig, make_mesh


def test_the_downstream_model_costs_what_its_compiled_program_does():
    cfg = DownstreamConfig(tokens=30, projection=20, channels=20, width=16, heads=4, feed_forward=24)
    model = Downstream(jax.random.key(0), cfg, hidden=3, inputs=12)
    features, frames = jnp.zeros((2, 90, 12)), jnp.array([90, 90])
    compiled = jax.jit(lambda x: logits_of(model, x, frames, cfg=cfg)[0]).lower(features).compile()
    assert read_program(compiled.as_text()).flops == 2 * downstream_flops(cfg, 90, inputs=12)


def test_hours_follow_from_the_protocol(capsys):
    """HuBERT Base by hand: 300,000 batches of 8 rows of 7.5 s."""
    (one,) = estimate(
        architecture("hubert_base"), [("multilingual", None)], duration="10min", cfg=ProtocolConfig(), root=None
    )
    samples = round((222.5 * 3600 / 122_890 + 1) * 16_000)
    row = row_flops(architecture("hubert_base"), DownstreamConfig(tokens=5_000), samples=samples)
    assert one.encoder + one.downstream == pytest.approx(2_400_000 * row.frozen_training)
    heard = 30 * 41.8 + 45.0  # hours: thirty validations and the test set
    assert one.judging == pytest.approx(heard * 122_890 / 222.5 * row.forward, rel=1e-4)
    assert one.seconds == pytest.approx(7.518, abs=1e-3) and one.schedule.iterations == 300_000
    verbs.superb("hubert_base --plan a100-80 --utilisation 0.5 --track multilingual".split())
    said = capsys.readouterr().out
    assert "estimate by formula" in said and "at 50% of its 312 TFLOP/s" in said
    assert f"| {one.operations / 156e12 / 3600:,.2f} |" in said


def test_the_challenge_is_planned_by_its_own_schedule(capsys):
    """Its 400,000 batches, and 20 validations of its own dev set; the judged set is read once."""
    config = architecture("hubert_base")
    dev, dialects = (
        estimate(config, [("challenge", name)], duration="10min", cfg=ProtocolConfig(), root=None)[0]
        for name in ("dev", "dev_dialect")
    )
    row = row_flops(config, DownstreamConfig(tokens=dev.tokens), samples=round(dev.seconds * 16_000))
    assert dev.name == "challenge dev" and dev.schedule.iterations == 400_000 and dev.schedule.validations == 20
    assert dev.encoder + dev.downstream == pytest.approx(3_200_000 * row.frozen_training)
    assert dev.judging == pytest.approx(21 * 23_892 * row.forward)
    assert dev.judging - dialects.judging == pytest.approx((23_892 - 7_100) * row.forward, rel=1e-6)
    verbs.superb("hubert_base --plan a100-80 --track challenge --judged-on dev_dialect".split())
    assert f"| challenge dev_dialect | 400,000 | 8.0 x {dev.seconds:.1f} |" in capsys.readouterr().out


def test_the_challenge_s_own_folder_is_counted(tmp_path, capsys):
    root = write_challenge(tmp_path / "challenge", write_folder(tmp_path / "benchmark"))
    verbs.superb(f"log-mel --plan h100 --track challenge --mlsuperb {root}".split())
    assert (
        "| challenge dev | 400,000 | 4.0 x 2.0 | 889 |" in capsys.readouterr().out
    )  # one batch, of four rows below 2 s


def test_the_thirteen_sets_are_one_row():
    sets = [("monolingual", name) for name in ("eng1", "deu2")]
    both = estimate(tiny.encoder(), [*sets, ("joint", None)], duration="1h", cfg=ProtocolConfig(scale=0.1), root=None)
    one, joint = summed(both)
    assert one.name == "monolingual, 2 sets" and joint == both[2]
    assert one.schedule.iterations == 2 * both[0].schedule.iterations == 2 * both[1].schedule.iterations
    assert one.operations == both[0].operations + both[1].operations and one.seconds == both[0].seconds
    doubled = ProtocolConfig(batches=TrackBatchesConfig(size=16), scale=0.1)
    (wide,) = estimate(tiny.encoder(), sets[:1], duration="1h", cfg=doubled, root=None)
    assert wide.encoder == 2 * both[0].encoder


def test_encoders_are_judged_in_float32_with_all_layers(tmp_path):
    """Of the paper's size stages are trained in bfloat16; one with a description alone stands for them."""
    trained = tiny.encoder(compute_dtype="bfloat16", layerdrop=0.5)
    description = StageFiles(tmp_path, "stage").model
    description.parent.mkdir(parents=True)
    write_description(description, trained, tiny.learner().head)
    found = read_encoder("random:stage", workdir=tmp_path, mesh=make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    assert shape_of("stage", workdir=tmp_path) == trained
    assert (found.config.compute_dtype, found.config.layerdrop) == ("float32", 0.0)


def test_what_cannot_be_planned(tmp_path):
    with pytest.raises(ProtocolError, match="nor is it an architecture"):
        shape_of("hubert_bass", workdir=tmp_path)
    with pytest.raises(ProtocolError, match="share of the peak"):
        verbs.superb("hubert_base --plan h100 --utilisation 40".split())
    with pytest.raises(ProtocolError, match="--sets eng1 is of the monolingual track"):
        verbs.superb("hubert_base --plan h100 --track joint --sets eng1".split())
    for more in ("--track challenge joint", "--track challenge --sets eng1", "--track challenge joint --plan h100"):
        with pytest.raises(ProtocolError, match="give it alone"):
            verbs.superb(f"hubert_base --mlsuperb {tmp_path} {more}".split())
    with pytest.raises(ProtocolError, match="--hours is of --track .*, and not of challenge"):
        verbs.superb(f"hubert_base --mlsuperb {tmp_path} --track challenge --hours 1h".split())
    for track, option in (("joint", "--judged-on dev"), ("challenge", "--hours 1h"), ("challenge", "--language eng1")):
        with pytest.raises(ProtocolError, match=f"{option.split()[0]} is of --track .*, and not of {track}"):
            verbs.finetune(f"hubert --mlsuperb {tmp_path} --track {track} {option}".split())
    with pytest.raises(ProtocolError, match="give --mlsuperb DIR"):
        verbs.superb(["hubert_base", "--workdir", str(tmp_path)])
    with pytest.raises(ProtocolError, match="no encoder that could be random"):
        read_encoder("random:log-mel", workdir=tmp_path, mesh=make_mesh(MeshConfig()))
    assert shape_of("log-mel", workdir=tmp_path) is None
    assert shape_of("random:wavlab_ms", workdir=tmp_path).width == 1024
