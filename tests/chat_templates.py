"""Small chat templates of the forms that today's models have, with tokenizers and models of every family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from conftest import SENTENCES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from support.models import load_codec
from support.options import FormatOptions, SampleOptions, TextOptions
from support.samples import load_samples


@dataclass(frozen=True)
class Form:
    """A template, the tokens that it writes, and what ends a turn."""

    template: str
    special: tuple[str, ...]
    end: str  # a token, or text
    bos: str | None = None
    plain: tuple[str, ...] = ()  # added tokens that are not special
    takes_system: bool = True
    alternates: bool = False  # it refuses conversations in which user and assistant do not take turns
    end_is_text: bool = False


CHATML = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You are small<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""

QWEN3 = """\
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' and loop.index0 > last.user %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
        {{- message['content'].split('</think>')[-1].lstrip('\\n') }}
    {%- else %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

PHI3 = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

SMOLLM3 = """\
{%- set mode = "/no_think" if enable_thinking is defined and enable_thinking is false else "/think" %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = 'You are small.' %}{%- set turns = messages %}{%- endif %}
{{- "<|im_start|>system\\nToday Date: " + strftime_now("%d %B %Y") + "\\nReasoning Mode: " + mode + "\\n" + system }}
{{- "<|im_end|>\\n" }}
{%- for message in turns %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

GRANITE = """\
{%- for message in messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""

OLMO2 = """\
{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{%- if not loop.last %}{{ '\\n' }}{% endif %}
{%- else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

PLAIN = """\
{% set names = {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'} %}
{%- for message in messages %}{% set who = names[message['role']] %}
{{- '### ' + who + ': ' + message['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:' }}
{%- endif %}"""

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
FORMS = {
    "ChatML": Form(CHATML, IM, "<|im_end|>"),
    "Llama 3": Form(
        LLAMA3,
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "Gemma": Form(GEMMA, ("<eos>", "<bos>", *TURN), TURN[1], bos="<bos>", takes_system=False, alternates=True),
    "Gemma, tokens not special": Form(
        GEMMA, ("<eos>", "<bos>"), TURN[1], bos="<bos>", plain=TURN, takes_system=False, alternates=True
    ),
    "Mistral": Form(MISTRAL, ("</s>", "<s>", "[INST]", "[/INST]"), "</s>", bos="<s>", alternates=True),
    "Qwen3": Form(QWEN3, IM, "<|im_end|>", plain=("<think>", "</think>")),
    "Phi-3": Form(PHI3, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "SmolLM3": Form(SMOLLM3, IM, "<|im_end|>"),
    "Granite": Form(GRANITE, ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>"),
    "OLMo 2": Form(OLMO2, ("<|endoftext|>",), "<|endoftext|>", bos="<|endoftext|>"),
    "plain text": Form(PLAIN, ("<|endoftext|>",), "\n### Human:", end_is_text=True),
}
INCONSISTENT = CHATML.replace("<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>answer\n' }}{% endif %}")
REFUSES_ALL = "{{ raise_exception('nothing is good enough') }}"
NOT_JINJA = "{% for message in messages %}{{ message['content'] }"


def chat_tokenizer(name: str, pad: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE with the tokens of a form. Its EOS is the first of them, and its pad token `pad` or EOS."""
    form, tokenizer = FORMS[name], Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys([*form.special, *([pad] if pad else [])])
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in form.plain])
    ends: dict[str, Any] = {"eos_token": form.special[0], "pad_token": pad or form.special[0]}
    if form.bos:
        ends["bos_token"] = form.bos
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", truncation_side="left", **ends)
    made.chat_template = form.template
    return made


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)
GROUPED = SIZES | dict(intermediate_size=64, num_key_value_heads=1)
SLIDING = GROUPED | dict(head_dim=16, sliding_window=16)  # shorter than the texts
FAMILIES = {
    "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=512, **ids),
    "opt": lambda **ids: OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **SIZES, **ids),
    "llama": lambda **ids: LlamaConfig(tie_word_embeddings=False, **GROUPED, **ids),
    "smollm": lambda **ids: LlamaConfig(tie_word_embeddings=True, **GROUPED, **ids),
    "qwen2": lambda **ids: Qwen2Config(tie_word_embeddings=True, **GROUPED, **ids),
    "qwen3": lambda **ids: Qwen3Config(tie_word_embeddings=True, head_dim=16, **GROUPED, **ids),
    "mistral": lambda **ids: MistralConfig(**SLIDING, **ids),
    "gemma2": lambda **ids: Gemma2Config(query_pre_attn_scalar=16, **SLIDING, **ids),
    "gemma3": lambda **ids: Gemma3TextConfig(query_pre_attn_scalar=16, sliding_window_pattern=2, **SLIDING, **ids),
    "phi3": lambda **ids: Phi3Config(**GROUPED, **ids),
    "gpt_neox": lambda **ids: GPTNeoXConfig(intermediate_size=64, **SIZES, **ids),
    "smollm3": lambda **ids: SmolLM3Config(no_rope_layers=[1, 0], **GROUPED, **ids),
    "olmo2": lambda **ids: Olmo2Config(**GROUPED, **ids),
    "granite": lambda **ids: GraniteConfig(logits_scaling=2.0, residual_multiplier=0.5, **GROUPED, **ids),
}


def small_model(family: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """Save a model of random weights with a tokenizer."""
    torch.manual_seed(0)
    # one row more: with a Qwen2 model the tokenizer is loaded as Qwen2's, which adds a token
    ids = dict(vocab_size=len(tokenizer) + 1, pad_token_id=tokenizer.pad_token_id)
    ids |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**ids)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def chat_model(folder: Path, form: str = "ChatML", family: str = "llama") -> str:
    """Save a small model with the tokenizer of a form; its generation_config names two end tokens."""
    tokenizer = chat_tokenizer(form)
    model = small_model(family, folder, tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("!")]
    model.generation_config.save_pretrained(folder)
    return str(folder)


@dataclass
class Options(SampleOptions, TextOptions, FormatOptions):
    """What load_samples reads of a script's options."""

    data_path: str = ""
    skip_bad_rows: bool = False


def load(folder: str, path: str, splits: tuple[str, ...] = ("train",), **settings: Any) -> SimpleNamespace:
    """The codec, the samples, and the lines that a load says."""
    options, lines = Options(data_path=path, **settings), []
    codec, samples = load_samples(options, load_codec(folder, "", options), folder, splits, lines.append, 512)
    return SimpleNamespace(codec=codec, samples=samples, lines=lines)
