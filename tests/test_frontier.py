"""The temperatures that reproduce.sh chooses, and what it says of two curves."""

import json
import sys

import forked
import pytest

from reproduce.frontier import best_temperature, read_points, temperature_like
from reproduce.results import frontier_of, least_distance
from support.errors import UserError


def write(folder, rows):
    folder.mkdir()
    for (temperature, top_p), (meteor, distinct2) in rows.items():
        metrics = {"meteor": meteor, "distinct2": distinct2, "intent": None}
        result = {"policy": metrics, "difference": {}, "win_rate": {}, "settings": {"samples": 9}}
        (folder / f"t{temperature}-p{top_p}.json").write_text(json.dumps(result))


@pytest.fixture()
def curves(tmp_path):
    write(tmp_path / "sft", {(0.5, 1.0): (0.2, 0.3), (1.0, 1.0): (0.1, 0.5), (0.5, 0.9): (0.9, 0.1)})
    write(tmp_path / "ppo", {(0.5, 1.0): (0.3, 0.2), (1.0, 1.0): (0.25, 0.4), (1.5, 1.0): (0.12, 0.6)})
    return tmp_path


def test_temperatures_are_chosen_among_the_points_with_the_largest_top_p(curves):
    start, policy = read_points(curves / "sft"), read_points(curves / "ppo")
    assert [(p["top_p"], p["temperature"]) for p in start] == [(1.0, 0.5), (1.0, 1.0), (0.9, 0.5)]
    assert best_temperature(start, "meteor") == 0.5  # 0.9 has another top-p
    assert temperature_like(policy, 0.5) == pytest.approx(1.25)
    assert temperature_like(policy, 0.1) == 0.5 and temperature_like(policy, 0.9) == 1.5
    # at distinct-2 of 0.4 the start's curve has 0.15; the policy's other points are beyond its ends
    assert least_distance(start, policy, "meteor") == pytest.approx(0.25 - 0.15)
    assert least_distance(start, policy, "intent") is None
    with pytest.raises(UserError, match="expected one of meteor, distinct2"):
        best_temperature(start, "intent")


def test_the_command_prints_one_number_or_a_sentence(curves):
    command = [sys.executable, "reproduce/frontier.py"]
    done = forked.run([*command, str(curves / "ppo"), "--like", str(curves / "sft")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1.25\n"), done.stderr
    done = forked.run([*command, str(curves / "sft"), "--best", "meteor"], capture_output=True, text=True)
    assert done.stdout == "0.5\n"
    (curves / "none").mkdir()
    done = forked.run([*command, str(curves / "none"), "--best", "meteor"], capture_output=True, text=True)
    assert done.returncode == 2 and "run the stage frontier-none of reproduce.sh first" in done.stderr
    (curves / "ppo" / "t1.0-p1.0.json").write_text("{}")
    done = forked.run([*command, str(curves / "ppo"), "--best", "meteor"], capture_output=True, text=True)
    assert done.returncode == 2 and "is not an evaluation of reproduce.sh" in done.stderr


def test_the_test_split_is_compared_at_the_temperature_that_validation_chose(tmp_path):
    for split, best in (("validation", 0.5), ("test", 1.0)):
        (tmp_path / split / "frontier").mkdir(parents=True)
        rows = {(t, 1.0): (0.3 if t == best else 0.2, 0.4) for t in (0.5, 1.0)}
        write(tmp_path / split / "frontier" / "sft", rows)
    (tmp_path / "test" / "eval").mkdir()
    compared = {"difference": {}, "baseline": {"meteor": 0.2}}
    (tmp_path / "test" / "eval" / "ppo-0-over-best-meteor.json").write_text(json.dumps(compared))
    found = frontier_of(tmp_path, "test", ["ppo-0"])
    assert found["best"] == {"meteor": {"temperature": 0.5, "metrics": {"meteor": 0.2}}}
    assert [point["metrics"]["meteor"] for point in found["points"]["sft"]] == [0.2, 0.3]
