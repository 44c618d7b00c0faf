"""CTC heads with a vocabulary, in transformers: classes keep their numbers, and texts are read as here."""

import json

import numpy as np
import pytest
import torch
import transformers

from tests.wavlab_jax import tiny
from wavlab_jax.convert import ConvertError, from_encoder
from wavlab_jax.convert import huggingface as folders
from wavlab_jax.convert.tokenizer import BARS, DELIMITER, fine_tuned_settings, text_of, tokenizer_files
from wavlab_jax.encoder import encode

pytestmark = pytest.mark.torch

PARTS = dict(blank="<blank>", unknown="<unk>", end="<sos/eos>", space="<space>")
CHARACTERS = ["<blank>", "<unk>", "E", "<space>", "[eng]", "A", "É", "[org_jpn]", "'", "日", "<sos/eos>"]
FILES = tokenizer_files(CHARACTERS, **PARTS)
PHONES = ["<blank>", "<unk>", "a1", "sh", "b", "<sos/eos>"]


def written(folder, tokens, *, relative_bias=False, phones=False):
    """An encoder and a head of random numbers, exported; the encoder, the head."""
    cfg = tiny.encoder(pre_norm=True, extractor_norm="layer", normalize_waveform=True, relative_bias=relative_bias)
    encoder, rng = tiny.randomised(cfg), np.random.default_rng(1)
    head = {
        "lm_head.weight": rng.normal(size=(len(tokens), cfg.width)).astype(np.float32),
        "lm_head.bias": rng.normal(size=len(tokens)).astype(np.float32),
    }
    files = tokenizer_files(tokens, **PARTS, phones=phones)
    settings = {"tokenizer": files, "fine_tuning": fine_tuned_settings(files, dropout=0.2)}
    folders.write(from_encoder(encoder, head=head, settings=settings), folder)
    return encoder, head


@pytest.mark.parametrize("kind", ["HubertForCTC", "WavLMForCTC"])
def test_logits_and_text_are_those_of_transformers(kind, tmp_path):
    """By the class and the processor that the folder itself names; nothing is missing, nothing left over."""
    encoder, head = written(tmp_path / "out", CHARACTERS, relative_bias=kind == "WavLMForCTC")
    model, info = transformers.AutoModelForCTC.from_pretrained(tmp_path / "out", output_loading_info=True)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == kind and type(processor).__name__ == "Wav2Vec2Processor"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (model.config.pad_token_id, model.config.vocab_size) == (processor.tokenizer.pad_token_id, 11) == (0, 11)
    assert len(processor.tokenizer) == 11  # nothing was added beside what the head has rows for
    assert model.config.final_dropout == 0.2 and model.config.ctc_zero_infinity
    waveform = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    inputs = processor(waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        theirs = model.eval()(**inputs).logits[0].numpy()
    ours = np.asarray(encode(encoder, waveform[None]).hidden[-1][0]) @ head["lm_head.weight"].T + head["lm_head.bias"]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert "AutoProcessor" in (tmp_path / "out" / "README.md").read_text()
    assert processor.batch_decode(theirs.argmax(-1)[None]) == [text_of(ours.argmax(-1), FILES)]


def test_every_class_is_read_as_its_token(tmp_path):
    written(tmp_path / "out", CHARACTERS)
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    rng = np.random.default_rng(3)
    for _ in range(20):
        classes = rng.integers(0, len(CHARACTERS), 30)
        assert tokenizer.decode(classes) == text_of(classes, FILES)
    assert tokenizer("ÉA E").input_ids == [6, 5, 3, 2]  # and a text is read for training on


def test_phones_are_written_apart(tmp_path):
    written(tmp_path / "out", PHONES, phones=True)
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    classes = [2, 2, 0, 2, 3, 3, 1, 4]
    assert tokenizer.decode(classes) == "a1 a1 sh <unk> b"
    assert text_of(classes, tokenizer_files(PHONES, **PARTS, phones=True)) == "a1 a1 sh <unk> b"


def test_languages_alone_are_written_apart(tmp_path):
    written(tmp_path / "out", ["<blank>", "<unk>", "[eng]", "[org_jpn]", "<sos/eos>"], phones=True)
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer.decode([0, 2, 2, 0, 3]) == "[eng] [org_jpn]" and tokenizer.decode([0, 2, 2]) == "[eng]"


def test_a_tokenizer_comes_back_from_a_folder_and_goes_out_again(tmp_path):
    """Of another folder too: a published model's files are kept as they are, but for what would run code."""
    written(tmp_path / "out", CHARACTERS)
    extra = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) | {"auto_map": {"x": "y.z"}}
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(extra))
    files = folders.write(folders.read(tmp_path / "out"), tmp_path / "again")
    assert {"vocab.json", "tokenizer_config.json"} <= set(files)
    assert (tmp_path / "again" / "vocab.json").read_bytes() == (tmp_path / "out" / "vocab.json").read_bytes()
    del extra["auto_map"]
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == extra
    assert "vocab" not in (tmp_path / "again" / "config.json").read_text().replace("vocab_size", "")


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([*CHARACTERS, "|"], "A｜ A"),  # where a space is written |, one that looks like it
        ([*CHARACTERS, "|", "｜"], "A∣ A"),
        (["<blank>", "<unk>", "|", "A", "<sos/eos>"], "A|A"),
    ],
)
def test_a_bar_in_the_texts_is_no_space(tokens, said, tmp_path):
    """The challenge's texts keep their punctuation."""
    written(tmp_path / "out", tokens)
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    classes = [tokens.index(token) for token in ("A", "|", "<space>", "A") if token in tokens]
    assert tokenizer.decode(classes) == text_of(classes, tokenizer_files(tokens, **PARTS)) == said
    assert tokenizer(said).input_ids == classes


def test_a_vocabulary_that_cannot_be_written_is_refused():
    with pytest.raises(ConvertError, match="has │ more than once"):
        tokenizer_files([*CHARACTERS, DELIMITER, *BARS], **PARTS)
    with pytest.raises(ConvertError, match="has A more than once"):
        tokenizer_files([*CHARACTERS, "A"], **PARTS)
    with pytest.raises(ConvertError, match="no '<blank>', the blank token"):
        tokenizer_files(CHARACTERS[1:], **PARTS)
