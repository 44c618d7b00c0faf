"""Every code of the named corpora leads to the language that ISO 639-3 calls as the corpus does.

languages.tsv holds what the corpora say of themselves (Common Voice's web/locales/en/pages/common.ftl, TFDS's list of
FLEURS, VoxLingua107's list, the LDC's and OpenSLR's titles), and ISO's own name where it spells it otherwise, looked up
by hand.
"""

import csv
from pathlib import Path

import pycountry
import pytest

from data_pipelines.corpora import babel, openslr, voxlingua107
from data_pipelines.languages import normalise

with open(Path(__file__).with_name("languages.tsv"), encoding="utf-8") as table:
    ROWS = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
COUNTS = {"common_voice": 252, "fleurs": 102, "voxlingua107": 107, "mls": 8, "babel": 25, "openslr": 28, "voxforge": 17}


def ours(corpus, code):
    if corpus == "babel":
        return babel.LANGUAGES[code]
    if corpus == "openslr":
        return openslr.RESOURCES[int(code)]
    if corpus == "voxlingua107":
        return voxlingua107.SPOKEN.get(code) or normalise(code)
    return normalise(code)


@pytest.mark.parametrize("corpus", COUNTS)
def test_every_code_of_a_corpus_is_the_language_that_it_names(corpus):
    rows = [row for row in ROWS if row["corpus"] == corpus]
    assert len(rows) == COUNTS[corpus]
    wrong = []
    for row in rows:
        code = ours(corpus, row["code"])
        official = pycountry.languages.get(alpha_3=code).name.split(" (")[0]
        if official.lower() != (row["iso_name"] or row["name"]).lower():
            wrong.append(f"{row['code']} ({row['name']}) is {code} ({official})")
    assert not wrong
    assert corpus != "babel" or len(rows) == len(babel.LANGUAGES)
    assert corpus != "openslr" or len(rows) == len(openslr.RESOURCES)
