"""Each named corpus as a miniature in its real layout, made from clips of the demo corpus: listed, and decoded.

What is listed is compared with what the miniature was made of, and the sound with the clip that was written.
"""

import csv
import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import soxr

from data_pipelines.audio import decode
from data_pipelines.balance import XLS_R
from data_pipelines.corpora import CorpusError, common_voice, librilight
from data_pipelines.corpora.readers import READERS

DEMO = Path(__file__).resolve().parents[3] / "demo_corpus"
FORMATS = {
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".sph": ("NIST", "ALAW"),
}


class Made(NamedTuple):
    """What a clip is, to the test's knowledge; `waveform` [samples] float32 at 16 kHz."""

    language: str
    speaker: str
    split: str
    text: str
    waveform: np.ndarray


class Miniature(NamedTuple):
    """Clips by id, and what is to be rejected: path -> words of the reason."""

    made: dict[str, Made]
    rejected: dict[str, str]


@functools.cache
def clips(language):
    """(text, waveform) of six clips of the demo corpus, between 1 and 2 s, in its order."""
    with open(DEMO / "manifest.tsv", encoding="utf-8") as table:
        rows = csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = [r for r in rows if r["language"] == language and r["text"] and 16000 < int(r["n_samples"]) < 32000][:6]
    sounds = [decode(DEMO / row["path"], name=row["path"]).waveform for row in rows]
    sounds = [np.rint(sound * 32767).astype(np.int16) / np.float32(32768) for sound in sounds]
    return [(" ".join(row["text"].split()), sound) for row, sound in zip(rows, sounds, strict=True)]


def write(path, waveform, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = waveform if rate == 16000 else soxr.resample(waveform, 16000, rate)
    kind, subtype = FORMATS.get(path.suffix, (path.suffix[1:].upper(), "PCM_16"))
    soundfile.write(path, sound, rate, format=kind, subtype=subtype)


def put(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def dealt(language, sentence):
    percent = int(hashlib.sha256(f"{language}\t{sentence}".encode()).hexdigest(), 16) % 100
    return "train" if percent < 80 else "dev" if percent < 90 else "test"


def make_common_voice(root):
    made = {}
    header = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender"  # release 17
    header = f"{header} accents variant locale segment"
    for locale, code, language in (("de", "deu", "deu"), ("zh-HK", "yue", "spa")):
        for i, (split, (text, sound)) in enumerate(zip(("train", "dev", "test"), clips(language), strict=False)):
            name = f"common_voice_{locale}_{i}.mp3"
            write(root / locale / "clips" / name, sound, 48000)
            row = [f"{locale}{i}", name, "", f'"{text}', *[""] * 9]  # quotes mean nothing
            gone = [f"{locale}x", "gone.mp3", "", "", *[""] * 9] if split == "train" and locale == "de" else None
            rows = ["\t".join(row), *(["\t".join(gone), "too\tshort"] if gone else [])]
            put(root / locale / f"{split}.tsv", header.replace(" ", "\t"), *rows)
            made[f"{locale}/clips/{name}"] = Made(code, f"{locale}{i}", split, f'"{text}', sound)
    return Miniature(made, {"de/clips/gone.mp3": "no such file", "de/train.tsv": "line 4: another number"})


def make_mls(root):
    made = {}
    for name, code, suffix in (("mls_german", "deu", ".flac"), ("mls_polish_opus", "pol", ".opus")):
        for split, (text, sound) in zip(("train", "dev", "test"), clips("deu"), strict=False):
            part = root / name / split
            write(part / "audio" / "1724" / "99" / f"1724_99_000001{suffix}", sound)
            put(part / "transcripts.txt", f"1724_99_000001\t{text}", *(["5_6_000009\tgone"] if split == "dev" else []))
            put(part / "segments.txt", "1724_99_000001\thttp://librivox.example/a.mp3\t10.1\t12.0")
            made[f"{name}/{split}/audio/1724/99/1724_99_000001{suffix}"] = Made(code, "1724", split, text, sound)
    put(root / "mls_lm_german" / "data.txt", "text")
    gone = {f"{name}/dev/audio/5/6/5_6_000009": "no audio" for name in ("mls_german", "mls_polish_opus")}
    return Miniature(made, gone)


def make_voxpopuli(root):
    made = {}
    for i, (_, sound) in enumerate(clips("ell")[:3]):
        event = f"2018011{i}-0900-PLENARY-10_el"
        write(root / "unlabelled_data" / "el" / "2018" / f"{event}_{i}.ogg", sound)
        made[f"unlabelled_data/el/2018/{event}_{i}.ogg"] = Made("ell", "", dealt("ell", event), "", sound)
    header = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender\tis_gold_transcript\taccent"
    for place, split, i in (("en", "train", 0), ("en", "dev", 1), ("en_accented", "test", 2)):
        text, sound = clips("eng")[i]
        name = f"20090112-0900-PLENARY-1-en_20090112-17:08:25_{i}"
        write(root / "transcribed_data" / place / "2009" / f"{name}.ogg", sound)
        speaker = "None" if i == 2 else "4"
        row = f"{name}\t{text.upper()}\t{text}\t{speaker}\t{split}\tmale\tTrue\tNone"
        put(root / "transcribed_data" / place / f"asr_{split}.tsv", header, row)
        path = f"transcribed_data/{place}/2009/{name}.ogg"
        made[path] = Made("eng", "" if i == 2 else "4", split, text, sound)
    put(root / "transcribed_data" / "en" / "asr_test.tsv", header, "2009x\t\t\t\t\t\t\t")
    return Miniature(made, {"transcribed_data/en/2009/2009x.ogg": "no such file"})


def make_fleurs(root):
    made = {}
    for place, code, language in (("es_419", "spa", "spa"), ("cmn_hans_cn", "cmn", "rus")):
        for i, (split, (text, sound)) in enumerate(zip(("train", "dev", "test"), clips(language), strict=False)):
            write(root / "data" / place / "audio" / split / f"10{i}.wav", sound)
            row = f"{i}\t10{i}.wav\t{text}.\t{text}\t{'|'.join(text)}\t{len(sound)}\tMALE"
            put(root / "data" / place / f"{split}.tsv", row, *(["7\tx.wav\ttoo few"] if split == "dev" else []))
            made[f"data/{place}/audio/{split}/10{i}.wav"] = Made(code, "", split, text, sound)
    return Miniature(made, {f"data/{place}/dev.tsv": "line 2" for place in ("es_419", "cmn_hans_cn")})


def make_voxlingua107(root):
    made, rejected = {}, {"logs": "not a language"}
    (root / "logs").mkdir(parents=True)
    for place, code in (("iw", "heb"), ("jw", "jav"), ("zh", "cmn"), ("dev/iw", "heb")):
        for i, (_, sound) in enumerate(clips("heb")[:2]):
            video = f"dev{i}" if place == "dev/iw" else f"{place}{i}"
            path = f"{place}/{video}__U__S{i}---0001.230-0002.340.wav"
            write(root / path, sound)
            made[path] = Made(code, video, "dev" if place == "dev/iw" else "train", "", sound)
    path = "iw/dev0__U__S7---0100.000-0102.000.wav"
    write(root / path, clips("heb")[2][1])
    return Miniature(made, rejected | {path: "in the dev set"})


def make_babel(root):
    made, rejected = {}, {}
    for number, code, part, split in (("105", "tur", "training", "train"), ("205", "kmr", "dev", "dev")):
        folder = root / f"IARPA_BABEL_BP_{number}" / "conversational" / part
        (text, first), (more, second) = clips("ron")[:2]
        name = f"BABEL_BP_{number}_10033_20111024_205740_inLine"
        pause = np.zeros(8000, np.float32)
        write(folder / "audio" / f"{name}.sph", np.concatenate([pause, first, pause, second, pause]), 8000)
        times = np.cumsum([0, *(len(s) / 16000 for s in (pause, first, pause, second, pause))])
        said = ("<no-speech>", text, None, f"<hes> {more}", "<no-speech>")
        lines = [line for time, words in zip(times, said, strict=False) for line in (f"[{time:.5f}]", words) if line]
        put(folder / "transcription" / f"{name}.txt", *lines, f"[{times[-1]:.5f}]")
        path, speaker = f"{folder.relative_to(root).as_posix()}/audio/{name}.sph", f"{number}_10033_inLine"
        made[path] = Made(code, speaker, split, text, first)
        made[f"{path}#1"] = Made(code, speaker, split, f"<hes> {more}", second)
    evaluation = root / "IARPA_BABEL_BP_105" / "conversational" / "eval" / "audio"
    name = "BABEL_BP_105_20001_20111024_205740_outLine"  # without a transcription
    write(evaluation / f"{name}.sph", first, 8000)
    path = evaluation.relative_to(root).as_posix()
    made[f"{path}/{name}.sph"] = Made("tur", "105_20001_outLine", "test", "", first)
    write(evaluation / "BABEL_BP_999_20001_20111024_205740_outLine.wav", first)
    rejected[f"{path}/BABEL_BP_999_20001_20111024_205740_outLine.wav"] = "number (999)"
    return Miniature(made, rejected)


def make_openslr(root):
    made = {}
    (text, sound), (more, other), (third, last), *_ = clips("mal")

    def expect(path, speaker, text, sound, code):
        write(root / path, sound)
        made[path] = Made(code, speaker, dealt(code, text), text, sound)

    expect("SLR41/jv_id_female/wavs/jvf_00297_00037352660.wav", "jvf_00297", text, sound, "jav")
    put(root / "SLR41" / "jv_id_female" / "line_index.tsv", f"jvf_00297_00037352660\t\t{text}")
    for gender, words, waveform in (("female", text, sound), ("male", more, other)):
        name = f"ml{gender[0]}_02879_01795762363"
        expect(f"SLR63/ml_in_{gender}/{name}.wav", f"ml{gender[0]}_02879", words, waveform, "mal")
        put(root / "SLR63" / f"line_index_{gender}.tsv", f"{name}\t{words}")
        put(root / "SLR63" / f"ml_in_{gender}" / "line_index.tsv", f"{name}\t{words}")  # the same once more
    expect("asr_sinhala/data/00/0011a4ad11.flac", "83b57", third, last, "sin")
    put(root / "asr_sinhala" / "utt_spk_text.tsv", f"0011a4ad11\t83b57\t{third}", "0022\t83b57\tgone")
    expect("SLR32/af_za/za/afr/wavs/afr_0184_0162.wav", "afr_0184", more, other, "afr")
    put(root / "SLR32" / "af_za" / "za" / "afr" / "line_index.tsv", f"afr_0184_0162\tx\t{more}")
    expect("SLR32/st_za/za/sso/wavs/sso_1367_79.wav", "sso_1367", third, last, "sot")  # not Sissano
    put(root / "SLR32" / "st_za" / "za" / "sso" / "line_index.tsv", f"sso_1367_79\tx\t{third}")
    expect("british/welsh_english_female/wef_02484_00388.wav", "wef_02484", "Well, no, thanks", sound, "eng")
    put(root / "british" / "line_index_all.csv", "EN0001, wef_02484_00388, Well, no, thanks")
    expect("SLR61/es_weather_messages/arf_05223_0001.wav", "arf_05223", more, other, "spa")
    put(root / "SLR61" / "es_ar_line_index_weather.tsv", f"arf_05223_0001\t{more}")
    write(root / "asr_sinhala" / "data" / "00" / "stray.flac", sound)
    stray = {"asr_sinhala/data/00/stray.flac": "no table names it", "asr_sinhala/0022": "line 2: no audio file"}
    return Miniature(made, stray)


def make_librispeech(root):
    made = {}
    for subset, split, chapter in (("train-clean-100", "train", "84-1"), ("dev-other", "dev", "85-2")):
        lines = []
        for i, (text, sound) in enumerate(clips("eng")[:2]):
            place = f"LibriSpeech/{subset}/{chapter.replace('-', '/')}"
            write(root / place / f"{chapter}-000{i}.flac", sound)
            lines.append(f"{chapter}-000{i} {text}")
            made[f"{place}/{chapter}-000{i}.flac"] = Made("eng", chapter.split("-")[0], split, text, sound)
        put(root / place / f"{chapter}.trans.txt", *lines, f"{chapter}-0009 GONE")
    put(root / "LibriSpeech" / "SPEAKERS.TXT", ";ID |SEX| SUBSET |MINUTES| NAME", "84 | F | train-clean-100 | 25.1 | A")
    gone = {"train-clean-100/84/1/84-1-0009.flac", "dev-other/85/2/85-2-0009.flac"}
    return Miniature(made, {f"LibriSpeech/{path}": "no audio" for path in gone})


def make_librilight(root):
    (_, a), (_, b), (_, c), *_ = clips("eng")
    pause, short = np.zeros(48000, np.float32), np.zeros(8000, np.float32)
    book = root / "small" / "100" / "sea_fairies_0812_librivox_64kb_mp3"
    write(book / "01_baum_sea_fairies_64kb.flac", np.concatenate([pause, a, short, b, pause, c]))
    edges = np.cumsum([0, *(len(sound) / 16000 for sound in (pause, a, short, b, pause, c))]).tolist()
    voice = [edges[1:3], edges[3:5], edges[5:7]]
    about = {"speaker": "100", "book_meta": {"id": "315", "language": "English"}, "snr": 9.5, "voice_activity": voice}
    put(book / "01_baum_sea_fairies_64kb.json", json.dumps(about))
    write(book / "02.flac", a)
    put(book / "03.json", json.dumps(about | {"voice_activity": [[0.5, 0.9], [0.1, 0.2]]}))
    write(book / "03.flac", a)
    write(root / "duplicate" / "1" / "b" / "x.flac", a)
    path = f"small/100/{book.name}/01_baum_sea_fairies_64kb.flac"
    made = {
        path: Made("eng", "100", "train", "", np.concatenate([a, short, b])),
        f"{path}#1": Made("eng", "100", "train", "", c),
    }
    wrong = {f"small/100/{book.name}/02.flac": "no .json", f"small/100/{book.name}/03.flac": "in order"}
    return Miniature(made, wrong)


def make_voxforge(root):
    made = {}
    anonymous = "anonymous-20090101-xyz"
    rows = [
        ("Dutch/anna-20080123-abc", "nld", "anna", ".wav", "PROMPTS", "nl-0001", "utf-8"),
        (f"de/extracted/{anonymous}", "deu", anonymous, ".flac", "prompts-original", "de5", "latin-1"),
    ]
    for place, code, speaker, suffix, prompts, name, encoding in rows:
        text, sound = clips(code)[0]
        text += " é"
        write(root / place / suffix[1:] / f"{name}{suffix}", sound)
        put(root / place / "etc" / "README", "Language: ...")
        key = f"{Path(place).name}/mfc/{name}" if prompts == "PROMPTS" else name
        (root / place / "etc" / prompts).write_text(f"{key} {text}\n", encoding=encoding)
        made[f"{place}/{suffix[1:]}/{name}{suffix}"] = Made(code, speaker, dealt(code, text.lower()), text, sound)
    put(root / "de" / "extracted" / "otto-2009-abc" / "etc" / "PROMPTS", "otto/mfc/a TEXT")
    return Miniature(made, {"de/extracted/otto-2009-abc": "neither wav/ nor flac/"})


CALLED = {"common_voice": "commonvoice"}  # in the manifest, so that XLS_R and the stages find it by their name for it
MAKERS = {name.removeprefix("make_"): maker for name, maker in list(globals().items()) if name.startswith("make_")}


@pytest.mark.parametrize("name", MAKERS)
def test_a_miniature_is_listed_and_decodes_to_what_it_was_made_of(tmp_path, name):
    made, rejected = MAKERS[name](tmp_path)
    listing = READERS[name](tmp_path)
    listed = {c.id: (c.language, c.speaker, c.split.name.lower(), c.text) for c in listing.clips}
    assert listed == {key: clip[:4] for key, clip in made.items()}
    assert {clip.corpus for clip in listing.clips} == {CALLED.get(name, name)}
    assert len(listing.clips) == len(listed)
    assert {r.path for r in listing.rejected} == set(rejected)
    assert not [r for r in listing.rejected if rejected[r.path] not in r.reason]
    rows = [one.row for one in (*listing.clips, *listing.rejected)]
    assert sorted(rows) == list(range(1, len(rows) + 1))
    for clip in listing.clips:
        source = tmp_path / clip.path
        assert clip.size == source.stat().st_size
        sound = decode(source, name=clip.id).waveform
        sound = sound[round(clip.start * 16000) : None if clip.end is None else round(clip.end * 16000)]
        wanted = made[clip.id].waveform
        assert abs(len(sound) - len(wanted)) <= 2, clip.id
        assert clip.samples in (None, len(sound))
        if source.suffix in (".wav", ".flac"):
            np.testing.assert_array_equal(sound, wanted)
        else:
            n = min(len(sound), len(wanted))
            assert np.corrcoef(sound[:n], wanted[:n])[0, 1] > 0.9, clip.id


def test_what_xls_r_draws_from_is_called_as_the_readers_call_it(tmp_path):
    made = {name: MAKERS[name](tmp_path / name) and READERS[name](tmp_path / name).clips[0].corpus for name in MAKERS}
    assert set(XLS_R.corpora) <= set(made.values())


@pytest.mark.parametrize("name", MAKERS)
def test_another_layout_is_named_with_what_is_there(tmp_path, name):
    (tmp_path / "stray!").mkdir()
    put(tmp_path / "README.txt", "hello")
    with pytest.raises(CorpusError, match="is not laid out as .*README.txt, stray!/"):
        READERS[name](tmp_path)
    with pytest.raises(CorpusError, match="does not exist"):
        READERS[name](tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("common_voice", {"languages": ["de"]}, lambda c: c.path.startswith("de/")),
        ("librispeech", {"subsets": ["dev-other"]}, lambda c: "dev-other" in c.path),
        ("librilight", {"subsets": ["small"]}, lambda c: True),
        ("voxpopuli", {"unlabelled": False}, lambda c: c.text),
        ("voxpopuli", {"transcribed": False}, lambda c: not c.text),
        ("babel", {"whole": True}, lambda c: "#" not in c.id),
    ],
)
def test_options_keep_a_part(tmp_path, name, options, kept):
    made, _ = MAKERS[name](tmp_path)
    everything = READERS[name](tmp_path).clips
    part = READERS[name](tmp_path, **options).clips
    assert [c.id for c in part] == [c.id for c in everything if kept(c)]
    if name == "babel":
        assert {(c.start, c.end, c.text) for c in part} == {(0.0, None, "")}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("common_voice", {"languages": ["fr"]}, "no locale fr"),
        (
            "librispeech",
            {"subsets": ["train-other-500"]},
            "no subset train-other-500; it has dev-other, train-clean-100",
        ),
        ("librilight", {"subsets": ["tiny"]}, "tiny; known: small, medium"),
    ],
)
def test_a_part_that_is_not_there_is_refused(tmp_path, name, options, said):
    MAKERS[name](tmp_path)
    with pytest.raises(CorpusError, match=said):
        READERS[name](tmp_path, **options)


def test_the_first_releases_of_common_voice_and_more_than_the_three_tables(tmp_path):
    """Names without .mp3, few columns; what a held-out contributor said, or a held-out sentence, is not trained on."""
    put(tmp_path / "dev.tsv", "path\tclient_id\tsentence", "b\tbo\tone")
    put(tmp_path / "train.tsv", "path\tclient_id\tsentence", "a\tann\ttwo")
    rows = ["a\tann\ttwo", "b\tbo\tone", "c\tbo\tthree", "d\tdan\tone", "e\tann\ttwo"]
    put(tmp_path / "validated.tsv", "path\tclient_id\tsentence", *rows)
    for name in "abcde":
        write(tmp_path / "clips" / f"{name}.mp3", clips("eng")[0][1])
    listing = common_voice.read(tmp_path, language="sv-SE", extra=("validated",))
    assert [(c.path, c.language, c.split.name) for c in listing.clips] == [
        ("clips/b.mp3", "swe", "DEV"),
        ("clips/a.mp3", "swe", "TRAIN"),
        ("clips/e.mp3", "swe", "TRAIN"),
    ]
    assert [r.path for r in listing.rejected] == ["clips/c.mp3", "clips/d.mp3"]
    with pytest.raises(CorpusError, match="no other.tsv"):
        common_voice.read(tmp_path, language="sv-SE", extra=("other",))
    with pytest.raises(CorpusError, match="known: validated, other"):
        common_voice.read(tmp_path, language="sv-SE", extra=("all",))


@pytest.mark.parametrize("nested", [False, True], ids=["as released", "as on Kaggle"])
def test_the_very_first_release_of_common_voice_had_csv_tables(tmp_path, nested):
    rows = {"valid-train": "one, two", "valid-dev": "three", "valid-test": "four", "other-train": "five"}
    for name, text in rows.items():
        folder = f"cv-{name}"
        more = [f'{folder}/sample-000001.mp3,"three",0,1,,,,'] if name == "other-train" else []
        header = "filename,text,up_votes,down_votes,age,gender,accent,duration"
        put(tmp_path / f"cv-{name}.csv", header, f'{folder}/sample-000000.mp3,"{text}",1,0,twenties,,us,', *more)
        for k in range(1 + len(more)):
            place = tmp_path / folder / folder if nested else tmp_path / folder
            write(place / f"sample-00000{k}.mp3", clips("eng")[0][1])
    for name in ("other-dev", "other-test"):
        put(tmp_path / f"cv-{name}.csv", header)
    listing = common_voice.read(tmp_path)
    found = {(c.language, c.split.name, c.text, c.speaker) for c in listing.clips}
    expected = {("eng", "TRAIN", "one, two", ""), ("eng", "DEV", "three", ""), ("eng", "TEST", "four", "")}
    assert found == expected and not listing.rejected
    listing = common_voice.read(tmp_path, extra=("other",))
    assert {c.text for c in listing.clips} == {"one, two", "three", "four", "five"}
    assert ["its sentence is in dev or test"] == [r.reason for r in listing.rejected]
    with pytest.raises(CorpusError, match="cv-invalid.csv cannot be read: No such file"):
        common_voice.read(tmp_path, extra=("invalidated",))


def test_a_locale_of_a_delta_release_of_common_voice_is_told(tmp_path):
    """Of a delta there are validated, other and invalidated clips, and no splits yet."""
    put(tmp_path / "de" / "train.tsv", "path\tclient_id", "a\tann")
    put(tmp_path / "fr" / "validated.tsv", "path\tclient_id", "b\tbo")
    for locale, name in (("de", "a"), ("fr", "b")):
        write(tmp_path / locale / "clips" / f"{name}.mp3", clips("eng")[0][1])
    listing = common_voice.read(tmp_path)
    assert [c.path for c in listing.clips] == ["de/clips/a.mp3"]
    assert [(r.path, "give extra, of validated" in r.reason) for r in listing.rejected] == [("fr", True)]
    assert [c.language for c in common_voice.read(tmp_path / "fr", extra=("validated",)).clips] == ["fra"]


def test_what_has_to_be_unpacked_or_cut_first_says_how(tmp_path):
    put(tmp_path / "f" / "data" / "es_419" / "train.tsv", "1\ta.wav\tA\ta\ta\t16000\tMALE")
    put(tmp_path / "f" / "data" / "es_419" / "audio" / "train.tar.gz", "")
    with pytest.raises(CorpusError, match="tar -xzf train.tar.gz in .*es_419/audio"):
        READERS["fleurs"](tmp_path / "f")
    (tmp_path / "v" / "raw_audios").mkdir(parents=True)
    with pytest.raises(CorpusError, match="get_unlabelled_data"):
        READERS["voxpopuli"](tmp_path / "v")


def test_stretches_of_voice_are_joined_up_to_a_length():
    voice = [librilight.Span(0, 10), librilight.Span(10.5, 20), librilight.Span(20.2, 31), librilight.Span(40, 110)]
    clips = list(librilight.joined(voice, clip_seconds=30, pause_seconds=1))
    assert clips == [(0, 20), (20.2, 31), (40, 110)]
    assert list(librilight.joined(voice, clip_seconds=60, pause_seconds=0.1)) == voice
    assert list(librilight.joined([], clip_seconds=60, pause_seconds=1)) == []
