"""The model card: a README in Markdown that travels with the weights: what they are, and where they come from."""

from collections.abc import Mapping, Sequence

import yaml

from data_pipelines.batch import SAMPLE_RATE
from wavlab_jax.convert.checkpoint import HEADS, Checkpoint
from wavlab_jax.convert.settings import task_of
from wavlab_jax.convert.source_card import OURS, Rows, SourceCard, table, table_rows

KINDS = {"hubert": "HuBERT", "wavlm": "WavLM", "wav2vec2": "wav2vec 2.0"}

_PAPERS = {
    "hubert": ("hsu2021hubert", "HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden "
               "Units", "Hsu, Wei-Ning and Bolte, Benjamin and Tsai, Yao-Hung Hubert and Lakhotia, Kushal and "
               "Salakhutdinov, Ruslan and Mohamed, Abdelrahman", "2021", "2106.07447"),
    "wavlm": ("chen2022wavlm", "WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing",
              "Chen, Sanyuan and others", "2021", "2110.13900"),
    "wav2vec2": ("baevski2020wav2vec", "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech "
                 "Representations",
                 "Baevski, Alexei and Zhou, Henry and Mohamed, Abdelrahman and Auli, Michael", "2020", "2006.11477"),
    "wavlablm": ("chen2023joint", "Joint Prediction and Denoising for Large-scale Multilingual Self-supervised "
                 "Learning",
                 "Chen, William and Shi, Jiatong and Yan, Brian and Berrebbi, Dan and Zhang, Wangyou and Peng, "
                 "Yifan and Chang, Xuankai and Maiti, Soumi and Watanabe, Shinji", "2023", "2309.15317"),
}  # fmt: skip


def citation(*names: str) -> str:
    """BibTeX of papers: "hubert", "wavlm", "wav2vec2", "wavlablm"."""
    entries = []
    for name in names:
        key, title, author, year, number = _PAPERS[name]
        entries.append(
            f"@article{{{key},\n  title = {{{title}}},\n  author = {{{author}}},\n  year = {{{year}}},\n"
            f"  journal = {{arXiv preprint arXiv:{number}}}\n}}"
        )
    return "\n\n".join(entries)


def model_card(
    checkpoint: Checkpoint,
    *,
    notes: Sequence[str] = (),
    head_file: str | None = None,
    title: str | None = None,
    sections: Mapping[str, str] | None = None,
    papers: Sequence[str] = (),
    licence: str | None = None,
    languages: Sequence[str] = (),
    source: SourceCard | None = None,
    in_transformers: bool = True,
) -> str:
    """The card's text.

    Args:
        checkpoint: what it is of.
        notes: of the layout, where numbers may differ from the encoder's.
        head_file: where heads without a place in the model lie.
        title: of the card; by default kind and size.
        sections: heading -> Markdown, of where the model comes from: stages, data. By default what the checkpoint says.
        papers: to cite beside that of the model's kind.
        licence: of the weights, as Hugging Face spells it ("cc-by-4.0"); by default the source's.
        languages: ISO 639 codes of the training data; by default the source's.
        source: the card of the model that this one was converted from, which is carried over.
        in_transformers: whether the folder loads there.
    """
    cfg, kind = checkpoint.encoder, KINDS[checkpoint.model_type]
    parameters, what = checkpoint.parameters(), "recogniser" if "tokenizer" in checkpoint.settings else "encoder"
    source = source or SourceCard("")
    sections = dict(sections if sections is not None else origin(checkpoint, source)) | _carried(source)
    tables = {heading: rows for heading, text in sections.items() if (rows := table_rows(text))}
    lines = [
        "---",
        _front(
            checkpoint.model_type,
            licence,
            languages,
            source,
            tables,
            in_transformers=in_transformers,
            recognises="tokenizer" in checkpoint.settings,
        ),
        "---",
        "",
        f"# {title or f'{kind} {what}, {parameters / 1e6:.1f} M parameters'}",
        "",
        f"{kind}: {cfg.layers} layers, width {cfg.width}, {cfg.heads} heads, {parameters:,} parameters; {SAMPLE_RATE} "
        "Hz mono in, one hidden state every 20 ms out. "
        + ("Waveforms are normalised to zero mean and unit variance." if cfg.normalize_waveform else
           "Waveforms are taken as they are."),
        "",
    ]  # fmt: skip
    task = task_of(checkpoint.model_type, {name: tensor.shape for name, tensor in checkpoint.heads.items()})
    if in_transformers:
        use = _USE_CTC if "tokenizer" in checkpoint.settings else _USE
        lines += [line.replace("AutoModel", task.auto_class) for line in use]
    for heading, text in sections.items():
        lines += [f"## {heading}", "", text.strip(), ""]
    lines += [
        "## Layers",
        "",
        f"`hidden_states` has {cfg.layers + 1} entries: 0 is the input of the first Transformer layer, n the output of "
        f"layer n, {cfg.layers} the last" + (", after the final LayerNorm." if cfg.pre_norm else ".")
        + " Other toolkits count otherwise.",
        "",
    ]  # fmt: skip
    if notes:
        lines += ["## Before you compare numbers", "", *(f"- {note}" for note in notes), ""]
    if checkpoint.heads:
        lines += ["## Heads", "", *(f"- `{name}` {_head(checkpoint, name)}" for name in sorted(checkpoint.heads)), ""]
        if head_file and (not in_transformers or checkpoint.heads.keys() - task.heads):
            lines += [f"Those that the model's own file has no place for lie in `{head_file}`.", ""]
    lines += [
        "## Licence",
        "",
        _licence(licence, source),
        "",
        "## Citation",
        "",
        "```bibtex",
        citation(*dict.fromkeys((checkpoint.model_type, *papers))),
        "```",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def origin(checkpoint: Checkpoint, source: SourceCard) -> dict[str, str]:
    """The section of a model that was not trained here: what is known of where it comes from."""
    if checkpoint.layout == "wavlab_jax":
        return {"Origin": "Trained with WavLab-JAX."}
    said = [f"Converted by WavLab-JAX from a checkpoint in the {checkpoint.layout} layout, without changing a value."]
    for name, text in (("label_rate", "Labels a second"), ("temperature", "Temperature of the logits")):
        if isinstance(checkpoint.settings.get(name), int | float):
            said.append(f"{text}: {checkpoint.settings[name]:g}.")
    known = source.languages or source.datasets or source.tables
    said += [*checkpoint.notes, *([] if known else ["What it was trained on, the file does not say."])]
    return {"Origin": " ".join(said)}


def _front(
    model_type: str,
    licence: str | None,
    languages: Sequence[str],
    source: SourceCard,
    tables: Mapping[str, Rows],
    *,
    in_transformers: bool,
    recognises: bool,
) -> str:
    """The YAML that Hugging Face's hub reads, and our tables for the next conversion."""
    named = {"license_name": source.licence_name, "license_link": source.licence_link} if not licence else {}
    entries = {
        "library_name": "transformers" if in_transformers else None,
        "license": licence or source.licence,
        **named,
        "language": list(languages or source.languages),
        "datasets": list(source.datasets),
        "pipeline_tag": "automatic-speech-recognition" if recognises else "feature-extraction",
        "tags": list(dict.fromkeys(("speech", "self-supervised", model_type, *source.tags))),
        OURS: {"tables": {heading: [dict(row) for row in rows] for heading, rows in tables.items()}}
        if tables
        else None,
    }
    said = {name: value for name, value in entries.items() if value}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, default_flow_style=None, width=1000).rstrip()


def _carried(source: SourceCard) -> dict[str, str]:
    """Sections of what the source's card said."""
    said = [
        f"{title}: {', '.join(values)}."
        for title, values in (
            ("Licence", [part for part in (source.licence, source.licence_name, source.licence_link) if part]),
            ("Languages", source.languages),
            ("Datasets", source.datasets),
        )
        if values
    ]
    if not said and not source.tables:
        return {}
    said += [f"Its tables: {', '.join(source.tables)}, below."] if source.tables else []
    quoted = f"The card of `{source.name}`, which this was converted from, says: {' '.join(said)}"
    return {"Source card": quoted} | {heading: table(rows) for heading, rows in source.tables.items()}


def _licence(licence: str | None, source: SourceCard) -> str:
    if licence:
        return f"The weights: {licence}."
    if source.licence:
        return f"The weights: {source.licence}, as the card of `{source.name}` says."
    return (
        "None has been chosen for these weights. It must respect those of the data that they were trained on; name it "
        "above as `license:` before you publish them."
    )


def _head(checkpoint: Checkpoint, name: str) -> str:
    said = HEADS.get(name, "")
    return f"{list(checkpoint.heads[name].shape)}" + (f": {said}" if said else "")


_USE = [
    "```python",
    "from transformers import AutoFeatureExtractor, AutoModel",
    "",
    'extractor = AutoFeatureExtractor.from_pretrained("FOLDER")',
    'model = AutoModel.from_pretrained("FOLDER").eval()',
    f'inputs = extractor(waveform, sampling_rate={SAMPLE_RATE}, return_tensors="pt")',
    "hidden = model(**inputs, output_hidden_states=True).hidden_states",
    "```",
    "",
]
_USE_CTC = [
    "```python",
    "from transformers import AutoModel, AutoProcessor",
    "",
    'processor = AutoProcessor.from_pretrained("FOLDER")',
    'model = AutoModel.from_pretrained("FOLDER").eval()',
    f'inputs = processor(waveform, sampling_rate={SAMPLE_RATE}, return_tensors="pt")',
    "text = processor.batch_decode(model(**inputs).logits.argmax(-1))[0]",
    "```",
    "",
]
