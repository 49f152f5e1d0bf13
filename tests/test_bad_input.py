"""A table of wrong inputs: each ends in a sentence or two that say what was given and expected, with status 2."""

import importlib.util
import json
import re
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

import estimate
import eval_metrics
import ppo_dialog
import sft_dialog
from chat import ChatConfig
from ppo_dialog import PPOConfig
from support.config import load_yaml
from support.data import load_dialogues
from support.errors import UserError, run_script

GOOD = {"dialog": ["Hi .", "Hello .", "How are you ?", "Fine .", "Good .", "Bye ."], "act": [1, 1, 2, 1, 1, 1]}
OWN = """
THREE = 3
def raises(*_): return 1 / 0
def none(*_): return None
def short(prompts, *_): return [0.0]
def nan(prompts, responses, *_): return [float('nan')] * len(responses)
def words(prompts, responses, *_): return ['good'] * len(responses)
def stats(*_): return 3
def taken(rollout, metrics): return {'score': 1.0}
class Net:
    def __init__(self, config): pass
"""


def tiny_gpt2(**changes) -> GPT2LMHeadModel:
    sizes = dict(vocab_size=330, n_layer=1, n_head=2, n_embd=16, n_positions=256) | changes
    return GPT2LMHeadModel(GPT2Config(**sizes))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder of things that cannot be used, and a few that can."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)

    def write(name, text):
        return (root / name).write_text(text, encoding="utf-8", errors="surrogatepass")

    # dialogues
    def rows(n, row=GOOD):
        return [json.dumps(row | {"dialog": [f"Hi {i} .", *row["dialog"][1:]]}) for i in range(n)]

    good = json.dumps(GOOD)
    write("good.jsonl", "\n".join(rows(60)))
    write("act_word.jsonl", "\n".join(rows(30) + [json.dumps(GOOD | {"act": ["inform"] * 6})] * 30))
    write("unlabelled.jsonl", "\n".join(rows(60, {"dialog": GOOD["dialog"]})))
    write("short.jsonl", "\n".join(rows(60, {"dialog": ["Hi .", "Hello ."], "act": [1, 1]})))
    write("few.jsonl", good)
    write("empty.jsonl", "")
    write("broken.jsonl", good + "\n{'dialog': [}")
    write("scalar.json", "3")
    write("empty.csv", "")
    write("header.csv", "dialog,act\n")
    write("notes.txt", "Hello there")
    write("archive.parquet", "not parquet")
    (root / "nothing").mkdir()
    (root / "no_validation").mkdir()
    (root / "no_validation" / "train.jsonl").write_text("\n".join([good] * 5))
    (root / "torn_zip").mkdir()
    (root / "torn_zip" / "train.zip").write_bytes(b"PK\x03\x04 torn")
    (root / "lacks_acts").mkdir()
    with zipfile.ZipFile(root / "lacks_acts" / "train.zip", "w") as archive:
        archive.writestr("dialogues_train.txt", "Hi . __eou__ Hello . __eou__\n")

    # models
    tokenizer = make_tokenizer()
    bert = dict(vocab_size=330, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    t5 = dict(vocab_size=330, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    emotions = dict(enumerate(["no emotion", "anger", "disgust", "fear", "happiness", "sadness", "surprise"]))
    saved = dict.fromkeys(("lm", "torn_weights", "pickled", "quantised", "deeper"), tiny_gpt2())
    saved |= {
        "small_vocabulary": tiny_gpt2(vocab_size=50),
        "short_positions": tiny_gpt2(n_positions=32),
        "both_ways": XLNetLMHeadModel(XLNetConfig(vocab_size=330, d_model=16, n_layer=1, n_head=2, d_inner=16)),
        "encoder": BertModel(BertConfig(**bert)),
        "encoder_decoder": T5ForConditionalGeneration(T5Config(**t5)),
        "labels2": BertForSequenceClassification(BertConfig(num_labels=2, **bert)),
        "labels3": BertForSequenceClassification(BertConfig(num_labels=3, **bert)),
        "emotions": BertForSequenceClassification(BertConfig(id2label=emotions, **bert)),
    }
    for name, model in saved.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    tiny_gpt2().save_pretrained(root / "no_tokenizer")
    for name, special in (("no_ends", {}), ("no_eos", {"pad_token": "a"})):
        tiny_gpt2().save_pretrained(root / name)
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(root / name)
    tiny_gpt2(vocab_size=1, bos_token_id=0, eos_token_id=0).save_pretrained(root / "one_token")
    one = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=one, eos_token="a", unk_token="a").save_pretrained(root / "one_token")
    weights = root / "torn_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (root / "pickled" / "model.safetensors").unlink()
    torch.save(tiny_gpt2(), root / "pickled" / "pytorch_model.bin")  # the object, not its tensors
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    for name, change in (("quantised", quantised), ("deeper", {"n_layer": 2})):
        config = json.loads((root / name / "config.json").read_text()) | change
        (root / name / "config.json").write_text(json.dumps(config))
    prompt_tuning = get_peft_model(tiny_gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt_tuning.peft_config["default"].base_model_name_or_path = str(root / "lm")
    prompt_tuning.save_pretrained(root / "prompt_tuning")
    for name, text in (("bad_config", "{"), ("unknown_type", '{"model_type": "perceptron"}')):
        tokenizer.save_pretrained(root / name)
        (root / name / "config.json").write_text(text)

    # code and settings
    write("own.py", OWN)
    write("syntax.py", "def reward(:\n")
    write("unknown.yaml", "learning_rte: 1e-6\n")
    write("typed.yaml", "lr: fast\n")
    write("list.yaml", "- lr\n- 3\n")
    write("torn.yaml", "lr: [1\n")
    write("unsafe.yaml", "lr: !!python/object/apply:os.system ['echo unsafe']\n")
    write("twice.yaml", "env:\n  args: 3\n")
    return root


DATA = ["--model-path", "@lm", "--intent-coef", "0", "--data-path"]
MODEL = ["--data-path", "@good.jsonl", "--intent-coef", "0", "--model-path"]
JUDGE = ["--data-path", "@good.jsonl", "--model-path", "@lm", "--intent-model"]
REWARD = [*MODEL, "@lm", "--reward"]
CASES = [
    # the command line and the configuration file
    (["--ppo-epochs", "3"], "ppo-epoch"),
    (["--lr", "fast"], "lr"),
    (["--lr-schedule", "cosine"], "cosine"),
    (["--config"], "needs the name of a YAML file"),
    (["--config", "@nowhere.yaml"], "does not exist"),
    (["--config", "@unknown.yaml"], "learning_rte"),
    (["--config", "@typed.yaml"], "lr"),
    (["--config", "@list.yaml"], "list"),
    (["--config", "@torn.yaml"], "not YAML"),
    (["--config", "@unsafe.yaml"], "not YAML"),
    (["--config", "@twice.yaml"], "env.args"),
    (["--env-num", "0"], "env_num is 0"),
    (["--gamma", "1.5"], "gamma is 1.5"),
    (["--lr", "nan"], "lr is nan"),
    (["--top-p", "0"], "top_p is 0"),
    (["--temperature", "0"], "temperature is 0"),
    (["--max-new-tokens", "0"], "max_new_tokens"),
    (["--max-prompt-tokens", "0"], "max_prompt_tokens"),
    (["--context-utterances", "0"], "context_utterances"),
    (["--eou-marker", " "], "eou_marker"),
    (["--experiment-name", "../elsewhere"], "experiment_name"),
    (["--intent-coef", "0", "--meteor-coef", "0"], "nothing is rewarded"),
    (["--model-class", "a:B", "--critic-class", "a:C"], "policy and value together"),
    (["--use-deepspeed"], "--deepspeed-config"),
    (["--target-kl=0.1"], "give --early-stop-kl"),
    (["--wandb-mode", "offline"], "WANDB_MODE"),
    (["--mixed-precision", "fp16"], "fp16"),
    (["--resume"], "no run in"),
    (["--keep-checkpoints", "0"], "keep_checkpoints is 0"),
    (["--reward-timeout", "-1"], "reward_timeout is -1"),
    (["--run-dir", "/proc/none"], "cannot be written"),
    # dialogues
    ([*DATA, "@nowhere"], "does not exist"),
    ([*DATA, "@nothing"], "nothing"),
    ([*DATA, "@notes.txt"], "notes.txt"),
    ([*DATA, "@archive.parquet"], "archive.parquet"),
    ([*DATA, "@empty.jsonl"], "holds no dialogue"),
    ([*DATA, "@empty.csv"], "empty.csv"),
    ([*DATA, "@header.csv"], "holds no dialogue"),
    ([*DATA, "@broken.jsonl"], "broken.jsonl"),
    ([*DATA, "@scalar.json"], "scalar.json"),
    ([*DATA, "@no_validation"], "validation"),
    ([*DATA, "@torn_zip"], "train.zip"),
    ([*DATA, "@lacks_acts"], "lacks_acts"),
    ([*DATA, "@short.jsonl"], "more than 5 utterances"),
    ([*DATA, "@few.jsonl"], "holds no dialogue"),
    ([*DATA, "@act_word.jsonl"], "whole numbers"),
    (["--model-path", "@lm", "--meteor-coef", "0", "--data-path", "@unlabelled.jsonl"], "nothing of the reward"),
    # models and tokenizers
    ([*MODEL, "@nowhere"], "does not exist"),
    ([*MODEL, "@nothing"], "without config.json"),
    ([*MODEL, "@no_tokenizer"], "no tokenizer"),
    ([*MODEL, "@small_vocabulary"], "embeds only 50"),
    ([*MODEL, "@short_positions"], "32 positions"),
    (["--model-path", "@both_ways", "--intent-coef", "0", "--data-path", "@act_word.jsonl"], "changes what it makes"),
    ([*MODEL, "@lm", "--ref-model", "@short_positions"], "32 positions"),
    ([*MODEL, "@encoder"], "causal"),
    ([*MODEL, "@encoder_decoder"], "causal"),
    ([*MODEL, "@no_ends"], "neither a pad nor an EOS"),
    ([*MODEL, "@no_eos"], "cannot write the marker"),
    ([*MODEL, "@one_token"], "cannot write the marker"),
    ([*MODEL, "@torn_weights"], "cannot be loaded"),
    ([*MODEL, "@pickled"], "safetensors"),
    ([*MODEL, "@quantised"], "is quantised (gptq)"),
    ([*MODEL, "@lm", "--ref-model", "@quantised"], "is quantised (gptq)"),
    ([*MODEL, "@deeper"], "do not fit its config.json"),
    ([*MODEL, "@prompt_tuning"], "PROMPT_TUNING"),
    ([*MODEL, "@lm", "--lora-rank", "2", "--model-path", "@prompt_tuning"], "PROMPT_TUNING"),
    ([*MODEL, "@bad_config"], "cannot be loaded"),
    ([*MODEL, "@unknown_type"], "cannot be loaded"),
    ([*MODEL, "@lm", "--ref-model", "@encoder"], "causal"),
    ([*MODEL, "@lm", "--ref-model", "@small_vocabulary"], "embeds only 50"),
    ([*MODEL, "@lm", "--tokenizer-path", "@nothing"], "no tokenizer"),
    ([*MODEL, "@lm", "--max-new-tokens", "200"], "positions"),
    ([*JUDGE, "@nowhere"], "does not exist"),
    ([*JUDGE, "@labels2"], "tells 2 classes apart"),
    ([*JUDGE, "@labels3"], "tells 3 classes apart"),
    (["--model-path", "@torn_weights", "--intent-model", "@emotions"], "7 classes apart (no emotion, anger"),
    ([*JUDGE, "@encoder"], "no trained classifier"),
    ([*JUDGE, "@quantised"], "is quantised (gptq)"),
    ([*JUDGE, "@prompt_tuning"], "PROMPT_TUNING"),
    # the user's own code
    ([*REWARD, "defualt"], "Did you mean 'default'?"),
    ([*REWARD, "@own.py"], "import path"),
    ([*REWARD, "@nowhere.py:f"], "nowhere.py"),
    ([*REWARD, "@own.py:missing"], "missing"),
    ([*REWARD, "@own.py:THREE"], "is a int"),
    ([*REWARD, "@syntax.py:reward"], "syntax.py"),
    ([*REWARD, "@own.py:raises"], "ZeroDivisionError"),
    ([*REWARD, "@own.py:none"], "one each is due"),
    ([*REWARD, "@own.py:short"], "one each is due"),
    ([*REWARD, "@own.py:nan"], "expected a finite number"),
    ([*REWARD, "@own.py:words"], "no number"),
    ([*MODEL, "@lm", "--stats", "@own.py:THREE"], "cannot be called"),
    ([*MODEL, "@lm", "--stats", "@own.py:stats"], "expected a dict"),
    ([*MODEL, "@lm", "--stats", "@own.py:taken"], "taken already"),
    ([*MODEL, "@lm", "--model-class", "@own.py:Net"], "has no policy"),
    ([*MODEL, "@lm", "--policy-class", "@own.py:Net"], "get_output_embeddings"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, phrase", CASES, ids=[" ".join(c[0][-2:]) for c in CASES])
def test_it_ends_in_a_sentence_and_status_2(arguments, phrase, world, tmp_path, monkeypatch, capfd):
    small = ["--total-time-steps", "20", "--env-num", "2", "--eval-limit", "-1", "--judge-samples", "4"]
    argv = ["ppo_dialog.py", "--run-dir", str(tmp_path / "runs"), *small]
    argv += [a.replace("@", f"{world}/") for a in arguments]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        run_script(ppo_dialog.main)
    printed, errors = capfd.readouterr()
    assert ended.value.code == 2
    assert phrase in errors + printed and "Traceback" not in errors + printed
    if "error: " in errors:  # ours; what tyro cannot parse it answers itself, in a box
        sentence = errors[errors.index("error: ") :].strip()
        assert len(sentence) < 700 and len(re.findall(r"[.!?](?= [A-Z]|$)", sentence)) <= 4


TOO_SHORT = "has 32 positions, but max_prompt_tokens 128 and max_new_tokens 20 need 148; lower one of them"


@pytest.mark.parametrize(
    "script, arguments, phrase",
    [
        (sft_dialog, ["--model-path", "@encoder", "--data-path", "@good.jsonl"], "causal"),
        (sft_dialog, ["--model-path", "@lm", "--data-path", "@short.jsonl"], "utterances"),
        (sft_dialog, ["--model-path", "@lm", "--data-path", "@nowhere"], "does not exist"),
        (sft_dialog, ["--model-path", "@short_positions", "--data-path", "@act_word.jsonl"], f"{TOO_SHORT}."),
        (sft_dialog, ["--model-path", "@short_positions", "--loss-on", "dialogue"], f"{TOO_SHORT}."),
        (
            sft_dialog,
            ["--model-path", "@both_ways", "--data-path", "@act_word.jsonl"],
            "changes what it makes of a text",
        ),
        (estimate, ["--model-path", "@short_positions", "--intent-coef", "0"], f"{TOO_SHORT}."),
        (eval_metrics, ["--model-path", "@short_positions", "--data-path", "@good.jsonl"], f"{TOO_SHORT} in dialogue_"),
        (eval_metrics, ["--model-path", "@lm", "--baseline-path", "@short_positions"], f"{TOO_SHORT} in dialogue_"),
    ],
)
def test_the_other_scripts_answer_alike(script, arguments, phrase, world, tmp_path, monkeypatch, capfd):
    output = ["--output-dir", str(tmp_path / "out")] if script is sft_dialog else []
    monkeypatch.setattr("sys.argv", [script.__name__, *output, *(a.replace("@", f"{world}/") for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        run_script(script.main)
    assert ended.value.code == 2 and phrase in capfd.readouterr().err


# --- anything at all: the readers answer with a sentence, or with dialogues


@given(st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.parquet"]), st.binary(max_size=300))
@settings(deadline=None, max_examples=150)
def test_dataset_readers_survive_any_bytes(name, content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        try:
            assert load_dialogues(str(Path(folder) / name), "train")
        except UserError as error:
            assert str(error).strip().endswith((".", "?"))


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["dialog", "act", "emotion", "speaker"]),
            st.one_of(st.none(), st.integers(), st.text(), st.lists(st.one_of(st.text(), st.integers(), st.none()))),
        ),
        max_size=30,
    )
)
@settings(deadline=None, max_examples=150)
def test_dataset_readers_survive_any_rows(rows):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        for skip in (False, True):
            try:
                dialogues = load_dialogues(str(file), "train", skip_bad_rows=skip)
                assert all(len(d.utterances) == len(d.acts) == len(d.emotions) > 0 for d in dialogues)
            except UserError as error:
                assert str(error).strip().endswith((".", "?"))


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))))
@settings(deadline=None, max_examples=200)
def test_the_yaml_loader_survives_any_bytes(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.yaml"
        file.write_bytes(content)
        try:
            values, notes = load_yaml(PPOConfig, str(file))
            assert isinstance(values, dict) and isinstance(notes, list)
        except UserError as error:
            assert str(error).strip()


@pytest.mark.parametrize(
    ("package", "config"),
    [
        ("peft", lambda folder: PPOConfig(lora_rank=4)),
        ("peft", lambda folder: PPOConfig(model_path=str(folder))),
        ("peft", lambda folder: ChatConfig(path=str(folder))),
        ("peft", lambda folder: eval_metrics.EvalConfig(model_path=str(folder))),
        ("gradio", lambda folder: ChatConfig(path="", web=True)),
        ("deepspeed", lambda folder: PPOConfig(deepspeed_config="configs/ds_config.json")),
        ("trackio", lambda folder: PPOConfig(track=("trackio",))),
        ("openai", lambda folder: PPOConfig(reward={str(folder / "judge.yaml"): 1.0})),
    ],
)
def test_a_package_that_is_not_installed_is_named_before_anything_is_loaded(package, config, monkeypatch, tmp_path):
    for name in ("adapter_config.json", "judge.yaml"):
        (tmp_path / name).write_text("{}")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=rf"needs the package {package}, .* pip install {package} .requirements-all"):
        config(tmp_path).check()
