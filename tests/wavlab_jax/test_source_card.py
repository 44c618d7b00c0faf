"""What is carried over from the card beside a model, and what is not."""

import pytest
import yaml

from tests.wavlab_jax import tiny
from wavlab_jax.convert import from_encoder
from wavlab_jax.convert.card import model_card
from wavlab_jax.convert.source_card import SourceCard, read_source_card, table, table_rows

TRAINING = (
    {"stage": "wavlab_mk", "begins with": "random values", "hours": "1,000.50"},
    {"stage": "wavlab_ms", "begins with": "wavlab_mk", "hours": "32,000.00"},
)
DATA = ({"language": "Norwegian", "code": "no", "hours": "12.5"}, {"language": "Irish", "code": "gle", "hours": "3"})


@pytest.fixture(scope="module")
def checkpoint():
    return from_encoder(tiny.randomised(tiny.encoder()))


def front(text: str) -> dict:
    """The YAML of a card, by a reader that is not ours."""
    return yaml.safe_load(text.split("---\n")[1])


def test_a_published_card_is_carried_over(checkpoint, tmp_path):
    (tmp_path / "mHuBERT").mkdir()
    (tmp_path / "mHuBERT" / "README.md").write_text(
        "---\nlicense: cc-by-nc-sa-4.0\nlanguage:\n- no\n- en\ndatasets: [voxpopuli]\ntags:\n- speech\n- hubert-147\n"
        "model-index:\n- name: x\n  results: []\n---\n\n# A model\n"
    )
    source = read_source_card(tmp_path / "mHuBERT")
    assert source == SourceCard(
        "mHuBERT", "cc-by-nc-sa-4.0", languages=("no", "en"), datasets=("voxpopuli",), tags=("speech", "hubert-147")
    )
    assert read_source_card(tmp_path / "mHuBERT" / "pytorch_model.bin") == source  # beside a file too
    card = model_card(checkpoint, source=source)
    assert front(card).items() >= {
        "license": "cc-by-nc-sa-4.0",
        "language": ["no", "en"],  # Norwegian, which YAML would take for false
        "datasets": ["voxpopuli"],
        "tags": ["speech", "self-supervised", "hubert", "hubert-147"],
    }.items()  # fmt: skip
    assert "The weights: cc-by-nc-sa-4.0, as the card of `mHuBERT` says." in card and str(tmp_path) not in card
    assert "## Source card\n\nThe card of `mHuBERT`, which this was converted from, says: Licence" in card
    assert "the file does not say" not in card
    chosen = model_card(checkpoint, source=source, licence="mit")
    assert front(chosen)["license"] == "mit" and "The weights: mit." in chosen


def test_stages_and_hours_survive_two_conversions(checkpoint, tmp_path):
    sections = {"Training": f"Stages.\n\n{table(TRAINING)}\n\n`x` was imported.", "Data": table(DATA), "Note": "a | b"}
    card = model_card(checkpoint, sections=sections, languages=["nor", "gle"], licence="mit")
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        (folder / "README.md").write_text(card)
        source = read_source_card(folder)
        assert source.tables == {"Training": TRAINING, "Data": DATA}
        assert (source.licence, source.languages) == ("mit", ("nor", "gle"))
        card = model_card(checkpoint, source=source, in_transformers=False)
        assert "| wavlab_ms | wavlab_mk | 32,000.00 |" in card and "| Norwegian | no | 12.5 |" in card
    assert table(DATA).splitlines()[1] == "|---|---|---:|" and table_rows(table(DATA)) == DATA


@pytest.mark.parametrize(
    "text",
    [
        "# No front matter\n",
        "---\nlicense: [unclosed\n---\n",
        "---\n- license\n---\n",
        "---\nlicense: mit\n",  # does not end
        "---\na: &a [x, x]\nlicense: *a\n---\n",
        "---\n" + "[" * 50_000 + "\n---\n",
        "",
    ],
)
def test_cards_that_say_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert read_source_card(tmp_path) is None
    assert read_source_card(tmp_path / "nowhere" / "model.pt") is None


def test_what_is_not_plain_is_left_out(tmp_path):
    odd = {
        "license": "m" * 201,
        "language": ["en", {"a": 1}, "<script>", ["x"], "de\nfr", "`", "fr", "en"],
        "datasets": {"a": "b"},
        "tags": ["t" + str(i) for i in range(5000)],
        "wavlab_jax": {"tables": {"Data": ["x", {"code": "en", "<b>": "x", "hours": ["1"]}], "Empty": [], "No": 3}},
    }
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(odd)}---\n")
    found = read_source_card(tmp_path)
    assert (found.licence, found.languages, found.datasets) == ("", ("en", "fr"), ())
    assert len(found.tags) == 1000 and found.tables == {"Data": ({"code": "en", "hours": ""},)}
