"""ML-SUPERB's folder read by the published rules, on a folder in its layout made of real clips."""

import csv
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines.mlsuperb import texts
from data_pipelines.mlsuperb.layout import (
    FEW_SHOT,
    SOURCES,
    MlSuperbError,
    few_shot_utterances,
    ignored_folders,
    missing_few_shot,
    missing_sources,
    read_split,
    unsayable_languages,
    untold_recordings,
)
from data_pipelines.mlsuperb.miniature import write_miniature
from data_pipelines.mlsuperb.tracks import MONOLINGUAL_SETS, monolingual_score, read_track

DEMO = Path(__file__).resolve().parents[2] / "demo_corpus"


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Some clips of every (language, corpus, split) of the demo corpus that have text, with their table."""
    folder, taken = tmp_path_factory.mktemp("audio"), Counter()
    with open(DEMO / "manifest.tsv", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        kept = []
        for row in reader:
            cell = (row["language"], row["source"], row["split"])
            if row["text"].strip() and taken[cell] < (10 if row["language"] in FEW_SHOT else 2):
                taken[cell] += 1
                kept.append(row)
        lines = ["\t".join(reader.fieldnames), *("\t".join(row.values()) for row in kept)]
    for row in kept:
        (folder / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DEMO / row["path"], folder / row["path"])
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def benchmark_folder(audio, tmp_path_factory):
    out = tmp_path_factory.mktemp("mlsuperb") / "mini"
    write_miniature(audio, out)
    return out


@pytest.fixture
def small(tmp_path):
    """A folder of one language with whatever a test writes: a function of transcript lines by file."""

    def make(lines, seconds=None, language="eng", source="mls"):
        folder = tmp_path / "root" / source / language
        (folder / "wav").mkdir(parents=True)
        for name in ("10min_train", "1h_train", "10min_dev", "10min_test"):
            (folder / f"transcript_{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")
        for line in lines:
            id = line.split(" ")[0]
            if id and (seconds or {}).get(id, 1.0):
                count = int((seconds or {}).get(id, 1.0) * 16_000)
                soundfile.write(folder / "wav" / f"{id}.wav", np.random.default_rng(0).normal(0, 0.1, count), 16_000)
        return tmp_path / "root"

    return make


def test_texts_are_written_as_published():
    """By hand, from the published functions: brackets, ASCII punctuation, capitals; other punctuation stays."""
    assert texts.reference("[noise] l'été, “oui” - ça\tva!", brackets=True) == "LÉTÉ “OUI” ÇA VA"
    assert texts.reference("[noise] oui", brackets=False) == "NOISE OUI"
    assert texts.reference("[a] kept (b) [c]", brackets=True) == "KEPT B"
    assert texts.reference("[a] gone [c] d", brackets=True) == "D"  # from the first [ to the last ]
    assert texts.reference("straße", brackets=True) == "STRASSE"


def test_white_space_that_is_not_ascii_is_unknown_in_training_and_a_space_where_it_is_scored(small):
    """As in ESPnet, whose list of tokens and scoring split lines into words, and whose training does not."""
    assert texts.reference(" «\u00a0oui\u00a0» \t  non\u00a0! ", brackets=True) == "«\u00a0OUI\u00a0» NON"
    assert texts.reference("\u00a0 oui", brackets=True, symbol="[fra]") == "[fra] \u00a0 OUI"
    assert texts.listed(["A", "\u00a0", "<space>", "B", "\u3000"]) == ["A", "<space>", "B", "<space>"]
    track = read_track(small(["mls_eng_000001 x A\u00a0A  A", "mls_eng_000002 x A"]), "multilingual", duration="10min")
    assert track.tokens == ["<blank>", "<unk>", "A", "<space>", "<sos/eos>"]
    assert track.encode(track.parts["train"][0].tokens) == [2, 1, 2, 3, 2]
    assert texts.scored_characters(track.parts["test"][0].text) == ["A", "<space>", "A", "<space>", "A"]
    assert dict(track.unseen("train")) == dict(track.unseen("dev")) == {"\u00a0": 1} and not track.unseen("test")


def test_tokens_of_characters_and_symbols():
    assert texts.characters("[eng] AB C", symbols=["[eng]"]) == ["[eng]", "<space>", "A", "B", "<space>", "C"]
    assert texts.scored_characters("[eng]  AB", symbols=["[eng]"]) == ["<space>", "A", "B"]
    assert texts.said_language("[org_jpn] x [eng]") == "[eng]"
    assert texts.said_language("[org_jpn]") == "[org_jpn]"
    assert texts.said_language("ENG") == "[UNK]"


def test_the_challenge_compares_without_unicode_punctuation():
    assert texts.challenge_text("I'll be, “there” ", language="[eng]") == "ILL BE THERE"
    assert texts.challenge_text("我想去餐厅。 我非常饿", language="[cmn]") == "我想去餐厅我非常饿"


def test_what_is_left_out_is_named_and_counted(small):
    lines = [
        "mls_eng_000001 x hello there",
        "mls_eng_000002 x",
        "mls_eng_000003 x ...",
        "mls_eng_000004 x too long",
        "mls_eng_000005 x too short",
        "mls_eng_000006 x not there",
        "mls_eng_000001 y hello again",
        "nonsense x hello",
        "",
    ]
    root = small(lines, {"mls_eng_000004": 21.0, "mls_eng_000005": 0.05, "mls_eng_000006": 0})
    train = read_split(root, "train", duration="10min")
    assert [each.id for each in train.utterances] == ["mls_eng_000001"]
    assert train.reasons() == {
        "no text": 1,
        "no text but punctuation": 1,
        "not between 0.1 and 20 s": 2,
        "recording missing": 1,
        "id stands on an earlier line already": 1,
        "id does not end in _LANGUAGE_NUMBER": 1,
    }
    assert train.left_out[0].place.endswith("eng/transcript_10min_train.txt:2")
    # the test part keeps every length, and texts that are empty once punctuation is gone
    test = read_split(root, "test", duration="1h")
    assert [each.id[-1] for each in test.utterances] == ["1", "3", "4", "5"]
    soundfile.write(root / "mls" / "eng" / "wav" / "mls_eng_000099.wav", np.zeros(16_000), 16_000)
    assert [path.name for path in untold_recordings(root)] == ["mls_eng_000099.wav"]


def test_an_id_is_used_once_whatever_the_folder(small):
    """Hypotheses are matched with references by id."""
    lines = ["fleurs_eng_000001 x one", "fleurs_eng_000002 x two"]
    small(lines, source="fleurs")
    split = read_split(small(lines[1:], source="mls"), "test", duration="10min")
    assert [(each.source, each.id[-1]) for each in split.utterances] == [("fleurs", "1"), ("fleurs", "2")]
    assert split.reasons() == {"id stands in fleurs/eng already": 1}


def test_lines_of_punctuation_alone_are_left_out_where_nothing_would_be_left_of_them(small):
    """asr.sh drops lines of one field; `ID [eng]` has two."""
    root = small(["mls_eng_000001 x hello", "mls_eng_000002 x ...", "mls_eng_000003 x [laughs]"])
    monolingual = {"task": "monolingual", "monolingual": "eng1"}
    for asked, train, empty in (
        ({"task": "identification"}, ["[eng]"] * 3, []),
        ({"task": "joint"}, ["[eng] HELLO", "[eng]", "[eng]"], []),
        ({"task": "multilingual"}, ["HELLO"], ["...:2", "...:3"]),
        (monolingual, ["HELLO", "LAUGHS"], ["...:2"]),
    ):
        track = read_track(root, duration="10min", **asked)
        for part in ("train", "dev"):
            assert [each.text for each in track.parts[part]] == train
            assert ["..." + each.place[-2:] for each in track.left_out[part]] == empty
        assert len(track.parts["test"]) == 3


def test_listed_recordings_without_sound_are_left_out(small):
    root = small(["swc_eng_000007 x hello", "swc_eng_000008 x hello"], source="swc")
    split = read_split(root, "dev", duration="10min")
    assert [each.id for each in split.utterances] == ["swc_eng_000008"]
    assert split.reasons() == {"listed as without sound": 1}


def test_few_shot_languages_train_on_five_named_utterances():
    by_language = Counter(id.split("_")[-2] for id in few_shot_utterances())
    assert set(by_language) == FEW_SHOT and set(by_language.values()) == {5}


def test_sources_and_few_shot_utterances_that_are_not_there_are_named(small):
    five = sorted(id for id in few_shot_utterances() if "_lit_" in id)
    root = small([f"{id} x labas" for id in five[1:]], language="lit", source="commonvoice")
    assert missing_few_shot(root, duration="10min") == missing_few_shot(root, duration="1h") == five[:1]
    (root / "mls").mkdir()  # without a language
    assert missing_sources(root) == [source for source in SOURCES if source != "commonvoice"]


def test_folders_that_are_not_read_and_languages_that_cannot_be_said_are_named(small):
    small(["cv_org_jpn_000001 x hai"], language="org_jpn", source="commonvoice")
    root = small(["mls_de_000001 x gut"], language="de")
    (root / "voxlingua" / "deu").mkdir(parents=True)
    (root / "license.txt").touch()
    assert ignored_folders(root) == ["voxlingua"] and unsayable_languages(root) == ["mls/de"]
    for task in ("identification", "joint"):
        with pytest.raises(MlSuperbError, match="language of mls/de: folders of languages are named by ISO 639-3"):
            read_track(root, task, duration="10min")
    assert read_track(root, "multilingual", duration="10min").parts["train"][1].text == "GUT"


def test_folders_that_are_not_the_benchmark(tmp_path, small):
    with pytest.raises(MlSuperbError, match="is no folder"):
        read_split(tmp_path / "nowhere", "train", duration="10min")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MlSuperbError, match="none of the benchmark's folders"):
        read_split(tmp_path / "empty", "train", duration="10min")
    root = small(["mls_eng_000001 x hello"])
    (root / "mls" / "eng" / "transcript_10min_dev.txt").unlink()
    with pytest.raises(MlSuperbError, match=r"transcript_10min_dev\.txt is missing"):
        read_track(root, "multilingual", duration="10min")


def test_a_transcript_that_is_not_utf_8_is_named_with_its_line(small):
    root = small(["mls_deu_000001 x gut", "mls_deu_000002 x schön"], language="deu")
    path = root / "mls" / "deu" / "transcript_10min_train.txt"
    path.write_bytes(path.read_text("utf-8").encode("latin-1"))
    for read in (lambda: read_split(root, "train", duration="10min"), lambda: list(untold_recordings(root))):
        with pytest.raises(MlSuperbError, match=r"transcript_10min_train\.txt, line 2 is not UTF-8 \(byte 0xf6\)"):
            read()


def test_multilingual_tracks_of_the_miniature(benchmark_folder):
    plain, joint, lid = (
        read_track(benchmark_folder, task, duration="10min") for task in ("multilingual", "joint", "identification")
    )
    few = Counter(each.utterance.language for each in plain.parts["train"] if each.utterance.few_shot)
    assert few == {"dan": 5, "lit": 5, "tsn": 5}
    for short, long in zip(plain.parts["test"], joint.parts["test"], strict=True):
        assert long.text == f"[{short.utterance.language}] {short.text}"
        assert long.tokens == [f"[{short.utterance.language}]", "<space>", *short.tokens]
    assert {each.text for each in lid.parts["train"]} == set(joint.symbols) == set(lid.tokens[2:-1])
    assert plain.tokens[:2] == ["<blank>", "<unk>"] and plain.tokens[-1] == "<sos/eos>"
    assert len(set(plain.tokens)) == len(plain.tokens) and not plain.symbols
    counts = Counter(token for each in plain.parts["train"] for token in each.tokens)
    ordered = [counts[token] for token in plain.tokens[2:-1]]
    assert ordered == sorted(ordered, reverse=True) and sum(ordered) == counts.total()
    assert plain.encode(["<blank>", plain.tokens[5], "never seen"]) == [0, 5, 1]
    hour = read_track(benchmark_folder, "multilingual", duration="1h")
    assert {e.utterance.id for e in plain.parts["train"]} < {e.utterance.id for e in hour.parts["train"]}
    assert hour.parts["test"] == plain.parts["test"]


@pytest.mark.parametrize("name", MONOLINGUAL_SETS)
def test_monolingual_tracks_train_on_one_source_and_test_on_all(benchmark_folder, name):
    track, each = read_track(benchmark_folder, "monolingual", duration="1h", monolingual=name), MONOLINGUAL_SETS[name]
    assert {e.utterance.source for part in ("train", "dev") for e in track.parts[part]} == {each.source}
    assert {e.utterance.language for e in track.parts["test"]} == {each.language}
    there = {p.parts[-3] for p in benchmark_folder.glob(f"*/{each.language}/wav")}
    heard = {e.utterance.source for e in track.parts["test"]}
    assert each.source in heard and heard <= there and (len(there) == 1 or len(heard) > 1)
    if name in ("jpn", "cmn"):
        assert track.token_kind == "phone" and all(e.text.split() == e.tokens for e in track.parts["train"])


def test_the_miniature_says_what_stands_in_and_overwrites_nothing(benchmark_folder, audio):
    readme = (benchmark_folder / "README.md").read_text()
    assert "- ALFFA/swa: nds (klettres)" in readme and "cmn, jpn" in readme
    with pytest.raises(MlSuperbError, match="is not empty"):
        write_miniature(audio, benchmark_folder)


def test_monolingual_score_averages_sets_and_then_languages():
    """Three English sets count as one language: (20 + 8 * 40) / 9."""
    rates = {name: 40.0 for name in MONOLINGUAL_SETS} | {"eng1": 10.0, "eng2": 20.0, "eng3": 30.0}
    assert monolingual_score(rates) == pytest.approx((20 + 8 * 40) / 9)
    with pytest.raises(MlSuperbError, match="none of xty"):
        monolingual_score({name: 1.0 for name in MONOLINGUAL_SETS if name != "xty"})
