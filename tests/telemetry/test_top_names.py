"""The number of metric labels that come from callers is bounded."""

from antefix.telemetry.top_names import OTHERS, TopNames


def make(num_max=3):
    dropped = []
    return TopNames(num_max, dropped.append, clock=lambda: 0.0), dropped


def test_the_first_have_names_and_the_rest_are_one():
    names, dropped = make()
    assert [names.place(f"t{number}", 10) for number in range(5)] == ["t0", "t1", "t2", OTHERS, OTHERS]
    assert not dropped


def test_who_uses_twice_as_much_takes_the_place_of_the_least():
    names, dropped = make()
    for number, weight in enumerate((30, 10, 20)):
        names.place(f"t{number}", weight)
    assert names.place("large", 15) == OTHERS
    assert names.place("large", 15) == "large" and dropped == ["t1"]
    assert names.place("t1", 1) == OTHERS


def test_any_number_of_names_takes_bounded_room():
    names, _ = make()
    shown = {names.place(f"t{number}", 1) for number in range(10_000)}
    assert len(shown) <= 4 and len(names._waiting) <= 24
