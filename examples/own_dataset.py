"""Your own chats, a CSV without labels, from the file to a conversation: convert, supervised start, PPO, chat.

    python examples/own_dataset.py examples/chats.csv
    python examples/own_dataset.py my_chats.csv --model-path gpt2 --sft-lr 5e-5 --lr 1e-5 --output runs/mine

The CSV has a line for each message: conversation_id, speaker, text. Messages in a row from one speaker become one
utterance; each with two before it is a reply to learn. Further options go to ppo_dialog.py, such as your own --reward.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path


def convert(file: str, folder: Path) -> None:
    """A file for each split, a line of JSON for each chat: {"dialog": [utterances]} is all that is needed."""
    chats: dict[str, list[list[str]]] = {}  # of each chat, [speaker, text] of its utterances
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        if missing := {"conversation_id", "speaker", "text"} - set(rows.fieldnames or ()):
            sys.exit(f"'{file}' has no column {' and no '.join(sorted(missing))}; it has {rows.fieldnames}.")
        for row in rows:
            chat, text = chats.setdefault(row["conversation_id"], []), (row["text"] or "").strip()
            if text and chat and chat[-1][0] == row["speaker"]:
                chat[-1][1] += " " + text
            elif text:
                chat.append([row["speaker"], text])
    rows = [json.dumps({"dialog": [said for _, said in chat]}) + "\n" for chat in chats.values() if chat]
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    rest = [row for i, row in enumerate(rows) if i % 10 > 1]
    for split, part in dict(validation=rows[::10], test=rows[1::10], train=rest).items():
        (folder / f"{split}.jsonl").write_text("".join(part))


def run(command: str, *options: object) -> None:
    print("\n==", *(words := [*command.split(), *map(str, options)]), flush=True)
    if failed := subprocess.run([sys.executable, *words]).returncode:
        sys.exit(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("chats", help="the CSV")
    parser.add_argument("--model-path", default="builtin", help="causal LM to start from")
    parser.add_argument("--sft-lr", default="1e-3", help="supervised rate (1e-3 suits the built-in model)")
    parser.add_argument("--output", type=Path, help="folder for all that is made (runs/, then the CSV's name)")
    args, of_ppo = parser.parse_known_args()
    args.output = args.output or Path("runs") / Path(args.chats).stem
    convert(args.chats, data := args.output / "data")
    if not (start := args.output / "sft").exists():
        sft = "sft_dialog.py --context-utterances 2 --epochs 10 --eval-every 50 --resume --lr"
        run(sft, args.sft_lr, "--model-path", args.model_path, "--data-path", data, "--output-dir", start)
    ppo = "ppo_dialog.py --intent-coef 0 --meteor-coef 1 --total-time-steps 5000 --env-num 32 --experiment-name ppo"
    run(ppo, "--run-dir", args.output, "--model-path", start, "--data-path", data, *of_ppo)
    run("chat.py", args.output / "ppo", "--prompt", json.loads(open(data / "test.jsonl").readline())["dialog"][0])
