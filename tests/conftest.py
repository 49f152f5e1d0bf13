"""Fixtures that several test files share: small tokenizers and models made in-process, and the data beside the project.

Nothing here needs a network. Tests of real data and of WordNet are skipped where ../shared is not there, tests in a
browser where there is no Chromium.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
if (SHARED / "data" / "nltk_data").is_dir():
    os.environ["NLTK_DATA"] = str(SHARED / "data" / "nltk_data")  # NLTK reads it when it is imported, below

# tests run side by side, and what they train is small
os.environ.setdefault("TORCH_NUM_THREADS", "1")

import torch  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: E402

from support.libraries import quiet_libraries  # noqa: E402

quiet_libraries()

SENTENCES = [
    "Hello there , how are you today ?",
    "Fine , thanks . And you ?",
    "What time is it ? It is half past six .",
    "Could I have a table for two , please ?",
    "Sure . Please follow me , sir .",
    "I'd like a cup of coffee . No sugar .",
    "See you soon . Good bye !",
]


def make_tokenizer(special_marker=True):
    """A byte-level BPE with <PAD> and <EOS>; the marker <EOU> is a special token, or text of three tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<PAD>", "<EOS>"] + ["<EOU>"] * special_marker
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # as GPT-2 does, the plain variant merges the marker's first character with the stop before it: ".<", "EOU", ">"
    texts = SENTENCES * 5 if special_marker else SENTENCES * 5 + ["Sure.<EOU>", "Is it?<EOU>", "Good.<EOU>"] * 40
    tokenizer.train_from_iterator(texts, trainer)
    if special_marker:  # the judge reads pairs
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A",
            pair="$A <EOU> $B:1 <EOU>:1",
            special_tokens=[("<EOU>", tokenizer.token_to_id("<EOU>"))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<PAD>", eos_token="<EOS>", padding_side="left", truncation_side="left"
    )


@pytest.fixture
def tiny_tokenizer():
    """<EOU> is one special token, as in the tokenizer of the built-in models."""
    return make_tokenizer(special_marker=True)


@pytest.fixture
def tiny_plain_tokenizer():
    """<EOU> is plain text of three tokens, its first merged with a stop before it, as with GPT-2's tokenizer."""
    return make_tokenizer(special_marker=False)


@pytest.fixture
def tiny_lm(tmp_path, tiny_tokenizer):
    """The folder of a GPT-2 of random weights with its tokenizer."""
    folder = tmp_path / "tiny_lm"
    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tiny_tokenizer.eos_token_id)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_positions=256)
    network = GPT2Config(vocab_size=len(tiny_tokenizer), pad_token_id=tiny_tokenizer.pad_token_id, **ends, **sizes)
    GPT2LMHeadModel(network).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shared():
    """The folder beside the project that holds DailyDialog, WordNet and the tutorial."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: the data and the tutorial are not here")
    return SHARED


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium, driven by selenium: a profile of its own, and its console and network in the driver's logs.

    Without Chromium and chromedriver a test is skipped; where CI is set in the environment, it fails.
    """
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    selenium = importlib.util.find_spec("selenium")
    if not (chromium and driver and selenium):
        missing = "no browser here: pip install selenium, and on Debian apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync disable-dev-shm-usage"
    ).split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'browser'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield chrome
    chrome.quit()
