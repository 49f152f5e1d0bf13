"""The result in other hands: `transformers serve` answers with it, and `transformers chat` talks to it."""

import json
import os
import pty
import select
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from chat_templates import chat_model
from conftest import make_tokenizer
from test_programs import trained
from transformers import AutoModelForCausalLM

from support.agent import Agent
from support.models import load_codec
from support.options import TextOptions
from support.text import messages_of

TRANSFORMERS = Path(sys.executable).with_name("transformers")
TALK = ["Hello there , how are you today ?", "Fine , thanks . And you ?", "Sure ."]
RUN = dict(total_time_steps=100, env_num=8, eval_limit=-1, validation_limit=0, sample_interval=0, intent_coef=0.0)


def learned(folder: Path, marker_is_text: bool = False) -> str:
    """Save a small model that has learned to answer, in ChatML or in the dialogue format."""
    chat_model(folder)
    if marker_is_text:
        make_tokenizer(special_marker=False).save_pretrained(folder)
        (folder / "chat_template.jinja").unlink()
    codec = load_codec(str(folder), options=TextOptions())
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    prompts = [messages_of(TALK[:1])]
    [prompt], [target] = codec.prompt_ids(prompts), codec.encode_targets(prompts, TALK[1:2])
    ids = torch.tensor([prompt + target])
    labels = torch.tensor([[-100] * len(prompt) + target])
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> dict[str, str]:
    """The folders that runs of the built-in model, of a chat model and of a model with a marker of text leave."""
    place = tmp_path_factory.mktemp("served")
    models = {"builtin": "builtin", "chat": learned(place / "m1"), "text": learned(place / "m2", marker_is_text=True)}
    said = [[f"Number {k} , please .", f"Here is number {k} ."] for k in range(120)]
    talks = [[*TALK[:2], *said[i], *said[i + 10], *said[i + 20]] for i in range(100)]
    (place / "talks.jsonl").write_text("\n".join(json.dumps({"dialog": talk}) for talk in talks))
    settings = dict(run_dir=str(place), data_path=str(place / "talks.jsonl"), max_new_tokens=20, lr=1e-6) | RUN
    runs = {name: trained(model_path=path, experiment_name=name, **settings) for name, path in models.items()}
    return {name: str(run / "policy") for name, run in runs.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of `transformers serve`, which loads the model that a request names."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    output = tmp_path_factory.mktemp("server") / "output"
    with open(output, "w") as file:
        command = [TRANSFORMERS, "serve", "--port", str(port), "--device", "cpu"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=output.parent, env=environment)
    try:
        end = time.monotonic() + 300
        while not is_up(f"http://localhost:{port}/health"):
            assert process.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.5)
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(30)


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def answers(server: str, policy: str, text: str, **settings) -> list[tuple[str, str]]:
    """Reply and reason of its end, whole and in pieces."""
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=300)
    request = dict(model=policy, messages=[{"role": "user", "content": text}], **settings)
    whole = client.chat.completions.create(**request).choices[0]
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **request) if chunk.choices]
    streamed = "".join(piece.delta.content or "" for piece in pieces)
    return [(whole.message.content, whole.finish_reason), (streamed, pieces[-1].finish_reason)]


@pytest.mark.slow
def test_transformers_serve_gives_the_replies_of_chat_py_with_their_ends(policies, server):
    for name, policy in policies.items():
        expected = Agent(policy, greedy=True).reply(TALK[0])
        assert expected and (name == "builtin" or expected == TALK[1])
        for reply, reason in answers(server, policy, TALK[0], temperature=0):
            marker = "<EOU>" if name == "text" else ""  # of several tokens: it ends the reply, and stays in it
            assert (reply.strip(), reason) == (expected + marker, "stop"), name
    sampled = [answers(server, policies["builtin"], TALK[0], extra_body={"seed": seed})[0] for seed in (1, 2, 3)]
    assert len(set(sampled)) > 1 and all(reply and reason == "stop" for reply, reason in sampled)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["builtin", "chat"])
def test_transformers_chat_talks_with_the_policy(name, policies, server, tmp_path):
    own, screen = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), screen)
    command = [TRANSFORMERS, "chat", policies[name], server, "do_sample=False", "--user", "me"]
    settings = os.environ | {"TERM": "dumb", "COLUMNS": "400"}
    settings.pop("HF_HUB_OFFLINE", None)  # it would refuse this machine's server too
    process = subprocess.Popen(command, cwd=tmp_path, env=settings, start_new_session=True, **streams)
    os.close(screen)
    try:
        until(own, "<me>:")
        for said in (TALK[0], "Sure ."):
            os.write(own, f"{said}\n".encode())
            shown = until(own, "tok/s)").split(f"<{policies[name]}>:")[1]
            reply = shown.strip().splitlines()[0].strip()
            assert len(reply) > 2 and "<" not in reply, shown
            if said == TALK[0]:
                assert reply == Agent(policies[name], greedy=True).reply(said)
            until(own, "<me>:")  # not a question whether to go on, which a reply without an end brings
        os.write(own, b"!exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(own)


def until(terminal: int, text: str, seconds: float = 300) -> str:
    """Everything that is shown up to `text`."""
    seen, end = b"", time.monotonic() + seconds
    while text.encode() not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, f"waited for {text!r}, saw {seen.decode(errors='replace')!r}"
        try:
            seen += os.read(terminal, 1)  # by bytes, so that nothing after it is read
        except OSError:  # the other side has closed
            raise AssertionError(f"ended before {text!r}, saw {seen.decode(errors='replace')!r}") from None
    return seen.decode(errors="replace")
