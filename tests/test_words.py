"""Words in other scripts than English: metrics, rewards and distinct-n count them; English figures do not move."""

import json
import random
import unicodedata

import nltk
import numpy as np
import pytest
import sacrebleu
import torch
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import eval_metrics
from eval_metrics import Answers, DistinctN, Meteor, NGrams, Rouge, SacreBleu, compare, score_answers
from ppo_dialog import PPOConfig, train
from reproduce.results import habits
from rewards import CrossPromptOverlap, MBRConsensus, make_reward
from support import meteor as meteor_module
from support.samples import Sample
from support.words import describe, spaced, word_tokenizer_for, words

REPLIES = {  # a reply of at least four words in each language, and how many words it has, punctuation among them
    "Chinese": ("你好，今天天气很好。", 10),
    "Japanese": ("こんにちは、コーヒーを飲みますか。", 14),
    "Korean": ("안녕하세요, 오늘 날씨가 좋네요.", 6),
    "Russian": ("Привет, как у тебя дела?", 7),
    "Arabic": ("مرحبا، كيف حالك اليوم؟", 6),
    "Persian": ("سلام، من نمی‌خواهم بروم", 5),
    "Hebrew": ("שלום, מה שלומך היום?", 6),
    "Hindi": ("नमस्ते, आप कैसे हैं।", 6),
    "Thai": ("สวัสดีครับ", 7),
    "Khmer": ("សួស្តីអ្នក", 6),
    "Greek": ("Γεια σου, τι κάνεις;", 6),
    "German": ("Schöne Grüße über die Brücke", 5),
    "Vietnamese": ("Xin chào, bạn có khỏe không?", 8),
    "Amharic": ("ሰላም፡እንዴት፡ነህ", 5),
    "mixed": ("我用Python 3.5写代码, don't you?", 12),
}


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch):
    monkeypatch.setattr(meteor_module, "_meteor_parts", lambda: (meteor_module._Stemmer(), meteor_module._NoWordNet()))


@pytest.mark.parametrize("language", REPLIES)
def test_the_human_reply_has_full_marks_in_every_language(language):
    reply, n = REPLIES[language]
    assert len(words(reply)) == n
    given = dict(predictions=[reply], references=[reply])
    assert Rouge().compute(**given) == dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 1)
    assert SacreBleu().compute(**given) == {"sacrebleu": pytest.approx(1)}
    assert Meteor().compute(**given) == {"meteor": pytest.approx(1 - 0.5 / n**3)}  # one chunk of n matches
    # and what has no word in common has none
    assert Meteor().compute(predictions=["Њ"], references=[reply]) == {"meteor": 0}


def test_partial_overlap_in_chinese_by_hand():
    given = dict(predictions=["我喜欢红茶"], references=["我很喜欢喝红茶"])  # 5 characters of 7, in 3 chunks
    rouge = Rouge().compute(**given)
    assert rouge["rouge1"] == rouge["rougeL"] == pytest.approx(2 * 5 / 12)  # precision 1, recall 5/7
    assert rouge["rouge2"] == pytest.approx(2 * 2 / 10)  # 喜欢 and 红茶, of 4 pairs and 6
    fmean = (5 / 7) / (0.9 + 0.1 * 5 / 7)
    assert Meteor().compute(**given) == {"meteor": pytest.approx((1 - 0.5 * (3 / 5) ** 3) * fmean)}
    assert DistinctN().compute(predictions=["好的好的", "好"]) == {"distinct1": 2 / 5, "distinct2": 2 / 3}


def test_bleu_is_that_of_sacrebleus_tokenizers():
    chinese = ["你好，今天天气很好，我们去公园吧。", "我用Python写代码，花了￥100！"]
    others = ["你好！今天天气不错，我们一起去公园吧。", "他用Python写了代码，花了￥200！"]
    russian = ["Привет, как у тебя дела? Это стоит 2,5 руб.", "«Да», сказал он… п’ять."]
    other = ["Привет, как твои дела? Это стоит 2,5 рубля.", "«Нет», сказал он… п’ять."]
    for predictions, references, tokenizer in ((chinese, others, "zh"), (russian, other, "intl")):
        expected = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score / 100
        result = SacreBleu().compute(predictions=predictions, references=references)
        assert 0.4 < expected < 0.9 and result == {"sacrebleu": pytest.approx(expected)}


def test_the_form_of_a_letter_does_not_matter():
    composed = "Où est le café là-bas ?"
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed and words(composed) == words(decomposed)
    assert Rouge().compute(predictions=[composed], references=[decomposed])["rouge2"] == 1


def test_only_letters_and_digits_beyond_ascii_choose_the_tokenizer():
    english = ["Don’t “go” — it’s £5… 😀 ❤️ 1️⃣ °。", "Sure, I'll be there at 7.", ""]
    assert word_tokenizer_for(english) == "english" == describe("english")
    assert [spaced(text) for text in english] == english  # so both tokenizers give it the same words
    for reply in ("naïve", "好", "٣", "Да", "５"):
        assert word_tokenizer_for([*english, reply]) == "unicode"
    assert describe("unicode").startswith("unicode (UAX #29, regex 20")


def evaluated(texts, references):
    samples = [Sample(({"role": "user", "content": "p"},), "p<EOU>", reply) for reply in references]
    n = len(texts)
    return score_answers(Answers(list(texts), [1] * n, [True] * n, [-1.0] * n, [1] * n, 0.0, 20), samples)


def test_a_models_stray_letters_change_nothing_of_an_english_table():
    references, replies = ["See you at the cafe.", "Yes, I do. Don't you?"], ["See you。日本 x.y", "naïve б.x I do"]
    result = evaluated(replies, references)
    tokens = [nltk.word_tokenize(text, preserve_line=True) for text in replies]
    for i, (reply, reference) in enumerate(zip(replies, references)):
        for name, score in RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"]).score(reference, reply).items():
            assert result.scores[name][i] == score.fmeasure
        texts = nltk.word_tokenize(reference, preserve_line=True), tokens[i]
        assert result.scores["meteor"][i] == single_meteor_score(*texts, wordnet=meteor_module._NoWordNet())
    assert result.scores["rouge1"][1] == pytest.approx(2 * 2 / 11) and result.scores["meteor"][1] > 0.1
    expected = sacrebleu.corpus_bleu(replies, [references], tokenize="intl").score / 100
    assert result.metrics()["sacrebleu"] == pytest.approx(expected)
    assert result.ngrams["distinct1"].ids.size == len(tokens[0] + tokens[1])
    assert compare(result)["settings"]["word_tokenizer"] == "english"


def test_a_mixed_corpus_scores_each_reply_in_its_words():
    english = ["See you at the café.", "Yes, I do. Don't you?", "I'd say so."], ["See you.", "I do. Don't I?", "So so."]
    chinese = ["你好，今天天气很好。"] * 2, ["你好，今天很热。", "OK"]
    alone = evaluated(english[1][1:], english[0][1:])
    both = evaluated(english[1] + chinese[1], english[0] + chinese[0])
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum", "meteor"):
        assert both.scores[name][1:3].tolist() == alone.scores[name].tolist()
    assert both.scores["rouge1"][3] == pytest.approx(2 * 5 / (8 + 6))  # 你 好 今 天 很
    assert compare(both)["settings"]["word_tokenizer"] == describe("unicode")
    both_models = compare(both, evaluated(["Да"] * 5, english[0] + chinese[0]), n_bootstrap=20)
    low, high = both_models["difference"]["distinct1"]["ci95"]
    assert low < both_models["difference"]["distinct1"]["value"] < high


def test_leaving_out_a_chinese_reply():
    texts = ["好的好的", "好", "的好"]
    left_out = [NGrams(texts[:i] + texts[i + 1 :], 2).distinct(np.ones(2)) for i in range(3)]
    assert NGrams(texts, 2).distinct_without(3).tolist() == pytest.approx(left_out) == [1, 2 / 4, 2 / 3]


def test_rewards_count_the_words_that_the_run_chose():
    parts = dict.fromkeys(("meteor", "consensus", "commonplace"), 1.0)
    episodes = ["a", "a", "b", "b"], ["我很好", "我好", "很好", "你好"], ["我很好", "我很好", "OK", "OK"], [0] * 4
    _, statistics = make_reward(parts, {}, "cpu", "<EOU>", "unicode")(*episodes)
    assert statistics["meteor"][0] == pytest.approx(1 - 0.5 / 27) and statistics["meteor"][1] > 0.3
    assert (statistics["consensus"] > 0).all()  # also where the human reply is "OK"
    assert statistics["commonplace"].tolist() == [0.5, 0, 1, 0]  # 很好 stands in replies to both prompts
    _, before = make_reward(parts, {}, "cpu", "<EOU>", "english")(*episodes)
    assert before["meteor"].tolist() == [0.5, 0, 0, 0] and not before["consensus"].any()
    for part in (MBRConsensus, CrossPromptOverlap):
        assert part().word_tokenizer == "unicode"


def test_repetition_in_chinese(tmp_path):
    head = json.dumps({"seconds": 1})
    rows = [{"text": t, "reply": r, "ended": True} for t, r in (("好的吧好的吧", "好"), ("今天天气很好", "OK"))]
    file = tmp_path / "replies.jsonl"
    file.write_text("\n".join([head, *(json.dumps(row) for row in rows)]) + "\n")
    assert habits(file) == {"at_limit": 0, "repeating": 0.5}


CHARACTERS = "我你他很好不是的在吃喝看去来大小"


@pytest.fixture
def chinese(tmp_path):
    """The folders of Chinese dialogues and of a model of random weights that writes their characters."""
    rng = random.Random(0)

    def sentence():
        return "".join(rng.choices(CHARACTERS, k=6)) + "。"

    for split in ("train", "validation", "test"):
        rows = [{"dialog": [sentence() for _ in range(8)]} for _ in range(8)]
        file = tmp_path / "data" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    signs = ["<PAD>", "<EOS>", "<EOU>", *CHARACTERS, "。"]
    network = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<PAD>"))
    network.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    network.decoder = decoders.Fuse()
    network.add_special_tokens(signs[:3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=network, pad_token="<PAD>", eos_token="<EOS>")
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_positions=256, vocab_size=len(signs))
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=1, pad_token_id=0)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "data"), str(tmp_path / "model")


def test_an_evaluation_of_chinese_replies_says_which_words_it_counted(chinese, tmp_path, capsys):
    data, model = chinese
    kept, output = tmp_path / "model.jsonl", tmp_path / "metrics.json"
    settings = dict(data_path=data, output=str(output), bootstrap=20)
    eval_metrics.run_evaluation(eval_metrics.EvalConfig(model_path=model, replies=str(kept), **settings))
    head, *rows = [json.loads(line) for line in kept.read_text().splitlines()]
    human = tmp_path / "human.jsonl"
    human.write_text("\n".join(json.dumps(row) for row in [head, *(row | {"text": row["reply"]} for row in rows)]))
    eval_metrics.run_evaluation(eval_metrics.EvalConfig(model_path=str(human), baseline_path=str(kept), **settings))
    result = json.loads(output.read_text())
    assert result["settings"]["word_tokenizer"] == describe("unicode")
    for name in ("rouge1", "rouge2", "rougeL", "sacrebleu"):
        assert result["policy"][name] == pytest.approx(1) and 0 < result["baseline"][name] < 0.9
        low, high = result["difference"][name]["ci95"]
        assert 0 < low < high
    assert result["policy"]["meteor"] == pytest.approx(1 - 0.5 / 7**3)  # six characters and a stop
    counted = [len(row["reply"]) for row in rows]
    assert set(counted) == {7}
    distinct = len({sign for row in rows for sign in row["reply"]}) / sum(counted)
    assert result["policy"]["distinct1"] == pytest.approx(distinct)


def test_ppo_on_meteor_rewards_chinese_replies(chinese, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ppo_dialog.show_results", lambda run: None)  # the report takes longer than the run
    data, model = chinese
    settings = dict(data_path=data, model_path=model, run_dir=str(tmp_path), intent_coef=0.0, judge_samples=1)
    settings |= dict(total_time_steps=250, env_num=8, num_mini_batch=1, eval_limit=4, validation_limit=0)
    folder = train(PPOConfig(**settings, sample_interval=0))
    assert f"words of replies: {describe('unicode')}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) > 1 and all(row["meteor"] > 0.05 and row["score_std"] > 0 for row in rows)
    result = json.loads((folder / "eval.json").read_text())
    assert result["settings"]["word_tokenizer"] == describe("unicode")
    assert 0 < result["policy"]["meteor"] < 1 and result["policy"]["rouge1"] > 0
