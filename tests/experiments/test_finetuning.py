"""Fine-tuning from a model folder to a recogniser for transformers: results, kills, LoRA, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import soundfile

from data_pipelines.mlsuperb.batches import TrackBatchesConfig
from data_pipelines.mlsuperb.challenge import read_challenge
from data_pipelines.mlsuperb.tracks import read_track
from experiments.export import check, export_model
from experiments.mlsuperb import training
from experiments.mlsuperb.encoders import LOG_MEL, read_encoder
from experiments.mlsuperb.finetuning import FineTuning, RecogniserFiles, fine_tune
from experiments.mlsuperb.gathered import write_leaderboard
from experiments.mlsuperb.protocol import ProtocolError
from experiments.mlsuperb.recipe import RecipeConfig, RegularisationConfig
from experiments.mlsuperb.recogniser import read_recogniser
from experiments.mlsuperb.results import read_results
from tests.experiments.small_mlsuperb import write_challenge
from tests.wavlab_jax import tiny
from wavlab_jax.adapters import LoraConfig
from wavlab_jax.convert import ConvertError, from_encoder
from wavlab_jax.convert import huggingface as folders
from wavlab_jax.masking import MaskConfig
from wavlab_jax.model import parameters
from wavlab_jax.optim import FineTuningConfig
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.train import Interrupted

pytestmark = pytest.mark.once

CFG = RecipeConfig(
    updates=3,
    validations=3,
    optimizer=FineTuningConfig(
        peak_learning_rate=1e-2, warmup_steps=1, total_steps=4, freeze_steps=1, layer_decay=0.5, accumulate=2
    ),
    batches=TrackBatchesConfig(size=3, step=1.0, threads=0, fillers=True),
)
TEXTS = {"eng": ("AB", "A BA", "BAB", "AA"), "deu": ("ÄB", "B", "ÄÄ", "BÄ")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sources and languages; one training utterance has more tokens than frames."""
    root, rng = tmp_path_factory.mktemp("superb"), np.random.default_rng(0)
    for source, prefix, language in (("mls", "mls", "eng"), ("commonvoice", "cv", "deu")):
        folder = root / source / language
        (folder / "wav").mkdir(parents=True)
        for part in ("train", "dev", "test"):
            lines = []
            for number, text in enumerate(TEXTS[language]):
                id = f"{prefix}_{language}_{len(part)}{number:05d}"
                soundfile.write(folder / "wav" / f"{id}.wav", rng.normal(0, 0.1, 5_000 + 900 * number), 16_000)
                lines.append(f"{id} x {'ABA' * 20 if (part, number) == ('train', 3) else text}\n")
            (folder / f"transcript_10min_{part}.txt").write_text("".join(lines), "utf-8")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder of a HuBERT with random weights."""
    folder = tmp_path_factory.mktemp("model") / "hubert"
    folders.write(from_encoder(tiny.randomised(tiny.encoder(pre_norm=True, extractor_norm="layer"))), folder)
    return folder


def tuning(root, model, workdir, *, task="joint", devices: int = 1, fsdp: int = 1, **changes) -> FineTuning:
    mesh = make_mesh(MeshConfig(fsdp=fsdp), devices=jax.devices()[:devices])
    track = read_track(root, task, duration="10min")
    encoder = read_encoder(str(model), workdir=workdir, mesh=mesh, name="tuned")
    files = RecogniserFiles(workdir, "tuned", track)
    return FineTuning(track, encoder, str(model), dataclasses.replace(CFG, **changes), mesh, files)


@pytest.fixture(scope="module")
def whole(root, model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    run = tuning(root, model, workdir)
    return run, fine_tune(run, root=root, workdir=workdir)


def test_the_encoder_is_trained_but_for_what_is_frozen(whole, root, model, tmp_path):
    run, results = whole
    before, after = tuning(root, model, tmp_path).encoder.params, parameters(read_recogniser(run.files.folder).encoder)
    jax.tree.map(np.testing.assert_array_equal, before["frontend"]["convolutions"], after["frontend"]["convolutions"])
    for name in ("position", "layers", "norm"):
        assert any(
            not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True)
        )
    assert results["data"]["infeasible"]["train"]["count"] == 2 and results["all"]["utterances"] == 8
    assert results["challenge"].keys() == {"accuracy", "error_rate", "deviation", "worst_15"}
    assert len(results["training"]["averaged"]) == 1 and "accuracy" in results["groups"]["normal"]


def test_results_say_that_it_is_another_protocol_and_stand_in_the_table(whole, tmp_path):
    run, results = whole
    assert json.loads(run.files.results.read_text()) == results and not results["protocol"]["published"]
    tuned, changed = results["protocol"]["deviations"][:2]
    assert "the encoder itself and a linear layer" in tuned
    assert "optimizer.peak_learning_rate 0.01" in changed and "updates 3" in changed and "beta1" not in changed
    text = write_leaderboard(run.files.folder.parents[3], tmp_path / "table.md")
    assert "not by the published protocol" in text and "| **tuned**" in text


def test_a_killed_run_goes_on_to_the_same_model(whole, root, model, tmp_path, monkeypatch):
    run, results = whole
    original = training.train

    def dies(state, step, batches, **arguments):
        def three(state, batch, wish):
            if int(state.step) == 3:  # between two updates, with half of one summed up; the encoder has just thawed
                raise Interrupted("killed", number=9)
            return step(state, batch, wish)

        return original(state, three, batches, **arguments)

    monkeypatch.setattr(training, "train", dies)
    with pytest.raises(Interrupted):
        fine_tune(tuning(root, model, tmp_path), root=root, workdir=tmp_path)
    monkeypatch.undo()
    killed = tuning(root, model, tmp_path)
    again = fine_tune(killed, root=root, workdir=tmp_path)
    same = ("all", "groups", "confusions", "training", "examples")
    assert {key: again[key] for key in same} == {key: results[key] for key in same}
    models = (parameters(read_recogniser(each.files.folder).encoder) for each in (run, killed))
    jax.tree.map(np.testing.assert_array_equal, *models)
    with pytest.raises(ProtocolError, match="seed: 0 then, 1 now"):
        fine_tune(tuning(root, model, tmp_path, seed=1), root=root, workdir=tmp_path)


def test_one_training_on_the_challenge_is_judged_on_both_sets(root, model, tmp_path, monkeypatch):
    """In whichever order; results of both stand in the table and on the card."""
    challenge, workdir = write_challenge(tmp_path / "challenge", root), tmp_path / "work"

    def judged(judged_on):
        track = read_challenge(challenge, judged_on=judged_on)
        files = RecogniserFiles(workdir, "tuned", track)
        run = dataclasses.replace(tuning(root, model, workdir, updates=1, validations=1), track=track, files=files)
        return files, fine_tune(run, root=challenge, workdir=workdir)

    _, dialects = judged("dev_dialect")
    monkeypatch.setattr(training, "train", None)  # nothing is trained again
    files, dev = judged("dev")
    assert dialects["all"]["utterances"] == 2 and dev["all"]["utterances"] == 4
    assert dialects["training"] == dev["training"]
    assert [each["track"] for each in read_results(workdir)] == ["challenge dev", "challenge dev_dialect"]
    text = write_leaderboard(workdir, tmp_path / "table.md")
    assert "| tuned | challenge dev | " in text and "| tuned | challenge dev_dialect | " in text
    sections = read_recogniser(files.folder).sections
    assert all(f"Track: challenge {name}, 1h" in sections["Results"] for name in ("dev", "dev_dialect"))
    assert (
        "small letters and punctuation, as in the challenge's data; a token such as `[deu]`" in sections["Fine-tuning"]
    )


@pytest.mark.soak
def test_letters_that_sound_different_are_read(model, tmp_path):
    """Four letters, a tone each, and an encoder of random values: hardly one is read wrong in the end."""
    rng, tones = np.random.default_rng(0), {"A": 300, "B": 700, "C": 1_500, "D": 3_100}
    folder = tmp_path / "tones" / "mls" / "eng"
    (folder / "wav").mkdir(parents=True)
    for part, count in (("train", 48), ("dev", 12), ("test", 24)):
        lines = []
        for number in range(count):
            text = "".join(rng.permutation(list(tones))[:3])  # none twice: where one tone ends is not heard
            place = np.arange(5_000) / 16_000
            sound = np.concatenate([np.sin(2 * np.pi * tones[letter] * place) for letter in text])
            id = f"mls_eng_{len(part)}{number:05d}"
            sound = 0.3 * sound + rng.normal(0, 0.02, len(sound))
            soundfile.write(folder / "wav" / f"{id}.wav", sound, 16_000)
            lines.append(f"{id} x {text}\n")
        (folder / f"transcript_10min_{part}.txt").write_text("".join(lines), "utf-8")
    optimizer = FineTuningConfig(
        peak_learning_rate=2e-3, warmup_steps=50, schedule="constant", freeze_steps=0, frozen=(), clip_norm=5.0
    )
    quiet = RegularisationConfig(activation_dropout=0.0, layerdrop=0.0)
    changes = dict(updates=1_000, validations=2, optimizer=optimizer, regularisation=quiet)
    batches = TrackBatchesConfig(size=12, step=1.0, threads=0)
    run = tuning(tmp_path / "tones", f"random:{model}", tmp_path, task="multilingual", batches=batches, **changes,
                 mask=MaskConfig(probability=0.0, minimum_spans=0))  # fmt: skip
    results = fine_tune(run, root=tmp_path / "tones", workdir=tmp_path)
    assert results["all"]["error_rate"] < 20, results["examples"]


@pytest.mark.soak
def test_devices_and_passes_do_not_change_what_is_learned(whole, root, model, tmp_path):
    """Four devices, parameters in two pieces, what is frozen without moments; and a row a pass."""
    _, results = whole
    sharded = fine_tune(tuning(root, model, tmp_path, devices=4, fsdp=2), root=root, workdir=tmp_path)
    passes = fine_tune(tuning(root, model, tmp_path / "one", seconds_per_device=1.0), root=root, workdir=tmp_path)
    for other in (sharded, passes):
        for mine, theirs in zip(results["training"]["losses"], other["training"]["losses"], strict=True):
            assert theirs == pytest.approx(mine, rel=1e-3)


@pytest.mark.torch
def test_transformers_has_the_same_logits_and_reads_the_same_text(whole, tmp_path):
    run, _ = whole
    exported = export_model(str(run.files.folder), workdir=tmp_path, corpus=None, out=tmp_path / "out")
    hidden, logits = check(exported, None)
    assert logits.peer.startswith("HubertForCTC") and logits.largest < 1e-4 and hidden.wrong() == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCTC" in card and "| 8 | normal |" in card and "`hubert`, fine-tuned" in card
    assert "Texts are in capitals, without ASCII's punctuation; a token such as `[deu]` names a language." in card


@pytest.mark.torch
def test_lora_is_trained_alone_and_exported_merged(root, model, tmp_path):
    lora = LoraConfig(rank=2, targets=("query", "value"))
    run = tuning(root, model, tmp_path, adapter="lora", lora=lora, updates=1, validations=1)
    results = fine_tune(run, root=root, workdir=tmp_path)
    tokens = len(run.track.tokens)
    assert results["model"]["downstream_parameters"] == 2 * 2 * 2 * 2 * 16 + 16 * tokens + tokens
    found = read_recogniser(run.files.folder)
    before, after = run.encoder.params["layers"], parameters(found.encoder)["layers"]
    assert not np.array_equal(before["attention"]["query"]["kernel"], after["attention"]["query"]["kernel"])
    np.testing.assert_array_equal(before["attention"]["key"]["kernel"], after["attention"]["key"]["kernel"])
    exported = export_model(str(run.files.folder), workdir=tmp_path, corpus=None, out=tmp_path / "out")
    _, logits = check(exported, None)
    assert logits.largest < 1e-4
    other = tmp_path / "other"
    folders.write(from_encoder(tiny.randomised(tiny.encoder(pre_norm=True, extractor_norm="layer"), seed=5)), other)
    about = json.loads(run.files.recogniser.read_text())
    run.files.recogniser.write_text(json.dumps(about | {"model": str(other)}))
    with pytest.raises(ProtocolError, match="is not the model that"):
        read_recogniser(run.files.folder)


def test_a_bottleneck_that_transformers_lacks_is_not_exported(root, model, tmp_path):
    run = tuning(root, model, tmp_path, adapter="houlsby", bottleneck=4, updates=1, validations=1)
    fine_tune(run, root=root, workdir=tmp_path)
    with pytest.raises(ConvertError, match="no place for houlsby"):
        export_model(str(run.files.folder), workdir=tmp_path, corpus=None, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_fine_tuned_or_exported_is_refused(whole, root, model, tmp_path):
    run, _ = whole
    mesh = run.mesh
    log_mel = read_encoder(LOG_MEL, workdir=tmp_path, mesh=mesh)
    with pytest.raises(ProtocolError, match="log-mel has no encoder"):
        fine_tune(dataclasses.replace(run, encoder=log_mel), root=root, workdir=tmp_path)
    layers = dataclasses.replace(CFG.optimizer, layers=(3,))
    with pytest.raises(ProtocolError, match="layer 3, but .*hubert has 2"):
        fine_tune(tuning(root, model, tmp_path, optimizer=layers), root=root, workdir=tmp_path)
    with pytest.raises(ConvertError, match="is a recogniser.*leave --layout out"):
        export_model(str(run.files.folder), workdir=tmp_path, corpus=None, out=tmp_path / "o", layout="fairseq")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recogniser.json").write_text("{}")
    with pytest.raises(ProtocolError, match="not trained to its end"):
        export_model(str(unfinished), workdir=tmp_path, corpus=None, out=tmp_path / "o")


def test_the_recipe_is_fairseqs_and_a_scale_shortens_all_of_it():
    recipe = RecipeConfig()
    assert (recipe.schedule().iterations, recipe.schedule().validations) == (100_000, 25)
    adam = recipe.optimizer
    assert (adam.peak_learning_rate, adam.beta1, adam.beta2, adam.epsilon) == (2e-5, 0.9, 0.98, 1e-8)
    assert (adam.warmup_steps, adam.hold_steps, adam.decay_steps, adam.final_scale) == (8_000, 0, 72_000, 0.05)
    assert (adam.freeze_steps, adam.frozen, adam.weight_decay, adam.clip_norm) == (10_000, ("extractor",), 0, 0)
    assert (recipe.mask.probability, recipe.mask.length) == (0.75, 10)
    assert (recipe.mask.channel_probability, recipe.mask.channel_length) == (0.5, 64)
    dropped = recipe.regularisation
    assert (dropped.layerdrop, dropped.activation_dropout, dropped.dropout, dropped.attention_dropout) == (
        0.1,
        0.1,
        0,
        0,
    )
    assert recipe.deviations() == ["fine-tuned: the encoder itself and a linear layer, by fairseq's recipe for HuBERT"]
    short = RecipeConfig(scale=0.01)
    optimizer = short.scaled_optimizer()
    assert (optimizer.warmup_steps, optimizer.freeze_steps, optimizer.total_steps) == (80, 100, 800)
    assert short.schedule().iterations == 1000 and "250 of 25,000 updates" in short.deviations()[1]
    for wrong in ({"scale": 0.0}, {"scale": 2.0}, {"updates": 0}, {"seconds_per_device": 0.0}):
        with pytest.raises(ProtocolError):
            RecipeConfig(**wrong)
