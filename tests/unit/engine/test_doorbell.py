"""A bell with one waiter: no ring is lost, none counts twice."""

import threading

from replicas.engine.doorbell import Doorbell


def waits(bell: Doorbell) -> bool:
    """Whether a wait on the bell would sleep."""
    answered = threading.Event()

    def answer() -> None:
        bell.wait()
        answered.set()

    waiter = threading.Thread(target=answer, daemon=True)
    waiter.start()
    slept = not answered.wait(0.05)
    if slept:
        bell.ring()
    waiter.join(5.0)
    return slept


def test_a_ring_before_the_wait_is_not_lost_and_counts_once():
    bell = Doorbell()
    bell.ring()
    bell.ring()
    assert not waits(bell)
    assert waits(bell)


def test_a_cleared_ring_is_forgotten():
    bell = Doorbell()
    bell.clear()
    assert waits(bell)
    bell.ring()
    bell.clear()
    assert waits(bell)


def test_every_one_of_many_rings_is_heard_when_what_it_announces_is_looked_at_after_a_clear():
    bell, sent, seen = Doorbell(), [], 0
    number = 2000

    def ring_often() -> None:
        for index in range(number):
            sent.append(index)
            bell.ring()

    threads = [threading.Thread(target=ring_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    while seen < 3 * number:
        bell.wait()
        bell.clear()
        seen = len(sent)
    for thread in threads:
        thread.join()
