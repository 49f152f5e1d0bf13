"""reproduce.sh: its stages, the temperatures that it chooses, and the page that it writes."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from reproduce import results
from reproduce.frontier import best_temperature, read_points, temperature_like
from reproduce.results import MARKS, ResultsConfig, frontier_of, least_distance, write_text
from support.builtin import builtin_model
from support.errors import UserError
from support.meteor import meteor

ROOT = Path(__file__).parents[1]
# stands in for `python` and `accelerate`: notes the command, and makes the file or the folder that it names
RECORDER = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
if [[ $1 == reproduce/frontier.py ]]; then exec "$REAL_PYTHON" "$@"; fi
while [[ $# -gt 0 ]]; do
    if [[ $1 == --output || $1 == --replies ]]; then mkdir -p "$(dirname "$2")" && touch "$2"; fi
    shift
done
"""


def write(folder, rows):
    folder.mkdir()
    for (temperature, top_p), (quality, distinct2) in rows.items():
        metrics = {"meteor": quality, "distinct2": distinct2, "intent": None}
        result = {"policy": metrics, "difference": {}, "win_rate": {}, "settings": {"samples": 9}}
        (folder / f"t{temperature}-p{top_p}.json").write_text(json.dumps(result))


@pytest.fixture()
def curves(tmp_path):
    write(tmp_path / "sft", {(0.5, 1.0): (0.2, 0.3), (1.0, 1.0): (0.1, 0.5), (0.5, 0.9): (0.9, 0.1)})
    write(tmp_path / "ppo", {(0.5, 1.0): (0.3, 0.2), (1.0, 1.0): (0.25, 0.4), (1.5, 1.0): (0.12, 0.6)})
    return tmp_path


def test_temperatures_are_chosen_among_the_points_at_top_p_1(curves):
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
    with pytest.raises(UserError, match="add 1.0 to TOP_PS"):
        best_temperature(start[2:], "meteor")


def test_the_command_prints_one_number_or_a_sentence(curves):
    command = [sys.executable, "reproduce/frontier.py"]
    done = forked.run([*command, str(curves / "ppo"), "--like", str(curves / "sft")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1.25\n"), done.stderr
    done = forked.run([*command, str(curves / "sft"), "--best", "meteor"], capture_output=True, text=True)
    assert done.stdout == "0.5\n"
    (curves / "none").mkdir()
    done = forked.run([*command, str(curves / "none"), "--best", "meteor"], capture_output=True, text=True)
    assert done.returncode == 2 and "reproduce.sh frontier-none` first" in done.stderr
    for none_or_both in ((), ("--best", "meteor", "--like", str(curves / "sft"))):
        done = forked.run([*command, str(curves / "ppo"), *none_or_both], capture_output=True, text=True)
        assert done.returncode == 2 and "expected either a metric (best) or a folder (like)" in done.stderr
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


@pytest.fixture()
def reproduce(tmp_path):
    """Call reproduce.sh with recorded commands: returns the finished process and the commands."""
    (tmp_path / "bin").mkdir()
    for program in ("python", "accelerate"):
        (tmp_path / "bin" / program).write_text(RECORDER)
        (tmp_path / "bin" / program).chmod(0o755)
    calls = tmp_path / "calls"
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment |= {"REAL_PYTHON": sys.executable, "OUT": str(tmp_path / "a folder"), "SEEDS": "0"}

    def call(*stages: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls.write_text("")
        command = ["bash", "reproduce/reproduce.sh", *stages]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment | variables)
        return done, calls.read_text().splitlines()

    return call


def test_each_estimator_has_its_options_and_the_ablations_are_of_the_first(reproduce, tmp_path):
    kinds = dict(KINDS="rloo critic ppo")
    done, calls = reproduce("rloo-0", "critic-0", "ppo-0", "no-kl", **kinds)
    assert done.returncode == 0, done.stderr
    options = {call.split("--experiment-name ")[1].split()[0]: call for call in calls}
    assert list(options) == ["rloo-0", "critic-0", "ppo-0", "no-kl"]
    assert "--seed 0 --advantage rloo" in options["rloo-0"] and "--kl-coef 0 --advantage rloo" in options["no-kl"]
    assert "--value-coef 0.5 --gae-lambda 0.95" in options["critic-0"] and "--advantage" not in options["critic-0"]
    assert "--advantage" not in options["ppo-0"] and "--value-coef" not in options["ppo-0"]
    done, calls = reproduce("no-kl", **kinds)
    assert "no-kl is done" in done.stdout and calls == []
    done, calls = reproduce("ppo-0", KINDS="ppo reinforce")
    assert done.returncode == 2 and "KINDS has 'reinforce'" in done.stderr and calls == []
    done, calls = reproduce("critic-1", **kinds)
    assert done.returncode == 2 and "no stage 'critic-1'" in done.stderr and calls == []


def test_a_frontier_gets_further_temperatures(reproduce):
    for temperatures, made in (("1.0", ["1.0"]), ("0.5 1.0", ["0.5"]), ("0.5 1.0", [])):
        done, calls = reproduce("frontier-sft", TEMPERATURES=temperatures, TOP_PS="1.0")
        assert done.returncode == 0, done.stderr
        assert [call.split("--temperature ")[1].split()[0] for call in calls] == made
    assert "frontier-sft is done" in done.stdout


def test_no_temperature_is_chosen_without_the_validation_splits_curve(reproduce):
    done, calls = reproduce("best-sft", SPLIT="test")
    assert done.returncode == 2 and "`SPLIT=validation bash reproduce/reproduce.sh frontier-sft`" in done.stderr
    assert [call.split()[1] for call in calls] == ["reproduce/frontier.py"]


def written(summary: dict, monkeypatch, **options) -> str:
    """The part of results.md that results.py writes, without dialogues."""
    monkeypatch.setattr(results, "shown_dialogues", lambda *_: [])
    config = ResultsConfig(out="", main=summary["main"], **options)
    return "\n".join(line.rstrip() for line in str(write_text(summary, config)).strip().split("\n"))


@pytest.mark.parametrize(("folder", "tutorial"), [("docs/notebook", True), ("docs/notebook/builtin", False)])
def test_the_pages_are_those_of_their_figures(folder, tutorial, monkeypatch):
    summary = json.loads((ROOT / folder / "results.json").read_text())
    made = (ROOT / folder / "results.md").read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert made.strip().startswith(written(summary, monkeypatch, tutorial=tutorial))


def test_a_page_says_what_was_measured_and_needs_no_more(monkeypatch):
    summary = json.loads((ROOT / "docs/notebook/builtin/results.json").read_text())
    whole = written(summary, monkeypatch)
    assert "| supervised, T = 0.4, its best METEOR |" in whole and "where it has its best METEOR and" in whole
    part = copy.deepcopy(summary)
    part["frontier"] |= {"points": {}, "above": {}, "matched": {}}
    part["frontier"]["best"].pop("intent_second_judge")
    page = written(part, monkeypatch)
    assert "where it has its best METEOR of" in page and "(results-frontier.png)" not in page
    part |= {"frontier": {"points": {}, "best": {}, "over_best": {}, "matched": {}, "above": {}}, "scoring_rl4lms": {}}
    page = written(part, monkeypatch)
    assert "It has not been measured." in page and "No model was scored so." in page
    part["main"] = "rloo"
    assert "### RLOO against the supervised model" in written(part, monkeypatch)


@pytest.mark.slow
def test_reproduce_quick_goes_from_nothing_to_the_table_and_again_in_seconds(tmp_path):
    places = dict(DATA="builtin", POLICY=builtin_model("policy"), ENCODER=builtin_model("judge"), SEEDS="0 1")
    places |= dict(OUT=tmp_path / "out", RESULTS=tmp_path / "results")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {k: str(v) for k, v in places.items()} | {"PATH": path}
    again = ["bash", "reproduce/reproduce.sh", "--quick"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=2400)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [row["seed"] for row in result["seeds"]] == [0, 1] and result["samples"] == 32
    wanted = "rouge1 rougeLsum meteor sacrebleu intent intent_second_judge mean_output_length distinct2".split()
    for row in result["seeds"]:
        assert list(row["gain"]) == list(row["ci95"]) == wanted
    for name in wanted:
        gains = [row["gain"][name] for row in result["seeds"]]
        assert result["gain_mean"][name] == pytest.approx(sum(gains) / 2)
        for row in result["seeds"]:
            assert row["ci95"][name][0] <= row["gain"][name] <= row["ci95"][name][1]
    trained = [f"{kind}-{seed}" for kind in ("ppo", "rloo") for seed in (0, 1)]
    scores = result["meteor"]
    assert list(scores) == ["sft", *trained, "no-kl", "no-meteor"] and list(result["estimators"]) == trained
    assert scores["sft"]["own"] == result["supervised"]["meteor"]
    rows = [json.loads(line) for line in (tmp_path / "out/validation/replies/ppo-1.jsonl").read_text().splitlines()[1:]]
    pairs = [(rows[i]["text"], rows[(i + 16) % 32]["reply"]) for i in range(32)]
    assert scores["ppo-1"]["elsewhere"] == pytest.approx(sum(meteor(*pair) for pair in pairs) / 32)
    assert list(result["habits"]) == list(scores)
    assert result["habits"]["ppo-1"]["repeating"] == result["ppo"]["1"]["repetition"]
    assert result["habits"]["ppo-1"]["at_limit"] == pytest.approx(sum(not r["ended"] for r in rows) / 32)
    counted = result["scoring_rl4lms"]  # the end marker is in both texts
    assert list(counted) == list(scores) and counted["sft"]["meteor"] > result["supervised"]["meteor"]
    assert result["shuffled"]["rl4lms"]["meteor"] > result["shuffled"]["plain"]["meteor"] > 0
    frontier = result["frontier"]
    assert [p["temperature"] for p in frontier["points"]["rloo-1"]] == [0.5, 1.0, 1.5]
    [at_one] = (p for p in frontier["points"]["sft"] if p["temperature"] == 1.0)
    assert at_one["metrics"] == result["supervised"] and at_one["difference"]["meteor"]["value"] == 0
    for name in trained:
        assert "gain" in frontier["matched"][name] and "gain" in frontier["over_best"]["meteor"][name]
    best = max(p["metrics"]["meteor"] for p in frontier["points"]["sft"])
    assert frontier["best"]["meteor"]["metrics"]["meteor"] == best
    page = (tmp_path / "results" / "results.md").read_text()
    assert page.count("- supervised: ") == 20 and "| METEOR |" in page
    assert {p.name for p in (tmp_path / "results").glob("*.png")} == {
        "results-gains.png",
        "results-curves.png",
        "results-frontier.png",
        "results-supervised.png",
    }
    (tmp_path / "results" / "results.md").write_text(page.replace("# Results\n", "# Results\n\nBy hand.\n"))
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0 and "==" not in done.stdout  # no stage is done again
    assert "By hand." in (tmp_path / "results" / "results.md").read_text()
