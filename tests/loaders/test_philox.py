import numpy as np
import pytest

from fastssl.loaders.philox import below, philox, random_words, uniform

# The authors' known answers for philox4x32 with 10 rounds (Random123, kat_vectors): counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert tuple(int(w) for w in philox(numbers(counter), numbers(key))) == numbers(words)


def test_counters_broadcast():
    words = philox((np.arange(5)[:, None], 1, np.arange(3), 2**32 - 1), (7, 8))
    assert all(w.shape == (5, 3) for w in words)
    single = philox((4, 1, 2, 2**32 - 1), (7, 8))
    assert [int(w[4, 2]) for w in words] == [int(w) for w in single]


def test_every_argument_counts():
    base = dict(seed=1, purpose="view/a", sample=5, epoch=2, crop=3, block=4)
    changes = dict(seed=2, purpose="view/b", sample=6, epoch=3, crop=4, block=5)
    words = {tuple(int(w) for w in random_words(**{**base, key: value})) for key, value in changes.items()}
    words.add(tuple(int(w) for w in random_words(**base)))
    assert len(words) == 7


def test_below_and_uniform_stay_in_range():
    words = np.array([0, 2**31, 2**32 - 1], np.uint64)
    assert below(words, 1).tolist() == [0, 0, 0]
    assert below(words, 10).tolist() == [0, 5, 9]
    assert below(words, np.array([2**32, 3, 7])).tolist() == [0, 1, 6]
    values = uniform(words, -1, 3)
    assert values[0] == -1
    assert values[1] == 1
    assert values[2] < 3
