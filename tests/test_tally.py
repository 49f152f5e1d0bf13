"""The tally of blind comparisons: what is counted, the exact interval, and files that cannot be counted."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

import tally
from support.errors import UserError, run_script
from support.tally import Choice, last_words, one_line, read_choices, tallies, tally_of

ROOT = Path(__file__).parents[1]


def row(chosen="a", rejected="b", tie=False, prompt="hello", **more):
    reply = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    asked = [{"role": "system", "content": "be kind"}, {"role": "user", "content": prompt}]
    return dict(prompt=asked, **reply, chosen_model=chosen, rejected_model=rejected, tie=tie, **more)


def write(file, *rows, end=""):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows) + end, encoding="utf-8")
    return str(file)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs `python tally.py ...` in this process: status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tally.py", *map(str, arguments)])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
        status = 0
        try:
            run_script(tally.main)
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


def test_wins_ties_and_losses_are_those_of_the_first_name(tmp_path, run):
    rows = [row("b", "a")] * 3 + [row("a", "b", prompt="bye")] * 2 + [row("b", "a", tie=True)]
    status, out, err = run(write(tmp_path / "p.jsonl", *rows), "--by-prompt")
    assert (status, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0].endswith("p.jsonl: 6 choices") and lines[2:4] == ["A: a", "B: b"]
    assert lines[4] == "6 comparisons: A won 2, B won 3, 1 tie."
    assert lines[5].startswith("A won 40.0% of 5 decided, 95% interval 5.3% to 85.3%; exact two-sided p = 1 ")
    assert [line.split() for line in lines[7:]] == [["4", "0", "1", "3", "hello"], ["2", "2", "0", "0", "bye"]]


def test_rows_of_an_open_page_have_no_tie_and_count(tmp_path):
    rows = [row("a", "b"), row("b", "a"), row("a", "b")]
    for open_row in rows[1:]:
        del open_row["tie"]
    choices = read_choices(write(tmp_path / "p.jsonl", *rows))
    [found] = tallies(choices.rows)
    assert (found.wins, found.ties, found.losses) == (2, 0, 1)
    assert choices.notes() == ["2 choices were made with the names of the models in view (without --blind)."]


def tail(n, k, p):
    """The probability of k or more wins among n."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize("wins, losses", [(9, 1), (30, 20), (3, 4)])
def test_the_interval_is_that_of_clopper_and_pearson(wins, losses):
    n = wins + losses
    choices = [Choice("a", "b", False, "")] * wins + [Choice("b", "a", False, "")] * losses
    test = tally_of(choices, ("a", "b")).test()
    low, high = test["interval"]
    assert tail(n, wins, low) == pytest.approx(0.025) and 1 - tail(n, wins + 1, high) == pytest.approx(0.025)
    assert test["share"] == wins / n
    assert test["p_value"] == pytest.approx(min(1, 2 * tail(n, max(wins, losses), 0.5)))
    mirrored = tally_of(choices, ("b", "a")).test()
    assert mirrored["interval"] == pytest.approx([1 - high, 1 - low]) and mirrored["p_value"] == test["p_value"]


def test_ties_alone_decide_nothing(tmp_path, run):
    file = write(tmp_path / "p.jsonl", row(tie=True))
    status, out, _ = run(file, "--output", tmp_path / "new" / "t.json")
    assert status == 0 and "1 comparison: A won 0, B won 0, 1 tie." in out and "Nothing was decided" in out
    [pair] = json.loads((tmp_path / "new" / "t.json").read_text())["pairs"]
    assert pair["share"] is pair["interval"] is pair["p_value"] is None and pair["ties"] == 1


def test_each_pair_of_models_has_its_tally_and_the_output_has_all(tmp_path, run):
    rows = [row("c", "a"), row("b", "a"), row("b", "c", prompt="x" * 200), row("a", "b", tie=True)]
    file = write(tmp_path / "p.jsonl", *rows)
    status, out, _ = run(file, "--by-prompt", "--output", tmp_path / "t.json")
    assert status == 0 and f"written to {tmp_path / 't.json'}" in out and "x" * 69 + "…" in out
    stored = json.loads((tmp_path / "t.json").read_text())
    assert [pair["models"] for pair in stored["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    first, _, last = stored["pairs"]
    assert (first["wins"], first["ties"], first["losses"]) == (0, 1, 1)
    assert last["prompts"] == [dict(prompt="x" * 200, asked=1, wins=1, ties=0, losses=0)]
    assert (stored["file"], stored["choices"], stored["skipped"]) == (file, 4, {})


def test_thousands_of_rows_are_counted():
    draw = random.Random(0)
    choices = [Choice(*draw.sample(("a", "b"), 2), draw.random() < 0.2, str(i % 500)) for i in range(20_000)]
    [found] = tallies(choices)
    assert found.asked == 20_000 and len(found.prompts) == 500 and {c.asked for c in found.prompts.values()} == {40}
    low, high = found.test()["interval"]
    assert low < 0.5 < high < low + 0.02


def test_lines_that_are_no_choice_are_counted_by_reason(tmp_path, run):
    ordinary = {name: "text" for name in ("prompt", "chosen", "rejected")}
    bad = [ordinary, ordinary, row("a", "a"), row(tie="no"), row(chosen=None), row(rejected=""), [1], row()]
    file = Path(write(tmp_path / "p.jsonl", row(when="today"), *bad, end='\n \nhello\n{"prompt": "tor'))
    file.write_bytes(file.read_bytes().replace(b"hello\n", b"hello\n\xff\xfe\n" + b"[" * 10**5 + b"\n", 1))
    choices = read_choices(file)
    assert len(choices.rows) == 2
    assert sorted(choices.skipped.values()) == [1, 1, 1, 4, 4] and choices.unread == {"when"}
    status, out, _ = run(file)
    assert (
        status == 0
        and "note: 11 lines were not counted: 4 " in out
        and "note: columns that were not read: when." in out
    )
    for said in (
        "4 without chosen_model",
        "4 not a JSON",
        "1 with the same",
        "1 whose 'tie'",
        "1 cut short at the end",
    ):
        assert said in out


def test_a_last_line_without_its_newline_counts_if_it_is_whole(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\ufeff" + json.dumps(row()) + "\r\n" + json.dumps(row()), encoding="utf-8")
    assert len(read_choices(file).rows) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no file '.*'; python chat.py A --versus B --web --blind writes"),
        ("", "is empty: no choice was written"),
        ("\n\n", "is empty: no choice was written"),
        ('{"prompt": "tor', "holds no choice between two models: 1 cut short"),
        ("hello\n", "1 not a JSON object"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2, "2 without chosen_model .* --blind writes rows"),
    ],
)
def test_a_file_without_a_choice_is_answered_by_a_sentence(tmp_path, run, content, message):
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_choices(file)
    status, out, err = run(file)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_an_output_that_cannot_be_written_is_answered_before_the_count(tmp_path, run):
    file = write(tmp_path / "p.jsonl", row())
    for output, message in (
        (tmp_path, "cannot be written"),
        (file, "the file of choices itself"),
        (file + "/x", "cannot"),
    ):
        status, out, err = run(file, "--output", output)
        assert (status, out) == (2, "") and message in err
    assert json.loads(Path(file).read_text()) == row()
    status, _, err = run(tmp_path)
    assert status == 2 and "cannot be read" in err


def test_the_last_words_of_the_user_are_the_prompt():
    turns = [dict(role=role, content=f" {role} ") for role in ("system", "user", "assistant")]
    assert last_words({"prompt": turns}) == "user" and last_words({"prompt": "as text"}) == "as text"
    for prompt in (None, [], [1], {"role": "user"}, turns[:1], [dict(role="user", content=None)]):
        assert last_words({"prompt": prompt}) == ""


def test_what_was_said_cannot_move_the_cursor():
    assert one_line("one\x1b[2J\n two\u202e\ud800 three") == "one [2J two three"


def test_it_runs_without_heavy_libraries_and_a_reader_may_leave_early(tmp_path):
    file = write(tmp_path / "p.jsonl", *[row(prompt=f"\ud800 {n}") for n in range(3000)])
    code = (
        "import sys, tally; sys.argv = ['tally.py', *sys.argv[1:]]; tally.main(); "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, file, "--by-prompt"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout.readline().endswith(b"3,000 choices\n")
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 0
