import hashlib
import math
import pickle
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from data_pipelines.crops import COVERING_EPOCHS, CropError
from data_pipelines.manifest import Manifest, Split, write_manifest
from data_pipelines.plan import make_plan
from data_pipelines.sampling import (
    ROW_PERIOD,
    STEP_PERIOD,
    Draw,
    DrawConfig,
    SamplingError,
)

LENGTHS = (16_000, 32_000, 64_000)
ROWS = (8, 4, 2)  # 8 s a step


def corpus(root, table, *, splits=None) -> Manifest:
    """A manifest without audio from rows of (language, corpus, samples)."""
    root.mkdir(exist_ok=True)
    write_manifest(
        root,
        samples=[samples for _, _, samples in table],
        language=[language for language, _, _ in table],
        corpus=[name for _, name, _ in table],
        id=[f"{language}-{name}-{place}" for place, (language, name, _) in enumerate(table)],
        split=splits,
    )
    return Manifest.load(root, check_shards=False)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory) -> Manifest:
    """4 languages, 7 leaves of language and corpus, sizes over a factor of 100, 1 to 11 s each; some held out."""
    rng = np.random.default_rng(0)
    sizes = {("aaa", "x"): 400, ("aaa", "y"): 90, ("bbb", "x"): 60, ("bbb", "y"): 50, ("bbb", "z"): 4}
    sizes |= {("ccc", "y"): 40, ("ddd", "z"): 5}
    table = [(*pair, int(n)) for pair, size in sizes.items() for n in rng.integers(16_000, 176_000, size)]
    splits = np.where(np.arange(len(table)) % 10 == 9, int(Split.DEV), int(Split.TRAIN))
    return corpus(tmp_path_factory.mktemp("skewed"), table, splits=splits)


def make(manifest, alpha=1.0, beta=1.0, *, lengths=LENGTHS, rows=ROWS, seed=3, split=Split.TRAIN) -> Draw:
    return Draw(manifest, lengths=lengths, rows=rows, cfg=DrawConfig(alpha, beta), split=split, seed=seed)


def pair(manifest, i) -> tuple[str, str]:
    return manifest.languages[manifest.language[i]], manifest.corpora[manifest.corpus[i]]


# --- the draw ---


def expected_shares(manifest, alpha, beta) -> dict:
    """The definition, over again and by brute force."""
    seconds = defaultdict(float)
    for i in manifest.rows(Split.TRAIN):
        seconds[pair(manifest, i)] += manifest.samples[i] / 16_000
    language_seconds = defaultdict(float)
    for (language, _), amount in seconds.items():
        language_seconds[language] += amount
    shares = {}
    for (language, name), amount in seconds.items():
        of_language = language_seconds[language] ** alpha / sum(s**alpha for s in language_seconds.values())
        inside = sum(s**beta for (other, _), s in seconds.items() if other == language)
        shares[language, name] = of_language * amount**beta / inside
    return shares


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 0.8), (0.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
def test_drawn_seconds_are_shared_as_declared(skewed, alpha, beta):
    """Counted over all lengths together: within 0.4 % of all seconds, for every language and corpus. (What is left is
    chance, inside the block that is not finished; the next test looks past it.)"""
    draw = make(skewed, alpha, beta)
    drawn = Counter()
    steps = 20 * STEP_PERIOD
    for k in range(steps):
        step = draw.step(k)
        for row in range(ROWS[step.length]):
            i = draw.draw(step.length, step.first_row + row).utterance
            assert skewed.split[i] == Split.TRAIN
            assert LENGTHS[step.length] <= skewed.samples[i]
            drawn[pair(skewed, i)] += LENGTHS[step.length] / 16_000
    expected = expected_shares(skewed, alpha, beta)
    assert set(drawn) == set(expected)
    total = sum(drawn.values())
    assert total == steps * 8
    for leaf, share in expected.items():
        assert drawn[leaf] / total == pytest.approx(share, abs=0.004), leaf
    for share in draw.shares(steps=steps):
        assert share.drawn == pytest.approx(expected[share.language, share.corpus])


def test_corpora_may_come_first(skewed):
    """XLS-R's order, by the definition: p(corpus) ~ s ** beta, then p(language | corpus) ~ s ** alpha."""
    alpha, beta = 0.5, 0.25
    seconds = Counter()
    for i in skewed.rows(Split.TRAIN):
        seconds[pair(skewed, i)] += skewed.samples[i] / 16_000
    corpora = Counter()
    for (_, name), amount in seconds.items():
        corpora[name] += amount
    cfg = DrawConfig(alpha, beta, first="corpus")
    found = Draw(skewed, lengths=LENGTHS, rows=ROWS, cfg=cfg, seed=3).shares()
    assert len(found) == len(seconds)
    for share in found:
        of_corpus = corpora[share.corpus] ** beta / sum(s**beta for s in corpora.values())
        inside = sum(s**alpha for (_, name), s in seconds.items() if name == share.corpus)
        expected = of_corpus * seconds[share.language, share.corpus] ** alpha / inside
        assert share.drawn == pytest.approx(expected)


def test_only_the_declared_corpora_are_drawn(skewed):
    draw = Draw(skewed, lengths=LENGTHS, rows=ROWS, cfg=DrawConfig(corpora=("z", "y")), seed=3)
    assert {(s.language, s.corpus) for s in draw.shares()} == {
        ("aaa", "y"), ("bbb", "y"), ("bbb", "z"), ("ccc", "y"), ("ddd", "z")
    }  # fmt: skip
    for row in range(300):
        drawn = draw.draw(0, row).utterance
        assert pair(skewed, drawn)[1] in "yz"
        assert pair(skewed, draw.partner(0, row))[1] in "yz"
    with pytest.raises(SamplingError, match="names the corpora w, which were not prepared here; there are x, y, z"):
        Draw(skewed, lengths=LENGTHS, rows=ROWS, cfg=DrawConfig(corpora=("x", "w")))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 0.8), (0.0, 0.0)])
def test_drawn_seconds_converge_to_what_is_declared(skewed, alpha, beta):
    """After a million periods: within 1e-6 of all the drawn seconds."""
    draw = make(skewed, alpha, beta)
    steps = draw._step_quotas.given(10**6)
    drawn = Counter()
    for place, steps_of_length in zip(draw._step_lengths, steps.tolist(), strict=True):
        here = draw._of_length[place]
        for leaf, share in zip(here.pairs.tolist(), here.quotas.shares.tolist(), strict=True):
            drawn[draw._names[leaf]] += steps_of_length * ROWS[place] * share * LENGTHS[place]
    total = math.fsum(drawn.values())
    for leaf, share in expected_shares(skewed, alpha, beta).items():
        assert drawn[leaf] / total == pytest.approx(share, abs=1e-6), leaf


def test_shares_hold_when_steps_of_different_lengths_differ_in_seconds(tmp_path):
    """Whole rows make steps of 0.9 s and 1.0 s here; the draw makes up for it, so the seconds are as declared still."""
    table = [("aaa", "x", 9600)] * 20 + [("bbb", "x", 16_000)] * 12  # 12 s each, one length each
    manifest = corpus(tmp_path, table)
    draw = make(manifest, lengths=(9600, 16_000), rows=(3, 2))  # 1.8 s and 2 s
    steps = Counter(draw.step(k).length for k in range(19 * STEP_PERIOD))
    assert steps[0] * 1.8 / (steps[0] * 1.8 + steps[1] * 2.0) == pytest.approx(0.5, abs=1e-3)
    assert draw.seconds_per_step == pytest.approx(2 / (1 / 1.8 + 1 / 2.0))


def test_every_period_is_within_one_draw_of_every_quota(skewed):
    draw = make(skewed, 0.5, 0.5)
    for place, length in enumerate(LENGTHS):
        weights = {}
        for leaf, share in expected_shares(skewed, 0.5, 0.5).items():
            slot_seconds = Counter()
            for i in skewed.rows(Split.TRAIN):
                if pair(skewed, i) == leaf:
                    fills = max(n for n in LENGTHS if n <= skewed.samples[i])
                    slot_seconds[fills] += skewed.samples[i] // fills * fills
            if slot_seconds[length]:
                weights[leaf] = share * slot_seconds[length] / slot_seconds.total()
        total = sum(weights.values())
        for period in (0, 1, 2, 10**6):
            rows = draw.take(place, period * ROW_PERIOD, ROW_PERIOD)
            counts = Counter(pair(skewed, i) for i in rows.utterance)
            assert set(counts) == set(weights)
            for leaf, weight in weights.items():
                assert abs(counts[leaf] - weight / total * ROW_PERIOD) <= 1


def test_every_crop_comes_once_an_epoch_and_none_is_left_out(skewed):
    draw = make(skewed, 0.3, 0.7)
    for place, length in enumerate(LENGTHS):
        epochs = defaultdict(Counter)
        for row in range(ROW_PERIOD):
            drawn = draw.draw(place, row)
            epochs[pair(skewed, drawn.utterance), drawn.epoch][drawn.utterance, drawn.slot] += 1
        slots = defaultdict(set)
        for i in skewed.rows(Split.TRAIN):
            if max(n for n in LENGTHS if n <= skewed.samples[i]) == length:
                slots[pair(skewed, i)] |= {(int(i), slot) for slot in range(skewed.samples[i] // length)}
        assert {leaf for leaf, _ in epochs} == set(slots)
        for leaf, all_slots in slots.items():
            last = max(epoch for other, epoch in epochs if other == leaf)
            assert last >= 1, "the test must see more than one epoch"
            for epoch in range(last + 1):
                seen = epochs[leaf, epoch]
                assert set(seen.values()) == {1}
                assert set(seen) == all_slots if epoch < last else set(seen) <= all_slots


def in_leaf_order(draw, place, rows, of=lambda utterance: True) -> list:
    """What a leaf gives in the first rows, in the order in which the leaf counts (which rows are shuffled over)."""
    given = {}
    for row in range(rows):
        drawn = draw.draw(place, row)
        if of(drawn.utterance):
            period, inside = divmod(row, ROW_PERIOD)
            given[draw._of_length[place].quotas.dealt(period).index[inside]] = drawn
    return [given[n] for n in range(len(given))]


def test_epochs_are_in_different_orders(tmp_path):
    manifest = corpus(tmp_path, [("aaa", "x", 20_000)] * 64)
    draw = make(manifest, lengths=(16_000,), rows=(1,))
    given = in_leaf_order(draw, 0, ROW_PERIOD)
    orders = {tuple(drawn.utterance for drawn in given[epoch * 64 : (epoch + 1) * 64]) for epoch in range(64)}
    assert len(orders) == 64
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_steps_have_consecutive_rows_and_their_lengths_shares(skewed):
    draw = make(skewed)
    steps = [draw.step(k) for k in range(4 * STEP_PERIOD)]
    for place in range(len(LENGTHS)):
        firsts = sorted(step.first_row for step in steps if step.length == place)
        assert firsts == [k * ROWS[place] for k in range(len(firsts))]
        assert abs(len(firsts) - draw.length_shares[place] * len(steps)) <= 2
    assert sum(draw.length_shares) == pytest.approx(1)
    assert max(len(set(steps[k : k + 20])) for k in range(100)) == 20


@pytest.mark.parametrize("hosts", [2, 4])
def test_no_host_misses_a_leaf(tmp_path, hosts):
    """Equal leaves and a power of two of hosts: without the shuffle, host h would hear leaf h only."""
    table = [(language, name, 16_000) for language in "abcd" for name in "xy" for _ in range(40)]
    manifest = corpus(tmp_path, table)
    rows = 8
    draw = make(manifest, lengths=(16_000,), rows=(rows,))
    heard = [Counter() for _ in range(hosts)]
    for k in range(2 * STEP_PERIOD):
        step = draw.step(k)
        for row in range(rows):
            heard[row * hosts // rows][pair(manifest, draw.draw(0, step.first_row + row).utterance)] += 1
    for counts in heard:
        expected = 2 * STEP_PERIOD * rows / hosts / 8
        assert len(counts) == 8
        assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


def test_the_draw_has_no_state_and_pickles_small(skewed):
    draw, again = make(skewed), make(skewed)
    rows = list(range(0, 3 * ROW_PERIOD, 131))
    forward = [draw.draw(1, row) for row in rows]
    assert forward == [again.draw(1, row) for row in reversed(rows)][::-1]
    packed = pickle.dumps(draw)
    assert len(packed) < 2000
    restored = pickle.loads(packed)
    assert forward == [restored.draw(1, row) for row in rows]
    assert [draw.step(k) for k in range(99)] == [restored.step(k) for k in range(99)]


def test_seeds_differ(skewed):
    rows = range(0, 200)
    first, second = make(skewed, seed=3), make(skewed, seed=4)
    assert [first.draw(0, r) for r in rows] != [second.draw(0, r) for r in rows]
    assert [first.step(k) for k in rows] != [second.step(k) for k in rows]


def test_another_language_does_not_reorder_a_leaf(tmp_path, skewed):
    alone = [("ccc", "y", int(skewed.samples[i])) for i in skewed.rows() if pair(skewed, i) == ("ccc", "y")]
    small = corpus(tmp_path / "small", alone)
    large = corpus(tmp_path / "large", [*alone, *[("abc", "x", 90_000)] * 30])

    def order(manifest):
        draw = make(manifest, rows=(1, 1, 1))
        given = in_leaf_order(draw, 2, ROW_PERIOD, of=lambda i: pair(manifest, i) == ("ccc", "y"))
        return [(manifest.id(drawn.utterance), *drawn[1:]) for drawn in given[:100]]

    assert order(small) == order(large)


def test_the_order_is_pinned(tmp_path):
    """A run that is resumed after an update must go on with the same data: this digest may only change on purpose."""
    table = [(language, "x", 16_000 * n) for language in "abc" for n in (1, 2, 3, 5, 9)]
    draw = make(corpus(tmp_path, table), 0.5, 0.5, rows=(2, 2, 2))
    drawn = []
    for k in range(300):
        step = draw.step(k)
        drawn += [*step, *draw.draw(step.length, step.first_row), *draw.draw(step.length, step.first_row + 1)]
    assert hashlib.sha256(np.array(drawn, "<i8").tobytes()).hexdigest()[:16] == "20b149ddae8c4b51"


def test_a_stretch_of_rows_is_its_rows(skewed):
    """Over the ends of periods too, and whatever was asked before."""
    draw, other = make(skewed, 0.5, 0.5), make(skewed, 0.5, 0.5)
    for first, count in ((ROW_PERIOD - 3, 7), (5, 2 * ROW_PERIOD), (0, 1), (10**9, 40)):
        taken = draw.take(1, first, count)
        rows = list(range(first, first + count))[:: max(1, count // 50)]
        for row in reversed(rows):
            assert other.draw(1, row) == tuple(int(each[row - first]) for each in taken)


# --- caps, subsets, what is counted ---


def test_a_subset_is_a_fixed_choice_of_its_hours(skewed):
    cfg = DrawConfig(1.0, 0.5, subset_hours=0.05)  # 180 s of a language
    heard = []
    for seed in (1, 2):
        draw = Draw(skewed, lengths=LENGTHS, rows=ROWS, cfg=cfg, seed=seed)
        heard.append({int(i) for place in range(3) for i in draw.take(place, 0, 2 * ROW_PERIOD).utterance})
    assert heard[0] == heard[1]
    seconds, found = Counter(), Counter()
    for i in skewed.rows(Split.TRAIN):
        seconds[pair(skewed, i)[0]] += skewed.samples[i] / 16_000
    for i in heard[0]:
        found[pair(skewed, i)[0]] += skewed.samples[i] / 16_000
    for language, amount in seconds.items():
        # cut to the utterance at which each of its corpora has its part
        assert min(180, amount) - 1e-6 <= found[language] <= min(amount, 180 + 3 * 11)
    assert {s.language: s.hours for s in make(skewed).shares()} != {s.language: s.hours for s in draw.shares()}


def test_utterances_may_be_counted(skewed):
    """mHuBERT-147's rule: of the drawn rows a language has (n_l / N) ** 0.7, n its utterances, at any lengths."""
    cfg = DrawConfig(0.7, 0.9, counted="utterances")
    draw = Draw(skewed, lengths=LENGTHS, rows=ROWS, cfg=cfg, seed=3)
    rows = Counter()
    for place in range(len(LENGTHS)):
        here = draw._of_length[place]
        for leaf, share in zip(here.pairs.tolist(), here.quotas.shares.tolist(), strict=True):
            rows[draw._names[leaf][0]] += draw.length_shares[place] * ROWS[place] * share
    n = Counter(pair(skewed, i)[0] for i in skewed.rows(Split.TRAIN))
    p = {language: (count / n.total()) ** 0.7 for language, count in n.items()}
    total = math.fsum(rows.values())
    assert {language: count / total for language, count in rows.items()} == pytest.approx(
        {language: value / sum(p.values()) for language, value in p.items()}
    )


# --- every second is heard ---


def test_every_hop_of_every_utterance_is_heard_in_any_four_epochs(tmp_path):
    """Brute force over utterances of one and of many slots, lengths that are whole hops and that are not."""
    rng = np.random.default_rng(0)
    table = [("aaa", "x", int(n)) for n in [*rng.integers(16_000, 200_000, 40), 16_000, 32_000, 48_100, 47_999]]
    manifest = corpus(tmp_path, table)
    draw = make(manifest, lengths=(16_000, 30_100), rows=(1, 1))
    for place, length in enumerate(draw.lengths):
        of_epoch = defaultdict(lambda: defaultdict(list))
        for i, epoch, _, start in zip(*draw.take(place, 0, 3 * ROW_PERIOD), strict=True):
            of_epoch[int(i)][int(epoch)].append(int(start))
        whole = min(max(epochs) for epochs in of_epoch.values()) - 1
        assert whole >= 20
        for i, epochs in of_epoch.items():
            samples = int(manifest.samples[i])
            for first in range(whole - COVERING_EPOCHS):
                heard = np.zeros(samples, bool)
                for epoch in range(first, first + COVERING_EPOCHS):
                    for start in epochs[epoch]:
                        assert start % 320 == 0 and start + length <= samples
                        heard[start : start + length] = True
                reach = (samples - length) // 320 * 320 + length
                assert samples - reach < 320 and heard[:reach].all()
            assert samples < length + 1600 or len({tuple(sorted(starts)) for starts in epochs.values()}) > 3


def test_when_all_was_heard_is_told(tmp_path):
    """Drawn that long, every hop of every language was heard; and the larger language needs longer."""
    rng = np.random.default_rng(1)
    table = [("aaa", "x", int(n)) for n in rng.integers(16_000, 90_000, 60)]
    table += [("bbb", "x", int(n)) for n in rng.integers(16_000, 90_000, 9)]
    manifest = corpus(tmp_path, table)
    draw = make(manifest, 0.0, 0.0, lengths=(16_000, 32_000), rows=(4, 2))
    needed = draw.steps_to_hear_all()
    assert needed["aaa"] >= needed["bbb"]
    crops = [16_000 if n < 32_000 else 32_000 for n in manifest.samples.tolist()]
    heard = [np.zeros((n - c) // 320 * 320 + c, bool) for n, c in zip(manifest.samples.tolist(), crops, strict=True)]
    for k in range(max(needed.values())):
        step = draw.step(k)
        for i, _, _, start in zip(*draw.take(step.length, step.first_row, draw.rows[step.length]), strict=True):
            heard[i][start : start + draw.lengths[step.length]] = True
    assert all(each.all() for each in heard)


# --- the kept plan ---


def test_a_kept_plan_is_the_made_one_and_is_made_again_when_it_is_not_sound(skewed, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.plan.KEPT_FROM", 0)
    manifest = corpus(tmp_path / "kept", [("aaa", "x", 16_000 * n) for n in (1, 2, 3, 9)] * 20)
    first = make(manifest)
    (path,) = (tmp_path / "kept" / "plans").iterdir()
    whole = path.read_bytes()
    made = []
    monkeypatch.setattr("data_pipelines.plan.make_plan", lambda *a, **k: made.append(1) or make_plan(*a, **k))
    expected = [first.draw(2, row) for row in range(99)]
    again = make(manifest)
    assert [again.draw(2, row) for row in range(99)] == expected and not made
    for damaged in (whole[:-1], whole[:50], b"", whole[:-3] + b"\1" + whole[-2:], b"x" + whole[1:]):
        path.write_bytes(damaged)
        made.clear()
        again = make(manifest)
        assert [again.draw(2, row) for row in range(99)] == expected
        assert made and path.read_bytes() == whole
    make(manifest, 0.5)  # another draw has another plan
    assert len(list(path.parent.iterdir())) == 2
    again = corpus(tmp_path / "kept", [("aaa", "x", 64_000)] * 9)  # another corpus in the same place
    assert make(again).draw(2, 0).utterance < 9
    assert len(list(path.parent.iterdir())) == 1


def test_a_plan_that_cannot_be_kept_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.plan.KEPT_FROM", 0)
    manifest = corpus(tmp_path, [("aaa", "x", 64_000)] * 9)
    (tmp_path / "plans").write_text("in the way")
    assert make(manifest).draw(2, 0).utterance < 9


# --- partners ---


def test_partners_are_others_with_the_same_shares(skewed):
    draw = make(skewed, 0.0, 0.0)
    drawn = draw.take(2, 0, ROW_PERIOD).utterance
    found = draw.partners(2, 0, ROW_PERIOD)
    assert (found != drawn).all()
    assert (skewed.samples[found] >= 64_000).all() and (skewed.split[found] == Split.TRAIN).all()
    partners, direct = (Counter(pair(skewed, i) for i in each) for each in (found, drawn))
    for leaf, count in direct.items():
        assert partners[leaf] / ROW_PERIOD == pytest.approx(count / ROW_PERIOD, abs=0.04)
    assert np.mean(found == draw.partners(2, 0, ROW_PERIOD, voice=1)) < 0.1
    assert np.mean(found == draw.partners(2, ROW_PERIOD, ROW_PERIOD)) < 0.1
    for row in (0, 77, ROW_PERIOD - 1):  # alone as in company
        assert draw.partner(2, row) == found[row] == draw.partners(2, row, 1)[0]


def test_partner_of_an_utterance_that_is_nearly_all_there_is(tmp_path):
    manifest = corpus(tmp_path, [("aaa", "x", 16_000 * 5000)] + [("aaa", "x", 16_000)] * 2)
    draw = make(manifest, lengths=(16_000,), rows=(1,))
    drawn, found = draw.take(0, 0, 400).utterance, draw.partners(0, 0, 400)
    assert (found != drawn).all() and set(found[drawn == 0].tolist()) == {1, 2}


def test_an_utterance_alone_has_no_partner(tmp_path):
    draw = make(corpus(tmp_path, [("aaa", "x", 16_000)]), lengths=(16_000,), rows=(1,))
    assert draw.partner(0, 0) is None


def test_the_table_of_shares(tmp_path):
    manifest = corpus(tmp_path, [("aaa", "x", 64_000)] * 3 + [("bbb", "y", 64_000)])
    first, second = make(manifest, 0.0, 0.0, lengths=(64_000,), rows=(2,)).shares(steps=4)
    assert first == ("aaa", "x", pytest.approx(12 / 3600), 0.75, 0.5, pytest.approx(16 / 12))
    assert second == ("bbb", "y", pytest.approx(4 / 3600), 0.25, 0.5, pytest.approx(16 / 4))


# --- what cannot be drawn ---


def test_a_leaf_without_training_audio_is_absent(tmp_path):
    manifest = corpus(
        tmp_path, [("aaa", "x", 64_000)] * 4 + [("bbb", "x", 64_000)] * 4, splits=[0, 0, 0, 0, 1, 1, 2, 2]
    )
    draw = make(manifest, 0.0, 0.0, lengths=(64_000,), rows=(2,))
    assert [(s.language, s.drawn) for s in draw.shares()] == [("aaa", 1.0)]
    assert {draw.draw(0, row).utterance for row in range(50)} == {0, 1, 2, 3}


def test_a_length_that_nothing_fills_never_comes(tmp_path):
    draw = make(corpus(tmp_path, [("aaa", "x", 64_000)] * 4))
    assert {draw.step(k).length for k in range(50)} == {2}
    assert draw.length_shares == (0, 0, 1)
    with pytest.raises(SamplingError, match="no utterance has static length 16000"):
        draw.draw(0, 0)


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(SamplingError, match="no DEV utterances"):
        make(corpus(tmp_path, [("aaa", "x", 64_000)]), split=Split.DEV)


def test_a_corpus_too_small_for_a_step_is_refused_with_the_remedy(tmp_path):
    manifest = corpus(tmp_path, [("aaa", "x", 20_000)] * 7 + [("aaa", "x", 64_000)] * 9)
    with pytest.raises(SamplingError, match=r"length 16000 \(1 s\) takes 8 rows, but only 7 .*seconds_per_step"):
        make(manifest)


def test_too_short_an_utterance_is_named(tmp_path):
    with pytest.raises(CropError, match="aaa/x utterance aaa-x-1 has 15999 samples"):
        make(corpus(tmp_path, [("aaa", "x", 64_000), ("aaa", "x", 15_999)]))


def test_rows_must_match_lengths(tmp_path):
    manifest = corpus(tmp_path, [("aaa", "x", 64_000)])
    for rows in ((1, 1), (1, 0, 1)):
        with pytest.raises(SamplingError, match="one for each of the lengths"):
            make(manifest, rows=rows)


def test_four_thousand_leaves_are_drawn_from_as_well(tmp_path):
    """As many as a large crawl has; every leaf is reached, in proportion."""
    table = [(f"l{n:04d}", "x", 16_000) for n in range(4000) for _ in range(1 + n % 3)]
    draw = make(corpus(tmp_path, table), 0.0, 0.0, lengths=(16_000,), rows=(4,))
    counts = Counter(draw.draw(0, row).utterance for row in range(2 * ROW_PERIOD))
    languages = Counter()
    for i, count in counts.items():
        languages[table[i][0]] += count
    assert len(languages) == 4000 and max(languages.values()) <= 4
    assert all(later >= earlier for earlier, later in pairwise(sorted(languages.values())))


def test_caps_and_floors_are_counted_in_what_is_drawn(skewed):
    """Hours of a language are clipped, by brute force; then the draw is counted over whole periods of all lengths."""
    hours = Counter()
    for i in skewed.rows(Split.TRAIN):
        hours[pair(skewed, i)[0]] += skewed.samples[i] / 16_000 / 3600
    cfg = DrawConfig(0.8, 1.0, cap_hours=0.1, floor_hours=0.05)
    draw = Draw(skewed, lengths=LENGTHS, rows=ROWS, cfg=cfg, seed=3)
    drawn = Counter()
    for place, length in enumerate(LENGTHS):
        languages = Counter(pair(skewed, i)[0] for i in draw.take(place, 0, 8 * ROW_PERIOD).utterance)
        for language, count in languages.items():
            drawn[language] += count / (8 * ROW_PERIOD) * draw.length_shares[place] * ROWS[place] * length
    counted = {language: min(max(amount, 0.05), 0.1) ** 0.8 for language, amount in hours.items()}
    assert min(hours.values()) < 0.05 and max(hours.values()) > 0.1
    for language, amount in counted.items():
        assert drawn[language] / drawn.total() == pytest.approx(amount / sum(counted.values()), abs=1e-3)
