"""Models and tokenizers by name: which folders are read, which are refused, and that none runs code."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import chat
import estimate
import eval_metrics
import intent_classifier
import ppo_dialog
import sft_dialog
from support.errors import UserError, first_line, run_script
from support.judge import IntentJudge
from support.pretrained import load_pretrained, load_tokenizer

TEXT = torch.arange(12)[None]  # (1, 12) token ids
SIZES = dict(vocab_size=330, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
CAUSAL = dict(task_type="CAUSAL_LM")


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def causal(folder: Path | str) -> torch.nn.Module:
    return load_pretrained(AutoModelForCausalLM, str(folder), "model", dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(TEXT).logits


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Small models of random weights with a tokenizer: a GPT-2, a Llama (tied embeddings), an encoder, a judge."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=330, n_layer=1, n_head=2, n_embd=16, n_positions=256)),
        "llama": LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, max_position_embeddings=256, **SIZES)),
        "encoder": BertModel(BertConfig(**SIZES)),
        "judge": BertForSequenceClassification(BertConfig(num_labels=4, **SIZES)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def folder(world, tmp_path) -> Path:
    """A copy of the GPT-2 that a test may damage."""
    return Path(shutil.copytree(world / "gpt2", tmp_path / "model"))


# --- weights


@pytest.mark.parametrize("form", ["file", "old file", "half", "shards", "beside safetensors"])
def test_pickled_tensors_are_read_and_safetensors_written(form, folder, tmp_path):
    expected = causal(folder)
    tensors = expected.state_dict()
    if form == "beside safetensors":  # these are read, not the pickle
        torch.save({n: torch.zeros_like(t) for n, t in tensors.items()}, folder / "pytorch_model.bin")
    else:
        (folder / "model.safetensors").unlink()
    if form in ("file", "old file", "half"):
        tensors = {n: t.half() if form == "half" else t for n, t in tensors.items()}
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "old file")
    if form == "shards":
        names = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(tensors)}
        for file in set(names.values()):
            torch.save({n: t for n, t in tensors.items() if names[n] == file}, folder / file)
        index = {"metadata": {}, "weight_map": names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = causal(folder)
    assert model.dtype == torch.float32
    assert torch.allclose(logits(model), logits(expected), atol=1e-3 if form == "half" else 0)
    model.save_pretrained(tmp_path / "saved")
    assert {f.name for f in (tmp_path / "saved").iterdir()} >= {"model.safetensors"}
    assert not list((tmp_path / "saved").glob("*.bin"))


def test_a_judge_whose_weights_are_pickled_under_old_names_judges_alike(world, tmp_path):
    folder = Path(shutil.copytree(world / "judge", tmp_path / "judge"))
    expected = IntentJudge(str(folder))

    def rename(n):
        return n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    torch.save({rename(n): t for n, t in expected.model.state_dict().items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.allclose(logits(IntentJudge(str(folder)).model), logits(expected.model), atol=1e-6)


QUANTISED = {"bitsandbytes": dict(load_in_4bit=True), "gptq": dict(bits=4), "awq": dict(bits=4)}
QUANTISED |= {"hqq": dict(quant_config={})}
QUANTISED |= dict.fromkeys(("fp8", "mxfp4", "compressed-tensors", "not yet known"), {})


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM])
def test_a_quantised_model_is_refused_by_its_method(method, auto_class, folder):
    change(folder / "config.json", quantization_config=dict(quant_method=method) | QUANTISED[method])
    with pytest.raises(UserError, match=rf"is quantised \({method}\); expected weights in fp32"):
        load_pretrained(auto_class, str(folder), "model")


def test_a_quantised_model_without_a_method_is_refused(folder):
    change(folder / "config.json", quantization=dict(group_size=64, bits=4))  # as MLX writes it
    with pytest.raises(UserError, match="is quantised; expected"):
        causal(folder)


@pytest.mark.parametrize("name", ["tf_model.h5", "model.onnx", "model-q4.gguf", "consolidated.00.pth", None])
def test_weights_of_another_kind_are_named(name, folder):
    (folder / "model.safetensors").rename(folder / (name or "readme"))
    with pytest.raises(UserError, match="has no weights; expected model.safetensors") as error:
        causal(folder)
    assert ("It holds" in str(error.value)) == bool(name) and (name or "") in str(error.value)


def test_weights_that_are_missing_or_of_another_shape_are_no_model(folder, world):
    change(folder / "config.json", n_layer=2)
    with pytest.raises(UserError, match="12 of 29 are missing or of another shape, such as transformer.h.1"):
        causal(folder)
    change(folder / "config.json", n_layer=1, n_inner=20)
    with pytest.raises(UserError, match="3 of 17 are missing or of another shape, such as transformer.h.0.mlp"):
        causal(folder)
    with pytest.raises(UserError, match="no trained classifier: its weights lack classifier"):
        load_pretrained(AutoModelForSequenceClassification, str(world / "encoder"), "intent model")
    new_head = dict(num_labels=4, ignore_mismatched_sizes=True)
    load_pretrained(AutoModelForSequenceClassification, str(world / "encoder"), "model", **new_head)


def test_a_folder_of_models_says_where_one_is(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "trainer" / "checkpoint-500")
    with pytest.raises(UserError, match="without config.json; .* There is a model in '.*checkpoint-500'"):
        causal(tmp_path / "trainer")


@pytest.mark.parametrize(
    ("said", "line"),
    [("a:\n\n  b\nc", "a: b"), ("a\nb", "a"), ("", "ValueError"), ("a:\n\tb:\n c\n", "a: b: c"), ("a:", "a:")],
)
def test_the_first_line_goes_on_after_a_colon(said, line):
    assert first_line(ValueError(said)) == line


# --- adapters


def adapter(folder: Path, base: Path, config: peft.PeftConfig, rows: int = 0, auto=AutoModelForCausalLM, **kwargs):
    """Save a trained adapter on `base`, with a vocabulary of `rows` if given, and return its logits."""
    torch.manual_seed(1)
    model = auto.from_pretrained(base, **kwargs)
    if rows:
        model.resize_token_embeddings(rows)
    model = peft.get_peft_model(model, config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return logits(model)


LORA = dict(r=2, target_modules=["q_proj"], **CAUSAL)
ADAPTERS = {
    "lora": (peft.LoraConfig(**LORA), 0),
    "dora": (peft.LoraConfig(use_dora=True, **LORA), 0),
    "more tokens": (peft.LoraConfig(**LORA), 340),
    "fewer tokens": (peft.LoraConfig(**LORA), 300),
    "the embedding": (peft.LoraConfig(**LORA | dict(target_modules=["q_proj", "embed_tokens"])), 0),
    "the embedding of more tokens": (peft.LoraConfig(**LORA | dict(target_modules=["q_proj", "embed_tokens"])), 340),
    "the head": (peft.LoraConfig(**LORA | dict(target_modules=["lm_head"])), 0),
    "both, tied": (peft.LoraConfig(ensure_weight_tying=True, **LORA | dict(target_modules=["embed_tokens"])), 0),
    "a new embedding": (peft.LoraConfig(modules_to_save=["embed_tokens"], **LORA), 0),
    "a new one, tied": (peft.LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True, **LORA), 0),
    "some tokens": (peft.LoraConfig(trainable_token_indices=[3, 4], **LORA), 0),
    "some of more tokens": (peft.LoraConfig(trainable_token_indices=[331, 339], **LORA), 340),
    "ia3": (peft.IA3Config(**CAUSAL), 0),
    "loha": (peft.LoHaConfig(**LORA), 0),
}


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning", "ignore:Model has:UserWarning", "ignore:Setting `save_emb")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_trained_on_and_saved_whole(kind, world, tmp_path):
    config, rows = ADAPTERS[kind]
    expected = adapter(tmp_path / "adapter", world / "llama", config, rows)
    model = causal(tmp_path / "adapter")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert all(weight.requires_grad for weight in model.parameters())
    model.save_pretrained(tmp_path / "whole")
    tied = model.all_tied_weights_keys
    gathered = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}  # as save_policy
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    for name in ("whole", "gathered"):
        assert torch.allclose(logits(causal(tmp_path / name)), expected, atol=1e-5), name
    assert len(load_tokenizer(str(tmp_path / "adapter"))) == 330  # its base's: the adapter has none


def test_pickled_adapters_adapters_on_adapters_and_a_trunk(world, tmp_path):
    from safetensors.torch import load_file

    first = adapter(tmp_path / "first", world / "llama", peft.LoraConfig(**LORA))
    tensors = tmp_path / "first" / "adapter_model.safetensors"
    torch.save(load_file(tensors), tensors.with_suffix(".bin"))
    tensors.unlink()
    assert torch.allclose(logits(causal(tmp_path / "first")), first, atol=1e-5)
    causal(tmp_path / "first").save_pretrained(tmp_path / "merged")
    second = adapter(tmp_path / "second", tmp_path / "merged", peft.LoraConfig(**LORA))
    change(tmp_path / "second" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "first"))
    assert torch.allclose(logits(causal(tmp_path / "second")), second, atol=1e-5)
    trunk = load_pretrained(AutoModel, str(tmp_path / "second"), "model", dtype=torch.float32).eval()
    hidden = causal(tmp_path / "second").base_model(TEXT).last_hidden_state
    assert torch.allclose(trunk(TEXT).last_hidden_state, hidden, atol=1e-5)


def test_a_judge_may_be_an_adapter_and_no_adapter_takes_the_place_of_the_other_kind(world, tmp_path):
    settings = dict(r=2, target_modules=["query"], task_type="SEQ_CLS")
    classifier = dict(auto=AutoModelForSequenceClassification, num_labels=4)
    expected = adapter(tmp_path / "judge", world / "encoder", peft.LoraConfig(**settings), **classifier)
    judge = IntentJudge(str(tmp_path / "judge"))
    assert torch.allclose(logits(judge.model), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"adapter of another kind \(SEQ_CLS\); expected a causal language model"):
        causal(tmp_path / "judge")
    adapter(tmp_path / "policy", world / "llama", peft.LoraConfig(**LORA))
    with pytest.raises(UserError, match=r"adapter of another kind \(CAUSAL_LM\); expected a classifier"):
        IntentJudge(str(tmp_path / "policy"))


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=2, **CAUSAL),
        peft.PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL),
        peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **CAUSAL),
        peft.PolyConfig(r=2, target_modules=["q_proj"], n_tasks=1, n_skills=1, n_splits=1, **CAUSAL),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_its_kind(config, world, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(world / "llama"), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"adapter of the kind {config.peft_type.value}, which cannot be merged"):
        causal(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (dict(base_model_name_or_path="./nowhere"), "base model of the adapter .* does not exist.*adapter_config.json"),
        (dict(base_model_name_or_path=None), "names no base model; add base_model_name_or_path"),
        (dict(peft_type="MYSTERY"), "cannot be loaded: KeyError: 'MYSTERY'"),
        ("no weights", "adapter without weights; expected adapter_model.safetensors"),
        ("a tensor less", "Found missing adapter keys"),
        ("another base", "size mismatch for base_model"),
        ("a quantised base", r"base model of the adapter .* is quantised \(gptq\)"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_adapter_that_cannot_be_read_is_said(spoil, said, world, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter(tmp_path / "adapter", world / "llama", peft.LoraConfig(**LORA))
    weights, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    if isinstance(spoil, dict):
        change(config, **spoil)
    elif spoil == "no weights":
        weights.unlink()
    elif spoil == "a tensor less":
        save_file(dict(list(load_file(weights).items())[1:]), weights)
    else:
        base = Path(shutil.copytree(world / "llama", tmp_path / "base"))
        if spoil == "another base":
            LlamaForCausalLM(LlamaConfig.from_pretrained(base, hidden_size=32)).save_pretrained(base)
        else:
            change(base / "config.json", quantization_config=dict(quant_method="gptq", bits=4))
        change(config, base_model_name_or_path=str(base))
    with pytest.raises(UserError, match=said):
        causal(tmp_path / "adapter")


# --- tokenizers

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] hello how are you".replace(" ", "\n")


def test_a_tokenizer_of_an_old_format_is_read(world, tmp_path):
    folder = tmp_path / "bert"
    AutoConfig.from_pretrained(world / "judge").save_pretrained(folder)
    (folder / "vocab.txt").write_text(WORDS)
    assert load_tokenizer(str(folder))("hello you").input_ids == [2, 5, 8, 3]


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": "{}"}, {"special_tokens_map.json": "{}"}])
@pytest.mark.parametrize("model", ["gpt2", "llama", "judge"])
def test_a_folder_without_a_vocabulary_holds_no_tokenizer(model, files, world, tmp_path):
    AutoConfig.from_pretrained(world / model).save_pretrained(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"holds no tokenizer \(no tokenizer.json\); save the model's tokenizer there"):
        load_tokenizer(str(tmp_path))


def test_packages_that_a_tokenizer_needs_are_named(world, tmp_path, monkeypatch):
    AutoConfig.from_pretrained(world / "llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    for package in ("sentencepiece", "tiktoken"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install sentencepiece tiktoken"):
        load_tokenizer(str(tmp_path))


# --- no code of a folder runs, and no script asks whether to run it

MAP = {name: "trap.Model" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")}
SMALL = ["--total-time-steps", "20", "--env-num", "2", "--eval-limit", "-1"]
COMMANDS = {
    "policy": (ppo_dialog, ["--model-path", "@model", "--intent-coef", "0", *SMALL]),
    "reference": (ppo_dialog, ["--ref-model", "@model", "--intent-coef", "0", *SMALL]),
    "judge": (ppo_dialog, ["--intent-model", "@model", *SMALL]),
    "tokenizer": (ppo_dialog, ["--tokenizer-path", "@words", "--intent-coef", "0", *SMALL]),
    "adapter": (ppo_dialog, ["--model-path", "@adapter", "--intent-coef", "0", *SMALL]),
    "sft": (sft_dialog, ["--model-path", "@model"]),
    "classifier": (intent_classifier, ["--model-path", "@model"]),
    "classifier's tokenizer": (intent_classifier, ["--model-path", "@words"]),
    "evaluation": (eval_metrics, ["--model-path", "@model"]),
    "second judge": (eval_metrics, ["--model-path", "builtin", "--limit", "2", "--second-intent-model", "@model"]),
    "chat": (chat, ["@model", "--prompt", "hello"]),
    "chat's tokenizer": (chat, ["builtin", "--tokenizer-path", "@words", "--prompt", "hello"]),
    "page": (chat, ["@model", "--web"]),
    "estimate": (estimate, ["--model-path", "@model"]),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_no_script_runs_code_of_a_folder_or_asks_whether_to(what, world, tmp_path, monkeypatch, capfd):
    script, arguments = COMMANDS[what]
    asked, proof = [], tmp_path / "was_here"
    for name in ("model", "words"):
        folder = Path(shutil.copytree(world / "gpt2", tmp_path / name))
        (folder / "trap.py").write_text(f"import pathlib; pathlib.Path({str(proof)!r}).touch()")
        change(folder / "config.json", model_type="trap")
    change(tmp_path / "model" / "config.json", auto_map=MAP)
    tokenizer = dict(tokenizer_class="Trap", auto_map={"AutoTokenizer": [None, "trap.Model"]})
    change(tmp_path / "words" / "tokenizer_config.json", **tokenizer)
    adapter(tmp_path / "adapter", world / "llama", peft.LoraConfig(**LORA))
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # pytest's own has no reconfigure
    monkeypatch.setattr(sys, "argv", [script.__name__, *(a.replace("@", f"{tmp_path}/") for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        run_script(script.main)
    assert ended.value.code == 2 and "of its own (auto_map" in capfd.readouterr().err
    assert not asked and not proof.exists()


def test_a_folder_with_code_for_a_known_type_is_read_without_it(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question="": pytest.fail(question))
    expected = logits(causal(folder))
    (folder / "trap.py").write_text("raise SystemExit")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit")
    change(folder / "config.json", auto_map=MAP)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "trap.Model"]})
    model = causal(folder)
    assert torch.equal(logits(model), expected) and len(load_tokenizer(str(folder))) == 330
    assert model.generate(TEXT, max_new_tokens=2, do_sample=False).shape == (1, 14)


LOADERS = ("from_pretrained", "from_config", "pipeline")


def test_every_call_that_could_run_code_of_a_folder_says_not_to():
    """Covers `from_pretrained`, `from_config` and `pipeline` of transformers, in scripts and examples."""
    root, calls = Path(chat.__file__).parent, 0
    for file in [f for folder in ("", "support", "examples", "benchmarks") for f in (root / folder).glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if getattr(node.func, "attr", getattr(node.func, "id", "")) not in LOADERS:
                continue
            called = ast.unparse(node.func)
            if "Peft" not in called and called != "GenerationConfig.from_pretrained":  # these hold no code
                calls += 1
                assert "trust_remote_code" in ast.unparse(node) or "**" in ast.unparse(node), f"{file}: {called}"
    assert calls >= 4
