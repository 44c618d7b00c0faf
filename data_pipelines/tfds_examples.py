"""Random access to the examples of a TFDS data set (ArrayRecord or Parquet), without TensorFlow."""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path


@functools.cache
def _tfds():
    """tensorflow_datasets, with an audio feature that can be made without TensorFlow.

    In 4.9.10 its decoder asks TensorFlow for a dtype that only lazily decoded audio needs (tensorflow/datasets#11233),
    so no data set with audio can be opened where TensorFlow is not installed.
    """
    import tensorflow_datasets
    from tensorflow_datasets.core.features import audio_feature

    def remember(self, file_format, np_dtype, shape):
        self._file_format, self._np_dtype, self._shape = file_format, np_dtype, shape
        self._channels = shape[1] if len(shape) > 1 else 1

    audio_feature._AudioDecoder.__init__ = remember
    return tensorflow_datasets


def open_builder(directory: str | Path):
    """The `tfds.core.DatasetBuilder` of a prepared data set. Raises what TFDS raises: OSError, ValueError, ..."""
    return _tfds().builder_from_directory(str(directory))


class Examples:
    """The examples of a split, each a nested dict of some features alone; `examples[k]` reads and decodes one.

    TFDS's own data source decodes all features or none (its PartialDecoding needs TensorFlow in 4.9.10), and audio
    is by far the largest.
    """

    def __init__(self, records: Sequence, features):
        self._records, self._features = records, features

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, example: int) -> dict:
        return self._features.deserialize_example_np(self._records[example])


def open_examples(directory: str | Path, split: str, *, features: Iterable[str]) -> Examples:
    """The examples of a split with these features alone; of nested ones ("outer/inner"), the outermost as a whole."""
    builder = open_builder(directory)
    every = builder.info.features
    names = dict.fromkeys(feature.split("/")[0] for feature in features)
    subset = _tfds().features.FeaturesDict({name: every[name] for name in names})
    return Examples(builder.as_data_source(split).data_source, subset)


def needs_tensorflow(error: Exception) -> bool:
    """Whether an error of TFDS says that TensorFlow is missing (lazily decoded audio, TFRecord files)."""
    return bool(re.search(r"tensorflow|\btf\b", str(error), re.IGNORECASE))
