import threading
import time
import traceback

import pytest

from fastssl.loaders.ahead import Ahead, read_ahead


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("fastssl-loader")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert loader_threads() == []


def squares(position):
    box = [0]

    def piece():
        time.sleep(0.001 * (position % 3))
        box[0] = position**2

    return box, [piece]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("prefetch", [1, 3, 50])
def test_items_come_finished_and_in_order(workers, prefetch):
    assert [box[0] for box in Ahead(workers, prefetch).run(squares, range(20))] == [i**2 for i in range(20)]


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (3, 0), (3, 1), (1, 50)])
def test_reading_ahead_makes_something_of_each_key_in_order(workers, prefetch):
    assert list(read_ahead("some keys", str.upper, workers, prefetch)) == list("SOME KEYS")
    assert loader_threads() == []
    made = read_ahead(iter(range(10**9)), str, workers, prefetch)
    assert next(made) == "0"
    made.close()


def test_no_more_than_prefetch_items_are_begun():
    begun = []

    def prepare(position):
        begun.append(position)
        return position, []

    items = Ahead(4, 2).run(prepare, range(100))
    for _ in range(3):
        next(items)
    assert len(begun) <= 5
    items.close()


def divide(position):
    def piece():
        return 1 / (3 - position)

    return position, [piece]


def test_worker_error_ends_the_pass_with_its_own_traceback():
    seen = []
    with pytest.raises(ZeroDivisionError) as caught:
        seen.extend(Ahead(2, 4).run(divide, range(10)))
    assert "1 / (3 - position)" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_error_while_preparing_ends_the_pass():
    with pytest.raises(TypeError):
        list(Ahead(2, 4).run(lambda position: None + position, range(10)))


def test_dropping_the_iterator_frees_the_threads():
    items = Ahead(4, 4).run(squares, range(1000))
    next(items)
    assert loader_threads()
    del items
    assert loader_threads() == []


def test_close_wakes_a_waiting_consumer():
    gate = threading.Event()
    caught = []

    def prepare(position):
        return position, [lambda: gate.wait(100)]

    ahead = Ahead(1, 2)

    def consume():
        try:
            list(ahead.run(prepare, range(5)))
        except RuntimeError as error:
            caught.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.1)
    threading.Timer(0.2, gate.set).start()
    ahead.close()
    consumer.join(100)
    assert not consumer.is_alive()
    assert caught == ["the loader was closed while its batches were being read"]
