"""Your own chats, a CSV without labels, from the file to a conversation: convert, supervised model, PPO, chat.

    python examples/own_dataset.py my_chats.csv --model-path gpt2 --sft-lr 5e-5 --lr 1e-5 --output runs/mine

The CSV has a line for each message: conversation_id, speaker, text. Messages in a row from one speaker become one
utterance; each with two before it is a reply to learn. Further options go to ppo_dialog.py, as your own --reward."""

import argparse
import csv
import json
import subprocess
import sys
import zlib
from pathlib import Path


def convert(file: str, folder: Path) -> None:
    """A file for each split, a line of JSON for each chat: {"dialog": [utterances]} is all that is needed."""
    chats: dict[str, list[list[str]]] = {}  # of each chat, [speaker, text] of its utterances
    rows = csv.DictReader(open(file, newline="", encoding="utf-8-sig"))
    if missing := {"conversation_id", "speaker", "text"} - set(rows.fieldnames or ()):
        sys.exit(f"'{file}' has no column {' and no '.join(sorted(missing))}; it has {rows.fieldnames}.")
    for row in rows:
        chat, text = chats.setdefault(row["conversation_id"], []), (row["text"] or "").strip()
        if text and chat and chat[-1][0] == row["speaker"]:
            chat[-1][1] += " " + text
        elif text:
            chat.append([row["speaker"], text])
    rows = [json.dumps({"dialog": [said for _, said in chat]}) + "\n" for chat in chats.values() if chat]
    rows = sorted(set(rows), key=lambda row: zlib.crc32(row.encode()))  # copies once, in an order unlike the file's
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_ten in dict(validation=[0], test=[1], train=range(2, 10)).items():
        (folder / f"{split}.jsonl").write_text("".join(row for i, row in enumerate(rows) if i % 10 in of_ten))


def run(command: str, *options: object) -> None:
    print("\n==", *(words := [*command.split(), *map(str, options)]), flush=True)
    (failed := subprocess.run([sys.executable, *words]).returncode) and sys.exit(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("chats", help="the CSV")
    parser.add_argument("--model-path", default="builtin", help="causal LM to start from")
    parser.add_argument("--sft-lr", default="1e-3", help="supervised rate (1e-3 suits the built-in model)")
    parser.add_argument("--output", type=Path, help="folder for all that is made (runs/, then the CSV's name)")
    parser.add_argument("--run-dir", "--run_dir", type=Path, help="folder for PPO's run (--output)", dest="runs")
    parser.add_argument("--experiment-name", "--experiment_name", default="ppo", help="name of PPO's run", dest="name")
    args, of_ppo = parser.parse_known_args()
    Path(args.chats).is_file() or parser.exit(2, f"there is no file '{args.chats}'.\n")
    output = args.output or Path("runs") / Path(args.chats).stem
    convert(args.chats, data := output / "data")
    made_of = zlib.crc32(Path(args.chats).read_bytes() + repr((args.model_path, args.sft_lr)).encode())
    if not (start := output / f"sft-{made_of:08x}").exists():  # other chats get another start
        sft = "sft_dialog.py --template dialogue --context-utterances 2 --epochs 10 --eval-every 50 --resume --lr"
        run(sft, args.sft_lr, "--model-path", args.model_path, "--data-path", data, "--output-dir", start)
    ppo = "ppo_dialog.py --intent-coef 0 --meteor-coef 1 --total-time-steps 5000 --env-num 32 --experiment-name"
    run(ppo, args.name, "--run-dir", args.runs or output, "--model-path", start, "--data-path", data, *of_ppo)
    said = json.loads(next(open(data / "test.jsonl")))["dialog"]
    run("chat.py", Path(args.runs or output, args.name), "--prompt", said[0])
