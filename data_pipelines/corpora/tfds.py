"""A data set that TFDS prepared (as ArrayRecord or Parquet), read without TensorFlow; see `tfds_examples`."""

from pathlib import Path

from tqdm import tqdm

from data_pipelines.containers import TFDS_INFO, tfds_member
from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.listing import Lister, existing_folder, needs_language, split_in
from data_pipelines.tfds_examples import needs_tensorflow, open_builder, open_examples


def read(
    folder: str | Path,
    *,
    audio: str = "audio",
    language: str | None = None,
    language_feature: str | None = None,
    text_feature: str | None = None,
    speaker_feature: str | None = None,
    id_feature: str | None = None,
    rate: int | None = None,
) -> Listing:
    """Lists all examples of the data set prepared in `folder` (where dataset_info.json lies).

    `audio` is its audio feature ("speech" in librispeech, "voice" in common_voice); its rate that of the feature, else
    `rate` in Hz. Class labels count by their names. Splits are those of the data set ("train_clean100" is train). All
    examples are read for their other features, since TFDS has no other place for them.

    Raises CorpusError: no data set, no such feature, no rate, no language, one that only TensorFlow can read.
    """
    folder = existing_folder(folder)
    if language is None and language_feature is None:
        raise needs_language(folder, ("language", "language_feature"))
    wanted = {"language": language_feature, "text": text_feature, "speaker": speaker_feature, "id": id_feature}
    wanted = {what: name for what, name in wanted.items() if name is not None}
    lister = Lister(folder)
    row = 0
    try:
        builder = open_builder(folder)
        features = builder.info.features
        for name in (audio, *wanted.values()):
            if name not in features:
                raise CorpusError(f"{folder} has no feature {name!r}; it has: {', '.join(features)}")
        hertz = getattr(features[audio], "sample_rate", None) or rate
        if not hertz:
            raise CorpusError(f"{folder} does not say the sample rate of {audio!r}: give the option rate in Hz")
        for split, facts in builder.info.splits.items():
            count = facts.num_examples
            examples = open_examples(folder, split, features=wanted.values()) if wanted else None
            size = facts.num_bytes // max(count, 1)
            for k in tqdm(range(count), desc=f"{folder.name} {split}", unit="example", delay=5, disable=None):
                row += 1
                values = examples[k] if examples is not None else {}
                fields = {what: _text(values[name], features[name]) for what, name in wanted.items()}
                lister.add(
                    TFDS_INFO,
                    row=row,
                    id=fields.get("id") or f"{split}/{k}",
                    language=language or fields["language"],
                    speaker=fields.get("speaker", ""),
                    split=split_in(split.replace("-", "_")),
                    text=fields.get("text", ""),
                    size=size,
                    member=tfds_member(split, example=k, feature=audio, rate=hertz),
                )
    except CorpusError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, AttributeError) as error:
        hint = ": prepare it as array_record, with audio that is not decoded lazily" if needs_tensorflow(error) else ""
        raise CorpusError(f"{folder} cannot be read with TFDS{hint} ({' '.join(str(error).split())[:300]})") from error
    return lister.listing(source=folder)


def _text(value: object, feature: object) -> str:
    if hasattr(feature, "int2str"):
        return feature.int2str(int(value)) if value >= 0 else ""
    return value.decode() if isinstance(value, bytes) else str(value)
