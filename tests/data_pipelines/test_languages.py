import pickle

import pycountry
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.languages import UnknownLanguage, name_of, normalise


@pytest.mark.parametrize(
    ("given_as", "code"),
    [
        ("fra", "fra"),
        ("fr", "fra"),
        ("fre", "fra"),
        ("FR", "fra"),
        (" fr ", "fra"),
        ("fr-CA", "fra"),
        ("fr_FR.UTF-8", "fra"),
        ("French", "fra"),
        ("nn-NO", "nno"),
        ("ga-IE", "gle"),
        ("zh", "zho"),
        ("zh-CN", "cmn"),
        ("cmn_hans_cn", "cmn"),
        ("zh-Hant-HK", "yue"),
        ("zh_TW.UTF-8", "cmn"),
        ("zh-yue", "yue"),
        ("zh-Hans", "zho"),
        ("nan-tw", "nan"),
        ("Tok-Pisin", "tpi"),
        ("es_419", "spa"),
        ("rm-sursilv", "roh"),
        ("ger", "deu"),
        ("iw", "heb"),
        ("jw", "jav"),
        ("mo", "ron"),
        ("qaa", "qaa"),
        ("und", "und"),
        ("Low German", "nds"),
        ("Modern Greek", "ell"),
        ("Cantonese", "yue"),
        ("Punjabi", "pan"),
        ("Haitian Creole", "hat"),
        ("Haitian-Creole", "hat"),
        ("Kyrgyz", "kir"),
        ("Uyghur", "uig"),
    ],
)
def test_every_usual_spelling(given_as, code):
    assert normalise(given_as) == code


@pytest.mark.parametrize(
    ("wrong", "meant"), [("fraa", "fra"), ("frnch", "fra"), ("engl", "eng"), ("Portugese", "por"), ("swahilli", "swa")]
)
def test_unknown_names_the_nearest(wrong, meant):
    with pytest.raises(UnknownLanguage, match=repr(wrong)) as caught:
        normalise(wrong)
    assert any(meant in near for near in caught.value.nearest), caught.value.nearest
    assert pickle.loads(pickle.dumps(caught.value)).nearest == caught.value.nearest


@pytest.mark.parametrize("wrong", ["", " ", "-", "xx", "x", "123", "fr/ca", "../fr", "klingonish"])
def test_nonsense_is_refused(wrong):
    with pytest.raises(UnknownLanguage):
        normalise(wrong)


@given(st.sampled_from(list(pycountry.languages)))
def test_every_iso_639_3_code_is_itself_and_every_alpha_2_leads_to_it(language):
    assert normalise(language.alpha_3) == language.alpha_3
    if hasattr(language, "alpha_2"):
        assert normalise(language.alpha_2) == language.alpha_3
    if hasattr(language, "bibliographic"):
        assert normalise(language.bibliographic) == language.alpha_3


def test_names_for_people():
    assert name_of("nds") == "Low German"
    assert name_of("qab") == "qab"
