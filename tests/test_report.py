"""The page of a run: what it says, that it says it of broken, strange and unfinished runs too, and a real browser."""

import base64
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml

from ppo_dialog import PPOConfig, show_results
from report import (
    COUNTERS,
    HEIGHT,
    LEFT,
    LIGHT,
    NAME_LENGTH,
    PANELS,
    POINTS,
    RIGHT,
    SOFT,
    WIDTH,
    Chart,
    Run,
    charts_of,
    draw_curves,
    groups_of,
    load_runs,
    make_page,
    points,
    replies_of,
    settings_of,
    shorten,
    shown_dialogues,
    table_of,
    write_report,
)
from reproduce import results
from support.config import parse_config, plain_values
from support.errors import UserError
from support.metric_names import BETTER, LABELS
from support.seeds import over_seeds

ROOT = Path(__file__).parents[1]
EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'> & \"quotes\" </script>\u2028 end"


def flags(**settings) -> list[str]:
    return [part for k, v in settings.items() for part in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(scope="module")
def real_run(tmp_path_factory) -> tuple[Path, str]:
    """A short run of the built-in models, to its end: its folder and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    short = dict(total_time_steps=900, env_num=16, num_mini_batch=2, judge_samples=50, validation_limit=8)
    command = [sys.executable, "ppo_dialog.py", *flags(run_dir=runs, eval_limit=30, save_interval=2, **short)]
    result = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return runs / "ppo_dialog", result.stdout


def metric_rows(n: int, **figures) -> list[dict]:
    """n updates of 100 tokens: each figure a function of the update."""
    rows = [{"update": i + 1, "env_steps": 100 * (i + 1), "fps": 50.0} for i in range(n)]
    return [row | {name: figure(i) for name, figure in figures.items()} for i, row in enumerate(rows)]


def held_out(n: int, said: str = "after", **scores) -> list[dict]:
    """n held-out samples; scores are functions of the sample, of the reply after (before: half of it)."""

    def row(i):
        return {name: float(f(i)) for name, f in scores.items()}

    return [
        {
            "context": [f"Is it number {i}?", "Which one?"],
            "act": 1 + i % 4,
            "human": f"human {i}",
            "before": {"text": f"before {i}", "length": 4} | {k: v / 2 for k, v in row(i).items()},
            "after": {"text": f"{said} {i}", "length": 5 + i % 3} | row(i),
        }
        for i in range(n)
    ]


def made_run(folder: Path, metrics=(), evaluation=None, **lines) -> Path:
    """A run's folder with these files."""
    folder.mkdir(parents=True)
    config = dict(total_time_steps=1000, kl_target=0.05, run_dir=folder.parent.name, experiment_name=folder.name)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | lines.pop("config", {})))
    if defaults := lines.pop("defaults", {}):
        (folder / "defaults.yaml").write_text(yaml.safe_dump(defaults))
    for name, rows in {"metrics": metrics, **lines}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluation:
        (folder / "eval.json").write_text(json.dumps(evaluation))
    return folder


def evaluation_of(difference: dict[str, tuple[float, float, float]]) -> dict:
    """eval.json of metrics that were 0.5 before, from (low, value, high) of the difference."""
    return {
        "policy": {name: 0.5 + d[1] for name, d in difference.items()},
        "baseline": dict.fromkeys(difference, 0.5),
        "difference": {
            name: {"value": d[1], "ci95": [d[0], d[2]], "relative": d[1] / 0.5} for name, d in difference.items()
        },
        "settings": {"samples": 40, "split": "test"},
        "reward": {"policy": 0.75, "baseline": 0.5, "difference": 0.25, "standard_error": 0.01},
    }


def page_of(*folders: Path, **options) -> str:
    return write_report(list(folders), **options).read_text(encoding="utf-8")


# --- what a run writes by itself


def test_a_run_ends_with_its_page_and_says_where(real_run):
    folder, printed = real_run
    assert f"report: {folder / 'report.html'}" in printed and "WARNING" not in printed
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "not finished" not in page and "cannot be read" not in page
    for heading in ("ROUGE-1", "METEOR", "perplexity", "KL to the reference", "Speed", "total_time_steps"):
        assert heading in page
    assert str(Run(folder).evaluation["settings"]["versions"]["torch"]) in page
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_keeps_the_defaults_that_its_settings_are_compared_with(real_run, tmp_path):
    run = Run(real_run[0])
    # what was left out is shown as it was chosen for the small built-in model
    assert run.defaults == plain_values(PPOConfig(lr=2e-4, critic_lr=3e-3, env_num=128))
    assert (run.config["lr"], run.config["critic_lr"]) == (2e-4, 3e-3)
    changed, usual = settings_of([run])
    given = "total_time_steps env_num num_mini_batch judge_samples validation_limit run_dir eval_limit save_interval"
    assert {row["name"] for row in changed} == set(given.split())
    assert len(changed) + len(usual) == len(run.defaults) - 1  # but for resume
    assert "no defaults.yaml" not in (real_run[0] / "report.html").read_text(encoding="utf-8")

    own = dict(kl_target=0.05, lr=0.1)  # of a version in which they were others
    folders = [made_run(tmp_path / f"{lr}", config=own, defaults=own | dict(lr=lr)) for lr in (0.1, 0.2)]
    changed, usual = ({row.pop("name"): row for row in part} for part in settings_of(load_runs(folders)))
    assert usual.keys() == {"kl_target"} and changed["lr"] == dict(default="0.1 or 0.2", values=[("0.1", [])])
    page = page_of(old := made_run(tmp_path / "old", metric_rows(2)))
    changed, usual = settings_of([Run(old)])
    assert {row["default"] for row in changed} == {""} and not usual
    assert "There is no defaults.yaml" in page and "All settings, as the run did not store its defaults." in page


def test_eval_samples_are_what_eval_json_is_the_mean_of(real_run):
    folder, _ = real_run
    rows = [json.loads(line) for line in (folder / "eval_samples.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((folder / "eval.json").read_text())
    assert len(rows) == result["settings"]["samples"] == 30
    assert set(rows[0]) == {"context", "act", "human", "before", "after"} and len(rows[0]["context"]) == 5
    for side, model in (("before", "baseline"), ("after", "policy")):
        theirs = result[model] | {"length": result[model]["mean_output_length"], "reward": result["reward"][model]}
        for name in ("rouge1", "rougeLsum", "meteor", "intent", "length", "reward"):
            assert sum(row[side][name] for row in rows) / len(rows) == pytest.approx(theirs[name])
        for scores in (row[side] for row in rows):
            assert scores["reward"] == pytest.approx((scores["intent"] + scores["meteor"]) / 2)


def test_a_page_that_cannot_be_written_is_a_sentence_and_no_more(tmp_path, capsys):
    folder = made_run(tmp_path / "run", metric_rows(3, score=float))
    (folder / "report.html").mkdir()  # what is there cannot be replaced
    show_results(folder)
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING: the report could not be written") and len(printed.splitlines()) == 1
    assert f"python report.py {folder}" in printed


# --- what it draws


def charts_by_title(runs: list) -> dict[str, Chart]:
    return {chart.title: chart for charts in charts_of(runs)[0].values() for chart in charts}


def test_curves_stand_where_their_numbers_are(tmp_path):
    run = Run(made_run(tmp_path / "run", metric_rows(20, score=lambda i: (0.123, 0.124)[i % 2])))
    chart = charts_by_title([run])["Score"]
    assert chart.read["x"] == [0, 2000]
    (path,) = re.findall(r'<path d="M ([^"z]*)" style="fill: none; stroke: var\(--c0\)', chart.svg)
    x, y = zip(*(map(float, point.split()) for point in path.split("L ")))
    assert x == pytest.approx([LEFT + (WIDTH - LEFT - RIGHT) * step / 2000 for step in range(100, 2001, 100)], abs=0.06)
    assert len(set(y)) == 2 and 0 < y[1] < y[0] < HEIGHT
    labels = re.findall(r'text-anchor: (\w+).*? x="(.*?)" y="(.*?)">(.*?)</text>', chart.svg)
    steps = {label: float(at) for anchor, at, _, label in labels if anchor == "middle"}
    assert steps == pytest.approx({"0": 46, "500": 122.5, "1k": 199, "1.5k": 275.5, "2k": 352})
    heights = {float(label): float(at) for anchor, _, at, label in labels if anchor == "end"}
    (low, low_at), (high, high_at) = min(heights.items()), max(heights.items())
    pixels = (low_at - high_at) / (high - low)
    assert y[0] - y[1] == pytest.approx(0.001 * pixels, abs=0.2)


def test_every_figure_is_drawn_once_or_said_in_words(tmp_path):
    figures = dict(
        score=float, kl_div=lambda i: i / 100, passes=lambda i: 2, reward_kl=lambda i: -i, polite=lambda i: i * i
    )
    run = Run(made_run(tmp_path / "run", metric_rows(5, reward_polite=float, **figures)))
    sections, constant = charts_of([run])
    drawn = [name for charts in sections.values() for chart in charts for name in chart.names]
    assert sorted(drawn) == ["kl_div", "polite", "reward_kl", "reward_polite", "score"]
    assert [chart.names for chart in sections["Your own figures"]] == [["polite"]]
    assert constant == {"fps": 50.0, "passes": 2}
    page = page_of(run.folder)
    assert "dashed: kl_target" in page and "<b>Parts of the reward</b>" in page


def test_every_figure_of_the_trainer_has_a_panel_or_is_a_counter(tmp_path):
    glossary = (ROOT / "docs" / "figures.md").read_text().split("## metrics.jsonl")[1].split("\n## ")[0]
    names = set(re.findall(r"^\| `(\w+)` \|", glossary, re.M)) - {
        "update",
        "env_steps",
        "NAME",
    }  # test_docs: all, no other
    assert {"score_std", "validation_reward", "commonplace", "reward_length_price"} <= names
    run = Run(made_run(tmp_path / "run", metric_rows(3, **dict.fromkeys(names, float))))
    sections, _ = charts_of([run])
    assert "Your own figures" not in sections
    assert [chart.names for chart in sections["Reward"][:2]] == [["score"], ["score_std"]]
    assert {name for charts in sections.values() for chart in charts for name in chart.names} == names - COUNTERS


@pytest.mark.parametrize(
    "figures, titles",
    [
        ("intent meteor", ["Intent and METEOR"]),
        ("meteor", ["METEOR"]),
        ("intent meteor consensus commonplace", ["Intent, METEOR, consensus and commonplace"]),
        ("reward_kl", ["Parts of the reward: kl"]),
        ("reward_intent reward_kl share_kl", ["Parts of the reward", "Shares of the reward: kl"]),
        ("critic_lr", ["Learning rates: critic_lr"]),
        ("lr critic_lr update_s", ["Learning rates", "Seconds of an update: update_s"]),
        ("score polite", ["Score", "polite"]),
    ],
)
def test_a_title_names_what_is_drawn_and_nothing_else(tmp_path, figures, titles):
    run = Run(made_run(tmp_path / "run", metric_rows(3, fps=lambda i: 1, **dict.fromkeys(figures.split(), float))))
    assert list(charts_by_title([run])) == titles


def test_the_curves_of_the_results_are_panels():
    assert set(results.CURVES) <= {panel.names.split()[0] for panels in PANELS.values() for panel in panels}


def test_the_start_is_drawn_where_the_first_rollout_measured_it(tmp_path, monkeypatch):
    rows = metric_rows(
        30, score=lambda i: 0.5 + i / 100, polite=float, score_std=lambda i: 0.4, intent=float, reward_kl=float,
        entropy=float, mine=float,
    )  # fmt: skip
    for row in rows:
        row["episodes"] = 64 * row["update"]
    run = Run(made_run(tmp_path / "run", rows, config=dict(samples_per_prompt=4)))
    charts = charts_by_title([run])
    half = 1.96 * 0.4 / 16**0.5  # 64 replies to 16 prompts
    assert charts["Score"].starts == [(0.5, pytest.approx(half), SOFT)]
    for title in ("polite", "Intent", "Parts of the reward: kl"):
        assert charts[title].starts == [(0, 0, SOFT)]  # their deviation is not known
    assert charts["Entropy"].starts == []  # a mean over the update's steps
    page = make_page([run])
    assert "mean reward of the sampled replies; dotted: start 0.5 \u00b1 0.2<" in page
    assert page.count("stroke-dasharray: 1.5,3") == 5 and page.count("fill: var(--soft); opacity: 0.16") == 1

    figure = draw_curves([charts["Score"]], [run], tmp_path / "curves.png")
    (drawn,) = figure.axes[:1]
    assert drawn.get_title(loc="left") == "Score" and [0.5, 0.5] in [list(line.get_ydata()) for line in drawn.lines]
    assert [patch.get_extents().height > 0 for patch in drawn.patches] == [True]

    later = Run(made_run(tmp_path / "later", rows[1:]))  # whose first rows are lost
    assert not any(chart.starts for chart in charts_by_title([later]).values())
    assert "Dotted: the start" in page and "The band is" in page and "Dotted: the start" not in make_page([later])
    other = made_run(tmp_path / "other", [row | {"score": row["score"] + 1} for row in rows])
    starts = charts_by_title(load_runs([run.folder, other]))["Score"].starts
    assert starts == [(0.5, 0, LIGHT[0]), (1.5, 0, LIGHT[1])]
    same = made_run(tmp_path / "same", rows, config=dict(samples_per_prompt=4))
    assert [color for _, _, color in charts_by_title(load_runs([run.folder, same]))["Score"].starts] == [SOFT]


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    rows = metric_rows(6, score=lambda i: [0.1, None, float("nan"), float("inf"), True, 0.6][i], intent=lambda i: None)
    folder = made_run(tmp_path / "run", rows)
    assert points(Run(folder), "score") == ([100.0, 600.0], [0.1, 0.6])
    page = page_of(folder)
    assert ">Score<" in page and "<b>Intent" not in page
    data = [part.split("</script>")[0] for part in page.split('<script type="application/json">')[1:]]
    assert data and all(json.loads(text, parse_constant=pytest.fail) for text in data)


def test_long_runs_are_thinned_to_means(tmp_path):
    folder = made_run(tmp_path / "run", metric_rows(4000, score=lambda i: i % 2))
    x, y = points(Run(folder), "score")
    assert len(x) == POINTS and set(y) == {0.5} and x == sorted(x)
    assert len(page_of(folder)) < 200_000


def test_the_table_marks_what_excludes_zero_and_cuts_off_what_is_far_out(tmp_path):
    difference = dict(rouge1=(0.01, 0.02, 0.03), meteor=(-0.01, 0.01, 0.03), intent=(-0.04, -0.03, -0.02))
    evaluation = evaluation_of(difference | {"sacrebleu": (-4.0, 3.0, 9.0)})
    evaluation["difference"]["perplexity"] = None
    run = Run(made_run(tmp_path / "run", metric_rows(10, score=float), evaluation))
    cells = {row["label"]: row["cells"][0] for row in table_of(groups_of([run]))}
    assert list(cells) == ["ROUGE-1", "METEOR", "SacreBLEU", "intent"]
    assert [cells[name]["verdict"] for name in cells] == ["better", "", "", "worse"]
    assert cells["SacreBLEU"]["place"] == [0, 100, 100]
    low, value, high = cells["ROUGE-1"]["place"]
    assert 50 < low < value < high < 100 and cells["intent"]["place"][2] < 50
    page = page_of(run.folder)
    assert "0.500 → 0.750" in page and "+0.250 ± 0.010" in page and "40 samples of the test split" in page


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_loss_is_marked_otherwise_than_a_gain_in_word_and_color(tmp_path, sign, several):
    rising = dict.fromkeys([name for name in LABELS if name != "rouge2"], (0.1, 0.2, 0.3))
    change = {name: tuple(sorted(sign * v for v in values)) for name, values in rising.items()}
    evaluation = evaluation_of(change | {"rouge2": (-0.1, 0.1, 0.3)})
    evaluation["reward"]["difference"] *= sign
    folders = [made_run(tmp_path / name, metric_rows(2), evaluation) for name in "ab"[: 1 + several]]
    page = page_of(*folders)
    better, worse = ("better", "worse")[::sign]
    meant = {1: better, -1: worse, 0: "changed"}
    rows = page.split('class="result"')[1].split("</table>")[0].split("<tr class=")[1:]
    rows = [row for row in rows if not row.startswith('"metric"')]
    shown = {name: rows[k * len(folders)] for k, name in enumerate(n for n in LABELS)}
    for name, row in shown.items():
        word = "" if name == "rouge2" else meant[BETTER[name]]
        assert row.split('"')[1].removesuffix(" run") == word, name  # the class, which has the colour
        assert f'<b class="verdict">{word}</b>' in row
    told = page.split('id="result"')[0].split("<main>")[1]
    assert f'class="{"tile " if not several else ""}{better}"' in told and f"(standard error): {better}" in told


def test_dialogues_are_picked_by_a_fixed_seed(tmp_path):
    run = Run(made_run(tmp_path / "run", metric_rows(2, score=float), eval_samples=held_out(200, reward=float)))
    cards, sorts, total = shown_dialogues(replies_of([run]))
    assert (len(cards), total) == (20, 200) and cards == shown_dialogues(replies_of([run]))[0]
    assert set(sorts) == {"gain in reward", "reward before", "reward after", "length after"}
    for card in cards:
        i = card["number"] - 1
        assert [r["text"] for r in card["replies"]] == [f"before {i}", f"after {i}"] and card["human"] == f"human {i}"
        assert card["gain"] == card["keys"]["gain in reward"] == i / 2
    assert page_of(run.folder) == page_of(run.folder)


# --- runs as they are found


def test_a_run_that_is_still_going_says_so(tmp_path):
    page = page_of(made_run(tmp_path / "run", metric_rows(4, score=float)))
    assert "not finished" in page and "400" in page and "of 1,000 planned" in page
    assert "There is no eval.json" in page and "There is no eval_samples.jsonl" in page
    page = page_of(made_run(tmp_path / "begun"))
    assert "no update yet" in page and (tmp_path / "begun" / "curves.png").exists()


def test_lines_that_were_torn_are_named(tmp_path):
    folder = made_run(tmp_path / "run", metric_rows(3, score=float), warnings=[{"update": 2, "text": EVIL}])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"update": 4, "env_st\xff')
    (folder / "eval.json").write_text('{"policy": ')
    page = page_of(folder)
    assert "metrics.jsonl: line 4 cannot be read" in page and "eval.json cannot be read" in page
    assert "1 warning" in page and "(update 2)" in page


def test_a_bare_metrics_file_of_an_old_run_is_enough(tmp_path):
    folder = made_run(tmp_path / "run", metric_rows(3, score=float))
    (folder / "config.yaml").unlink()
    page = page_of(folder)
    assert "unknown settings" in page and "There is no config.yaml" in page and "did not note its versions" in page


def test_a_reward_of_ones_own_without_intent_and_meteor(tmp_path):
    rows = held_out(30, reward=lambda i: i % 2, polite=lambda i: i % 2)
    page = page_of(made_run(tmp_path / "run", metric_rows(12, score=float, polite=lambda i: i / 12), eval_samples=rows))
    assert "<b>polite</b>" in page and "polite after" in page and "meteor" not in page.lower().replace("rouge", "")


def test_what_is_no_run_is_answered_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="is no run's folder.*metrics.jsonl"):
        write_report([tmp_path])
    folder = made_run(tmp_path / "run", metric_rows(2, score=float))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_report([folder], tmp_path / "file" / "page.html")


def test_the_command_line(tmp_path):
    def told(*arguments) -> subprocess.CompletedProcess:
        return forked.run([sys.executable, "report.py", *arguments], cwd=ROOT, capture_output=True, text=True)

    folder = made_run(tmp_path / "run", metric_rows(2, score=float))
    page = tmp_path / "pages" / "mine.html"
    result = told(str(folder), "--output", str(page))
    assert result.returncode == 0 and str(page) in result.stdout, result.stderr
    assert page.exists() and page.with_suffix(".png").exists() and not (folder / "report.html").exists()
    result = told(str(tmp_path))
    assert result.returncode == 2 and result.stderr.startswith("error:") and "Traceback" not in result.stderr


def test_commands_on_the_page_are_commands_of_the_trainer(tmp_path, monkeypatch):
    folder = made_run(tmp_path / "runs" / "it's mine", metric_rows(4, score=float))
    monkeypatch.chdir(tmp_path)
    page = page_of(Path("runs") / "it's mine")
    commands = [part.split("</pre>")[0].replace("&#39;", "'").replace("&#34;", '"') for part in page.split("<pre>")[1:]]
    launched = [shlex.split(c)[3:] for c in commands if c.startswith("accelerate launch ppo_dialog.py")]
    assert len(launched) == 2
    for arguments in launched:
        config, _ = parse_config(PPOConfig, arguments, "")
        assert config.run_folder.resolve() == folder and config.total_time_steps == 1000 and not config.check()


# --- several runs


def test_runs_beside_each_other(tmp_path):
    evaluation, said = evaluation_of({"meteor": (0.01, 0.02, 0.03)}), held_out(50, reward=float)
    one = made_run(tmp_path / "a" / "run", metric_rows(10, score=float), evaluation, eval_samples=said)
    files = dict(config=dict(lr=0.5), defaults=dict(lr=0.0002))
    files["eval_samples"] = held_out(40, said="later", reward=lambda i: 2 * i)
    two = made_run(tmp_path / "b" / "run", metric_rows(8, score=lambda i: 2.0 * i), **files)
    assert write_report([one, two]) == tmp_path / "a" / "comparison.html"
    page = (tmp_path / "a" / "comparison.html").read_text(encoding="utf-8")
    assert "a/run" in page and "b/run" in page and page.count("<figure") >= 2
    settings = page.split('id="settings"')[1]
    row = re.sub("<[^>]*>", "", settings.split('<th scope="row">lr</th>')[1].split("</tr>")[0])
    assert row.split() == ["a/run0.5", "b/run0.0002"]  # neither value nor none is lost, and whose each is
    assert "b/run: There is no eval.json" in page and "a/run</span>: 40 samples of the test split" in page
    assert "<h1>2 runs compared</h1>" in page and "<title>2 runs compared: report</title>" in page
    columns = replies_of(load_runs([one, two]))
    assert [c.label for c in columns][0] == "supervised" and columns[-1].start is not columns[-2].start
    cards, sorts, total = shown_dialogues(columns)
    assert total == 40 and all(len(card["replies"]) == len(columns) for card in cards)
    assert (tmp_path / "a" / "comparison.png").exists() and len(LIGHT) >= 2


@pytest.fixture
def sweep(tmp_path) -> list[Path]:
    """Two rates with three seeds each; the rate 0.1 gains 0.1, 0.2 and 0.3 of METEOR, the rate 0.2 the double."""
    folders = []
    for lr in (0.1, 0.2):
        for seed in (0, 1, 2):
            gain = 10 * lr * (seed + 1) / 10
            evaluation = evaluation_of({"meteor": (gain - 0.04, gain, gain + 0.04)})
            rows = metric_rows(9 + seed, score=lambda i, lr=lr, seed=seed: 10 * lr * (i + seed))
            folders.append(made_run(tmp_path / f"lr{lr}-{seed}", rows, evaluation, config=dict(lr=lr, seed=seed)))
    return folders


def test_runs_that_differ_by_their_seed_alone_are_one_curve_with_a_band(sweep):
    runs = load_runs(sweep)
    assert [(group.name, len(group.runs)) for group in groups_of(runs)] == [("lr=0.1", 3), ("lr=0.2", 3)]
    assert len({run.color for run in runs}) == 2
    slow, fast = charts_by_title(runs)["Score"].lines
    assert slow.x == [100.0 * (i + 1) for i in range(9)]  # as far as all seeds are
    assert slow.y == pytest.approx([i + 1 for i in range(9)])
    low, high = slow.band
    assert low == pytest.approx([i for i in range(9)]) and high == pytest.approx([i + 2 for i in range(9)])
    assert fast.y == pytest.approx([2 * v for v in slow.y]) and slow.label == "lr=0.1"
    alone = load_runs(sweep[::3])  # a seed of each
    assert [line.band for line in charts_by_title(alone)["Score"].lines] == [None, None]
    same_seed = load_runs([sweep[0], made_run(sweep[0].parent / "again", metric_rows(3, score=float))])
    assert len(groups_of(same_seed)) == 2


def test_the_table_of_settings_has_an_interval_over_seeds_and_samples(sweep):
    page = page_of(*sweep)
    assert "<h1>2 settings compared in 6 runs</h1>" in page and page.count("(3 seeds)") == 2
    (row,) = table_of(groups_of(load_runs(sweep)))
    cell = row["cells"][0]
    half = math.hypot(4.303 * 0.1 / math.sqrt(3), 0.04)  # Student's t with two degrees of freedom; of the samples
    assert (cell["value"], cell["before"], cell["after"]) == pytest.approx((0.2, 0.5, 0.7))
    assert (cell["low"], cell["high"]) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-4) and not cell["verdict"]
    assert "By setting" in page and "By setting" not in page_of(*sweep[:3], output=sweep[0].parent / "one.html")


def test_from_five_seeds_on_the_middle_half_counts():
    gains = [0.1, 0.11, 0.12, 0.13, 5.0]
    centre, low, high = over_seeds(gains)
    assert centre == pytest.approx(0.12) and 0.1 <= low < centre < high <= 5.0
    seven = [0.1, 0.12, 0.11, 0.2, 0.05, 0.3, 0.15]
    assert over_seeds(seven) == pytest.approx((0.136, 0.09, 0.21), abs=0.005)  # rliable 1.2.0, with 20,000 resamples
    assert over_seeds([0.2] * 6, [0.05] * 6) == pytest.approx((0.2, 0.15, 0.25))
    assert over_seeds([0.2], [0.05]) == pytest.approx((0.2, 0.15, 0.25))


def test_long_names_are_cut_in_the_middle_and_told_apart():
    assert shorten(["ppo", "a" * NAME_LENGTH]) == ["ppo", "a" * NAME_LENGTH]
    (short,) = shorten(["begin" + "x" * 80 + "end"])
    assert len(short) == NAME_LENGTH and short.startswith("begin") and short.endswith("end") and "\u2026" in short
    alike = [f"{'a' * 40}{seed}{'b' * 40}" for seed in range(4)]
    assert shorten(alike)[2].endswith("\u2026" + "2" + "b" * (NAME_LENGTH // 2 - 2) + "\u2026")
    mixed = [*alike, *(f"{seed}{'c' * 80}" for seed in range(3)), "c" * 40 + "d" * 40]
    assert len(set(shorten(mixed))) == 8 and max(map(len, shorten(mixed))) == NAME_LENGTH
    assert shorten(["same", "same"]) == ["same", "same"] and shorten(["s" * 90] * 2)[0] == shorten(["s" * 90])[0]


def test_the_same_start_is_shown_once(tmp_path):
    rows = {name: held_out(9, said=name, reward=float) for name in ("a", "b")}
    columns = replies_of(load_runs([made_run(tmp_path / name, eval_samples=said) for name, said in rows.items()]))
    assert [column.label for column in columns] == ["supervised", "a", "b"]
    assert columns[1].start is columns[2].start is columns[0]
    cards, _, total = shown_dialogues(columns)
    assert total == 9 and [r["text"] for r in cards[4]["replies"]] == ["before 4", "a 4", "b 4"]


# --- in a browser


def opened(browser, page: Path, scheme: str = "light", width: int = 1280, mobile: bool = False) -> None:
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=mobile)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = dict(features=[dict(name="prefers-color-scheme", value=scheme)])
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())


def requested(browser) -> list[str]:
    """Every address that was asked for, but for what a new tab of the browser is made of."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("chrome:", "chrome-untrusted:", "data:"))]


def brightness(browser, selector: str, what: str) -> float:
    color = browser.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, what
    )
    return sum(float(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]) / 3


def in_order(browser) -> list[dict]:
    script = "return [...document.querySelectorAll('#cards > *')].filter(c => !c.hidden).map(c => c.dataset.keys)"
    return [json.loads(keys) for keys in browser.execute_script(script)]


def press(browser, button: str) -> None:
    """Click a button where it stands still: the page itself scrolls smoothly, and a click in passing hits another."""
    element = browser.find_element("id", button)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def test_a_real_run_in_a_browser(real_run, browser):
    page = real_run[0] / "report.html"
    for scheme, dark in (("light", False), ("dark", True)):
        opened(browser, page, scheme)
        assert (brightness(browser, "body", "backgroundColor") < 60) == dark
        assert (brightness(browser, "body", "color") > 180) == dark
        assert (brightness(browser, ".plot text", "fill") > 120) == dark
        assert len(browser.find_elements("css selector", ".plot path[style*='var(--c0)']")) > 15
    for width in (390, 320):
        opened(browser, page, width=width, mobile=True)
        wide, window = browser.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
        assert wide <= window == width

    opened(browser, page)
    select = browser.find_element("id", "sort")
    values = [option.get_attribute("value") for option in select.find_elements("tag name", "option")]
    assert {"gain in reward", "reward after", "length after", "METEOR after"} <= set(values)

    def number():
        return [int(c.text.split()[1]) for c in browser.find_elements("css selector", "#cards header span:first-child")]

    assert number() == sorted(number()) and len(number()) == 20
    for key in ("gain in reward", "length after"):
        select.find_element("css selector", f"option[value='{key}']").click()
        order = [keys[key] for keys in in_order(browser)]
        assert order == sorted(order, reverse=True)
        press(browser, "turn")
        assert [keys[key] for keys in in_order(browser)] == sorted(order)
        press(browser, "turn")
    text = browser.find_element("css selector", "#cards .reply p").text
    browser.find_element("id", "search").send_keys(text.upper())
    left = [c for c in browser.find_elements("css selector", "#cards > *") if c.is_displayed()]
    assert 1 <= len(left) < 20 and all(word in c.text.lower() for c in left for word in text.lower().split())
    assert browser.find_element("id", "count").text == f"{len(left)} of 20"

    from selenium.webdriver import ActionChains

    chart = browser.find_element("css selector", ".chart .plot svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    ActionChains(browser).move_to_element(chart).perform()
    scores = [row["score"] for row in Run(real_run[0]).metrics]
    read = float(browser.find_element("css selector", ".tip").text.split()[1])
    assert min(abs(read - s) for s in scores) < 1e-3  # one of the numbers that are drawn

    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", dict(printBackground=True))["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert set(requested(browser)) == {page.as_uri()}  # the page alone, no network


@pytest.fixture(scope="module")
def many_runs(tmp_path_factory) -> list[Path]:
    """Ten runs of long names, with all that a page can show; some names differ only in their middle.

    The last four differ by their seed alone.
    """
    place, folders = tmp_path_factory.mktemp("many"), []
    for k in range(10):
        name = f"run_{k}_{'x' * 70}" if k % 2 else f"smollm2_daily_dialog_kl_target_0.0{k}_samples_per_prompt_4_seeds"
        figures = dict.fromkeys(("score", "intent", "meteor", "reward_kl", "p" * 90), lambda i: i % 5)
        change = dict.fromkeys(LABELS, (0.1, 0.2, 0.3) if k % 3 else (-0.3, -0.2, -0.1))
        config = dict(lr=min(k, 6) / 10, seed=k, data_path="d" * 90)
        lines = dict(config=config, eval_samples=held_out(4, reward=float, meteor=float))
        warned = [{"update": 1, "text": "w" * 90}]
        rows = metric_rows(9, **figures)
        folders.append(made_run(place / name, rows, evaluation_of(change), warnings=warned, **lines))
    return folders


def test_the_legend_of_the_curves_is_within_the_picture(many_runs, tmp_path):
    runs = load_runs(many_runs)
    figure = draw_curves([charts_by_title(runs)["Score"]], runs, tmp_path / "curves.png")
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert len(legend.texts) == 7 and whole.x0 <= box.x0 < box.x1 <= whole.x1 and box.y1 <= whole.y1
    assert box.y0 > figure.axes[0].get_window_extent().y1  # above the curves


@pytest.fixture(scope="module")
def many_pages(many_runs) -> dict[int, Path]:
    """The pages of the first, the first four, and all of them."""
    pages = {count: many_runs[0].parent / f"{count}.html" for count in (1, 4, 10)}
    for count, page in pages.items():
        page.write_text(make_page(load_runs(many_runs[:count])), encoding="utf-8")
    return pages


def test_the_charts_of_a_page_have_its_colors_and_ids_of_their_own(many_pages):
    page = many_pages[10].read_text(encoding="utf-8")
    ids = re.findall(r' id="(.*?)"', page)
    assert len(ids) == len(set(ids)) and len(ids) > 30  # the dots of short curves have some
    assert page.count("<use ") > 100 and not re.search("#[0-9a-f]{6}", page.split("</style>")[1])


def test_nothing_of_a_comparison_is_cut_off_at_the_right(many_runs, many_pages, browser):
    script = """
        const room = document.scrollingElement.clientWidth;
        const boxed = e => e.closest(".wide, pre, nav") && !["HTML", "BODY"].includes(e.tagName);
        const out = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !boxed(e)
          && e.getBoundingClientRect().right > room + 1).map(e => e.tagName + "." + e.getAttribute("class"));
        const boxes = [...document.querySelectorAll(".wide")].filter(e => e.checkVisibility());
        return [document.scrollingElement.scrollWidth - room, out,
                boxes.map(e => e.scrollWidth - e.clientWidth), boxes.map(e => getComputedStyle(e).overflowX)]"""
    for count, page in many_pages.items():
        for width in (1280, 1000, 800, 390):
            opened(browser, page, width=width, mobile=width < 500)
            over, outside, boxes, scroll = browser.execute_script(script)
            assert (over, outside) == (0, []), (width, outside)
            assert set(scroll) == {"auto"} and (width < 1000 or not any(boxes)), (width, boxes)
            if over := max(boxes):  # the first column stays where it is
                moved = """
                    const box = [...document.querySelectorAll(".wide")].find(e => e.scrollWidth > e.clientWidth);
                    box.scrollLeft = 40;
                    const left = e => e.getBoundingClientRect().left;
                    return left(box.querySelector("tbody th")) - left(box)"""
                assert browser.execute_script(moved) < 2, (width, over)
        if count > 1:
            names = browser.execute_script("return [...document.querySelectorAll('.facts [title]')].map(e => e.title)")
            assert names == [folder.name for folder in many_runs[:count]]
            heading = browser.execute_script("return document.querySelector('header').innerText")
            assert all(name in heading for name in names)
        opened(browser, page, width=718)  # of a sheet
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(media="print"))
        over, outside, boxes, _ = browser.execute_script(script)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(media=""))
        assert (over, outside) == (0, []) and not any(boxes), boxes


def test_gain_and_loss_can_be_read_on_light_and_dark(many_pages, browser):

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in ("light", "dark"):
        opened(browser, many_pages[1], scheme)
        script = """
            const of = (e, what) => getComputedStyle(e)[what];
            document.body.insertAdjacentHTML("beforeend", "<table class=result><tr class=better><td><b>b</b></table>");
            const shown = [...document.querySelectorAll(".better td b, .worse td b")].map(e => of(e, "color"));
            return [of(document.querySelector(".wide"), "backgroundColor"), [...new Set(shown)]]"""
        ground, colors = browser.execute_script(script)
        assert len(colors) == 2
        for color in colors:  # WCAG 2, for text
            low, high = sorted((luminance(ground), luminance(color)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, color)


def test_text_of_a_run_is_only_text(tmp_path, browser):
    samples = held_out(3, reward=float)
    samples[1] |= {"context": [EVIL, EVIL], "human": EVIL, "after": samples[1]["after"] | {"text": EVIL}}
    looks = [{"update": 1, "env_steps": 9, "context": [EVIL], "before": EVIL, "now": EVIL, "human": EVIL, "scores": {}}]
    folder = made_run(
        tmp_path / "<b>run",
        metric_rows(9, **{EVIL: float, "a$_{$b": float, "score": float}),
        config={"data_path": EVIL},
        warnings=[{"update": 1, "text": EVIL}],
        samples=looks,
        eval_samples=samples,
    )
    page = write_report([folder])
    opened(browser, page)
    assert browser.execute_script("return window.evil") is None
    assert len(browser.find_elements("css selector", "body script:not([type])")) == 1
    assert not browser.find_elements("css selector", "img, main b b, h1 b")
    for selector in (
        "#cards .context li",
        "#cards .reply p",
        "#along .reply p",
        ".warn li",
        "#settings td",
        ".chart b",
    ):
        shown = [e.text for e in browser.find_elements("css selector", selector)]
        assert any("<script>window.evil = 1</script><img" in text for text in shown), selector
    browser.find_element("id", "search").send_keys("<script>window.evil")
    assert browser.find_element("id", "count").text == "1 of 3"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_validation_curve_has_the_value_before_training(tmp_path):
    rows = metric_rows(12, score=lambda i: 0.5)
    for row in rows[3::4]:
        row |= {"validation_reward": 0.5 + 0.01 * row["update"], "validation_reward_start": 0.45}
    run = Run(made_run(tmp_path / "mine", rows))
    (chart,) = [chart for chart in charts_by_title([run]).values() if "validation_reward" in chart.panel.names]
    assert chart.names == ["validation_reward"] and chart.starts == [(0.45, 0, SOFT)]
