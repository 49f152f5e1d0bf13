"""The chat: what the model is shown of a conversation, what a person is shown of the model, and the terminal itself."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import chat
from common import UserError
from dialogue_agent import Agent, presentable
from envs import DialogueFormat

ROOT = Path(chat.__file__).parent
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
WORDS = "hello there how are you today fine thanks what is that it was nothing see you soon good bye".split()


def make_tokenizer(template=None, special_marker=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<PAD>", "<EOS>"] + ["<EOU>"] * special_marker
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[AddedToken(t, special=True) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<PAD>", eos_token="<EOS>")
    fast.chat_template = template
    return fast


def make_model(folder, positions=128, template=None, special_marker=False, seed=0, **sizes):
    """A random GPT-2 with its tokenizer, as a plain Hugging Face folder; without a template it has our format file."""
    tokenizer = make_tokenizer(template, special_marker)
    torch.manual_seed(seed)
    sizes = dict(n_layer=1, n_head=2, n_embd=16) | sizes
    ends = dict(bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=positions, initializer_range=0.5, **ends, **sizes)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not template:
        DialogueFormat().save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def template_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("template"), template=TEMPLATE)


def prompts_of(agent):
    """A list that gets every prompt the model is asked to go on from, as tokens."""
    seen, generate = [], agent.model.generate

    def spy(ids, **kwargs):
        seen.append(ids[0].tolist())
        return generate(ids, **kwargs)

    agent.model.generate = spy
    return seen


def dictate(agent, *replies):
    """Let the model write the token ids of each of `replies` in turn, whatever it is asked."""
    prompts, lines, place = prompts_of(agent), iter(replies), {}

    def force(module, args, output):
        if place.get("reply") != len(prompts):
            place.update(reply=len(prompts), ids=iter(next(lines)))
        output.logits[:, -1] = -1e4
        output.logits[:, -1, next(place["ids"])] = 1e4

    agent.model.register_forward_hook(force)
    return prompts


def run_main(monkeypatch, capsys, *arguments, stdin=None):
    """Status, stdout and stderr of `python chat.py *arguments`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((stdin or "").encode()), encoding="utf-8"))
    monkeypatch.setattr(chat, "use_all_cores", lambda: None)
    status = 0
    try:
        chat.run_script(chat.main)
    except SystemExit as leaving:
        status = leaving.code or 0
    return status, *capsys.readouterr()


# --- what a person is shown of the generated text -------------------------------------------------------------------


def shown(pieces, marker="<EOU>", one_line=True):
    return list(presentable(iter(pieces), marker, one_line))


def test_marker_in_several_pieces_is_held_back_and_ends_the_reply():
    assert shown(["Fine", ",", " thanks", " <", "E", "OU", ">", " never", " seen"]) == ["Fine", ",", " thanks"]
    assert shown(["Fine.<", "EOU>Bye"]) == ["Fine."]
    assert shown(["<EOU>"]) == []


def test_text_that_only_begins_like_the_marker_is_shown_once_that_is_known():
    assert shown(["a <", "E", " b"]) == ["a", " <E b"]
    assert "".join(shown(["1 <<", "E", "EOU> <EO", "U>"])) == "1 <<EEOU>"


def test_a_reply_cut_within_its_marker_shows_nothing_of_it():
    assert "".join(shown(["Well", " <", "EO"])) == "Well"


@pytest.mark.parametrize("cuts", range(1, 12))
def test_pieces_do_not_matter(cuts):
    text = "  One <3 two\n three <EO four \x1b[2J<EOU> five"
    pieces = [text[i : i + cuts] for i in range(0, len(text), cuts)]
    assert "".join(shown(pieces)) == "One <3 two three <EO four [2J"


def test_control_sequences_are_stripped_and_lines_joined_where_asked():
    text = ["\x1b]0;owned\x07Hi\r\x08\x7f\x9b31m ", "\tyou\n\n", "there\n"]
    assert "".join(shown(text)) == "]0;ownedHi31m \tyou there"
    assert "".join(shown(text, marker="", one_line=False)) == "]0;ownedHi31m \tyou\n\nthere"


def test_a_marker_of_several_plain_tokens_is_never_shown_and_ends_generation(folder):
    agent = Agent(folder, greedy=True)
    ids = agent.tokenizer("fine thanks<EOU>see you soon").input_ids
    assert agent.codec.marker_token_id is None
    dictate(agent, ids, ids)
    assert list(agent.stream("hello"))[-1] == " thanks"
    assert agent.reply("hello") == "fine thanks"
    assert agent.history == ["hello", "fine thanks"] * 2


def test_a_special_marker_ends_the_reply_but_not_before_min_new_tokens(tmp_path):
    agent = Agent(make_model(tmp_path, special_marker=True), greedy=True)
    marker = agent.codec.marker_token_id
    dictate(agent, [*agent.tokenizer("good bye").input_ids, marker, 9, 9, 9, 9, 9])
    assert agent.reply("hello") == "good bye"
    agent = Agent(str(tmp_path), min_new_tokens=5, greedy=True)
    seen = []

    def force(module, args, output):
        output.logits[:, -1, marker] = 1e4
        seen.append(1)

    agent.model.register_forward_hook(force)
    agent.reply("hello")
    assert len(seen) == 6


def test_eos_ends_the_reply_and_an_empty_reply_is_empty(folder):
    agent = Agent(folder, greedy=True, min_new_tokens=0)
    dictate(agent, [agent.tokenizer.eos_token_id])
    assert agent.reply("hello") == ""


# --- what the model is shown of the conversation ---------------------------------------------------------------------


def test_dialogue_format_and_reset(folder):
    agent = Agent(folder, seed=0)
    prompts = dictate(agent, *[agent.tokenizer(w + "<EOU>").input_ids for w in ("one", "two", "three", "four")])
    for line in ("a", " b ", "c"):
        agent.reply(line)
    agent.reset()
    agent.reply("d")
    texts = agent.tokenizer.batch_decode(prompts)
    # the blank before the last marker belongs to prompts of full length, as in training
    assert texts[:2] == ["a<EOU>", "a<EOU>one<EOU>b<EOU>"]
    assert texts[2:] == ["a<EOU>one<EOU>b<EOU>two<EOU>c <EOU>", "d<EOU>"]


def test_only_the_last_context_utterances_are_shown_and_spaced_as_asked(folder):
    agent = Agent(folder, spaced=True)
    prompts = dictate(agent, *[agent.tokenizer("ok<EOU>").input_ids] * 4)
    for line in "abcd":
        agent.reply(line)
    assert agent.tokenizer.decode(prompts[-1]) == " b <EOU> ok <EOU> c <EOU> ok <EOU> d  <EOU>"


def test_a_chat_template_is_used(template_folder):
    agent = Agent(template_folder, system="be kind", greedy=True)
    eos = agent.tokenizer.eos_token_id
    prompts = dictate(agent, *[[*agent.tokenizer(t).input_ids, eos] for t in ("fine\n\nthanks", "good bye")])
    assert agent.reply("how are you") == "fine\n\nthanks"
    assert agent.reply("see you") == "good bye"
    first = "[system] be kind\n[user] how are you\n[assistant] "
    assert agent.tokenizer.batch_decode(prompts) == [first, first + "fine\n\nthanks\n[user] see you\n[assistant] "]


def test_how_a_model_is_talked_to_can_be_forced_and_our_own_format_comes_first(tmp_path, folder):
    both = make_model(tmp_path / "both", template=TEMPLATE)
    assert Agent(both).uses_template and not Agent(both, format="dialogue").uses_template
    DialogueFormat(max_new_tokens=7).save(Path(both))
    ours = Agent(both)
    assert not ours.uses_template and ours.generation_config.max_new_tokens == 7
    assert Agent(both, format="template").uses_template
    for settings in (dict(format="template"), dict(system="be kind")):
        with pytest.raises(UserError, match="template"):
            Agent(folder, **settings)
    with pytest.raises(UserError, match="--spaced"):
        Agent(both, format="template", spaced=True)


@pytest.mark.parametrize("template, positions", [(None, 64), (TEMPLATE, 128)])
def test_the_prompt_never_exceeds_the_positions(tmp_path, capsys, template, positions):
    agent = Agent(make_model(tmp_path, positions, template), max_new_tokens=20, greedy=True)
    room = positions - 20
    reply = [*agent.tokenizer("fine thanks good bye").input_ids, agent.tokenizer.eos_token_id]
    prompts = dictate(agent, *[reply] * 8)
    for turn in range(6):
        agent.reply("how are you today " * (1 + turn % 2))
    assert room / 2 < max(map(len, prompts)) <= room
    assert "fine thanks good bye" in agent.tokenizer.decode(prompts[-1])
    assert "left out" not in capsys.readouterr().err
    for _ in range(2):
        agent.reply("what is that " * 100 + "bye")
    text = agent.tokenizer.decode(prompts[-1])
    assert room - 10 < len(prompts[-1]) <= room and "that bye" in text
    assert text.startswith("[user] ") == bool(template)  # the template stays whole
    assert capsys.readouterr().err.count("left out") == 1


def test_a_system_message_without_room_for_a_word_is_said(tmp_path):
    agent = Agent(make_model(tmp_path, positions=64, template=TEMPLATE), system="be kind " * 50)
    with pytest.raises(UserError, match="--system"):
        agent.reply("hello")


def test_a_stopped_reply_keeps_what_was_said(folder):
    agent = Agent(folder, max_new_tokens=100, min_new_tokens=100, seed=0)
    stream = agent.stream("hello")
    first = next(stream)
    stream.close()
    assert agent.history == ["hello", first]
    stream = agent.stream("never begun")
    stream.close()
    assert agent.history == ["hello", first]


def test_what_goes_wrong_in_generation_is_raised(folder):
    agent = Agent(folder)
    agent.model.generate = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        agent.reply("hello")
    assert agent.history == []


def test_the_folders_generation_settings_are_set_aside_but_for_its_ends(tmp_path):
    path = make_model(tmp_path)
    plain = Agent(path, seed=3).reply("hello")
    surprises = '{"repetition_penalty": 9.0, "num_beams": 1, "top_k": 1, "max_length": 3, "eos_token_id": [1, 5]}'
    (tmp_path / "generation_config.json").write_text(surprises)
    agent = Agent(path, seed=3)
    assert agent.reply("hello") == plain
    assert agent.generation_config.eos_token_id == [1, 5]


def test_same_seed_same_answers(folder):
    answers = {seed: [Agent(folder, seed=seed).reply("hello") for _ in range(2)] for seed in (1, 2)}
    assert answers[1][0] == answers[1][1] != answers[2][0] == answers[2][1]
    agent = Agent(folder)
    assert len({(agent.reset(), agent.reply("hello")) for _ in range(4)}) > 1


# --- models by name --------------------------------------------------------------------------------------------------


def test_the_policy_of_a_run_answers_for_its_folder(tmp_path):
    path = make_model(tmp_path / "policy")
    assert Agent(str(tmp_path), seed=1).reply("hello") == Agent(path, seed=1).reply("hello")


def test_models_that_cannot_talk_are_refused(tmp_path, folder):
    BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "bert"
    )
    make_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="BertModel.*causal LM"):
        Agent(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="does not exist"):
        Agent(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="without config.json"):
        Agent(str(tmp_path))
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match="no tokenizer.*--tokenizer-path"):
        Agent(str(tmp_path / "mute"))
    assert Agent(str(tmp_path / "mute"), tokenizer_path=folder).history == []


@pytest.mark.parametrize(
    "settings", [dict(temperature=0.0), dict(top_p=0.0), dict(max_new_tokens=128), dict(min_new_tokens=21)]
)
def test_settings_out_of_range_are_refused(folder, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Agent(folder, **settings)


# --- the script ------------------------------------------------------------------------------------------------------


def test_piped_input_gives_a_line_for_each_utterance(folder, monkeypatch, capsys):
    lines = "hello\n\n  \nhow are you\nRESET\nhelp\nhello\nquit\nnever read\n"
    status, out, err = run_main(monkeypatch, capsys, folder, "--seed", 1, stdin=lines)
    assert (status, err) == (0, "")
    replies = out.split("\n")
    assert len(replies) == 4 and replies[-1] == ""
    assert replies[0] == replies[2]  # reset forgot all there was


def test_piped_input_ends_at_eof_without_a_newline_and_with_stray_bytes(folder):
    run = subprocess.run(
        [sys.executable, ROOT / "chat.py", folder, "--seed", "1"], input=b"hello \xff\nbye", capture_output=True
    )
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.count(b"\n") == 2


def test_prompt_answers_once(folder, monkeypatch, capsys):
    status, out, err = run_main(monkeypatch, capsys, folder, "--prompt", "hello", "--seed", 1, stdin="not read\n")
    assert (status, err, out) == (0, "", Agent(folder, seed=1).reply("hello") + "\n")
    status, out, err = run_main(monkeypatch, capsys, folder, "--prompt", " ")
    assert status == 2 and "--prompt is blank" in err


def test_an_encoder_is_refused_with_status_2_and_a_sentence(tmp_path, monkeypatch, capsys):
    BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path
    )
    status, out, err = run_main(monkeypatch, capsys, tmp_path, "--prompt", "hello")
    assert status == 2 and out == ""
    assert err.startswith("error: model") and err.count("\n") == 1


class Terminal:
    """chat.py on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"  # readline then sends no control sequences
            os.execv(sys.executable, [sys.executable, str(ROOT / "chat.py"), *arguments])

    def send(self, keys):
        os.write(self.fd, keys.encode())

    def until(self, text, seconds=180):
        """Everything written up to and including `text`."""
        seen, end = "", time.monotonic() + seconds
        while text not in seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {text!r}, saw {seen!r}"
            try:
                seen += os.read(self.fd, 1).decode(errors="replace")  # by bytes, so that nothing after it is read
            except OSError:  # Linux: the other side has closed
                raise AssertionError(f"ended before {text!r}, saw {seen!r}") from None
        return seen

    def press(self, key):
        """A key pressed at the prompt, at a person's speed: readline loses a Ctrl-C that comes in the same instant."""
        time.sleep(0.5)
        self.send(key)

    def status(self, seconds=180):
        """Exit status."""
        with pytest.raises(AssertionError, match="ended before"):
            self.until("more than it says", seconds)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


@pytest.fixture
def terminal(request, tmp_path):
    path = make_model(tmp_path, positions=4096, n_layer=4)
    DialogueFormat(max_prompt_tokens=128, max_new_tokens=6).save(tmp_path)
    terminal = Terminal(path, *getattr(request, "param", ()))
    request.addfinalizer(terminal.kill)
    return terminal


def test_a_session_at_a_terminal(terminal):
    banner = terminal.until("you: ")
    assert "parameters" in banner and "dialogue format" in banner and "reset" in banner
    terminal.send("hello there\n")
    assert "agent: " in terminal.until("you: ")
    terminal.send("\n")
    assert "agent" not in terminal.until("you: ")
    terminal.send("reset\n")
    assert "(forgotten)" in terminal.until("you: ")
    terminal.send("help\n")
    assert "quit, exit" in terminal.until("you: ")
    terminal.press("\x03")
    assert "Ctrl-D or quit leaves" in terminal.until("you: ")
    terminal.press("\x04")
    assert terminal.status() == 0


@pytest.mark.parametrize(
    "terminal", [("--min-new-tokens", "3900", "--max-new-tokens", "3900", "--seed", "0")], indirect=True
)
def test_ctrl_c_stops_a_reply_and_leaves_where_pressed_twice(terminal):
    terminal.until("you: ")
    terminal.send("hello\n")
    terminal.until("agent: ")
    terminal.send("\x03")
    assert "(stopped)" in terminal.until("you: ")
    terminal.press("\x03")
    terminal.until("leaves")
    terminal.until("you: ")
    terminal.press("\x03")
    assert terminal.status() == 0
