"""fairseq's pre-training and CTC heads <-> the names of `HEADS`.

    final_proj, label_embs_concat       HuBERT, WavLM
    quantizer, project_q, final_proj    wav2vec 2.0 (the last is `project_hid` here)
    w2v_encoder.proj                    fine-tuned with CTC

A label set's part of `label_embs_concat` has a row for each symbol of fairseq's Dictionary: `<s>`, `<pad>`, `</s>`,
`<unk>` (`label_specials`), then the units in the order of dict.km.txt, so that unit k of the dictionary is row 4 + k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from wavlab_jax.convert.checkpoint import StoredTensor
from wavlab_jax.convert.names import ConvertError, short
from wavlab_jax.encoder import EncoderConfig

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq `data/dictionary.py` Dictionary.__init__
CTC_PREFIX = "w2v_encoder."
_CTC = {f"lm_head.{kind}": f"proj.{kind}" for kind in ("weight", "bias")}
_HUBERT = {f"final_proj.{kind}": f"final_proj.{kind}" for kind in ("weight", "bias")}
_CONTRASTIVE = {
    "quantizer.codevectors": "quantizer.vars",
    **{f"project_q.{kind}": f"project_q.{kind}" for kind in ("weight", "bias")},
    **{f"project_hid.{kind}": f"final_proj.{kind}" for kind in ("weight", "bias")},
}
_EMBEDDINGS = "label_embs_concat"


class Heads(NamedTuple):
    """What `read_heads` found: tensors by the names of `HEADS`, settings, sentences, and keys that are no head's."""

    tensors: dict[str, StoredTensor]
    settings: dict[str, Any]
    notes: tuple[str, ...]
    unknown: dict[str, StoredTensor]


class Slots(NamedTuple):
    """A checkpoint's heads as fairseq has them.

    Attributes:
        model: by fairseq's names; with `CTC_PREFIX`'s `proj` for CTC.
        fields: of `cfg.model`, that follow from their shapes.
        symbols: of each label set, or [None] where there are no label embeddings.
        made_up: names of `HEADS` that fairseq's class demands and the checkpoint does not have.
        side: what has no slot.
    """

    model: dict[str, StoredTensor]
    fields: dict[str, Any]
    symbols: list[list[str] | None]
    made_up: tuple[str, ...]
    side: dict[str, StoredTensor]


def read_heads(
    found: Mapping[str, StoredTensor],
    *,
    model_type: str,
    symbols: Sequence[Sequence[str] | None],
    label_sets: int,
    where: str,
) -> Heads:
    """The heads among tensors by fairseq's names (without the prefix of a fine-tuned model).

    `symbols`: of each label set, where the file says; `label_sets`: how many it names otherwise.
    Raises ConvertError if the symbols do not fit the embeddings.
    """
    found, settings, notes = dict(found), {}, []
    names = _CTC | (_CONTRASTIVE if model_type == "wav2vec2" else _HUBERT)
    tensors = {ours: found.pop(theirs) for ours, theirs in names.items() if theirs in found}
    if model_type == "wav2vec2":  # one linear layer, or several of a deeper quantizer, which keep their names
        tensors |= {name: found.pop(name) for name in sorted(found) if name.startswith("quantizer.")}
    elif _EMBEDDINGS in found:
        embeddings = found.pop(_EMBEDDINGS)
        if len(embeddings.shape) != 2:
            raise ConvertError(f"{where}: {_EMBEDDINGS} has the shape {list(embeddings.shape)}, not [symbols, dim]")
        known = [list(names) for names in symbols if names]
        if not known and label_sets > 1:
            tensors[_EMBEDDINGS] = embeddings
            notes.append(
                f"The units of {label_sets} label sets lie in {_EMBEDDINGS}, and the file does not say how many each "
                "has, so it is kept as it is."
            )
        else:
            sizes = [len(names) for names in known] or [embeddings.shape[0]]
            if sum(sizes) != embeddings.shape[0] or min(sizes) <= len(SPECIALS):
                raise ConvertError(
                    f"{where}: {_EMBEDDINGS} has {embeddings.shape[0]} rows, the dictionaries {sizes} symbols; "
                    "they belong to different models"
                )
            if any(tuple(names[: len(SPECIALS)]) != SPECIALS for names in known):
                raise ConvertError(f"{where}: a dictionary does not begin with {', '.join(SPECIALS)}")
            special, units = _rows(sizes)
            tensors["label_specials"] = _taken(embeddings, special)
            tensors["label_embeddings"] = _taken(embeddings, units)
            if known:
                settings["dictionaries"] = [names[len(SPECIALS) :] for names in known]
                if any(names != [str(k) for k in range(len(names))] for names in settings["dictionaries"]):
                    notes.append(
                        "Units are in the order of the file's dictionaries, which is not 0, 1, 2, ...: row k of the "
                        "label embeddings is the unit that the dictionary names k-th."
                    )
    return Heads(tensors, settings, tuple(notes), found)


def label_symbols(loaded: Mapping[str, Any]) -> list[list[str] | None]:
    """The symbols of every label set, from fairseq's dictionaries or s3prl's lists."""
    state = loaded.get("task_state")
    found = loaded.get("dictionaries_symbols", state.get("dictionaries") if isinstance(state, dict) else None)
    symbols = []
    for dictionary in found if isinstance(found, list) else []:
        names = dictionary.get("symbols") if isinstance(dictionary, dict) else dictionary
        plain = isinstance(names, list) and all(isinstance(name, str) for name in names)
        symbols.append(names if plain else None)
    return symbols


def fill_heads(
    heads: Mapping[str, StoredTensor],
    *,
    model_type: str,
    width: int,
    channels: int,
    settings: Mapping[str, Any],
) -> Slots:
    """The pre-training heads of a checkpoint, with what fairseq's classes demand beside them made up (zeros).

    `width` of the Transformer, `channels` of the extractor. Raises ConvertError if heads contradict one another.
    """
    heads = dict(heads)
    side = {name: heads.pop(name) for name in list(heads) if name in _CTC}
    if model_type == "wav2vec2":
        slots = _contrastive_slots(heads, width=width, channels=channels)
    else:
        slots = _hubert_slots(heads, width=width, settings=settings)
    return slots._replace(side=side | heads)


def fill_ctc(heads: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Slots:
    """The CTC head, its blank first; everything else has no slot in a fine-tuned model."""
    ordered = blank_first(heads, settings)
    model = {theirs: ordered[ours] for ours, theirs in _CTC.items()}
    return Slots(model, {}, [None], (), {name: tensor for name, tensor in heads.items() if name not in _CTC})


def has_ctc(heads: Mapping[str, StoredTensor]) -> bool:
    """Whether a CTC head is whole."""
    return all(name in heads for name in _CTC)


def blank_row(heads: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> int:
    """The row of `lm_head` that is CTC's blank: transformers' pad_token_id. 0 without such a head.

    Raises ConvertError if there is no such row.
    """
    if not has_ctc(heads):
        return 0
    tuned = settings.get("fine_tuning")
    row, rows = tuned.get("pad_token_id", 0) if isinstance(tuned, Mapping) else 0, heads["lm_head.weight"].shape[0]
    if type(row) is not int or not 0 <= row < rows:
        raise ConvertError(
            f"lm_head has {rows} rows, but pad_token_id, which says which of them is CTC's blank, is {short(row)}: "
            "mend config.json"
        )
    return row


def blank_first(
    heads: Mapping[str, StoredTensor], settings: Mapping[str, Any], *, back: bool = False
) -> dict[str, StoredTensor]:
    """The heads with CTC's blank as row 0 of `lm_head`, where fairseq and torchaudio have it; `back`: the inverse.

    fairseq: `tasks/audio_finetuning.py` calls `<s>`, row 0, the blank, and `criterions/ctc.py` takes row 0 without
    such a word; torchaudio: `pipelines/_wav2vec2/utils.py` puts it before the labels. Other rows keep their order.
    """
    row = blank_row(heads, settings)
    if not row:
        return dict(heads)
    rows = heads["lm_head.weight"].shape[0]
    order = np.array([row, *range(row), *range(row + 1, rows)])
    order = np.argsort(order) if back else order
    return {**heads, **{name: _taken(heads[name], order) for name in _CTC}}


def blank_note(heads: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> list[str]:
    """A sentence on rows that `blank_first` moved."""
    if not (row := blank_row(heads, settings)):
        return []
    return [
        f"CTC's blank (pad_token_id {row} in transformers) is row 0 of the output here; the rows before it, 0 to "
        f"{row - 1}, became 1 to {row}, and the others stayed."
    ]


def require_widths(heads: Mapping[str, StoredTensor], cfg: EncoderConfig, *, where: str) -> None:
    """Raises ConvertError naming heads that do not fit on the encoder, or a bias that does not fit its weight."""
    problems = []
    inputs = {"final_proj": cfg.width, "project_hid": cfg.width, "lm_head": cfg.width}
    inputs["quantizer.weight_proj"] = cfg.extractor_channels[-1]
    for name, width in inputs.items():
        weight, bias = heads.get(f"{name}.weight"), heads.get(f"{name}.bias")
        if weight and (len(weight.shape) != 2 or weight.shape[1] != width):
            problems.append(f"{weight.key} {list(weight.shape)}, not [..., {width}]")
        elif weight and bias and bias.shape != weight.shape[:1]:
            problems.append(f"{bias.key} {list(bias.shape)}, not {list(weight.shape[:1])}")
    for name, dimensions in (("label_embeddings", 2), ("quantizer.codevectors", 3), ("project_q.weight", 2)):
        if name in heads and len(heads[name].shape) != dimensions:
            problems.append(f"{heads[name].key} {list(heads[name].shape)}, not of {dimensions} dimensions")
    if problems:
        raise ConvertError(f"{where}: heads of a wrong shape: {', '.join(problems)}. Is the file whole?")


def _hubert_slots(heads: dict[str, StoredTensor], *, width: int, settings: Mapping[str, Any]) -> Slots:
    """Takes its heads out of `heads`."""
    embeddings, whole = heads.pop("label_embeddings", None), heads.pop(_EMBEDDINGS, None)
    weight, bias = heads.pop("final_proj.weight", None), heads.pop("final_proj.bias", None)
    specials, made_up, symbols = heads.pop("label_specials", None), [], [None]
    if embeddings is not None:
        dictionaries = settings.get("dictionaries") or [[str(k) for k in range(embeddings.shape[0])]]
        sizes = [len(SPECIALS) + len(names) for names in dictionaries]
        special, units = _rows(sizes)
        if len(units) != embeddings.shape[0]:
            raise ConvertError(
                f"{embeddings.key} has {embeddings.shape[0]} units, the dictionaries name {len(units)}; mend settings"
            )
        dim = embeddings.shape[1]
        if specials is None:  # as fairseq draws them; they are negatives there, and nothing else
            made_up.append("label_specials")
            drawn = np.random.default_rng(0).uniform(size=(len(special), dim)).astype(np.float32)
            specials = StoredTensor.of("label_specials", drawn)
        if specials.shape != (len(special), dim):
            raise ConvertError(f"{specials.key} has the shape {list(specials.shape)}, not {[len(special), dim]}")
        whole = _woven(embeddings, units, specials, special)
        symbols = [[*SPECIALS, *names] for names in dictionaries]
    rows = len(symbols) if settings.get("untie_final_proj") else 1
    dim = whole.shape[1] if whole else (weight.shape[0] // rows if weight else 256)
    if weight is None:
        made_up.append("final_proj")
        weight = _zeros("final_proj.weight", dim * rows, width)
    if weight.shape != (dim * rows, width):
        raise ConvertError(
            f"{weight.key} has the shape {list(weight.shape)}, but {rows} projection(s) of {width} to the {dim} of the "
            "label embeddings need another; is untie_final_proj in settings right?"
        )
    model = {"final_proj.weight": weight, "final_proj.bias": bias or _zeros("final_proj.bias", weight.shape[0])}
    model |= {_EMBEDDINGS: whole} if whole else {}
    fields = {"final_dim": dim, "untie_final_proj": bool(settings.get("untie_final_proj", False))}
    return Slots(model, fields, symbols, tuple(made_up), {})


def _contrastive_slots(heads: dict[str, StoredTensor], *, width: int, channels: int) -> Slots:
    """Takes its heads out of `heads`."""
    model = {name: heads.pop(name) for name in list(heads) if name.startswith("quantizer.weight_proj.")}
    model |= {theirs: heads.pop(ours) for ours, theirs in _CONTRASTIVE.items() if ours in heads}
    codes, to, made_up = model.get("quantizer.vars"), model.get("project_q.weight"), []
    if (codes is None) != (not any(name.startswith("quantizer.weight_proj.") for name in model)):
        raise ConvertError(
            "the heads have half a quantizer: quantizer.codevectors and quantizer.weight_proj belong together"
        )
    shapes = [model[name].shape[0] for name in ("final_proj.weight", "project_q.weight") if name in model]
    dim = shapes[0] if shapes else width
    quantized = to.shape[1] if to else (2 * codes.shape[2] if codes else channels)  # two groups in all released models
    for ours, theirs, inputs in (("project_hid", "final_proj", width), ("project_q", "project_q", quantized)):
        if f"{theirs}.weight" not in model:
            made_up.append(ours)
            model |= {f"{theirs}.weight": _zeros(ours, dim, inputs), f"{theirs}.bias": _zeros(ours, dim)}
    fields: dict[str, Any] = {"final_dim": dim, "quantize_targets": codes is not None}
    if codes is not None:
        groups, rest = divmod(quantized, codes.shape[2])
        if rest or codes.shape[1] % groups:
            raise ConvertError(f"{codes.key} {list(codes.shape)} and {to.key} {list(to.shape)} do not fit each other")
        fields |= {"latent_groups": groups, "latent_vars": codes.shape[1] // groups, "latent_dim": quantized}
    return Slots(model, fields, [], tuple(made_up), {})


def _rows(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the special symbols and of the units, of label sets that have so many symbols each."""
    starts = np.cumsum([0, *sizes[:-1]])
    special = np.concatenate([start + np.arange(len(SPECIALS)) for start in starts])
    return special, np.setdiff1d(np.arange(sum(sizes)), special)


def _taken(tensor: StoredTensor, rows: np.ndarray) -> StoredTensor:
    return replace(tensor, shape=(len(rows), *tensor.shape[1:]), read=lambda: tensor.read()[rows])


def _woven(
    units: StoredTensor, unit_rows: np.ndarray, specials: StoredTensor, special_rows: np.ndarray
) -> StoredTensor:
    shape = (units.shape[0] + specials.shape[0], units.shape[1])

    def read() -> np.ndarray:
        array = np.empty(shape, np.float32)
        array[unit_rows], array[special_rows] = units.values(), specials.values()
        return array

    return replace(units, shape=shape, read=read)


def _zeros(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, shape, lambda: np.zeros(shape, np.float32))
