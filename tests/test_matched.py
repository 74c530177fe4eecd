"""Arms at equal accuracy in distribution."""
import pytest

from rl.report.matched import at_level, curves_of, frontier, matched_text


def rows(method, seed, home, away, decoding="t1"):
    found = []
    for point, (x, y) in enumerate(zip(home, away)):
        for split, value in (("validation", 0.0), ("id", x), ("walk3", y)):
            found.append(dict(method=method, seed=seed, point=point, flops=point * 10 ** 12, split=split,
                              decoding=decoding, value=value))
    return found


def test_a_curve_is_read_where_it_first_reaches_the_level():
    [points] = curves_of(rows("rl", 0, [0.5, 0.6, 0.8, 0.7, 0.9], [0.1, 0.2, 0.4, 0.0, 0.5]), "t1")[1]["rl"].values()
    assert at_level(points, "id", 0.7) == pytest.approx(dict(flops=1.5e12, id=0.7, walk3=0.3))      # half way
    assert at_level(points, "id", 0.8) == pytest.approx(dict(flops=2e12, id=0.8, walk3=0.4))        # before it falls
    assert at_level(points, "id", 0.5) == points[0]             # what it starts from
    assert at_level(points, "id", 0.4) is None                  # it starts above: there is nothing like it to compare
    assert at_level(points, "id", 0.95) is None


def test_a_table_holds_the_arms_that_reach_a_level_with_every_seed():
    found = rows("rl", 0, [0.6, 0.8], [0.0, 0.4]) + rows("rl", 1, [0.7, 0.8], [0.2, 0.4])
    found += rows("filtered", 0, [0.6, 0.8], [0.0, 0.2]) + rows("filtered", 1, [0.6, 0.8], [0.0, 0.2])
    found += rows("gold", 0, [0.6, 0.9], [0.0, 0.2]) + rows("gold", 1, [0.6, 0.65], [0.0, 0.2])
    found += rows("gold", 0, [0.0], [0.0], decoding="greedy")
    text = matched_text(found, "t1")
    at_7, at_8 = text.split("\n\n")                             # nothing reaches .9 twice
    assert at_7.startswith("Where arms first reach 0.70 on id, T = 1") and at_7.endswith("from above it: gold")
    _, head, rl, filtered, _ = at_7.splitlines()
    assert head.split() == ["walk3", "TFLOP"]
    # rl: .2 half way and .2 at the start; filtered .1 twice
    assert rl.split()[:2] == ["rl", "0.200"] and rl.split()[-1] == "0.25"
    assert filtered.split() == ["filtered", "0.100", "[0.10,", "0.10]", "0.50"]
    assert "rl          0.400 [0.40, 0.40]   1.00" in at_8
    assert matched_text(rows("rl", 0, [0.6, 0.8], [0.0, 0.4]), "t1") == ""


def test_nothing_followed_is_no_table_and_no_picture():
    assert matched_text([], "t1") == "" and frontier([], "t1") is None


def test_the_picture_has_a_panel_for_every_other_split_and_every_arm_a_line():
    pytest.importorskip("matplotlib")
    from rl.report.matched import draw
    found = rows("grpo_token", 0, [0.5, 0.7], [0.1, 0.2]) + rows("filtered", 0, [0.5, 0.6], [0.1, 0.3])
    [ax] = draw(found, "t1").axes
    assert ax.get_title(loc="left").startswith("walk3") or ax.get_title().startswith("walk3")
    named = [line for line in ax.lines if not line.get_label().startswith("_")]
    ends = {line.get_label(): line.get_xydata()[0].tolist() for line in named}
    assert ends == {"grpo_token": [0.7, 0.2], "filtered": [0.6, 0.3]}
    assert frontier(found, "t1").startswith(b"\x89PNG")
